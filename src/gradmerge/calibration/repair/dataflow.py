"""The data flow between a network's layers, read from the graph that autograd records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from gradmerge.calibration.observers import Observer, first_argument, is_plain
from gradmerge.calibration.repair.layers import Layer

_LAYER = "gradmerge layer"


class Dataflow(Observer):
    """The calls of layers in a few passes, and where their outputs go.

    Each output is detached from the layer's input and marked as the layer's in the graph, so that
    the graph of any tensor ends at the layers it is computed from. Paths without a gradient
    (argmax, numpy) do not count.
    """

    def __init__(self, network: nn.Module, layers: Mapping[str, Layer]) -> None:
        self.watched = [(layer, layer.module) for layer in layers.values()] + [(None, network)]
        self.passes: list[list[tuple[str, int]]] = []
        """Calls of each pass in order: the layer, and a number that consecutive calls share if they
        are given the same tensor."""
        self.read: set[str] = set()
        """Layers whose output reaches another layer."""
        self.returned: set[str] = set()
        """Layers whose output the network returns unchanged (the tensor or a view of it)."""
        self.normalised: set[str] = set()
        """Layers whose output is the input of a BatchNorm."""
        self._plain: dict[str, bool] = {}
        self._last: tuple[Tensor, int] | None = None

    @property
    def transformed(self) -> set[str]:
        """Layers whose output is not what their kind makes of input and stored weight."""
        return {place for place, plain in self._plain.items() if not plain}

    def record(self, call: Callable[[], object]) -> None:
        """Run one forward pass and note its calls."""
        self.passes.append([])
        with torch.enable_grad(), self.watching():
            call()
        self._last = None

    @override
    def after(
        self, key: Layer | None, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Tensor | None:
        if key is None:
            for tensor in _tensors(getattr(output, "logits", output)):
                self.returned |= _maker(tensor if tensor._base is None else tensor._base)
            return None
        layer, inputs = key, first_argument(args, kwargs)
        self.read |= _makers(_tensors((args, kwargs)))
        if layer.is_norm:
            self.normalised |= _maker(inputs)
        elif layer.weight and layer.place not in self._plain and output.numel():
            self._plain[layer.place] = is_plain(layer.module, args, kwargs, output)
        self.passes[-1].append((layer.place, self._number(inputs)))
        with torch.enable_grad():
            marked = output.detach().requires_grad_().clone()
        node: Any = marked.grad_fn
        node.metadata[_LAYER] = layer.place
        return marked

    def _number(self, inputs: Tensor) -> int:
        version = 0 if inputs.is_inference() else inputs._version
        before, self._last = self._last, (inputs, version)
        number = self.passes[-1][-1][1] if self.passes[-1] else 0
        same = before is not None and before[0] is inputs and before[1] == version
        return number if same else number + 1


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _maker(tensor: Tensor) -> set[str]:
    """Return the layer whose output a tensor is, if any."""
    node: Any = tensor.grad_fn
    return set() if node is None or _LAYER not in node.metadata else {node.metadata[_LAYER]}


def _makers(tensors: Iterable[Tensor]) -> set[str]:
    """Return the layers that tensors are computed from."""
    places: set[str] = set()
    seen: set[Any] = {None}
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if _LAYER in node.metadata:
            places.add(node.metadata[_LAYER])
        else:
            waiting += [before for before, _ in node.next_functions]
    return places
