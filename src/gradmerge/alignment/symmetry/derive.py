"""A trace's units as a `PermutationSpec` over the names in the files."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import count, groupby

from gradmerge.alignment.symmetry.rules import Label, Traced
from gradmerge.alignment.symmetry.spec import (
    Axis,
    Factor,
    PermutationSpec,
    Place,
    Segment,
    UnitGroup,
    vector_role,
)
from gradmerge.alignment.symmetry.units import Dim, Product, Unit
from gradmerge.sources.skeleton import Binding


def to_spec(traced: Traced, binding: Binding) -> PermutationSpec:
    """Name the groups, and give the axes by the names in the files.

    Args:
        traced: units that the run found.
        binding: where the files' tensors sit in it.
    """
    names = _name_groups(traced)
    places = _places(traced, names)
    multiplied = {unit for dim in traced.multiplied for unit in dim.units()}
    groups = {
        name: UnitGroup(name, unit.size, tuple(places[unit]), unit in multiplied)
        for unit, name in names.items()
    }
    tensors: dict[str, tuple[Axis, ...]] = {}
    for file_name, module_name in binding.places.items():
        label = traced.labels.get(module_name, [])
        axes = _axes(module_name, label, traced, names)
        if any(axis.groups for axis in axes):
            tensors[file_name] = axes
    return PermutationSpec(groups, tensors)


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
            if not unit.pinned and unit not in names:
                name = f"{owner}.{i}" if len(units) > 1 else owner
                taken = set(names.values())
                numbered = (name if n == 1 else f"{name}#{n}" for n in count(1))
                names[unit] = next(n for n in numbered if n not in taken)
    return names


def _places(traced: Traced, names: Mapping[Unit, str]) -> Mapping[Unit, list[Place]]:
    found: dict[Unit, list[Place]] = defaultdict(list)
    for module, call, label in traced.seen:
        for i, dim in enumerate(label):
            start = 0
            for product in dim.resolve():
                sizes = tuple(unit.size for unit in product)
                for position, unit in enumerate(product):
                    if unit in names:
                        place = Place(module, i - len(label), start, sizes, position, call)
                        found[unit].append(place)
                start += math.prod(sizes)
    return found


def _axes(
    parameter: str, label: Label, traced: Traced, names: Mapping[Unit, str]
) -> tuple[Axis, ...]:
    if len(label) == 1:
        return (Axis(_segments(label[0], names), vector_role(parameter)),)
    reads = ((parameter, axis) in traced.reads for axis in range(len(label)))
    pairs = zip(label, reads, strict=True)
    return tuple(Axis(_segments(dim, names), "in" if read else "out") for dim, read in pairs)


def _segments(dim: Dim, names: Mapping[Unit, str]) -> tuple[Segment, ...]:
    """Stretches of factors; neighbours that are fixed are taken together."""
    segments: list[Segment] = []
    for moves, products in groupby(dim.resolve(), lambda units: not names.keys().isdisjoint(units)):
        if moves:
            segments += [Segment(_factors(product, names)) for product in products]
        else:
            segments.append(Segment((Factor(Dim(tuple(products)).size),)))
    return tuple(segments)


def _factors(product: Product, names: Mapping[Unit, str]) -> tuple[Factor, ...]:
    factors: list[Factor] = []
    for moves, units in groupby(product, names.__contains__):
        if moves:
            factors += [Factor(unit.size, names[unit]) for unit in units]
        else:
            factors.append(Factor(math.prod(unit.size for unit in units)))
    return tuple(factors)
