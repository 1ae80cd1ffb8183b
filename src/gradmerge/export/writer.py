"""Write safetensors files one tensor at a time, and JSON files."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmerge.common.errors import NonFiniteError
from gradmerge.common.finite import is_finite, non_finite
from gradmerge.sources.base import Checkpoint, tensor_bytes, watched_files
from gradmerge.sources.files import DTYPES
from gradmerge.sources.identity import require_unchanged

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: start writing, do not wait
# Bytes that may wait to be written while the next tensor is computed.
_BEHIND = 32 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its header, and a function that computes its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor] = field(repr=False)
    """Values of this shape, on any device; the writer converts their dtype."""
    exact: Callable[[], Tensor] | None = field(default=None, repr=False)
    """The values in a wider dtype, to explain those that `dtype` cannot hold. Default: `make`."""
    infinite: bool = False
    """Whether infinity is allowed, as in the masks of some models."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def entries_of(
    checkpoint: Checkpoint,
    names: Iterable[str],
    dtype: torch.dtype | None = None,
    infinite: Collection[str] = (),
) -> list[Entry]:
    """Return a checkpoint's own tensors.

    Args:
        checkpoint: where they are.
        names: their names.
        dtype: dtype of the floating-point ones. Default: as stored.
        infinite: names of those that may hold infinity.
    """
    files, found = watched_files([checkpoint]), []

    def read(name: str) -> Tensor:
        require_unchanged(files)  # before each tensor, for writing may take long
        return checkpoint.read(name)

    for info in (checkpoint.infos[name] for name in names):
        kind = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
        make, may_be = partial(read, info.name), info.name in infinite
        found.append(Entry(info.name, info.shape, kind, make, infinite=may_be))
    return found


def write_safetensors(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; memory holds one tensor and at most 32 MiB yet to be written.

    The library's own writer needs all tensors at once. The format is a length, a JSON header and
    the bytes in order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes, as readers may map them
    with path.open("wb", buffering=0) as file, _Behind(file) as behind:
        behind.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            behind.wait(_BEHIND)
            tensor = entry.make().detach().to("cpu", entry.dtype)
            if tuple(tensor.shape) != entry.shape:
                raise RuntimeError(
                    f"{entry.name}: expected shape {entry.shape} as in the header, got "
                    f"{tuple(tensor.shape)}"
                )
            _require_finite(entry, tensor)
            behind.write(tensor_bytes(tensor))
            del tensor  # memory is free for the next one once it is written
        behind.wait(0)
        os.fsync(file.fileno())


def _require_finite(entry: Entry, tensor: Tensor) -> None:
    """Reject a tensor with NaN or infinity, also if only its dtype makes it so.

    Raises:
        NonFiniteError: the message names the tensor and what to do.
    """
    if is_finite(tensor.reshape(-1)):
        return
    flaw = non_finite(tensor)
    if flaw is None or (entry.infinite and flaw.infinite):
        return
    kind = str(entry.dtype).removeprefix("torch.")
    exact = (entry.exact or entry.make)().detach()
    if non_finite(exact) is None:
        largest, limit = float(exact.abs().max()), torch.finfo(entry.dtype).max
        raise NonFiniteError(
            f"{entry.name}: expected values that {kind} can hold, up to {limit:g}, got {largest:g} "
            f"({flaw.count} of {flaw.total} entries are too large). Nothing was written.\n"
            "Choose a dtype of wider range: `--dtype bfloat16` or float32."
        )
    raise NonFiniteError(
        f"{entry.name}: expected finite values, got NaN or infinity in {flaw}. Nothing was "
        "written.\nThe sources or the coefficients make them; `gradmerge inspect` checks the "
        "sources."
    )


class _Behind:
    """A thread that writes one tensor while the next is computed."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="gradmerge-write")
        self._pending: deque[tuple[Future[None], int]] = deque()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *_: object) -> None:
        # after an error, the rest need not be written
        self._pool.shutdown(cancel_futures=True)

    def write(self, data: bytes | memoryview) -> None:
        """Queue bytes."""
        view = memoryview(data).cast("B")
        self._pending.append((self._pool.submit(self._whole, view), len(view)))

    def wait(self, limit: int) -> None:
        """Wait until at most `limit` bytes are queued; raise the error of a failed write."""
        while self._pending and (limit == 0 or sum(size for _, size in self._pending) > limit):
            self._pending.popleft()[0].result()

    def _whole(self, view: memoryview) -> None:
        start, done = self._file.tell(), 0
        while done < len(view):  # a raw write may be partial, and is at most 2 GiB
            done += self._file.write(view[done:]) or 0
        _start_writeback(self._file.fileno(), start, done)


def _start_writeback(descriptor: int, start: int, size: int) -> None:
    """Start writing these bytes to the disk (Linux), to shorten the `fsync` at the end."""
    start_range = getattr(_libc(), "sync_file_range", None)
    if start_range is not None:
        start_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), _WRITE)


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
