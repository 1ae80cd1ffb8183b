"""Networks with units to permute, and their permuted copies."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from gradmerge.alignment.align import traced_spec
from gradmerge.alignment.symmetry.spec import (
    Axis,
    Factor,
    LinearMap,
    Map,
    Maps,
    PermutationSpec,
    Role,
    Segment,
    as_linear,
)
from gradmerge.alignment.symmetry.trace import tensors_of
from gradmerge.alignment.symmetry.verify import Float64
from gradmerge.sources.in_memory import persistent_tensors
from gradmerge.sources.skeleton import Network, strip_weights
from networks import seeded


def shaken(module: nn.Module) -> nn.Module:
    """Weights, gains and statistics that all differ from unit to unit."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in module.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(noise * (0.3 if tensor.ndim < 2 else 0.05))
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return module.eval()


def spec_of(
    module: nn.Module, example: dict[str, Any] | None = None, unreached: Sequence[str] = ()
) -> PermutationSpec:
    names = list(persistent_tensors(module))
    return traced_spec(Network.bound(strip_weights(module), names), example, unreached)


def permuted(module: nn.Module, spec: PermutationSpec, seed: int = 1) -> nn.Module:
    other = copy.deepcopy(module)
    maps = spec.random(seed)
    with torch.no_grad():
        for name, tensor in persistent_tensors(other).items():
            tensor.copy_(spec.apply(maps, name, tensor.clone()))
    return other


def outputs(module: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(module(**inputs))


def same_function(module: nn.Module, spec: PermutationSpec, inputs: dict[str, Tensor]) -> None:
    """1e-5 in float32, 1e-10 in float64, relative to the largest output."""
    other = permuted(module, spec)
    moved = [
        name
        for name, tensor in persistent_tensors(module).items()
        if not torch.equal(tensor, persistent_tensors(other)[name])
    ]
    assert moved, "nothing was permuted"
    for one, two in zip(outputs(module, inputs), outputs(other, inputs), strict=True):
        assert float((one - two).abs().max()) <= 1e-5 * float(one.abs().max())
        assert float(one.std()) > 1e-4 * float(one.abs().max())
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    module, other = copy.deepcopy(module).double(), copy.deepcopy(other).double()
    with Float64():  # Llama takes its norms in float32 whatever its weights
        pairs = zip(outputs(module, wide), outputs(other, wide), strict=True)
        for one, two in pairs:
            assert one.dtype == torch.float64
            assert float((one - two).abs().max()) <= 1e-10 * float(one.abs().max())


def sizes(spec: PermutationSpec) -> list[int]:
    return sorted(group.size for group in spec.groups.values())


def group_at(spec: PermutationSpec, tensor: str, axis: int, segment: int = 0) -> list[str | None]:
    return [f.group for f in spec.tensors[tensor][axis].segments[segment].factors]


def plain_axis(sizes: Sequence[int], groups: Sequence[str | None], role: Role = "out") -> Axis:
    """An axis of one stretch."""
    factors = tuple(Factor(size, group) for size, group in zip(sizes, groups, strict=True))
    return Axis((Segment(factors),), role)


def invert(change: Map) -> Map:
    """The map that undoes another."""
    if isinstance(change, LinearMap):
        return LinearMap(change.inverse, change.matrix)
    return torch.argsort(change)


def invert_all(maps: Maps) -> dict[str, Map]:
    return {name: invert(change) for name, change in maps.items()}


def compose(first: Map, then: Map) -> Map:
    """One map for `first`, and `then` on its result: `T = T_then T_first`."""
    if isinstance(first, LinearMap) or isinstance(then, LinearMap):
        one, two = as_linear(first), as_linear(then)
        return LinearMap(two.matrix @ one.matrix, one.inverse @ two.inverse)
    return first[then]


def compose_all(first: Maps, then: Maps) -> dict[str, Map]:
    both = {name: compose(first[name], then[name]) for name in first if name in then}
    return {**then, **first, **both}


class Partly(nn.Module):
    """A forward that leaves one layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)
        self.idle = nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


class Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 6), (6, 8)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after)]
            layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(8 * 4, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Padding(nn.Module):
    """The shortcut of CIFAR ResNets without weights: every other place, zeros around channels."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, padded: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(
            Block(6, 6, 1), Block(6, 6, 1), Block(6, 10, 2), Block(10, 10, 1)
        )
        self.head = nn.Linear(10, 4)
        self.padded = padded
        if padded:
            self.blocks[2].downsample = Padding()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.stem(x)).relu())
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


THREE_HEADS = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20}


def llama(kind: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=16,
        **more,
    )
    return shaken(getattr(transformers, f"{kind}ForCausalLM")(config))


def vit() -> nn.Module:
    return shaken(seeded(transformers.ViTForImageClassification, num_labels=5, **THREE_HEADS))
