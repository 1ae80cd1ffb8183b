"""The data flow between a network's layers, read from the graph that autograd records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradmerge.calibration.observers import after_call, first_argument, is_plain, removing
from gradmerge.calibration.repair.layers import Layer

_LAYER = "gradmerge layer"


class Dataflow:
    """The calls of layers in a few passes, and where their outputs go.

    Each output is detached from the layer's input and marked as the layer's in the graph, so that
    the graph of any tensor ends at the layers it is computed from. Paths without a gradient
    (argmax, numpy) do not count.
    """

    def __init__(self, network: nn.Module, layers: Mapping[str, Layer]) -> None:
        self._network, self._layers = network, layers
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
        handles = [after_call(self._network, self._returns)]
        for layer in self._layers.values():
            hook = partial(self._called, layer)
            handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        with torch.enable_grad(), removing(handles):
            call()
        self._last = None

    def _called(
        self, layer: Layer, _: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        inputs = first_argument(args, kwargs)
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

    def _returns(self, output: Any) -> None:
        for tensor in _tensors(getattr(output, "logits", output)):
            self.returned |= _maker(tensor if tensor._base is None else tensor._base)


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
