"""Files that must not change while they are in use."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gradmerge.common.errors import SourceError
from gradmerge.common.faults import add_reason

_HEAD = 1 << 16


@dataclass(frozen=True)
class FileState:
    """A file as it was when it was opened; a mapping of it shows what it holds now."""

    path: Path
    size: int
    changed: int
    """Time of the last change, in nanoseconds."""
    inode: int
    touched: int
    """Time of the last change of the file or of its permissions and links, which cannot be set."""
    head: str
    """SHA-256 of its first bytes, in which a safetensors file describes its tensors."""

    @classmethod
    def of(cls, path: Path) -> FileState | None:
        """Return the present state of a file; None if there is none, or it cannot be read."""
        try:
            now = os.stat(path)
            head = _head(path)
        except OSError:
            return None
        return cls(path, now.st_size, now.st_mtime_ns, now.st_ino, now.st_ctime_ns, head)

    def difference(self) -> str | None:
        """Return in words how the file differs from what it was, or None; takes microseconds."""
        try:
            now = os.stat(self.path)
            if now.st_size != self.size:
                return f"its size was {self.size} bytes and is {now.st_size}"
            if now.st_ino != self.inode:
                return "another file has taken its place"
            written = now.st_mtime_ns != self.changed
            # another link or permission is no difference
            if written or (now.st_ctime_ns != self.touched and _head(self.path) != self.head):
                return "it was written to"
        except OSError:
            return "it is gone"
        return None


def _head(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(_HEAD)).hexdigest()


_opened: dict[Path, FileState] = {}  # the latest state of each file, to explain a crash


def states_of(paths: Iterable[Path]) -> tuple[FileState, ...]:
    """Return the present states of the files that exist."""
    found = tuple(state for path in paths if (state := FileState.of(path)) is not None)
    _opened.update((state.path, state) for state in found)
    return found


def _cut_off() -> str:
    """Return in words which opened files have become shorter."""
    found = []
    for state in _opened.values():
        with suppress(OSError):
            if os.stat(state.path).st_size < state.size:
                found.append(f"{state.path}: {state.difference()}")
    return "; ".join(found[:5])


add_reason(_cut_off)


def require_unchanged(states: Iterable[FileState]) -> None:
    """Reject files that have changed since they were opened; costs microseconds per file.

    Raises:
        SourceError: some have changed; the message names them.
    """
    changed = [(state, why) for state in states if (why := state.difference()) is not None]
    if changed:
        listed = "; ".join(f"{state.path}: {why}" for state, why in changed[:5])
        raise SourceError(
            f"files of the sources changed while they were used. {listed}.\n"
            "What is computed from both states belongs to neither, so nothing is written from here "
            "on; checkpoints of before the change stay.\n"
            "Restore the files and resume, or start again with the new ones."
        )


def require_files(paths: Iterable[Path]) -> None:
    """Reject anything but a file in the place of one.

    Raises:
        SourceError: it is a folder, a pipe, a device or a link to nothing.
    """
    for path in paths:
        if os.path.lexists(path) and not path.is_file():
            raise SourceError(
                f"{path}: expected a file, got a folder, a pipe, a device or a link to nothing. It "
                "would be taken for missing; remove it, or copy or download the file again."
            )


def hashes_of(groups: Iterable[Sequence[Path]]) -> dict[str, str]:
    """Return the SHA-256 of each file by name; names in later groups have its number in front."""
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in _named(groups)}


def _named(groups: Iterable[Sequence[Path]]) -> Iterator[tuple[str, Path]]:
    for number, files in enumerate(groups):
        for file in files:
            yield (f"{number}:{file.name}" if number else file.name), file
