"""Writing safetensors files a tensor at a time."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    """A safetensors file, one tensor in memory at a time.

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
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            tensor = entry.make()
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise RuntimeError(
                    f"{entry.name}: made {tuple(tensor.shape)} {tensor.dtype}, header says "
                    f"{entry.shape} {entry.dtype}"
                )
            file.write(tensor_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())
