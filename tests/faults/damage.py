"""Ways to damage a world."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Damage = Callable[[Path], object]
DEEP = "[" * 200_000
BOMB = "x: &x [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{n}: &{n} [*{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}]\n"
    for p, n in zip("xabcdefghi", "abcdefghij", strict=True)
)
HANG = "([a-z_.0-9]+)+X"
DROP = object()


def both(*damages: Damage) -> Damage:
    return lambda work: [damage(work) for damage in damages]


def write(file: str, content: str | bytes) -> Damage:
    def damage(work: Path) -> None:
        path = work / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def fields(files: str | Sequence[str], **changes: Any) -> Damage:
    """Change top-level fields of JSON files; `DROP` removes one."""

    def damage(work: Path) -> None:
        for file in [files] if isinstance(files, str) else files:
            content = json.loads((work / file).read_text())
            _set(content, changes)
            (work / file).write_text(json.dumps(content))

    return damage


def _set(content: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = content
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if value is DROP:
            inner.pop(last, None)
        else:
            inner[last] = value


def options(file: str, **changes: Any) -> Damage:
    """Change the fields of a YAML file; `__` stands between the keys of nested ones."""

    def damage(work: Path) -> None:
        import yaml

        content = yaml.safe_load((work / file).read_text())
        _set(content, changes)
        (work / file).write_text(yaml.safe_dump(content))

    return damage


def text(file: str, old: str, new: str) -> Damage:
    """Replace text of a file."""

    def damage(work: Path) -> None:
        before = (work / file).read_text()
        assert old in before, (file, old)
        (work / file).write_text(before.replace(old, new))

    return damage


def tensors(file: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the tensors of a safetensors file; `change` may return others."""

    def damage(work: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(work / file)
        state = change(state) or state
        state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
        save_file(state, work / file, metadata={"format": "pt"})

    return damage


def entry(file: str, name: str, value: float) -> Damage:
    """Set one entry of a tensor."""
    return tensors(file, lambda state: state[name].view(-1).__setitem__(3, value))


def raw_tensors(file: str, header: bytes, data: int = 0) -> Damage:
    return write(file, struct.pack("<Q", len(header)) + header + bytes(data))


def cut(file: str, size: int) -> Damage:
    """Keep the first bytes of a file; with a negative number, all but these last ones."""
    return lambda work: (work / file).write_bytes((work / file).read_bytes()[:size])


def remove(file: str) -> Damage:
    import shutil

    def damage(work: Path) -> None:
        path = work / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def folder(file: str) -> Damage:
    """Put a folder in the place of a file."""

    def damage(work: Path) -> None:
        (work / file).unlink(missing_ok=True)
        (work / file).mkdir()

    return damage


def link(file: str, target: str) -> Damage:
    def damage(work: Path) -> None:
        (work / file).unlink(missing_ok=True)
        (work / file).symlink_to(target)

    return damage


def pipe(file: str) -> Damage:
    """Put a named pipe, which nobody writes to, in the place of a file."""

    def damage(work: Path) -> None:
        import os

        (work / file).unlink(missing_ok=True)
        os.mkfifo(work / file)

    return damage


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, work: Path) -> None:
        self.command = f"touch {work.parent}/PWNED"

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


def checkpoint(file: str, change: Callable[[dict[str, Any], Path], object]) -> Damage:
    """Change the content of a torch file."""

    def damage(work: Path) -> None:
        import torch

        content = torch.load(work / file, weights_only=True)
        changed = change(content, work)
        torch.save(content if changed is None else changed, work / file)

    return damage


def damaged_json(file: str) -> dict[str, Damage]:
    """Return the ways in which a JSON file can be broken as a file."""
    return {
        "empty": write(file, ""),
        "cut-off": cut(file, 20),
        "binary": write(file, bytes(range(256)) * 4),
        "utf-16": lambda work: (work / file).write_bytes((work / file).read_text().encode("utf16")),
        "a-list": write(file, "[1, 2]"),
        "a-number": write(file, "7"),
        "null": write(file, "null"),
        "deep": write(file, DEEP),
        "long-number": write(file, '{"vocab_size": ' + "9" * 5000 + "}"),
        "a-folder": folder(file),
        "a-pipe": pipe(file),
        "a-link-to-itself": link(file, Path(file).name),
    }
