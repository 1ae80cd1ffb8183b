"""What a driver has done so far, on disk as plain data, so that a killed run goes on.

    <root>/driver/job.json                what the job is: its configuration, fingerprints
    <root>/driver/steps/<name>/step.json  a finished step: what it was, and what it gave

Each file is written whole or not at all. Nothing is ever deleted: a job that begins anew moves the
folder of the earlier one aside.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradmerge.errors import ConfigError, shorten

JOB, STEP, STATE = "job.json", "step.json", "last.ckpt"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with work.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    work.replace(path)


def read_json(path: Path, **fields: type | tuple[type, ...]) -> dict[str, Any] | None:
    """The content of a file, or None where there is none.

    Args:
        path: of the file.
        **fields: what it must hold, and of which types.

    Raises:
        ConfigError: it is damaged, or no such record.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _no_record(path, f"something else ({error})") from error
    if not isinstance(found, dict):
        raise _no_record(path, type(found).__name__)
    for name, types in fields.items():
        if name not in found:
            raise _no_record(path, f"one without `{name}`")
        if not isinstance(found[name], types):
            raise _no_record(path, f"`{name}` of type {type(found[name]).__name__}")
    return found


def _no_record(path: Path, came: str) -> ConfigError:
    return ConfigError(
        f"{path}: expected the record of a driver, by which a job that was killed goes on, came "
        f"{came}: it was changed or damaged. Put it back, give another folder "
        "(--trainer.default_root_dir), or begin anew: --driver.restart true (the folder is moved "
        "aside, nothing is deleted)."
    )


def digest(content: Any) -> str:
    """SHA-256 of plain data."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(kept: Any, came: Any, place: str = "") -> Iterator[str]:
    """Where two pieces of plain data differ, one line each."""
    if isinstance(kept, Mapping) and isinstance(came, Mapping):
        for key in [*kept, *(key for key in came if key not in kept)]:
            inner = f"{place}.{key}" if place else str(key)
            yield from differences(kept.get(key), came.get(key), inner)
    elif isinstance(kept, list) and isinstance(came, list) and len(kept) == len(came):
        for i, (first, second) in enumerate(zip(kept, came, strict=True)):
            yield from differences(first, second, f"{place}[{i}]")
    elif kept != came:
        yield f"{place}: was {_short(kept)}, is {_short(came)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain(content: Any) -> Any:
    """As it comes back from a file: tuples become lists, keys become text."""
    return json.loads(json.dumps(content))


@dataclass(frozen=True)
class StepRecord:
    """One step of a driver: a folder, and its record once it is finished."""

    folder: Path
    """Where the step keeps its checkpoint, logs and result."""
    content: dict[str, Any]
    """What the step is, as plain data."""

    @property
    def checkpoint(self) -> Path:
        """Where the running step keeps its last state."""
        return self.folder / STATE

    @property
    def result(self) -> dict[str, Any] | None:
        """What the step gave, as plain data; None while it is not finished.

        Raises:
            ConfigError: the record is of another step, or damaged.
        """
        found = read_json(self.folder / STEP, step=dict, result=dict)
        if found is None:
            return None
        require_same(self.folder / STEP, found["step"], self.content)
        result: dict[str, Any] = found["result"]
        return result

    def finish(self, result: Mapping[str, Any]) -> None:
        """Record that the step is finished; call it once its files are complete."""
        content = {"step": self.content, "sha256": digest(self.content), "result": dict(result)}
        write_json(self.folder / STEP, content)


def require_same(path: Path, kept: Any, came: Any) -> None:
    """Refuse to go on with what was begun differently.

    Raises:
        ConfigError: what differs.
    """
    found = list(differences(kept, plain(came)))
    if found:
        raise ConfigError(
            f"{path.parent} holds another job, which this one must not go on with: "
            f"{shorten(found, 6)}. Run the command that began it, give another folder "
            "(--trainer.default_root_dir), or begin anew: --driver.restart true (the folder is "
            "moved aside, nothing is deleted)."
        )


def has_states(folder: Path) -> bool:
    """Whether any step of the job in this folder is finished, or has a state to go on from."""
    steps = folder / "steps"
    return any(path.is_file() for name in (STEP, STATE) for path in steps.glob(f"*/{name}"))


def set_aside(folder: Path) -> Path | None:
    """Give a folder another name, the first that is free; None where there is no such folder."""
    if not folder.exists():
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside
