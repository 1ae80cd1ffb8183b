"""Folders that get their name only when complete.

The content is written into a hidden folder beside the target, `.NAME.KERNEL.ID.partial`. If the
file system can exchange two names atomically (Linux: `renameat2`), the target is always the old
folder or the new one. Elsewhere the old one is renamed to `....old` first; if the run is killed
before the second rename, the next export to that name restores it.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from gradmerge.common.atomic import (
    hidden_name,
    hidden_names,
    is_left,
    lock,
    locked,
    remove,
    require_space,
    writing,
)
from gradmerge.common.output import paths_in, require_output, write_manifest
from gradmerge.engine.plan import Plan

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def new_folder(target: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a hidden folder beside the target, which becomes the target on success.

    On an error it is removed, and the target is as it was before. Arguments as in
    `refuse_existing`.
    """
    inputs = list(inputs)
    refuse_existing(target, overwrite, inputs)

    def make() -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = hidden_name(target, "partial")
        work.mkdir()
        return work

    kept = f"{target} is as it was." if os.path.lexists(target) else "Nothing is left there."
    with writing(target, f"{kept} Free some space, or give another folder."):
        stack, work = locked(make)
        with stack:
            try:
                yield work
                write_manifest(work)
                _take_name(work, target, overwrite, inputs)
            finally:
                _put_away(work, target)


def refuse_existing(
    target: Path,
    overwrite: bool,
    inputs: Iterable[Path] = (),
    remedy: str = "--overwrite true",
) -> None:
    """Reject a target that cannot be written or would take something away, before any work.

    First restores or removes what killed runs left: their old folder may be the target. Arguments
    and errors as in `gradmerge.common.output.require_output`.
    """
    with suppress(ValueError):  # a path that is refused below
        _recover(target)
    require_output(target, overwrite, inputs, remedy)


def inputs_of(plan: Plan) -> list[Path]:
    """Return the files and folders that a merge reads, of its recipe and of its weights."""
    opened = [*plan.serving.values(), *([] if plan.base is None else [plan.base])]
    parts = [part for checkpoint in opened for part in checkpoint.parts]
    files = {info.file for part in parts for info in part.infos.values()}
    return [*plan.recipe.inputs, *paths_in(sorted(files))]


def require_room(target: Path, plan: Plan, dtype: torch.dtype | None = None) -> None:
    """Reject a place without space for a merged model, estimated from the headers of its tensors.

    Raises:
        OutputError: there is too little.
    """
    infos = [plan.reference.infos[name] for name in plan.tensors]
    size = sum(math.prod(i.shape) * (dtype or i.dtype).itemsize for i in infos)
    heads = plan.serving.values() if plan.private else ()
    own = [head.infos[name] for head in heads for name in plan.private if name in head.infos]
    own += [plan.reference.infos[name] for name in plan.ranks for _ in plan.serving]
    size += sum(math.prod(i.shape) * (dtype or i.dtype).itemsize for i in own)
    require_space(target, size, "the merged model")


def _take_name(work: Path, target: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Rename a complete folder to the target, and only then remove an old target."""
    for path in work.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    while not _renamed(work, target):
        refuse_existing(target, overwrite, inputs)
        if _exchanged(work, target):
            return  # `work` is the old target now
        old = hidden_name(target, "old")
        with lock(target):  # or another run would give it its name back
            try:
                with suppress(FileNotFoundError):  # another export has just moved it
                    target.rename(old)
                if _renamed(work, target):
                    return
            finally:
                _put_away(old, target)


def _put_away(path: Path, target: Path) -> None:
    """Give an old folder its name back if that is free; remove any other, if it exists."""
    with suppress(OSError):  # gone
        if path.suffix == ".old":
            if _renamed(path, target):
                return
            # half of a removed folder must never be restored
            path = path.rename(path.with_suffix(".partial"))
        remove(path)


def _recover(target: Path) -> None:
    """Put away what killed runs left; other runs may still be at work."""
    for path in hidden_names(target, "partial", "old"):
        with lock(path) as held:
            if is_left(path, held) or (held and path.suffix == ".old"):
                _put_away(path, target)


def _renamed(path: Path, target: Path) -> bool:
    """Rename a folder to a free name; return False if the name is taken."""
    if os.path.lexists(target):
        return False
    try:
        path.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # taken just now
            return False
        raise
    return True


def _exchanged(first: Path, second: Path) -> bool:
    """Exchange two names atomically; return False if the system or file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
