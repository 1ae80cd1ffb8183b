"""The layers that REPAIR can correct: the tensor that scales each, and the axis of its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from gradmerge.calibration.observers import is_linear, without_padding
from gradmerge.engine.merged import MergedModel
from gradmerge.sources.skeleton import input_axis

UNKNOWN = "no layer of a known kind holds it"
"""The reason given for matrices that may be no layer's weight (tables of positions)."""
_COMPUTED = "its layer's weight is computed from it"
_NOT_SCALED = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
_NOT_SUPPORTED = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)


@dataclass(frozen=True)
class Layer:
    """A linear layer, convolution or BatchNorm of the network."""

    place: str
    module: nn.Module
    weight: str = ""
    """The tensor that takes the scale; empty if the layer cannot be corrected."""
    bias: str = ""
    """The tensor that takes scale and shift; empty if there is none that may change."""
    axis: int = 0
    """The weight's axis of output channels."""
    groups: int = 1
    """Groups of a transposed convolution, whose weight is `[in, out / groups, ...]`."""
    calls: int = 1
    """Calls per pass; above one only for a BatchNorm whose statistics alone are recomputed."""

    @property
    def is_norm(self) -> bool:
        """True for a BatchNorm."""
        return isinstance(self.module, _BatchNorm)

    def channels(self, output: Tensor, mask: Tensor | None) -> Tensor:
        """Return the layer's outputs as `[rows, channels, ...]`, without rows of padding (which a
        BatchNorm normalises like others).
        """
        if self.is_norm:
            return output
        return without_padding(output, mask, self.channel_axis(output))

    def channel_axis(self, output: Tensor) -> int:
        """Return the axis of channels of an output."""
        if isinstance(self.module, _ConvNd):
            return output.dim() - 1 - len(self.module.kernel_size)
        return 1 if self.is_norm else output.dim() - 1


def layers_of(merged: MergedModel) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return the network's layers by module name, and the weights of other modules that look like
    layers, with the reason why they cannot be corrected.

    A layer has no `weight` if that is private, computed in a way that no scale passes through, or
    used by anything but such layers (an embedding tied to the output layer).
    """
    plan, skeleton = merged.plan, merged.skeleton
    assert plan.binding is not None
    parameters = plan.binding.parameters
    names = {place: name for name, places in parameters.items() for place in places}
    layers: dict[str, Layer] = {}
    others: dict[str, str] = {}
    for place, module in skeleton.named_modules():
        own = {key: names.get(joined(place, key), "") for key in _weights(module)}
        own = {key: name for key, name in own.items() if name in plan.tensors}
        if module in merged.network_buffers.batch_norms:
            layers[place] = Layer(place, module, own.get("weight", ""))
        elif _is_layer(module):
            layers[place] = layer = _scaled(place, module, own)
            if not layer.weight:
                others = dict.fromkeys(own.values(), _COMPUTED) | others
            elif not all(_is_of_layer(skeleton, user) for user in parameters[layer.weight]):
                layers[place] = Layer(place, module)
        elif not isinstance(module, _NOT_SCALED) and "parametrizations" not in place.split("."):
            kind = type(module).__name__
            for name in own.values():
                axes = sum(size > 1 for size in plan.tensors[name].shape)
                if axes > 1 and len(parameters[name]) == 1:
                    known = axes > 2 or isinstance(module, _NOT_SUPPORTED)
                    others[name] = f"REPAIR corrects no {kind}" if known else UNKNOWN
    return layers, others


def joined(place: str, attribute: str) -> str:
    """Return the name of a module's parameter; the network may be a layer itself."""
    return f"{place}.{attribute}" if place else attribute


def _weights(module: nn.Module) -> list[str]:
    """Return the parameters of a module except its bias, and those its weight is computed from."""
    own = [key for key, _ in module.named_parameters(recurse=False) if key != "bias"]
    inner = "parametrizations.weight."
    return own + [key for key, _ in module.named_parameters() if key.startswith(inner)]


def _is_layer(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, _ConvNd)


def _is_of_layer(skeleton: nn.Module, parameter: str) -> bool:
    place = parameter.rpartition(".")[0].removesuffix("parametrizations.weight").rstrip(".")
    return _is_layer(skeleton.get_submodule(place))


def _scaled(place: str, module: Any, own: Mapping[str, str]) -> Layer:
    """Return the layer with the tensor that scales it: its weight, or the g of `weight_norm`."""
    axis = 1 - input_axis(module, "weight")
    groups = module.groups if isinstance(module, _ConvTransposeNd) else 1
    if "weight" in own:
        return Layer(place, module, own["weight"], axis=axis, groups=groups)
    steps = list(getattr(getattr(module, "parametrizations", None), "weight", ()))
    steps += [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
    g = own.get("weight_g", own.get("parametrizations.weight.original0", ""))
    scales = [type(step) for step in steps] in ([_WeightNorm], [WeightNorm])
    if scales and steps[0].dim == axis and groups == 1:
        return Layer(place, module, g, axis=axis)
    return Layer(place, module)
