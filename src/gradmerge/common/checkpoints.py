"""The one door by which checkpoints come in: local files, read as plain data, never unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gradmerge.common.errors import ConfigError

# What a checkpoint of a fit holds, by the types that gradmerge and Lightning rely on.
_PARTS: dict[str, type] = {
    "gradmerge": dict,
    "hyper_parameters": dict,
    "state_dict": dict,
    "pytorch-lightning_version": str,
    "callbacks": dict,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
}
_NEEDED = ("state_dict", "pytorch-lightning_version")
_PLAIN = ("gradmerge", "hyper_parameters", "callbacks", "loops")
# Bounds of plain data, which a reference of a list to itself exceeds.
_DEPTH, _COUNT = 100, 1_000_000


def is_address(path: str | os.PathLike[str]) -> bool:
    """Return True for what `fsspec` takes for an address, such as `s3://...` or `file://...`."""
    return re.match(r"[\w+.-]+:(//|:)", os.fspath(path)) is not None


def local_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return the path of a checkpoint file.

    Raises:
        ConfigError: it is an address, a folder or missing.
    """
    found = Path(path).expanduser()
    if found.is_file():
        return found
    if is_address(path):
        raise ConfigError(
            f"{os.fspath(path)}: expected a checkpoint as a local file, got an address, which is "
            "not opened. Download the file first, and give its path."
        )
    if found.is_dir():
        raise ConfigError(
            f"{path}: expected a checkpoint in one file (*.ckpt), got a folder. Shards of a "
            "distributed checkpoint are not loaded, because reading them can run code."
        )
    raise ConfigError(f"{path}: no such checkpoint.")


def load_checkpoint(
    path: str | os.PathLike[str] | IO[bytes], map_location: Any = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """Load a checkpoint of `gradmerge fit` as plain data and tensors; code in it never runs.

    Args:
        path: local file, or an open one.
        map_location: device of its tensors.
        mmap: map the tensors instead of reading them, to look at the rest.

    Raises:
        ConfigError: an address, a folder, another kind of file, a damaged one, or one that holds
            objects other than plain data and tensors.
    """
    file = path if hasattr(path, "read") else local_checkpoint(path)
    import torch  # not to say that there is no such file

    try:
        found = torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # damaged and hostile files raise many kinds
        # optimisers of other packages may keep their state in classes of their own
        foreign = re.search(
            r"(?:global: |unsupported )GLOBAL ((?!torch\.|__main__)\S+)", str(error)
        )
        if foreign:
            raise ConfigError(
                f"{path} holds an object of {foreign[1]}, which is not loaded because "
                "unpickling can run code.\nIf it belongs to an optimiser, export at the end of the "
                "fit (ExportAtEnd), or set save_weights_only: true of ModelCheckpoint."
            ) from error
        raise ConfigError(
            f"{path} cannot be read: expected a checkpoint of `gradmerge fit` (*.ckpt), got "
            "a truncated file or another format."
        ) from error
    _require_parts(path, found)
    return found


def _require_parts(path: Any, found: Any) -> None:
    if not isinstance(found, dict) or not {"gradmerge", "hyper_parameters"} <= found.keys():
        raise ConfigError(
            f"{path}: expected a checkpoint of `gradmerge fit`, got one without gradmerge "
            "coefficients."
        )
    wrong = [f"no {name}" for name in _NEEDED if name not in found]
    wrong += [
        f"{name} of type {type(found[name]).__name__} (expected {kind.__name__})"
        for name, kind in _PARTS.items()
        if name in found and not isinstance(found[name], kind)
    ]
    try:
        for name in _PLAIN:
            remote = [text for text in _texts(found.get(name)) if is_address(text)]
            # names of files that callbacks would remove or restore
            wrong += [f"the address {text!r} in {name}" for text in remote if name == "callbacks"]
    except RecursionError as error:
        wrong.append(str(error))
    if wrong:
        raise ConfigError(f"{path} is damaged or was changed: it has {', '.join(wrong[:5])}.")


def _texts(plain: Any) -> Iterator[str]:
    """Yield all texts of nested plain data.

    Raises:
        RecursionError: they are nested without end.
    """
    waiting, count = [(plain, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if depth > _DEPTH or count > _COUNT:
            raise RecursionError("entries nested without end")
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += [(inner, depth + 1) for pair in item.items() for inner in pair]
        elif isinstance(item, (list, tuple)):
            waiting += [(inner, depth + 1) for inner in item]
