"""Write safetensors files one tensor at a time, and JSON files."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmerge.sources.base import Checkpoint, tensor_bytes
from gradmerge.sources.files import DTYPES

_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Larger tensors are not written while the next one is computed, which would take memory for both.
_BEHIND = 32 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its header, and a function that computes its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor] = field(repr=False)
    """Values of this shape, on any device; the writer converts their dtype."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def entries_of(
    checkpoint: Checkpoint, names: Iterable[str], dtype: torch.dtype | None = None
) -> list[Entry]:
    """Return a checkpoint's own tensors, by default in their stored dtypes."""
    infos = [checkpoint.infos[name] for name in names]
    return [
        Entry(i.name, i.shape, dtype or i.dtype, partial(checkpoint.read, i.name)) for i in infos
    ]


def write_safetensors(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; memory holds one tensor, and one of at most 32 MiB to be written.

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
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        data: bytes | memoryview = struct.pack("<Q", len(text)) + text
        for entry in entries:
            written = pool.submit(_write, file, data)
            if len(data) > _BEHIND:
                written.result()
            del data  # memory is free for the next tensor once it is written
            data = _bytes_of(entry)
            written.result()
        _write(file, data)
        os.fsync(file.fileno())


def _bytes_of(entry: Entry) -> memoryview:
    tensor = entry.make().detach().to("cpu", entry.dtype)
    if tuple(tensor.shape) != entry.shape:
        raise RuntimeError(
            f"{entry.name}: expected shape {entry.shape} as in the header, got "
            f"{tuple(tensor.shape)}"
        )
    return tensor_bytes(tensor)


def _write(file: FileIO, data: bytes | memoryview) -> None:
    start, done, view = file.tell(), 0, memoryview(data)
    while done < len(view):  # a raw write may be partial, and is at most 2 GiB
        done += file.write(view[done:]) or 0
    with suppress(AttributeError, OSError):  # start writing to the disk, to shorten the `fsync`
        os.posix_fadvise(file.fileno(), start, done, os.POSIX_FADV_DONTNEED)
