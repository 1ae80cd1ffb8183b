"""Tensors that autograd saves for backward in streamed memory, made again instead of kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
        self._kept: OrderedDict[object, dict[object, Tensor]] = OrderedDict()
        self.layers = 0
        """Number of layers whose tensors are kept."""

    def add(self, theta: Tensor, key: str, task: str | None) -> None:
        """Register a merged tensor, or that of a task: it is made again if backward needs it."""
        self._live.add(theta, (key, theta.dtype, task))

    def forget(self) -> None:
        """Discard the tensors that a backward pass has made."""
        self._kept.clear()

    @contextmanager
    def keeping(self, layers: int) -> Iterator[None]:
        """Keep the tensors of the layers that ran last, for all that reads them in the context.

        Args:
            layers: number of layers.
        """
        self.layers = layers
        try:
            yield
        finally:
            self.layers = 0
            self.forget()

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
            return self.made(make, key, dtype, task, then).as_strided(size, stride, offset)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def made(
        self, make: Make, key: str, dtype: torch.dtype, task: str | None, version: int
    ) -> Tensor:
        """Return the tensor of a key, kept or made.

        Kept are those of the module that runs, if it reads a weight once for each of its experts,
        and of the layers that ran last, inside `keeping`.
        """
        place = self._places[key].rpartition(".")[0]
        if self.layers:
            place = layer_of(place)
        elif not reads_often(self._skeleton.get_submodule(place)):
            return make(key, dtype, task)
        kept = self._kept.setdefault((place, version), {})
        self._kept.move_to_end((place, version))
        while len(self._kept) > max(1, self.layers):
            self._kept.popitem(last=False)  # before another is made
        if (key, dtype, task) not in kept:
            kept[key, dtype, task] = make(key, dtype, task)
        return kept[key, dtype, task]


def layer_of(place: str) -> str:
    """Return the layer that a module belongs to: the first numbered part of its name, or itself.

    >>> layer_of("model.layers.3.mlp.up_proj"), layer_of("model.embed_tokens")
    ('model.layers.3', 'model.embed_tokens')
    """
    parts = place.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])
