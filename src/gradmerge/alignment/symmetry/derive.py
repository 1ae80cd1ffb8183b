"""A trace's units as a `PermutationSpec` over the names in the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from gradmerge.alignment.symmetry.rules import Label
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
from gradmerge.alignment.symmetry.trace import Traced
from gradmerge.alignment.symmetry.units import Dim, Unit
from gradmerge.sources.skeleton import Binding


def to_spec(traced: Traced, skeleton: nn.Module, binding: Binding) -> PermutationSpec:
    """Groups and axes by the names in the files.

    Args:
        traced: what the run found.
        skeleton: the network.
        binding: where the files' tensors sit in it.
    """
    seen = [label for _, _, label in traced.seen]
    _settle([*traced.labels.values(), *seen, traced.multiplied])
    names = _name_groups(traced)
    places = _places(traced, names)
    multiplied = {unit for dim in traced.multiplied for unit in dim.units()}
    groups = {
        name: Group(name, unit.size, tuple(places.get(name, ())), unit in multiplied)
        for unit, name in names.items()
    }
    tensors = {}
    fixed = {}
    for file_name, module_name in module_names(skeleton, binding).items():
        label = traced.labels.get(module_name)
        if label is None:
            continue
        axes = tuple(
            _axis(dim, names, _role(module_name, axis, label, traced))
            for axis, dim in enumerate(label)
        )
        if any(axis.groups for axis in axes):
            tensors[file_name] = axes
        for axis, dim in enumerate(label):
            if dim.size > 1 and not axes[axis].groups:
                fixed[f"{file_name}[{axis}]"] = dim.reason
    return PermutationSpec(groups, tensors, fixed)


def _settle(labels: Sequence[Label]) -> None:
    """Resolve until nothing changes: a stretch within a factor pins what others hold, too."""
    before: object = None
    while True:
        now = [
            [(id(unit), unit.pinned is None) for unit in dim.units()]
            for label in labels
            for dim in label
        ]
        if now == before:
            return
        before = now


def module_names(skeleton: nn.Module, binding: Binding) -> dict[str, str]:
    """Name in the files -> the first name in the module, of parameters and buffers."""
    first = {id(parameter): name for name, parameter in skeleton.named_parameters()}
    every = dict(skeleton.named_parameters(remove_duplicate=False))
    found = {name: first[id(every[places[0]])] for name, places in binding.parameters.items()}
    found.update(binding.buffers)
    found.update({alias: found[kept] for alias, kept in binding.ties.items()})
    return found


def _free(dims: Iterable[Dim]) -> list[Unit]:
    return [unit for dim in dims for unit in dim.units() if unit.pinned is None]


def _name_groups(traced: Traced) -> dict[Unit, str]:
    """A name for each free unit: of the first parameter that writes it, or else that reads it."""
    names: dict[Unit, str] = {}
    taken: set[str] = set()
    for reads in (False, True):
        for parameter, label in traced.labels.items():
            owner = parameter.rpartition(".")[0] or parameter
            for axis, dim in enumerate(label):
                if reads is not ((parameter, axis) in traced.reads):
                    continue
                several = len(dim.units()) > 1
                for i, unit in enumerate(dim.units()):
                    if unit.pinned is not None or unit in names:
                        continue
                    name = f"{owner}.{i}" if several else owner
                    name = next(n for n in _numbered(name) if n not in taken)
                    names[unit] = name
                    taken.add(name)
    return names


def _numbered(name: str) -> Iterable[str]:
    yield name
    number = 2
    while True:
        yield f"{name}#{number}"
        number += 1


def _role(parameter: str, axis: int, label: Label, traced: Traced) -> Role:
    if len(label) == 1:
        return vector_role(parameter)
    return "in" if (parameter, axis) in traced.reads else "out"


def _axis(dim: Dim, names: Mapping[Unit, str], role: Role) -> Axis:
    """Factors and stretches; neighbours that are fixed are taken together."""
    segments: list[Segment] = []
    for product in dim.resolve():
        factors: list[Factor] = []
        for unit in product:
            group = names.get(unit)
            if group is None and factors and factors[-1].group is None:
                factors[-1] = Factor(factors[-1].size * unit.size)
            else:
                factors.append(Factor(unit.size, group))
        segment = Segment(tuple(factors) or (Factor(1),))
        plain = all(factor.group is None for factor in segment.factors)
        last = segments[-1] if segments else None
        if plain and last is not None and all(f.group is None for f in last.factors):
            segments[-1] = Segment((Factor(last.size + segment.size),))
        else:
            segments.append(segment)
    return Axis(tuple(segments), role)


def _places(traced: Traced, names: Mapping[Unit, str]) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = {}
    for module, call, label in traced.seen:
        for i, dim in enumerate(label):
            start = 0
            for product in dim.resolve():
                sizes = tuple(unit.size for unit in product)
                length = 1
                for size in sizes:
                    length *= size
                for position, unit in enumerate(product):
                    if unit in names:
                        place = Place(module, i - len(label), start, sizes, position, call)
                        found.setdefault(names[unit], []).append(place)
                start += length
    return found
