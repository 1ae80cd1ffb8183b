"""What a job's data hold, in a line a split, so that data that changed are told from the same."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmerge.data import MergeDataModule

# A split is read whole up to so many rows and bytes; beyond, a sample that is always the same.
ROWS, BYTES = 4096, 64 << 20
# Rows that are read twice: a dataset may draw its examples anew each time.
_TWICE = 16
_PLAIN = {bool, int, float, str, type(None)}


def describe_contents(data: MergeDataModule) -> dict[str, dict[str, str]]:
    """Size and content hash of every split, by task and split.

    Content is that of the rows as they are stored, in their order; of a task with `limit`, of the
    first rows alone (not for `causal_lm`, whose limit counts windows). Of a split with more than
    `ROWS` rows, or `BYTES` bytes, a fixed sample counts, with the fingerprint that `datasets` keeps
    (from Python there may be none, and a change outside of the sample is not seen). Examples that
    a dataset draws anew each time count by their number alone.
    """
    found: dict[str, dict[str, str]] = {}
    for name, task in data.tasks.items():
        limits = {} if task.kind == "causal_lm" else task.limit or {}
        found[name] = {
            stage: _described(split, limits.get(stage))
            for stage, split in data.splits(name).items()
        }
    return found


def _described(split: Any, limit: int | None) -> str:
    count = len(split) if limit is None else min(limit, len(split))
    # in no order, so that what is left out lies everywhere
    rows = random.Random(0).sample(range(count), min(count, ROWS))
    stored = _stored(split)
    if stored is split and not _repeats(split, rows[:_TWICE]):
        return f"{count} examples, drawn anew each time"
    whole, read = _Hash(), 0
    for row in _rows(stored, rows):
        whole.add(row)
        read += 1
        if whole.bytes > BYTES:
            break
    own = getattr(split, "_fingerprint", None)
    if read < count and own is not None:
        whole.add(own)
    part = "" if read == count else f" of {read}"
    return f"{count} examples, sha256{part} {whole.hexdigest()[:16]}"


def _stored(split: Any) -> Any:
    """A dataset of `datasets` as it lies in its table: nothing is decoded or transformed."""
    return split.with_format("arrow") if hasattr(split, "_fingerprint") else split


def _rows(split: Any, at: Sequence[int]) -> Iterator[Any]:
    if not hasattr(split, "_fingerprint"):
        yield from (split[i] for i in at)
        return
    for start in range(0, len(at), 64):
        yield from split[list(at[start : start + 64])].to_pylist()


def _repeats(split: Any, at: Sequence[int]) -> bool:
    digests = []
    for _ in range(2):
        one = _Hash()
        for row in _rows(split, at):
            one.add(row)
        digests.append(one.hexdigest())
    return digests[0] == digests[1]


class _Hash:
    """SHA-256 of nested values, each with its kind, so that no two run together."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.bytes = 0

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def _put(self, kind: str, content: bytes = b"") -> None:
        self._hash.update(f"{kind}:{len(content)};".encode())
        self._hash.update(content)
        self.bytes += len(content)

    def add(self, value: Any) -> None:
        """Take in a value; of an object of an unknown class, its class alone."""
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            self._put(f"{value.dtype}{tuple(value.shape)}", flat.numpy().tobytes())
        elif isinstance(value, bytes):
            self._put("bytes", value)
        elif type(value) in _PLAIN:
            self._put(type(value).__name__, _text(value))
        elif isinstance(value, Mapping):
            if value.keys() == {"bytes", "path"}:  # an image or a sound, as `datasets` stores it
                self._add_file(**value)
                return
            self._put("mapping", str(len(value)).encode())
            for key in value:
                self.add(str(key))
                self.add(value[key])
        elif isinstance(value, (list, tuple)):
            self._add_list(value)
        elif hasattr(value, "tobytes"):  # an array, an image
            form = [getattr(value, name, "") for name in ("dtype", "shape", "mode", "size")]
            self._put(f"{form}", value.tobytes())
        else:
            self._put(f"{type(value).__module__}.{type(value).__qualname__}")

    def _add_list(self, values: Sequence[Any]) -> None:
        if set(map(type, values)) <= _PLAIN:
            self._put("list", _text(list(values)))
            return
        self._put("list", str(len(values)).encode())
        for item in values:
            self.add(item)

    def _add_file(self, bytes: Any, path: Any) -> None:
        if bytes is None and isinstance(path, str) and Path(path).is_file():
            bytes = Path(path).read_bytes()
        self._put("file")
        self.add(path if bytes is None else bytes)


def _text(value: Any) -> bytes:
    return repr(value).encode("utf-8", "surrogatepass")
