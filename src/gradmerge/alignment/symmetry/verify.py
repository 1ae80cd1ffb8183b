"""The check of a specification: a random element of its groups must leave the output unchanged."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gradmerge.alignment.symmetry.example import at_other_sizes
from gradmerge.alignment.symmetry.spec import Maps, PermutationSpec, Place
from gradmerge.alignment.symmetry.trace import run, stand_in, tensors_of
from gradmerge.common.errors import ConfigError, shorten

TOLERANCE = 1e-8
# Outputs beyond it are a mask's; with weights of order one no other comes near.
_MASKED = 1e6
LIMIT = 1_000_000_000
"""Parameters up to which a network is checked: it takes seconds per hundred million."""

_BLOCK = 100_003

_Shapes = Mapping[tuple[str, int], tuple[int, ...]]
"""Shapes of modules' outputs by module and call."""


class Float64(TorchDispatchMode):
    """Keeps floating-point casts and constants in float64, whatever precision a network asks for.

    Networks that take a norm or a softmax in float32 would show its rounding instead of the
    function.

    Args:
        filled: gives the value of every argument, at each use.
    """

    def __init__(self, filled: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.filled = filled

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator, wide."""
        kwargs = dict(kwargs or {})
        kind = kwargs.get("dtype")
        if kind is not None and kind.is_floating_point:
            kwargs["dtype"] = torch.float64
        if self.filled is not None:
            args, kwargs = tree_map_only(Tensor, self.filled, (args, kwargs))
        return func(*args, **kwargs)


def verify(
    spec: PermutationSpec,
    skeleton: nn.Module,
    files: Mapping[str, str],
    example: Mapping[str, Any],
    written: bool = False,
) -> PermutationSpec:
    """Compare the network's output with that under a random element of all groups.

    Weights are random, in float64, drawn one tensor at a time whenever the network asks for it. The
    output is compared on the example, and in two other sizes of batch and length, as far as the
    network takes them (`at_other_sizes`): its course may depend on the size of its input.

    Args:
        spec: by names in the files.
        skeleton: the network.
        files: first name in the module -> a name in the files.
        example: arguments of its forward.
        written: places were named by hand, and show a group along a whole axis.

    Returns:
        The specification with the largest relative change of the output (None where the network has
        more than `LIMIT` parameters and is not checked), and without places whose axis changes its
        size with the batch or the length: there units share it with examples or positions (heads
        and batch in one, for a batched product), so a stretch of fixed length would show those of
        some rows alone.

    Raises:
        ConfigError: the output changes by more than `TOLERANCE` (names the groups that change it),
            or a place that was named by hand does not show its group.
    """
    check = _Check(spec, skeleton, files)
    outputs, own = check.run(example, {})
    changes, others = check.changes(example, outputs), []
    if not changes and check.draws:
        raise ConfigError(
            "alignment: the example gives no finite output, so nothing can be checked. Give "
            "another `example`."
        )
    # one size after the other: a network may keep something of the size that it last saw
    for inputs, (outputs, shapes) in at_other_sizes(example, partial(check.run, maps={})):
        changes += check.changes(inputs, outputs)
        others.append(shapes)
    if written:
        _require_units(spec, own)

    def stays(place: Place) -> bool:
        size = _size(place, own)
        return all(_size(place, shapes) in (None, size) for shapes in others)

    groups = {
        name: replace(group, places=tuple(filter(stays, group.places)))
        for name, group in spec.groups.items()
    }
    return replace(spec, groups=groups, checked=max(changes, default=None))


class _Check:
    """A network on random weights, run with its units mapped."""

    def __init__(
        self, spec: PermutationSpec, skeleton: nn.Module, files: Mapping[str, str]
    ) -> None:
        self.spec, self.files = spec, files
        self.module, tensors = stand_in(skeleton, torch.float64)
        self.names = {id(t): name for name, t in tensors.items() if t.is_floating_point()}
        self.draws = sum(parameter.numel() for parameter in skeleton.parameters()) <= LIMIT
        """False: weights are zero, and only shapes are found."""
        self.maps = spec.random(0)
        self.shapes: dict[tuple[str, int], tuple[int, ...]] = {}
        for name in {place.module for group in spec.groups.values() for place in group.places}:
            self.module.get_submodule(name).register_forward_hook(partial(self._note, name))

    def _note(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        call = sum(name == known for known, _ in self.shapes)
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        self.shapes[name, call] = tuple(first.shape) if isinstance(first, Tensor) else ()

    def changes(self, example: Mapping[str, Any], before: Sequence[Tensor]) -> list[float]:
        """Relative change of every output that can be compared.

        Raises:
            ConfigError: one is more than `TOLERANCE`.
        """

        def under(maps: Maps) -> list[float]:
            after, _ = self.run(example, maps)
            gaps = (_gap(one, two) for one, two in zip(before, after, strict=True))
            return [gap for gap in gaps if gap is not None]

        found = under(self.maps) if self.draws else []
        if max(found, default=0) <= TOLERANCE:
            return found
        guilty = [
            name
            for name, own in self.maps.items()
            if max(under({name: own}), default=0) > TOLERANCE
        ]
        shapes = [f"{k} {list(v.shape)}" for k, v in example.items() if isinstance(v, Tensor)]
        raise ConfigError(
            f"alignment: permuting units changes what {type(self.module).__name__} computes "
            f"(relative change {max(found):.1e}, tolerance {TOLERANCE:.0e}, with "
            f"{', '.join(shapes)}), so the specification is wrong for it. Groups that change it by "
            f"themselves: {shorten(guilty) or 'none alone'}.\nGive a hand-written specification "
            "(`spec:` of the alignment) without them."
        )

    def run(self, example: Mapping[str, Any], maps: Maps) -> tuple[list[Tensor], _Shapes]:
        """Run the network in float64, with its units mapped."""

        def filled(tensor: Tensor) -> Tensor:
            name = self.names.get(id(tensor))
            if name is None:
                return tensor
            return self.spec.apply(maps, self.files.get(name, name), _random(name, tensor.shape))

        wide = {
            name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in example.items()
        }
        self.shapes = {}
        with torch.no_grad():
            out = run(self.module, wide, Float64(filled if self.draws else None))
        return [leaf.double() for leaf in tensors_of(out)], self.shapes


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


def _random(name: str, shape: torch.Size) -> Tensor:
    """Weights of a size that keeps activations of order one; positive numbers for vectors.

    Drawing takes most of the time, so a large tensor repeats a block of a prime number of entries,
    which lets no two units of it have the same weights.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"0\n{name}".encode()))
    if len(shape) < 2:
        return 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    fan = max(1, torch.Size(shape[1:]).numel())
    count = shape.numel()
    drawn = torch.randn(min(count, _BLOCK), generator=generator, dtype=torch.float64) / fan**0.5
    return drawn.repeat(-(-count // _BLOCK))[:count].reshape(shape) if count else drawn.view(shape)


def _size(place: Place, shapes: _Shapes) -> int | None:
    shape = shapes.get((place.module, place.call), ())
    return shape[place.axis] if len(shape) >= -place.axis else None


def _require_units(spec: PermutationSpec, shapes: _Shapes) -> None:
    problems = []
    for group in spec.groups.values():
        for place in group.places:
            shape = shapes.get((place.module, place.call))
            if _size(place, shapes) != group.size:
                gives = f"gives {list(shape)}" if shape else "gives no tensor on the example"
                problems.append(
                    f"\n  places: {group.name}: expected a module whose output has {group.size} "
                    f"entries along axis {place.axis}; {place.module} {gives}."
                )
    if problems:
        raise ConfigError(f"alignment.spec: {len(problems)} problem(s).{''.join(problems)}")
