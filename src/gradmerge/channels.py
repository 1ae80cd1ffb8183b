"""Layers whose output channels can be scaled by a tensor of theirs, and what they put out.

Linear layers and convolutions of any number of axes, transposed ones among them: channel c of the
output is a sum of products with entries of the weight that belong to c alone, and the bias' c. A
weight that `weight_norm` computes, `g v / |v|`, is scaled by its g.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from gradmerge.observation import first_argument, is_linear, is_linear_in_its_weight, tolerance_of
from gradmerge.plan import Plan
from gradmerge.sources.skeleton import input_axis

UNKNOWN = "no layer of a known kind holds it"
"""What is said of tables and matrices that may be no layer's weight (positions)."""
_WITHOUT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
_OTHERS = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)


@dataclass(frozen=True)
class ScaledWeight:
    """The tensor of a layer that scales its output channels."""

    name: str
    """Its name in the files."""
    axis: int
    """Its axis of channels."""
    groups: int = 1
    """Of a transposed convolution, whose weight is `[in, out / groups, ...]`."""


def has_channels(module: nn.Module) -> bool:
    """Whether a module is a layer of a kind that can be scaled."""
    return isinstance(module, (nn.Linear, _ConvNd)) or is_linear(module)


def channel_axis(module: nn.Module, output: Tensor) -> int:
    """The axis of channels of what a module (a BatchNorm, too) gives."""
    if isinstance(module, _ConvNd):
        return output.dim() - 1 - len(module.kernel_size)
    return 1 if isinstance(module, nn.modules.batchnorm._BatchNorm) else output.dim() - 1


def scaled_weights(plan: Plan) -> tuple[dict[str, ScaledWeight], dict[str, str]]:
    """By the module's name; and tensors of layers that cannot be scaled, with the reason.

    Left out are private tensors, and weights that anything else uses, too (an embedding tied to the
    output layer).
    """
    skeleton, binding = plan.skeleton, plan.binding
    assert skeleton is not None
    assert binding is not None
    names = {place: name for name, places in binding.parameters.items() for place in places}
    found: dict[str, ScaledWeight] = {}
    others: dict[str, str] = {}
    for place, module in skeleton.named_modules():
        own = {k: names[joined(place, k)] for k in _weights(module)}
        own = {k: name for k, name in own.items() if name in plan.tensors}
        if has_channels(module):
            known = _scaled(module, place, own)
            if known is None:
                why = "its layer's weight is computed from it"
                others.update({name: why for name in own.values() if name not in others})
            elif all(
                has_channels(skeleton.get_submodule(p.rpartition(".")[0]))
                or p.rpartition(".")[0].endswith("parametrizations.weight")
                for p in binding.parameters[known.name]
            ):
                found[place] = known
        elif not isinstance(module, _WITHOUT) and "parametrizations" not in place.split("."):
            for key, name in own.items():
                if len(binding.parameters[name]) == 1:
                    others.update(_of_other(module, key, name))
    return found, others


def _of_other(module: nn.Module, key: str, name: str) -> dict[str, str]:
    """A weight of a module of another kind, where it looks like one: several axes beyond 1."""
    stored: Any = module._parameters[key]  # the attribute would ask for the merged tensor
    axes = sum(size > 1 for size in stored.shape)
    if axes < 2:
        return {}
    warns = axes > 2 or isinstance(module, _OTHERS)
    return {name: f"REPAIR corrects no {type(module).__name__}" if warns else UNKNOWN}


def _weights(module: nn.Module) -> list[str]:
    """Parameters of a module but for its bias, and those that its weight is computed from."""
    own = [key for key, _ in module.named_parameters(recurse=False) if key != "bias"]
    inner = "parametrizations.weight."
    return own + [key for key, _ in module.named_parameters() if key.startswith(inner)]


def _scaled(module: Any, place: str, own: Mapping[str, str]) -> ScaledWeight | None:
    """What scales a layer; None where its weight is computed otherwise."""
    transposed = isinstance(module, _ConvTransposeNd)
    axis = 1 - input_axis_of(module)
    if "weight" in own:
        return ScaledWeight(own["weight"], axis, module.groups if transposed else 1)
    norm: Any = next(
        (h for h in module._forward_pre_hooks.values() if isinstance(h, WeightNorm)), None
    )
    key = "weight_g"
    if "parametrizations" in module._modules:
        steps = list(getattr(module.parametrizations, "weight", ()))
        norm = steps[0] if len(steps) == 1 and isinstance(steps[0], _WeightNorm) else None
        key = "parametrizations.weight.original0"
    if norm is None or norm.dim != axis or key not in own:
        return None
    return ScaledWeight(own[key], axis) if not transposed or module.groups == 1 else None


def input_axis_of(module: nn.Module) -> int:
    """See `input_axis`."""
    return input_axis(module, "weight")


def joined(place: str, attribute: str) -> str:
    """The name of a module's parameter; a network may be a layer itself."""
    return f"{place}.{attribute}" if place else attribute


def is_plain(module: Any, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> bool:
    """Whether an output is what the layer's kind makes of its input and its weight, bias included
    (to `tolerance_of`).
    """
    inputs = first_argument(args, kwargs)
    if is_linear(module):
        return is_linear_in_its_weight(module, inputs, output, input_axis_of(module))
    kind = next(kind for kind in type(module).__mro__ if kind.__module__ == _ConvNd.__module__)
    expected = kind.forward(module, *args, **kwargs).float()  # type: ignore[attr-defined]
    if expected.shape != output.shape:
        return False
    apart = (output.detach().float() - expected).norm()
    return float(apart) <= tolerance_of(output) * float(expected.norm())
