"""A specification written by hand.

A YAML file or a mapping: axes by tensor, each axis the name of its group, or a list.

    tensors:
      fc1.weight: [hidden, null]          # rows are the units of `hidden`, columns are fixed
      fc1.bias: [hidden]
      fc2.weight: [null, hidden]
      attn.c_attn.weight:                 # stored [in, out]; three stretches of heads x 64
        - stream
        - [[heads, 64], [heads, 64], [heads, 64]]
      attn.c_proj.weight: [[heads, 64], stream]
      head.weight: [null, [stream, 49]]   # flattened channels x places
    sizes: {heads: 12}                    # where no axis tells
    roles: {attn.c_attn.weight: [in, out]}
    places: {hidden: [fc1, [relu1, -3]]}  # modules whose output shows the units, and its axis
    multiplied: [heads]                   # units that others multiply: no map may mix them

An axis is `null` (fixed), a group, a row-major product of groups and fixed sizes, or a list of such
products one after the other. A group's size is inferred from the axes that it stands on alone, or
where all other factors are known. Roles (out, in, along, gain, square) matter to linear maps only;
the default is `along` for vectors (`gain` where the name's last part is weight, `square` where it
ends in running_var), `in` for axis 1 of a matrix or a kernel, and `out` else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from torch import nn

from gradmerge.alignment.symmetry.spec import (
    Axis,
    Factor,
    PermutationSpec,
    Place,
    Role,
    Segment,
    UnitGroup,
    vector_role,
)
from gradmerge.common.errors import ConfigError, nearest, shorten
from gradmerge.common.files import read_yaml

_FIELDS = {
    "tensors": "{fc1.weight: [hidden, null]}",
    "sizes": "{heads: 12}",
    "roles": "{fc1.weight: [out, in]}",
    "places": "{hidden: [fc1, [relu1, -3]]}",
    "multiplied": "[heads]",
}
_Written = list[list[Any]]
"""An axis: stretches of names of groups and fixed sizes."""
_Found = TypeVar("_Found")


def read_spec(
    given: str | Path | Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    skeleton: nn.Module | None = None,
) -> PermutationSpec:
    """Read a specification from a file or a mapping, and check it against the tensors' shapes.

    Args:
        given: a YAML file, or the mapping itself.
        shapes: of every tensor, by its name in the files.
        skeleton: the network, in which places are looked up.

    Raises:
        ConfigError: lists everything that does not fit.
    """
    modules = None if skeleton is None else dict(skeleton.named_modules())
    reader = _SpecReader(_fields(given), shapes, modules)
    spec = reader.spec()
    if reader.problems:
        lines = "\n".join(f"  {problem}" for problem in reader.problems)
        raise ConfigError(
            f"alignment.spec: {len(reader.problems)} problem(s); units would be permuted wrongly."
            f"\n{lines}"
        )
    return spec


def _fields(given: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Every field, empty where it is left out."""
    if isinstance(given, (str, Path)):
        try:
            given = read_yaml(Path(given).expanduser())
        except ConfigError as error:
            raise ConfigError(f"alignment.spec: {error}") from error
    if not isinstance(given, Mapping) or not isinstance(given.get("tensors"), Mapping):
        raise ConfigError(
            "alignment.spec: expected a mapping with `tensors`: axes by tensor, e.g. "
            f"{{tensors: {_FIELDS['tensors']}}}; got {str(given)[:60]!r}."
        )
    for name, value in given.items():
        if name not in _FIELDS:
            raise ConfigError(
                f"alignment.spec: unknown field {name!r}.{nearest(str(name), _FIELDS)} Expected "
                f"{', '.join(_FIELDS)}."
            )
        is_list = name == "multiplied"
        if value and not isinstance(value, (list, tuple) if is_list else Mapping):
            kind = "list of groups" if is_list else "mapping"
            raise ConfigError(
                f"alignment.spec: {name}: expected a {kind} such as {_FIELDS[name]}, got "
                f"{str(value)[:60]!r}."
            )
    return {name: given.get(name) or {} for name in _FIELDS}


@dataclass
class _SpecReader:
    """Reads the fields, and collects the problems found in them."""

    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, nn.Module] | None
    problems: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def spec(self) -> PermutationSpec:
        """Every tensor, with sizes inferred; problems are noted."""
        self.sizes = self._each("sizes", _size)
        axes = self._each("tensors", self._axes)
        roles = self._each("roles", self._roles)
        while self._infer(axes):
            pass
        tensors = {}
        for name, own in axes.items():
            kinds = roles.get(name) or _default_roles(name, len(own))
            sizes = zip(own, self.shapes[name], strict=True)
            segments = [self._segments(name, axis, size) for axis, size in sizes]
            tensors[name] = tuple(map(Axis, segments, kinds))
        names = sorted({group for own in tensors.values() for axis in own for group in axis.groups})
        places, apart = self._each("places", self._places), self.fields["multiplied"]
        groups = {n: UnitGroup(n, self.sizes[n], places.get(n, ()), n in apart) for n in names}
        for kind in ("multiplied", "sizes", "places"):
            self._require_known(kind, "group", names)
        self._require_known("roles", "tensor", axes)
        return PermutationSpec(groups, tensors)

    def _each(self, name: str, read: Callable[[str, Any], _Found]) -> dict[str, _Found]:
        """Read every entry of a field."""
        found = {}
        for key, value in self.fields[name].items():
            try:
                found[str(key)] = read(str(key), value)
            except ConfigError as problem:
                where = "" if name == "tensors" else f"{name}: "
                self.problems.append(f"{where}{key}: {problem}")
        return found

    def _require_known(self, name: str, kind: str, known: Iterable[str]) -> None:
        self.problems += [
            f"{name}: unknown {kind} {key!r}.{nearest(str(key), known)}"
            for key in self.fields[name]
            if key not in known
        ]

    def _axes(self, name: str, axes: Any) -> list[_Written]:
        shape = self.shapes.get(name)
        if shape is None:
            raise ConfigError(f"the checkpoint has no such tensor.{nearest(name, self.shapes)}")
        if not isinstance(axes, (list, tuple)) or len(axes) > len(shape):
            raise ConfigError(
                f"expected a list of at most {len(shape)} axes (shape {list(shape)}), got {axes!r}."
            )
        whole = [*axes, *[None] * (len(shape) - len(axes))]
        found = [_stretches(axis, size) for axis, size in zip(whole, shape, strict=True)]
        factors = [factor for axis in found for segment in axis for factor in segment]
        wrong = [repr(f) for f in factors if not (isinstance(f, str) or _is_size(f))]
        if wrong:
            raise ConfigError(
                f"expected names of groups and positive sizes along an axis, got {shorten(wrong)}."
            )
        return found

    def _roles(self, name: str, roles: Any) -> list[Role]:
        count, known = len(self.shapes.get(name, ())), get_args(Role)
        listed = isinstance(roles, (list, tuple)) and len(roles) == count
        if not listed or not all(role in known for role in roles):
            raise ConfigError(f"expected {count} of {', '.join(known)}, got {roles!r}.")
        return list(roles)

    def _unknown(self, axis: _Written) -> list[str]:
        names = [f for segment in axis for f in segment if isinstance(f, str)]
        return [name for name in dict.fromkeys(names) if name not in self.sizes]

    def _infer(self, axes: Mapping[str, list[_Written]]) -> bool:
        """Find sizes of groups from axes where one group alone is unknown; False: no more."""
        before = len(self.sizes)
        for name, own in axes.items():
            for axis, size in zip(own, self.shapes[name], strict=True):
                unknown = self._unknown(axis)
                if len(unknown) == 1 and all(s.count(unknown[0]) < 2 for s in axis):
                    group = unknown[0]
                    rest, one = (_entries(axis, {**self.sizes, group: n}) for n in (0, 1))
                    self.sizes[group] = max(1, (size - rest) // (one - rest))
        return len(self.sizes) > before

    def _segments(self, name: str, axis: _Written, size: int) -> tuple[Segment, ...]:
        lost = self._unknown(axis)
        self.sizes.update(dict.fromkeys(lost, 1))
        if lost:
            self.problems.append(
                f"{name}: the size of {shorten(lost)} cannot be inferred; state it under `sizes`."
            )
        elif (entries := _entries(axis, self.sizes)) != size:
            stated = {f: self.sizes[f] for s in axis for f in s if isinstance(f, str)}
            self.problems.append(
                f"{name}: expected axes of {list(self.shapes[name])}, got {axis} with {stated}, "
                f"which is {entries} where the tensor has {size}."
            )
        return tuple(
            Segment(tuple(Factor(f) if _is_size(f) else Factor(self.sizes[f], f) for f in s))
            for s in axis
        )

    def _places(self, group: str, places: Any) -> tuple[Place, ...]:
        entries = places if isinstance(places, (list, tuple)) else [places]
        return tuple(self._place(group, entry) for entry in entries if entry is not None)

    def _place(self, group: str, entry: Any) -> Place:
        pair = entry if isinstance(entry, (list, tuple)) else (entry, -1)
        module, axis = pair if len(pair) == 2 else (None, None)
        if not isinstance(module, str) or not isinstance(axis, int) or axis >= 0:
            raise ConfigError(
                "expected modules, or pairs of a module and an axis of its output from the end "
                f"(-1 the last), e.g. [fc1, [relu1, -3]]; got {entry!r}."
            )
        own = None
        if self.modules is not None:
            if module not in self.modules:
                raise ConfigError(f"unknown module {module!r}.{nearest(module, self.modules)}")
            own = self.modules[module]
        if axis == -1 and isinstance(own, (nn.Conv2d, nn.BatchNorm2d)):
            axis = -3
        return Place(module, axis, 0, (self.sizes.get(group, 1),), 0)


def _entries(axis: _Written, sizes: Mapping[str, int]) -> int:
    numbers = [[sizes[f] if isinstance(f, str) else f for f in segment] for segment in axis]
    return sum(map(math.prod, numbers))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _size(name: str, value: Any) -> int:
    if not _is_size(value):
        raise ConfigError(f"expected a positive number, got {value!r}.")
    return int(value)


def _default_roles(name: str, count: int) -> list[Role]:
    if count == 1:
        return [vector_role(name)]
    return ["in" if axis == 1 else "out" for axis in range(count)]


def _stretches(axis: Any, size: int) -> _Written:
    """An axis as stretches of factors."""
    if axis is None:
        return [[size]]
    if not isinstance(axis, (list, tuple)):
        return [[axis]]
    if axis and all(isinstance(part, (list, tuple)) for part in axis):
        return [list(part) for part in axis]
    return [list(axis)]
