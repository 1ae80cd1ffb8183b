"""Which places show a group's units whatever the size of the input."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradmerge.alignment.symmetry.example import at_other_sizes
from gradmerge.alignment.symmetry.spec import Group, PermutationSpec, Place
from gradmerge.alignment.symmetry.trace import run, stand_in
from gradmerge.errors import ConfigError

_Shapes = Mapping[tuple[str, int], tuple[int, ...]]


def steady(
    spec: PermutationSpec, skeleton: nn.Module, example: Mapping[str, Any], written: bool
) -> PermutationSpec:
    """The specification without places whose axis changes its size with the batch or the length.

    Units share such an axis with examples or positions (heads and batch in one, for a batched
    product of matrices), so that a stretch of fixed length would show those of some rows alone.
    They show in other places, or nowhere.

    Args:
        spec: groups and their places.
        skeleton: the network.
        example: arguments of its forward.
        written: places were named by hand, and show a group along a whole axis.

    Raises:
        ConfigError: a place that was named by hand does not show its group.
    """
    modules = {place.module for group in spec.groups.values() for place in group.places}
    if not modules:
        return spec
    module, _ = stand_in(skeleton, torch.float32)
    shapes = partial(_shapes, module, modules)
    own = shapes(example)
    if written:
        _require_units(spec, own)
    others = [found for _, found in at_other_sizes(example, shapes)]

    def stays(place: Place) -> bool:
        return all(_size(place, other) in (None, _size(place, own)) for other in others)

    groups: dict[str, Group] = {}
    for name, group in spec.groups.items():
        groups[name] = replace(group, places=tuple(p for p in group.places if stays(p)))
    return replace(spec, groups=groups)


def _require_units(spec: PermutationSpec, shapes: _Shapes) -> None:
    problems = []
    for name, group in spec.groups.items():
        for place in group.places:
            size = _size(place, shapes)
            if size != group.size:
                shape = shapes.get((place.module, place.call))
                gives = f"gives {list(shape)}" if shape else "gives no tensor on the example"
                problems.append(
                    f"  places: {name}: expected a module whose output has {group.size} entries "
                    f"along axis {place.axis}; {place.module} {gives}."
                )
    if problems:
        lines = "\n".join(problems)
        raise ConfigError(f"alignment.spec: {len(problems)} problem(s).\n{lines}")


def _size(place: Place, shapes: _Shapes) -> int | None:
    shape = shapes.get((place.module, place.call), ())
    return shape[place.axis] if len(shape) >= -place.axis else None


def _shapes(module: nn.Module, names: set[str], example: Mapping[str, Any]) -> _Shapes:
    """Shapes of what modules give (the first of several), by module and call."""
    found: dict[tuple[str, int], tuple[int, ...]] = {}

    def note(name: str, _: nn.Module, __: Any, output: Any) -> None:
        call = sum(name == known for known, _ in found)
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        found[name, call] = tuple(first.shape) if isinstance(first, Tensor) else ()

    hooks = [
        module.get_submodule(name).register_forward_hook(partial(note, name)) for name in names
    ]
    try:
        with torch.no_grad():
            run(module, example, nullcontext())
    finally:
        for hook in hooks:
            hook.remove()
    return found
