"""Does a specification hold? A random element of its groups must leave the output unchanged."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gradmerge.alignment.symmetry.example import at_other_sizes
from gradmerge.alignment.symmetry.spec import Maps, PermutationSpec
from gradmerge.alignment.symmetry.trace import run, stand_in, tensors_of
from gradmerge.errors import ConfigError, shorten

TOLERANCE = 1e-8
# Outputs beyond it are a mask's; with weights of order one no other comes near.
_MASKED = 1e6
LIMIT = 1_000_000_000
"""Parameters up to which a network is checked: drawing the weights takes seconds a hundred
million."""

_BLOCK = 1_000_003


class Float64(TorchDispatchMode):
    """Floating-point casts and constants stay in float64, whatever precision a network asks for.

    Networks that take a norm or a softmax in float32 would show its rounding instead of the
    function.

    Args:
        weights: what takes the place of some tensors, by identity; made anew at each use.
    """

    def __init__(self, weights: Mapping[int, Callable[[], Tensor]] | None = None) -> None:
        super().__init__()
        self.weights = dict(weights or {})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator, wide."""
        kwargs = dict(kwargs or {})
        kind = kwargs.get("dtype")
        if kind is not None and kind.is_floating_point:
            kwargs["dtype"] = torch.float64
        if self.weights:
            args, kwargs = tree_map_only(Tensor, self._filled, (args, kwargs))
        return func(*args, **kwargs)

    def _filled(self, tensor: Tensor) -> Tensor:
        make = self.weights.get(id(tensor))
        return tensor if make is None else make()


def verify(
    spec: PermutationSpec,
    skeleton: nn.Module,
    files: Mapping[str, str],
    example: Mapping[str, Any],
    seed: int = 0,
) -> float | None:
    """The largest relative change of the output under a random element of all groups.

    Weights are random, in float64, drawn a tensor at a time whenever the network asks for one. The
    output is compared on the example, and in two other sizes of batch and length, as far as the
    network takes them (`at_other_sizes`): its course may depend on the size of its input. None
    where the network has more than `LIMIT` parameters and is not checked.

    Args:
        spec: by names in the files.
        skeleton: the network.
        files: first name in the module -> a name in the files.
        example: arguments of its forward.
        seed: of weights and permutations.

    Raises:
        ConfigError: the output changes by more than `TOLERANCE`; names the groups that change it.
    """
    if sum(parameter.numel() for parameter in skeleton.parameters()) > LIMIT:
        return None
    check = _Check(spec, skeleton, files, seed)
    change = check.change(example, check.outputs(example, {}))
    if change is None:
        raise ConfigError(
            "alignment: the example gives no finite output, so that nothing can be checked. Give "
            "another `example`."
        )
    for other, outputs in at_other_sizes(example, partial(check.outputs, maps={})):
        change = max(change, check.change(other, outputs) or 0.0)
    return change


class _Check:
    def __init__(
        self,
        spec: PermutationSpec,
        skeleton: nn.Module,
        files: Mapping[str, str],
        seed: int,
    ) -> None:
        self.spec, self.files, self.seed = spec, files, seed
        self.module, self.names = stand_in(skeleton, torch.float64)
        self.tensors = {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        self.kind = type(skeleton).__name__
        self.maps = spec.random(seed)

    def change(self, example: Mapping[str, Any], before: Sequence[Tensor]) -> float | None:
        """Largest relative change of an output under all maps; None where no number can be
        compared.

        Raises:
            ConfigError: it is more than `TOLERANCE`.
        """
        change = self._gap(example, before, self.maps)
        if change is None or change <= TOLERANCE:
            return change
        guilty = [
            name
            for name in self.spec.groups
            if (self._gap(example, before, {name: self.maps[name]}) or 0.0) > TOLERANCE
        ]
        shapes = [f"{k} {list(v.shape)}" for k, v in example.items() if isinstance(v, Tensor)]
        raise ConfigError(
            f"alignment: permuting units changes what {self.kind} computes (relative change "
            f"{change:.1e}, tolerance {TOLERANCE:.0e}, with {', '.join(shapes)}), so the "
            "specification is wrong for it. Groups that change it by themselves: "
            f"{shorten(guilty) or 'none alone'}. Give a hand-written specification (`spec:` of the "
            "alignment) without them."
        )

    def _gap(
        self, example: Mapping[str, Any], before: Sequence[Tensor], maps: Maps
    ) -> float | None:
        after = self.outputs(example, maps)
        gaps = (_gap(one, two) for one, two in zip(before, after, strict=True))
        return max((gap for gap in gaps if gap is not None), default=None)

    def outputs(self, example: Mapping[str, Any], maps: Maps) -> Sequence[Tensor]:
        """What the network gives in float64, with its units mapped."""

        def maker(name: str, shape: torch.Size) -> Callable[[], Tensor]:
            def make() -> Tensor:
                value = _random(name, shape, self.seed)
                return self.spec.apply(maps, self.files.get(name, name), value)

            return make

        weights = {
            key: maker(name, self.tensors[key].shape)
            for key, name in self.names.items()
            if self.tensors[key].is_floating_point()
        }
        wide = {
            name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in example.items()
        }
        with torch.no_grad():
            out = run(self.module, wide, Float64(weights))
        return [leaf.double() for leaf in tensors_of(out)]


def _gap(one: Tensor, two: Tensor) -> float | None:
    """`max |one - two| / max |one|` over finite entries; None where there are none.

    Large constants that masks write (-1e9, -inf) are the same in both and would hide the rest.
    """
    finite = one.isfinite() & two.isfinite()
    if not torch.equal(one.isfinite(), two.isfinite()):
        return float("inf")
    compared = finite & ((one != two) | (one.abs() < _MASKED))
    if not compared.any():
        return None
    one, two = one[compared], two[compared]
    return float((one - two).abs().max() / one.abs().max().clamp_min(1e-300))


def _random(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Weights of a size that keeps activations of order one; positive numbers for vectors.

    Drawing is what takes time, so a large tensor repeats a block of a prime number of entries.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}\n{name}".encode()))
    if len(shape) < 2:
        return 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    fan = max(1, torch.Size(shape[1:]).numel())
    count = shape.numel()
    drawn = torch.randn(min(count, _BLOCK), generator=generator, dtype=torch.float64) / fan**0.5
    return drawn.repeat(-(-count // _BLOCK))[:count].reshape(shape) if count else drawn.view(shape)
