"""Files that must not change while they are in use."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradmerge.common.errors import SourceError
from gradmerge.common.faults import add_reason

# Modelling code (`*.py`) is downloaded, but never run unless the recipe trusts it.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
# About sampling, the weights, their training, or one checkpoint: nothing that coefficients are of.
_ABOUT = (
    "*.index.json",
    "*_results.json",
    "generation_config.json",
    "provenance.json",
    "tokens.json",
    "trainer_state.json",
)


@dataclass(frozen=True)
class FileState:
    """A file as it was when it was opened; a mapping of it shows what it holds now."""

    path: Path
    size: int
    changed: int
    """Time of the last change, in nanoseconds."""
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileState | None:
        """Return the present state of a file; None if there is none."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        return cls(path, found.st_size, found.st_mtime_ns, found.st_ino)

    def difference(self) -> str | None:
        """Return in words how the file differs from what it was, or None."""
        now = FileState.of(self.path)
        if now == self:
            return None
        if now is None:
            return "it is gone"
        if now.size != self.size:
            return f"its size was {self.size} bytes and is {now.size}"
        if now.inode != self.inode:
            return "another file has taken its place"
        return "it was written to"


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
        now = FileState.of(state.path)
        if now is not None and now.size < state.size:
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


def side_files(folder: Path) -> list[Path]:
    """Return the config, tokenizer and adapter settings of a folder, and its modelling code."""
    return [
        file
        for file in sorted(folder.iterdir())
        if any(map(file.match, SMALL_FILES)) and not any(map(file.match, _ABOUT)) and file.is_file()
    ]


def hashes_of(groups: Iterable[Sequence[Path]]) -> dict[str, str]:
    """Return the SHA-256 of each file by name; names in later groups have its number in front."""
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in _named(groups)}


def _named(groups: Iterable[Sequence[Path]]) -> Iterator[tuple[str, Path]]:
    for number, files in enumerate(groups):
        for file in files:
            yield (f"{number}:{file.name}" if number else file.name), file
