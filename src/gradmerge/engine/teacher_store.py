"""Outputs of sources on examples, kept on disk: each example runs through its source once.

A SQLite file holds one entry per example, written in transactions, so several processes may share
it and one that is killed leaves no partial entry. Entries are in safetensors' format: nothing is
unpickled.
"""

from __future__ import annotations

import sqlite3
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gradmerge.common.errors import ConfigError

FILE = "teacher.sqlite3"
_PAGE = 4096
_WAIT = 30.0
"""Seconds that a process waits for another that writes."""
Entry = dict[str, Tensor]


class TeacherStore:
    """Tensors by key, in a file that stops growing at a limit.

    Once the file has reached the limit, entries are read but none is added or replaced. Dropping
    the least recently used would drop every entry before its next use, as epochs pass over all
    examples in turn.

    Args:
        gigabytes: size that the file does not exceed.
        folder: its folder, which several processes and later runs may share; on a local disk.
            Default: a temporary folder of this process.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(self, gigabytes: float, folder: str | Path | None = None) -> None:
        self.gigabytes, self.folder = gigabytes, folder
        self.is_full = False
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._open: sqlite3.Connection | None = None
        if folder is not None:
            self._connection()  # fails before anything slow

    def __getstate__(self) -> dict[str, Any]:
        """Copy the settings; a copy opens the file anew."""
        return {**self.__dict__, "_open": None, "_temporary": None}

    @property
    def path(self) -> Path:
        """The file."""
        if self.folder is not None:
            return Path(self.folder).expanduser() / FILE
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="gradmerge-teacher-")
        return Path(self._temporary.name) / FILE

    @property
    def _pages(self) -> int:
        return max(8, int(self.gigabytes * 1e9) // _PAGE)  # the empty file takes three

    def read(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Return the entry of each key, on the CPU; None if there is none."""
        query = "SELECT value FROM entries WHERE key = ?"
        try:
            rows = [self._connection().execute(query, (key,)).fetchone() for key in keys]
            return [None if row is None else safetensors.torch.load(row[0]) for row in rows]
        except (sqlite3.Error, SafetensorError) as error:
            raise self._failed(error) from error

    def write(self, entries: Mapping[bytes, Mapping[str, Tensor]]) -> None:
        """Add entries, unless the file is full; those of known keys are the same already."""
        if self.is_full:
            return
        rows = [
            (key, safetensors.torch.save({n: t.cpu().contiguous().clone() for n, t in e.items()}))
            for key, e in entries.items()
        ]
        try:
            with self._connection() as connection:
                connection.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            if "full" in str(error) or "too big" in str(error):
                self._fill()
            elif "locked" not in str(error):  # else another process writes the same, or as much
                raise self._failed(error) from error

    def _fill(self) -> None:
        self.is_full = True
        warnings.warn(
            f"teacher_cache: {self.path} has the {self.gigabytes:g} GB that it may, or its "
            "disk is full, so further examples run through their source at every step.\n"
            "Raise model.teacher_cache, keep less (KLToSource.top_k), or delete the folder if "
            "earlier runs have filled it.",
            stacklevel=4,
        )

    def _connection(self) -> sqlite3.Connection:
        if self._open is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                opened = sqlite3.connect(self.path, timeout=_WAIT)
                opened.execute(f"PRAGMA page_size = {_PAGE}")
                opened.execute("PRAGMA journal_mode = WAL")
                opened.execute("PRAGMA wal_autocheckpoint = 256")  # pages beside the file
                opened.execute("PRAGMA synchronous = NORMAL")
                opened.execute(
                    f"PRAGMA max_page_count = {max(8, int(self.gigabytes * 1e9) // _PAGE)}"
                )
                opened.execute(
                    "CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, value BLOB NOT NULL)"
                )
            except (sqlite3.Error, OSError) as error:
                raise self._failed(error) from error
            self._open = opened
        return self._open

    def _failed(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"teacher_cache: expected a file of an earlier run or a new one at {self.path}, got: "
            f"{error}.\nDelete it if it is damaged, or set model.teacher_cache_folder to another "
            "folder, on a local disk."
        )
