"""Tensors that autograd saves for backward in streamed memory, made again instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradmerge.engine.install import LiveTensors, reads_often

Make = Callable[[str, torch.dtype, str | None], Tensor]


class SavedTensors:
    """Merged tensors that autograd saves for backward, as their key and view in place of numbers.

    Args:
        skeleton: the network.
        first_places: a name in the network of each key.
    """

    def __init__(self, skeleton: nn.Module, first_places: Mapping[str, str]) -> None:
        self._skeleton, self._places = skeleton, first_places
        self._live = LiveTensors()
        self._made: tuple[object, dict[str, Tensor]] = None, {}

    def add(self, theta: Tensor, key: str, task: str | None) -> None:
        """Register a merged tensor, or that of a task: it is made again if backward needs it."""
        self._live.add(theta, (key, theta.dtype, task))

    def forget(self) -> None:
        """Discard the tensors that a backward pass has made."""
        self._made = None, {}

    def hooks(
        self, make: Make, version: Callable[[], int], require: Callable[[int], None]
    ) -> AbstractContextManager[Any]:
        """Return the context in which a forward pass saves keys in place of merged tensors.

        Args:
            make: makes the tensor of a key in a dtype, for a task if it has its own.
            version: returns a number that changes with the coefficients.
            require: rejects another version than the present one.
        """
        self._live.purge()
        self.forget()
        if not torch.is_grad_enabled():
            return nullcontext()

        def pack(tensor: Tensor) -> Any:
            tag = self._live.find(tensor)
            if tag is None or tensor.dtype != tag[1] or tensor.is_conj() or tensor.is_neg():
                return tensor  # a view as another dtype cannot be rebuilt by its strides
            return (*tag, tensor.size(), tensor.stride(), tensor.storage_offset(), version())

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            key, dtype, task, size, stride, offset, then = packed
            require(then)
            return self._remake(make, key, dtype, task, then).as_strided(size, stride, offset)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _remake(
        self, make: Make, key: str, dtype: torch.dtype, task: str | None, version: int
    ) -> Tensor:
        owner = self._places[key].rpartition(".")[0]
        if not reads_often(self._skeleton.get_submodule(owner)):
            return make(key, dtype, task)
        if self._made[0] != (owner, dtype, task, version):
            self._made = (owner, dtype, task, version), {}  # frees those of another module first
        kept = self._made[1]
        if key not in kept:
            kept[key] = make(key, dtype, task)
        return kept[key]
