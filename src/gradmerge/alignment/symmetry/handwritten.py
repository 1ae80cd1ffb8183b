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

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
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

_FIELDS = ("tensors", "sizes", "roles", "places", "multiplied")
_EXAMPLES = {
    "sizes": "{heads: 12}",
    "roles": "{fc1.weight: [out, in]}",
    "places": "{hidden: [fc1, [relu1, -3]]}",
}


def read_spec(
    given: str | Path | Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    skeleton: nn.Module | None = None,
) -> PermutationSpec:
    """A specification from a file or a mapping, checked against the tensors' shapes.

    Args:
        given: a YAML file, or the mapping itself.
        shapes: of every tensor, by its name in the files.
        skeleton: the network, in which places are looked up.

    Raises:
        ConfigError: everything that does not fit, at once.
    """
    fields = _fields(given)
    written = _Written(fields, shapes, skeleton)
    spec = written.spec()
    if written.problems:
        lines = "\n".join(f"  {problem}" for problem in written.problems)
        raise ConfigError(
            f"alignment.spec: {len(written.problems)} problem(s); units would be permuted wrongly."
            f"\n{lines}"
        )
    return spec


def _fields(given: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(given, (str, Path)):
        import yaml

        try:
            given = yaml.safe_load(Path(given).expanduser().read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"alignment.spec: {given} cannot be read: {error}") from error
    if not isinstance(given, Mapping) or not isinstance(given.get("tensors"), Mapping):
        raise ConfigError(
            "alignment.spec: expected a mapping with `tensors`: axes by tensor, e.g. "
            f"{{tensors: {{fc1.weight: [hidden, null]}}}}; got {str(given)[:60]!r}."
        )
    unknown = [str(name) for name in given if name not in _FIELDS]
    if unknown:
        raise ConfigError(
            f"alignment.spec: no field {unknown[0]!r}.{nearest(unknown[0], _FIELDS)} Expected "
            f"{', '.join(_FIELDS)}."
        )
    for name, example in _EXAMPLES.items():
        if not isinstance(given.get(name) or {}, Mapping):
            raise ConfigError(
                f"alignment.spec: {name}: expected a mapping such as {example}, got "
                f"{str(given[name])[:60]!r}."
            )
    if not isinstance(given.get("multiplied") or [], (list, tuple)):
        raise ConfigError(
            f"alignment.spec: multiplied: expected a list of groups such as [heads], got "
            f"{str(given['multiplied'])[:60]!r}."
        )
    return given


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class _Written:
    """The mapping, with the problems found in it."""

    def __init__(
        self,
        fields: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        skeleton: nn.Module | None,
    ) -> None:
        self.shapes, self.skeleton = shapes, skeleton
        self.problems: list[str] = []
        self.sizes: dict[str, int] = {}
        self.axes: dict[str, list[list[list[Any]]]] = {}
        self.fields = fields
        for name, size in (fields.get("sizes") or {}).items():
            if _is_size(size):
                self.sizes[name] = size
            else:
                self.problems.append(f"sizes: {name}: expected a positive number, got {size!r}.")

    def spec(self) -> PermutationSpec:
        """Every tensor, with sizes inferred; problems are noted."""
        for name, axes in self.fields["tensors"].items():
            self._read(str(name), axes)
        while self._infer():
            pass
        tensors = {name: self._tensor(name, axes) for name, axes in self.axes.items()}
        names = dict.fromkeys(g for axes in tensors.values() for axis in axes for g in axis.groups)
        apart = self.fields.get("multiplied") or []
        groups = {n: Group(n, self.sizes[n], self._places(n), n in apart) for n in sorted(names)}
        self.problems += [
            f"multiplied: {name} is no group of a tensor.{nearest(str(name), names)}"
            for name in apart
            if name not in names
        ]
        for field in ("sizes", "places"):
            for name in self.fields.get(field) or {}:
                if name not in names:
                    self.problems.append(
                        f"{field}: {name} is no group of a tensor.{nearest(str(name), names)}"
                    )
        for name in self.fields.get("roles") or {}:
            if name not in self.axes:
                self.problems.append(f"roles: {name} is not among the tensors.")
        return PermutationSpec(groups, tensors)

    def _read(self, name: str, axes: Any) -> None:
        """One tensor's axes as stretches of factors."""
        shape = self.shapes.get(name)
        if shape is None:
            self.problems.append(
                f"{name}: the checkpoint has no such tensor.{nearest(name, self.shapes)}"
            )
            return
        if not isinstance(axes, (list, tuple)) or len(axes) > len(shape):
            self.problems.append(
                f"{name}: expected a list of at most {len(shape)} axes (shape {list(shape)}), got "
                f"{axes!r}."
            )
            return
        whole = [*axes, *[None] * (len(shape) - len(axes))]
        found = []
        for axis, size in zip(whole, shape, strict=True):
            if axis is None:
                found.append([[size]])
            elif not isinstance(axis, (list, tuple)):
                found.append([[axis]])
            elif axis and all(isinstance(part, (list, tuple)) for part in axis):
                found.append([list(part) for part in axis])
            else:
                found.append([list(axis)])
        wrong = [
            factor
            for axis in found
            for segment in axis
            for factor in segment
            if not (isinstance(factor, str) or _is_size(factor))
        ]
        if wrong:
            self.problems.append(
                f"{name}: expected names of groups and positive sizes along an axis, got "
                f"{shorten([repr(factor) for factor in wrong])}."
            )
            return
        self.axes[name] = found

    def _infer(self) -> bool:
        """Find sizes of groups from axes where one group alone is unknown; False: no more."""
        before = len(self.sizes)
        for name, axes in self.axes.items():
            for axis, size in zip(axes, self.shapes[name], strict=True):
                unknown = [f for s in axis for f in s if isinstance(f, str) and f not in self.sizes]
                if not unknown or len(set(unknown)) > 1:
                    continue
                if any(segment.count(unknown[0]) > 1 for segment in axis):
                    continue
                # sum of a_s x (with x in the segment) + b_s (without) = size
                with_it = without = 0
                for segment in axis:
                    known = torch.Size(
                        self.sizes[f] if isinstance(f, str) else f
                        for f in segment
                        if f != unknown[0]
                    ).numel()
                    if unknown[0] in segment:
                        with_it += known
                    else:
                        without += known
                left = size - without
                if left > 0 and left % with_it == 0:
                    self.sizes[unknown[0]] = left // with_it
                else:
                    self.problems.append(
                        f"{name}: an axis of {size} cannot be {axis}: {unknown[0]} would not be "
                        "whole."
                    )
                    self.sizes[unknown[0]] = 1
        return len(self.sizes) > before

    def _tensor(self, name: str, axes: list[list[list[Any]]]) -> tuple[Axis, ...]:
        shape = self.shapes[name]
        roles = self._roles(name, len(shape))
        found = []
        for axis, size, role in zip(axes, shape, roles, strict=True):
            lost = [f for s in axis for f in s if isinstance(f, str) and f not in self.sizes]
            if lost:
                self.problems.append(
                    f"{name}: the size of {shorten(list(dict.fromkeys(lost)))} cannot be inferred; "
                    "state it under `sizes`."
                )
                self.sizes.update(dict.fromkeys(lost, 1))
            segments = tuple(
                Segment(
                    tuple(
                        Factor(self.sizes[f], f) if isinstance(f, str) else Factor(f)
                        for f in segment
                    )
                )
                for segment in axis
            )
            made = Axis(segments, role)
            if made.size != size and not lost:
                stated = {f: self.sizes[f] for s in axis for f in s if isinstance(f, str)}
                self.problems.append(
                    f"{name}: expected axes of {list(shape)}, got {axis} with {stated}, which is "
                    f"{made.size} where the tensor has {size}."
                )
            found.append(made)
        return tuple(found)

    def _roles(self, name: str, count: int) -> list[Role]:
        given = (self.fields.get("roles") or {}).get(name)
        if given is not None:
            if (
                isinstance(given, (list, tuple))
                and len(given) == count
                and all(role in get_args(Role) for role in given)
            ):
                return list(given)
            self.problems.append(
                f"roles: {name}: expected {count} of {', '.join(get_args(Role))}, got {given!r}."
            )
        if count == 1:
            return [vector_role(name)]
        return ["in" if axis == 1 else "out" for axis in range(count)]

    def _places(self, group: str) -> tuple[Place, ...]:
        found = []
        given = (self.fields.get("places") or {}).get(group) or []
        if not isinstance(given, (list, tuple)):
            given = [given]
        for entry in given:
            pair = entry if isinstance(entry, (list, tuple)) else (entry, -1)
            whole = len(pair) == 2 and isinstance(pair[1], int) and not isinstance(pair[1], bool)
            if not whole or not isinstance(pair[0], str) or pair[1] >= 0:
                self.problems.append(
                    f"places: {group}: expected modules, or pairs of a module and an axis of its "
                    f"output from the end (-1 the last), e.g. [fc1, [relu1, -3]]; got {entry!r}."
                )
                continue
            module, axis = pair
            if self.skeleton is not None:
                modules = dict(self.skeleton.named_modules())
                if module not in modules:
                    self.problems.append(
                        f"places: {group}: no module {module!r}.{nearest(module, modules)}"
                    )
                    continue
                if axis == -1 and isinstance(modules[module], (nn.Conv2d, nn.BatchNorm2d)):
                    axis = -3
            found.append(Place(module, axis, 0, (self.sizes[group],), 0))
        return tuple(found)
