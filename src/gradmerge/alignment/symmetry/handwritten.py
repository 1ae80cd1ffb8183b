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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from torch import nn

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
from gradmerge.errors import ConfigError, nearest, shorten

_FIELDS = {
    "tensors": "{fc1.weight: [hidden, null]}",
    "sizes": "{heads: 12}",
    "roles": "{fc1.weight: [out, in]}",
    "places": "{hidden: [fc1, [relu1, -3]]}",
    "multiplied": "[heads]",
}
_Product = list[Any]
"""Names of groups and fixed sizes."""


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
    written = _Written(_fields(given), shapes, skeleton)
    spec = written.spec()
    if written.problems:
        lines = "\n".join(f"  {problem}" for problem in written.problems)
        raise ConfigError(
            f"alignment.spec: {len(written.problems)} problem(s); units would be permuted wrongly."
            f"\n{lines}"
        )
    return spec


def _fields(given: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Every field, empty where it is left out."""
    if isinstance(given, (str, Path)):
        import yaml

        try:
            given = yaml.safe_load(Path(given).expanduser().read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"alignment.spec: {given} cannot be read: {error}") from error
    if not isinstance(given, Mapping) or not isinstance(given.get("tensors"), Mapping):
        raise ConfigError(
            "alignment.spec: expected a mapping with `tensors`: axes by tensor, e.g. "
            f"{{tensors: {_FIELDS['tensors']}}}; got {str(given)[:60]!r}."
        )
    unknown = [str(name) for name in given if name not in _FIELDS]
    if unknown:
        raise ConfigError(
            f"alignment.spec: unknown field {unknown[0]!r}.{nearest(unknown[0], _FIELDS)} Expected "
            f"{', '.join(_FIELDS)}."
        )
    fields = {name: given.get(name) or {} for name in _FIELDS}
    for name, example in _FIELDS.items():
        is_list = name == "multiplied"
        if fields[name] and not isinstance(fields[name], (list, tuple) if is_list else Mapping):
            kind = "list of groups" if is_list else "mapping"
            raise ConfigError(
                f"alignment.spec: {name}: expected a {kind} such as {example}, got "
                f"{str(fields[name])[:60]!r}."
            )
    return fields


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class _Written:
    """The fields, with the problems found in them."""

    def __init__(
        self,
        fields: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        skeleton: nn.Module | None,
    ) -> None:
        self.fields, self.shapes = fields, shapes
        self.modules = None if skeleton is None else dict(skeleton.named_modules())
        self.problems: list[str] = []
        self.sizes: dict[str, int] = {}

    def spec(self) -> PermutationSpec:
        """Every tensor, with sizes inferred; problems are noted."""
        for name, size in self.fields["sizes"].items():
            if _is_size(size):
                self.sizes[name] = size
            else:
                self.problems.append(f"sizes: {name}: expected a positive number, got {size!r}.")
        given = {str(name): axes for name, axes in self.fields["tensors"].items()}
        read = {name: self._read(name, axes) for name, axes in given.items()}
        axes = {name: found for name, found in read.items() if found is not None}
        while self._infer(axes):
            pass
        tensors = {name: self._tensor(name, own) for name, own in axes.items()}
        names = sorted({group for own in tensors.values() for axis in own for group in axis.groups})
        apart = self.fields["multiplied"]
        groups = {n: Group(n, self.sizes[n], self._places(n), n in apart) for n in names}
        for field in ("multiplied", "sizes", "places"):
            self._require_known(field, "group", names)
        self._require_known("roles", "tensor", axes)
        return PermutationSpec(groups, tensors)

    def _require_known(self, field: str, kind: str, known: Iterable[str]) -> None:
        self.problems += [
            f"{field}: unknown {kind} {name!r}.{nearest(str(name), known)}"
            for name in self.fields[field]
            if name not in known
        ]

    def _read(self, name: str, axes: Any) -> list[list[_Product]] | None:
        """One tensor's axes as stretches of factors."""
        shape = self.shapes.get(name)
        if shape is None:
            self.problems.append(
                f"{name}: the checkpoint has no such tensor.{nearest(name, self.shapes)}"
            )
            return None
        if not isinstance(axes, (list, tuple)) or len(axes) > len(shape):
            self.problems.append(
                f"{name}: expected a list of at most {len(shape)} axes (shape {list(shape)}), got "
                f"{axes!r}."
            )
            return None
        whole = [*axes, *[None] * (len(shape) - len(axes))]
        found = [_stretches(axis, size) for axis, size in zip(whole, shape, strict=True)]
        factors = [factor for axis in found for segment in axis for factor in segment]
        wrong = [repr(f) for f in factors if not (isinstance(f, str) or _is_size(f))]
        if wrong:
            self.problems.append(
                f"{name}: expected names of groups and positive sizes along an axis, got "
                f"{shorten(wrong)}."
            )
            return None
        return found

    def _unknown(self, axis: list[_Product]) -> list[str]:
        names = [f for segment in axis for f in segment if isinstance(f, str)]
        return [name for name in dict.fromkeys(names) if name not in self.sizes]

    def _entries(self, axis: list[_Product], unknown: Mapping[str, int] | None = None) -> int:
        """Entries of an axis, with these sizes besides the known ones."""
        known = {**self.sizes, **(unknown or {})}
        return sum(math.prod(f if _is_size(f) else known[f] for f in s) for s in axis)

    def _infer(self, axes: Mapping[str, list[list[_Product]]]) -> bool:
        """Find sizes of groups from axes where one group alone is unknown; False: no more."""
        before = len(self.sizes)
        for name, own in axes.items():
            for axis, size in zip(own, self.shapes[name], strict=True):
                unknown = self._unknown(axis)
                if len(unknown) != 1 or any(segment.count(unknown[0]) > 1 for segment in axis):
                    continue
                (group,) = unknown
                rest = self._entries(axis, {group: 0})
                times = self._entries(axis, {group: 1}) - rest
                fits = size > rest and (size - rest) % times == 0
                self.sizes[group] = (size - rest) // times if fits else 1
                if not fits:
                    self.problems.append(
                        f"{name}: an axis of {size} cannot be {axis}: {group} would not be whole."
                    )
        return len(self.sizes) > before

    def _tensor(self, name: str, axes: list[list[_Product]]) -> tuple[Axis, ...]:
        shape = self.shapes[name]
        found = []
        for axis, size, role in zip(axes, shape, self._roles(name, len(shape)), strict=True):
            lost = self._unknown(axis)
            self.sizes.update(dict.fromkeys(lost, 1))
            if lost:
                self.problems.append(
                    f"{name}: the size of {shorten(lost)} cannot be inferred; state it under "
                    "`sizes`."
                )
            elif self._entries(axis) != size:
                stated = {f: self.sizes[f] for s in axis for f in s if isinstance(f, str)}
                self.problems.append(
                    f"{name}: expected axes of {list(shape)}, got {axis} with {stated}, which is "
                    f"{self._entries(axis)} where the tensor has {size}."
                )
            segments = (
                Segment(tuple(Factor(f) if _is_size(f) else Factor(self.sizes[f], f) for f in s))
                for s in axis
            )
            found.append(Axis(tuple(segments), role))
        return tuple(found)

    def _roles(self, name: str, count: int) -> list[Role]:
        given, known = self.fields["roles"].get(name), get_args(Role)
        if given is not None:
            listed = isinstance(given, (list, tuple)) and len(given) == count
            if listed and all(role in known for role in given):
                return list(given)
            self.problems.append(
                f"roles: {name}: expected {count} of {', '.join(known)}, got {given!r}."
            )
        if count == 1:
            return [vector_role(name)]
        return ["in" if axis == 1 else "out" for axis in range(count)]

    def _places(self, group: str) -> tuple[Place, ...]:
        given = self.fields["places"].get(group) or []
        entries = given if isinstance(given, (list, tuple)) else [given]
        found = (self._place(group, entry) for entry in entries)
        return tuple(place for place in found if place is not None)

    def _place(self, group: str, entry: Any) -> Place | None:
        pair = entry if isinstance(entry, (list, tuple)) else (entry, -1)
        module, axis = pair if len(pair) == 2 else (None, None)
        if not isinstance(module, str) or not isinstance(axis, int) or axis >= 0:
            self.problems.append(
                f"places: {group}: expected modules, or pairs of a module and an axis of its "
                f"output from the end (-1 the last), e.g. [fc1, [relu1, -3]]; got {entry!r}."
            )
            return None
        if self.modules is not None and module not in self.modules:
            self.problems.append(
                f"places: {group}: unknown module {module!r}.{nearest(module, self.modules)}"
            )
            return None
        own = None if self.modules is None else self.modules[module]
        if axis == -1 and isinstance(own, (nn.Conv2d, nn.BatchNorm2d)):
            axis = -3
        return Place(module, axis, 0, (self.sizes[group],), 0)


def _stretches(axis: Any, size: int) -> list[_Product]:
    """An axis as stretches of factors."""
    if axis is None:
        return [[size]]
    if not isinstance(axis, (list, tuple)):
        return [[axis]]
    if axis and all(isinstance(part, (list, tuple)) for part in axis):
        return [list(part) for part in axis]
    return [list(axis)]
