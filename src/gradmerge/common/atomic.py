"""Files that exist completely or not at all, and temporary folders that no kill leaves for good.

What is at work is locked (`flock`). The system releases the lock when the process dies, whatever
its number is and in whatever container it ran, so the next run can tell what was left from what is
in use. A lock may not reach another machine that shares the folder: what another kernel made must
also be a day old. The name of everything at work tells the kernel.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from gradmerge.common.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so nothing counts as left until it is a day old
    fcntl = None  # type: ignore[assignment]

_DAY = 24 * 3600
_LONGEST = 180  # bytes of a target's name within a hidden one; file systems allow 255 in all
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# As libraries word it that report a failed write as an error of their own.
_FULL_TEXT = re.compile(r"No space left|File too large|quota exceeded|os error (28|27|122)\b", re.I)


# ---- what is at work -----------------------------------------------------------------------------


@cache
def kernel() -> str:
    """Identify the running kernel, which all containers of a machine share."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
    except OSError:
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def hidden_name(target: Path, state: str) -> Path:
    """Return a new hidden name beside the target, `.NAME.KERNEL.ID.state`."""
    return target.with_name(f".{_stem(target.name)}.{kernel()}.{uuid.uuid4().hex[:12]}.{state}")


def hidden_names(target: Path, *states: str) -> list[Path]:
    """Return the paths beside the target that `hidden_name` made, also by earlier versions."""
    ours = re.compile(
        rf"\.{re.escape(_stem(target.name))}\.[0-9a-f]{{8}}\.(?:\d+\.)?[^.]+\.(?:{'|'.join(states)})"
    )
    try:
        return [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]
    except OSError:  # no such folder yet
        return []


def _stem(name: str) -> str:
    raw = os.fsencode(name)
    return name if len(raw) <= _LONGEST else hashlib.sha256(raw).hexdigest()[:16]


@contextmanager
def lock(path: Path) -> Iterator[bool | None]:
    """Lock a file or folder; give True, False if another process has it, or None if in doubt."""
    descriptor, held = -1, None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # someone who took it for a remnant may have removed it just before
        held = True if os.path.samestat(os.fstat(descriptor), os.lstat(path)) else None
    except BlockingIOError:
        held = False
    except (OSError, AttributeError):  # gone, not ours, or a file system without locks
        pass
    try:
        yield held
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def is_left(path: Path, held: bool | None) -> bool:
    """Return whether the process at work on a path is dead, given what `lock` gave."""
    return held is not False and (bool(held and f".{kernel()}." in path.name) or _is_old(path))


def locked(make: Callable[[], Path]) -> tuple[ExitStack, Path]:
    """Make a folder that is locked until the stack is closed."""
    while True:
        path, stack = make(), ExitStack()
        held = stack.enter_context(lock(path))
        if held or (held is None and path.is_dir()):
            return stack, path
        stack.close()  # taken for a remnant, before it was locked


def _is_old(path: Path) -> bool:
    """Return whether nothing in a path has changed for a day."""
    try:
        times = [path.lstat().st_mtime, *(inner.lstat().st_mtime for inner in path.rglob("*"))]
    except OSError:  # changing now
        return False
    return time.time() - max(times) > _DAY


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it exists."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


# ---- temporary folders ---------------------------------------------------------------------------


class Scratch:
    """A temporary folder, removed with this object; making one removes those of killed runs.

    Args:
        kind: a word that its name says.
        root: folder to make it in; default: `TMPDIR`.

    Raises:
        OutputError: it cannot be made.
    """

    def __init__(self, kind: str, root: Path | None = None) -> None:
        root = root or Path(tempfile.gettempdir())
        for path in root.glob(f"gradmerge-{kind}.*.scratch"):
            with lock(path) as held:
                if is_left(path, held):
                    remove(path)

        def make() -> Path:
            prefix = f"gradmerge-{kind}.{kernel()}."
            return Path(tempfile.mkdtemp(".scratch", prefix, root))

        with writing(root, "Set TMPDIR to another folder."):
            stack, self.path = locked(make)
        self.close = weakref.finalize(self, _release, stack, self.path, os.getpid())
        """Remove the folder now."""

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def _release(stack: ExitStack, path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a fork of the process that made it
        remove(path)
    stack.close()


# ---- files ---------------------------------------------------------------------------------------


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; what is there in the end takes the name `path`, on the disk.

    Until then it has no name where the system can do that (Linux), so that no kill leaves it; else
    it has a hidden one beside `path`.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
    """
    with writing(path, f"The earlier {path.name} is as it was." if path.exists() else ""):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in hidden_names(path, "partial"):
            with lock(left) as held:
                if is_left(left, held):
                    remove(left)
        work, descriptor = hidden_name(path, "partial"), nameless(path.parent)
        try:
            if descriptor is None:
                work.touch()
                with lock(work):
                    yield work
                    _sync(work)
                    work.replace(path)
            else:
                yield Path(f"/proc/self/fd/{descriptor}")
                os.fsync(descriptor)
                # given a folder's descriptor, `os.link` follows the link to the file
                os.link(f"/proc/self/fd/{descriptor}", work, src_dir_fd=descriptor)
                work.replace(path)
        finally:
            work.unlink(missing_ok=True)
            if descriptor is not None:
                os.close(descriptor)


def nameless(folder: Path) -> int | None:
    """Open a new file without a name, or return None where the system cannot."""
    try:
        descriptor = os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o666)
    except (OSError, AttributeError):
        return None
    if os.path.exists(f"/proc/self/fd/{descriptor}"):
        return descriptor
    os.close(descriptor)
    return None


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def writing(path: Path, kept: str = "") -> Iterator[None]:
    """Turn a full disk, and a path that cannot be written, into an error that names the path.

    Args:
        path: what is written.
        kept: sentence on what is kept, or what to do.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:  # libraries raise errors of their own
        reason = _why(error, path)
        if reason is None:
            raise
        raise OutputError(f"{path}: cannot be written: {reason}. {kept}".rstrip()) from error


def _why(error: Exception, path: Path) -> str | None:
    """Return why a path could not be written; None if the error is about something else."""
    if is_full(error):
        free = shutil.disk_usage(existing(path)).free
        return f"the disk is full ({_size(free)} free), or a quota or limit is reached"
    if not isinstance(error, OSError) or error.filename is None:
        return None
    path = path.absolute()
    work = f".{_stem(path.name)}.{kernel()}."
    for name in (error.filename, error.filename2):
        if isinstance(name, (str, bytes)):
            found = Path(os.fsdecode(name)).absolute()
            ours = path.parent / next(iter(found.parts[len(path.parent.parts) :]), "")
            if path in (found, *found.parents) or found in path.parents or work in ours.name:
                return f"{error.strerror} ({found})"
    return None


def is_full(error: BaseException) -> bool:
    """Return whether a full disk, a quota or a limit of size is behind an error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return True
        if isinstance(cause, Exception) and _FULL_TEXT.search(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def require_space(path: Path, size: int, what: str, remedy: str = "") -> None:
    """Reject a place with less free space than will be written.

    Args:
        path: what will be written, which need not exist.
        size: bytes.
        what: what they are, in words.
        remedy: sentence on what to do.

    Raises:
        OutputError: there is less.
    """
    usage = shutil.disk_usage(existing(path))
    if usage.total and usage.free < size:
        raise OutputError(
            f"{path}: expected {_size(size)} of free space for {what}, got {_size(usage.free)}. "
            f"{remedy or 'Free some, or give another folder.'}"
        )


def _size(size: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
