"""Folders that take their name only when complete, and what killed runs left beside it.

Work is done in a hidden folder beside the target, `.NAME.WHERE.PID.SERIAL.partial`. Where the file
system can exchange two names at once (Linux: `renameat2`), the target is always the old folder or
the new one. Elsewhere the old one stands aside as `....old` between two renames; a run that is
killed there leaves it for the next export to that name, which puts it back.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import os
import re
import shutil
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Literal

from gradmerge.errors import ConfigError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_serial = itertools.count()


def refuse_existing(target: Path, overwrite: bool, remedy: str = "--overwrite true") -> None:
    """Stop before any work if the target would be overwritten unasked.

    What dead runs left of the target is put right first: their old folder may be the target.

    Args:
        target: what would be written.
        overwrite: whether that was asked for.
        remedy: how it is asked for.

    Raises:
        ConfigError: it exists.
    """
    recover(target)
    try:
        mode = target.stat().st_mode  # one look: another export may move it between two
    except OSError:
        return
    if not overwrite:
        raise ConfigError(f"{target} exists; give another folder, or {remedy}.")
    if not stat.S_ISDIR(mode):
        raise ConfigError(f"{target} is a file; give a folder.")


def start_beside(target: Path) -> Path:
    """A new empty folder beside the target, for the work of this process."""
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        work = _hidden(target, "partial")
        with suppress(FileExistsError):  # of an earlier process with our number
            work.mkdir()
            return work


def take_name(work: Path, target: Path, overwrite: bool) -> None:
    """Give the complete folder its name; what had the name is removed only afterwards.

    Raises:
        ConfigError: the name is taken and not to be overwritten.
    """
    for path in work.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    replaced: list[Path] = []
    try:
        while not _renamed(work, target):
            refuse_existing(target, overwrite)
            if _exchanged(work, target):
                replaced.append(work)
                break
            old = _hidden(target, "old")
            with suppress(FileNotFoundError):  # another export has just put it aside
                target.rename(old)
                replaced.append(old)
    except BaseException:
        if replaced and not os.path.lexists(target):
            replaced.pop().rename(target)
        raise
    finally:
        for path in replaced:
            discard(path, target)


def recover(target: Path) -> None:
    """Put back an old folder that lost its name to a dead run, and remove what dead runs left.

    Only names of our own scheme count, of processes of this machine that are gone: exports that
    are under way, here or on another machine with the same disk, are left alone.
    """
    left = _left_by_the_dead(target)
    for path in left["old"]:
        if not os.path.lexists(target):
            with suppress(OSError):  # another process was faster
                path.rename(target)
    for path in (*left["old"], *left["partial"]):
        discard(path, target)


def discard(path: Path, target: Path) -> None:
    """Remove a folder beside the target; half of it is never taken for a whole one."""
    if path.name.endswith(".old"):
        rest = _hidden(target, "partial")
        try:
            path.rename(rest)
        except OSError:  # gone
            return
        path = rest
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _hidden(target: Path, state: Literal["partial", "old"]) -> Path:
    name = f".{target.name}.{_where()}.{os.getpid()}.{next(_serial)}.{state}"
    return target.parent / name


def _where() -> str:
    """What process numbers belong to: the host, and on Linux the namespace (containers)."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    key = f"{socket.gethostname()} {namespace}".encode()
    return hashlib.sha1(key, usedforsecurity=False).hexdigest()[:8]


def _left_by_the_dead(target: Path) -> dict[str, list[Path]]:
    """Hidden folders of the target by state, newest first."""
    left: dict[str, list[Path]] = {"old": [], "partial": []}
    pattern = re.compile(
        rf"\.{re.escape(target.name)}\.{_where()}\.(?P<pid>[1-9]\d*)\.\d+\.(?P<state>partial|old)"
    )
    try:
        beside = list(target.parent.iterdir())
    except OSError:  # there is no such folder yet, and so nothing in it
        return left
    for path in beside:
        match = pattern.fullmatch(path.name)
        if match and not _is_alive(int(match["pid"])):
            left[match["state"]].append(path)
    for paths in left.values():
        paths.sort(key=_changed, reverse=True)
    return left


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_ctime
    except OSError:
        return 0.0


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; when in doubt, it does."""
    if os.name != "posix":  # elsewhere signal 0 is a signal like others
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def _renamed(work: Path, target: Path) -> bool:
    """Take a name that is free; False if it is taken."""
    if os.path.lexists(target):
        return False
    try:
        work.rename(target)
    except OSError as error:
        # taken since just now; by the time of another look it may be free again
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY) or os.path.lexists(target):
            return False
        raise
    return True


def _exchanged(first: Path, second: Path) -> bool:
    """Exchange two names at once; False where this system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    number, text = ctypes.c_int, ctypes.c_char_p
    rename.argtypes = (number, text, number, text, ctypes.c_uint)
    names = os.fsencode(first), os.fsencode(second)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
