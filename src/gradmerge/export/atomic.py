"""Folders that get their name only when complete.

The content is written into a hidden folder beside the target, `.NAME.HOST.PID.ID.partial`. If the
file system can exchange two names atomically (Linux: `renameat2`), the target is always the old
folder or the new one. Elsewhere the old one is renamed to `....old` first; if the run is killed
before the second rename, the next export to that name restores it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from gradmerge.common.errors import ConfigError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden folder beside the target, which becomes the target on success.

    On an error it is removed, and the target is as it was before.
    """
    refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = _hidden(target, "partial")
    work.mkdir()
    try:
        yield work
        _take_name(work, target, overwrite)
    finally:
        _put_away(work, target)


def refuse_existing(target: Path, overwrite: bool, remedy: str = "--overwrite true") -> None:
    """Reject a target that exists, or with `overwrite` is not a folder, before any work.

    First restores or removes what killed runs left: their old folder may be the target. `remedy` is
    the option that allows to overwrite.
    """
    _recover(target)
    try:
        mode = target.stat().st_mode  # once: another export may move it in between
    except OSError:
        return
    if not overwrite:
        raise ConfigError(f"{target} exists; give another folder, or {remedy}.")
    if not stat.S_ISDIR(mode):
        raise ConfigError(f"{target} is a file; give a folder.")


def _take_name(work: Path, target: Path, overwrite: bool) -> None:
    """Rename a complete folder to the target, and only then remove an old target."""
    for path in work.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    while not _renamed(work, target):
        refuse_existing(target, overwrite)
        if _exchanged(work, target):
            return  # `work` is the old target now
        old = _hidden(target, "old")
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
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def _recover(target: Path) -> None:
    """Put away what killed runs of this machine left; other runs may still be at work."""
    name = re.escape(target.name)
    ours = re.compile(rf"\.{name}\.{_host()}\.(?P<pid>\d+)\.[^.]+\.(?:partial|old)")
    with suppress(OSError):  # no parent folder yet
        for path in list(target.parent.iterdir()):
            match = ours.fullmatch(path.name)
            if match and not _is_alive(int(match["pid"])):
                _put_away(path, target)


def _hidden(target: Path, state: Literal["partial", "old"]) -> Path:
    name = f".{target.name}.{_host()}.{os.getpid()}.{uuid.uuid4().hex}.{state}"
    return target.parent / name


def _host() -> str:
    """Identify the space of process numbers: host, and on Linux the namespace (containers)."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    key = f"{socket.gethostname()} {namespace}".encode()
    return hashlib.sha1(key, usedforsecurity=False).hexdigest()[:8]


def _is_alive(pid: int) -> bool:
    """Return whether a process of this machine runs; if in doubt, it does."""
    if os.name == "posix":  # elsewhere signal 0 does something
        try:
            os.kill(pid, 0)
        except (OSError, OverflowError) as error:
            return not isinstance(error, ProcessLookupError)
    return True


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
