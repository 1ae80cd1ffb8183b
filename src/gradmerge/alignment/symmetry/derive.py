"""A trace's units as a `PermutationSpec` over the names in the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

from torch import nn

from gradmerge.alignment.symmetry.rules import Label, Traced
from gradmerge.alignment.symmetry.spec import (
    Axis,
    Factor,
    Group,
    PermutationSpec,
    Place,
    Role,
    Segment,
    vector_role,
)
from gradmerge.alignment.symmetry.units import Dim, Unit
from gradmerge.sources.skeleton import Binding


def to_spec(traced: Traced, skeleton: nn.Module, binding: Binding) -> PermutationSpec:
    """Name the groups, and give the axes by the names in the files.

    Args:
        traced: units that the run found.
        skeleton: the network.
        binding: where the files' tensors sit in it.
    """
    seen = [label for _, _, label in traced.seen]
    _settle([*traced.labels.values(), *seen, traced.multiplied])
    names = _name_groups(traced)
    places = _places(traced, names)
    multiplied = {unit for dim in traced.multiplied for unit in dim.units()}
    groups = {
        name: Group(name, unit.size, tuple(places[name]), unit in multiplied)
        for unit, name in names.items()
    }
    tensors: dict[str, tuple[Axis, ...]] = {}
    fixed: dict[str, str] = {}
    for file_name, module_name in _module_names(skeleton, binding).items():
        label = traced.labels.get(module_name, [])
        axes = tuple(
            Axis(_segments(dim, names), _role(module_name, axis, label, traced))
            for axis, dim in enumerate(label)
        )
        if any(axis.groups for axis in axes):
            tensors[file_name] = axes
        for i, (axis, dim) in enumerate(zip(axes, label, strict=True)):
            if dim.size > 1 and not axis.groups:
                fixed[f"{file_name}[{i}]"] = dim.reason
    return PermutationSpec(groups, tensors, fixed)


def file_names(skeleton: nn.Module, binding: Binding) -> dict[str, str]:
    """The first name in the module -> a name in the files, of parameters and buffers."""
    names = _module_names(skeleton, binding)
    return {module_name: file_name for file_name, module_name in reversed(names.items())}


def _module_names(skeleton: nn.Module, binding: Binding) -> dict[str, str]:
    """Name in the files -> the first name in the module."""
    first = {id(parameter): name for name, parameter in skeleton.named_parameters()}
    every = dict(skeleton.named_parameters(remove_duplicate=False))
    found = {name: first[id(every[places[0]])] for name, places in binding.parameters.items()}
    found.update(binding.buffers)
    found.update({alias: found[kept] for alias, kept in binding.ties.items()})
    return found


def _settle(labels: Sequence[Label]) -> None:
    """Resolve until nothing changes: a stretch within a factor pins units that others hold, too."""
    before: object = None
    while True:
        units = [unit for label in labels for dim in label for unit in dim.units()]
        now = [(id(unit), unit.pinned is None) for unit in units]
        if now == before:
            return
        before = now


def _name_groups(traced: Traced) -> dict[Unit, str]:
    """A name for each free unit: of the first parameter that writes it, or else that reads it."""
    names: dict[Unit, str] = {}
    axes = [
        (parameter, (parameter, axis) in traced.reads, dim.units())
        for parameter, label in traced.labels.items()
        for axis, dim in enumerate(label)
    ]
    for parameter, _, units in sorted(axes, key=lambda found: found[1]):
        owner = parameter.rpartition(".")[0] or parameter
        for i, unit in enumerate(units):
            if unit.pinned is None and unit not in names:
                name = f"{owner}.{i}" if len(units) > 1 else owner
                taken = set(names.values())
                numbered = (name if n == 1 else f"{name}#{n}" for n in count(1))
                names[unit] = next(n for n in numbered if n not in taken)
    return names


def _role(parameter: str, axis: int, label: Label, traced: Traced) -> Role:
    if len(label) == 1:
        return vector_role(parameter)
    return "in" if (parameter, axis) in traced.reads else "out"


def _segments(dim: Dim, names: Mapping[Unit, str]) -> tuple[Segment, ...]:
    """Stretches of factors; neighbours that are fixed are taken together."""
    segments: list[Segment] = []
    for product in dim.resolve():
        factors: list[Factor] = []
        for unit in product:
            factor = Factor(unit.size, names.get(unit))
            if factor.group is None and factors and factors[-1].group is None:
                factor = Factor(factors.pop().size * unit.size)
            factors.append(factor)
        segment = Segment(tuple(factors) or (Factor(1),))
        if _is_plain(segment) and segments and _is_plain(segments[-1]):
            segment = Segment((Factor(segments.pop().size + segment.size),))
        segments.append(segment)
    return tuple(segments)


def _is_plain(segment: Segment) -> bool:
    return all(factor.group is None for factor in segment.factors)


def _places(traced: Traced, names: Mapping[Unit, str]) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = {name: [] for name in names.values()}
    for module, call, label in traced.seen:
        for i, dim in enumerate(label):
            for start, product in _stretches(dim):
                sizes = tuple(unit.size for unit in product)
                for position, unit in enumerate(product):
                    if unit in names:
                        place = Place(module, i - len(label), start, sizes, position, call)
                        found[names[unit]].append(place)
    return found


def _stretches(dim: Dim) -> Iterator[tuple[int, tuple[Unit, ...]]]:
    """The start of each product of a dimension, and its units."""
    start = 0
    for product in dim.resolve():
        yield start, product
        start += Dim((product,)).size
