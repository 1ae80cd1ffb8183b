"""Activations between two blocks, in memory up to a bound and in mapped files beyond it."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from torch import Tensor

from gradmerge.common.memory import in_file
from gradmerge.sources.base import tensor_bytes


class ActivationStore:
    """Tensors by name, each replaced in place as the blocks go by.

    Tensors beyond the bound are mapped from files without a name, so that they count as the
    system's cache and a killed run leaves nothing behind.

    Args:
        folder: existing folder of the files; default: `TMPDIR`.
        limit: bytes to hold in memory; default: all.
    """

    def __init__(self, folder: Path | None = None, limit: int = sys.maxsize) -> None:
        self._folder, self._limit = folder, limit
        self._held: dict[str, Tensor] = {}
        self._mapped: dict[str, Tensor] = {}

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
        form = tensor.shape, tensor.dtype
        kept = self._mapped.get(name, self._held.get(name))
        if kept is None or (kept.shape, kept.dtype) != form:
            self._held.pop(name, None)
            self._mapped.pop(name, None)
            if self.held + tensor.nbytes <= self._limit:
                kept = self._held[name] = torch.empty(form[0], dtype=form[1], device="cpu")
            else:
                kept = self._mapped[name] = in_file(*form, self._folder)
        kept.copy_(tensor.detach())

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

    def clear(self) -> None:
        """Release all tensors."""
        self._held.clear()
        self._mapped.clear()
