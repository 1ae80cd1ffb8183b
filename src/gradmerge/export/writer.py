"""Writing safetensors files a tensor at a time."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import struct
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmerge.sources.base import tensor_bytes

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and do not wait
# Bytes that may wait for the disk while the next tensor is made.
_BEHIND = 32 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: its header now, its values when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file, one tensor in memory at a time, and what the disk has yet to take.

    The library's own writer wants all tensors at once; the format is a length, a JSON header and
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
    text += b" " * (-len(text) % 8)  # tensors start on 8 bytes, as readers may map them
    with path.open("wb", buffering=0) as file, _Behind(file) as behind:
        behind.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            behind.wait(_BEHIND)
            tensor = entry.make()
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise RuntimeError(
                    f"{entry.name}: made {tuple(tensor.shape)} {tensor.dtype}, header says "
                    f"{entry.shape} {entry.dtype}"
                )
            behind.write(tensor_bytes(tensor))
        behind.wait(0)
        os.fsync(file.fileno())


class _Behind:
    """Writes in a thread, so that the next tensor is made while the disk takes the last one."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="gradmerge-write")
        self._pending: deque[tuple[Future[None], int]] = deque()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *_: object) -> None:
        # after an error nothing more needs to be written
        self._pool.shutdown(cancel_futures=True)

    def write(self, data: bytes | memoryview) -> None:
        """Put bytes in line."""
        view = memoryview(data).cast("B")
        self._pending.append((self._pool.submit(self._whole, view), len(view)))

    def wait(self, limit: int) -> None:
        """Until at most `limit` bytes are in line; raises what a write has raised."""
        while self._pending and (limit == 0 or sum(size for _, size in self._pending) > limit):
            self._pending.popleft()[0].result()

    def _whole(self, view: memoryview) -> None:
        start, done = self._file.tell(), 0
        while done < len(view):  # a raw write may take less, and never more than 2 GiB
            done += self._file.write(view[done:]) or 0
        _start_writeback(self._file.fileno(), start, done)


def _start_writeback(descriptor: int, start: int, size: int) -> None:
    """Have the system begin to put these bytes on the disk, so that less is left to wait for at the
    end (Linux; elsewhere it decides by itself).
    """
    start_range = getattr(_libc(), "sync_file_range", None)
    if start_range is not None:
        start_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), _WRITE)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
