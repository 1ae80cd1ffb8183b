"""Activations between two blocks, in memory up to a bound and in mapped files beyond it."""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from gradmerge.sources.base import tensor_bytes


class Activations:
    """Tensors by name, each replaced in place as the blocks go by.

    Tensors beyond the bound are kept in files of a folder and mapped from there, so that they count
    as the system's cache. The folder is scratch: `close` removes it, with what a killed run left
    there, and resuming needs nothing of it.

    Args:
        folder: for the files; made when it is needed.
        limit: bytes to hold in memory; default: all.
    """

    def __init__(self, folder: Path | None = None, limit: int = sys.maxsize) -> None:
        self._folder, self._limit = folder, limit
        self._held: dict[str, Tensor] = {}
        self._mapped: dict[str, Tensor] = {}
        self._files = 0

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self._held.values())

    @property
    def spilled(self) -> int:
        """Bytes in files."""
        return sum(tensor.nbytes for tensor in self._mapped.values())

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of a tensor under a name, in place of the one before."""
        tensor = tensor.detach()
        kept = self._mapped.get(name, self._held.get(name))
        if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
            kept.copy_(tensor)
            return
        self._held.pop(name, None)
        self._mapped.pop(name, None)
        if self.held + tensor.nbytes <= self._limit or not tensor.numel():
            self._held[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        else:
            self._mapped[name] = self._map(tensor).copy_(tensor)

    def constant(self, tensor: Tensor) -> Tensor:
        """Return the kept copy of a tensor that never changes, one for all that are equal."""
        digest = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        name = f"constant/{tensor.dtype}/{tuple(tensor.shape)}/{digest}"
        if name not in self._held and name not in self._mapped:
            self.put(name, tensor)
        return self.get(name)

    def get(self, name: str) -> Tensor:
        """Return the tensor of a name, which must not be written to."""
        return self._mapped[name] if name in self._mapped else self._held[name]

    def _map(self, tensor: Tensor) -> Tensor:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._files}.bin"
        self._files += 1
        size = math.prod(tensor.shape)
        flat = torch.from_file(str(path), shared=True, size=size, dtype=tensor.dtype)
        return flat.view(tensor.shape)

    def close(self) -> None:
        """Release all tensors, in memory and on disk."""
        self._held.clear()
        self._mapped.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
