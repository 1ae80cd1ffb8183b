"""Places of tensors as transformers' loader finds them: renamed, with or without the base's prefix,
fused with others or split.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from gradmerge.common.errors import SourceError
from gradmerge.sources.windows import Traced, Window


@dataclass(frozen=True)
class Place:
    """The place of a stored tensor in the network."""

    name: str
    """Its name in the module, or what the name would be before it is fused or split."""
    conversion: Conversion | None = None
    """How the loader fuses it with others or splits it (experts of some mixtures)."""


@dataclass(frozen=True)
class Conversion:
    """A rule by which the loader makes parameters of stored tensors of other shapes."""

    converter: Any
    """The library's `WeightConverter`."""
    target: str
    """Name of the first parameter that it makes."""
    pattern: str
    """The pattern of stored names, of those of the converter, that the tensor belongs to."""


@dataclass(frozen=True)
class Fused:
    """A parameter that is made of stored tensors, each of which lies in it as a whole."""

    place: str
    """Name of the parameter."""
    parts: Mapping[str, Window]
    """Place of each stored tensor in the parameter, by its name in the files."""


@dataclass(frozen=True)
class Split:
    """A stored tensor of which several parameters are made."""

    name: str
    """Its name in the files."""
    shape: tuple[int, ...]
    """The shape that it must have."""
    parts: Mapping[str, Window]
    """Each parameter as a part of the tensor, by its name in the module."""


class Loader:
    """The loader's rules for one network; a module that is not of transformers has none.

    Args:
        module: the network, which may be without weights.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self.known = {n: tuple(t.shape) for n, t in module.state_dict(keep_vars=True).items()}
        """Shapes of the parameters and persistent buffers of the module by name."""

    @cached_property
    def _is_of_transformers(self) -> bool:
        try:
            from transformers import PreTrainedModel
            from transformers.core_model_loading import rename_source_key  # noqa: F401
        except ImportError:
            return False
        return isinstance(self._module, PreTrainedModel)

    def places(
        self, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> dict[str, Place]:
        """Return the place of each name, in the order of `names`.

        Args:
            names: names in the files.
            shapes: their shapes, as far as they are known.
        """
        given = {**self.known, **(shapes or {})}
        places = {name: Place(name) for name in names}
        fitting = {name for name in names if name in self.known and given[name] == self.known[name]}
        if fitting.issuperset(names) or not self._is_of_transformers:
            return places
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            apply_converters,
            apply_renamings,
            dot_natural_key,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(self._module)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        prefix = self._module.base_model_prefix
        meta = dict.fromkeys(self.known, torch.empty(0, device="meta"))
        # in the loader's order, on which some renamings depend
        for name in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
            if target not in meta and name in meta:
                target, pattern = rename_source_key(name, [], [], prefix, meta)
            if pattern is None or (target == name and name in fitting):
                places[name] = Place(target)
                continue
            plain = apply_renamings(name, renamings)
            converted, _ = apply_converters(plain, converters)
            if target == f"{prefix}.{converted}":
                plain = f"{prefix}.{plain}"
            elif target != converted:
                plain = plain.removeprefix(f"{prefix}.")
            rule = next(c for c in converters if pattern in c.source_patterns)
            places[name] = Place(plain, Conversion(rule, target, pattern))
        return places

    def conversions(
        self, places: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[list[Fused | Split], dict[str, Exception]]:
        """Return how parameters are made of stored tensors, where they are not just renamed.

        The library's own conversions are followed, without values.

        Args:
            places: place of each stored tensor (see `places`).
            shapes: shapes of stored tensors, as far as they are known.

        Returns:
            The parameters and tensors, and the error for each parameter (by name) whose conversion
            cannot be followed, or, as a `SourceError`, lacks tensors.
        """
        if all(place.conversion is None for place in places.values()):
            return [], {}
        from transformers.core_model_loading import dot_natural_key

        groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        for name in sorted(places, key=dot_natural_key):
            rule = places[name].conversion
            if rule is not None:
                _, stored = groups.setdefault(rule.target, (rule.converter, defaultdict(list)))
                stored[rule.pattern].append(name)
        found: list[Fused | Split] = []
        failed: dict[str, Exception] = {}
        for target, (converter, stored) in groups.items():
            if target not in self.known:
                continue  # a layer that the network does not have
            try:
                found += _Converting(self._module, converter, target).run(stored, shapes)
            except Exception as error:  # the library's rules raise whatever they like
                failed[target] = error
        return found, failed

    def saved(self, places: Sequence[str]) -> dict[str, str]:
        """Return the name under which `save_pretrained` writes what belongs to each place."""
        if not self._is_of_transformers:
            return {place: place for place in places}
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            PrefixChange,
            WeightRenaming,
            apply_renamings,
        )

        back = [
            transform.reverse_transform()
            for transform in get_model_conversion_mapping(self._module, add_legacy=False)[::-1]
            if not isinstance(transform, PrefixChange)  # as for a network that was not loaded
        ]
        renamings = [entry for entry in back if isinstance(entry, WeightRenaming)]
        return {place: apply_renamings(place, renamings) for place in sorted(places)}

    def ignores(self, place: str) -> bool:
        """Return whether the loader passes over a tensor that has no place, without a warning."""
        return (
            place not in self.known
            and self._ignored is not None
            and bool(self._ignored.search(place))
        )

    @cached_property
    def _ignored(self) -> re.Pattern[str] | None:
        if not self._is_of_transformers:
            return None
        patterns = list(self._module._keys_to_ignore_on_load_unexpected or ())
        # buffers that older versions stored and current ones compute
        buffers = [name for name, _ in self._module.named_buffers()]
        for end, pattern in (
            ("rotary_emb.inv_freq", r"rotary_emb\.inv_freq"),
            ("position_ids", r"(^|\.)position_ids$"),
        ):
            if any(name.endswith(end) for name in buffers):
                patterns.append(pattern)
        return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


class _Converting:
    """One use of a conversion: for the parameters of one module."""

    def __init__(self, module: Any, converter: Any, target: str) -> None:
        self.module, self.converter, self.target = module, converter, target
        self.back = converter.reverse_transform()
        self.targets = [target]
        if len(converter.target_patterns) > 1:
            before, first, after = target.partition(converter.target_patterns[0])
            if not first:
                raise ValueError(f"{target} is not named by {converter}")
            self.targets = [f"{before}{name}{after}" for name in converter.target_patterns]

    def run(
        self, stored: Mapping[str, Sequence[str]], shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[Fused | Split]:
        """Yield the parameters that are fused, and the tensors that are split."""
        sizes = [tuple(self.module.get_parameter(name).shape) for name in self.targets]
        patterns = self.converter.source_patterns
        if len(patterns) > 1 or "*" in patterns[0]:
            yield from self._fused(stored, sizes)
            return
        (name,) = stored[patterns[0]]
        wholes = [torch.empty(size, device="meta") for size in sizes]
        ((_, stacked),) = self._apply(self.back, wholes).items()
        expected = given = tuple(stacked.shape)
        if torch.Size(shapes.get(name, ())).numel() == torch.Size(expected).numel():
            given = shapes.get(name, expected)
        made = self._apply(self.converter, [Traced(Window.over(name, given))])
        parts = {self._named(key): tensor.window for key, tensor in made.items()}
        if [part.shape for part in parts.values()] != sizes or list(parts) != self.targets:
            yield Split(name, expected, parts)  # its shape is wrong, which is reported as such
            return
        whole = parts[self.target].inverse(self.target, given)
        if len(parts) == 1 and whole is not None:
            yield Fused(self.target, {name: whole})
        else:
            yield Split(name, given, parts)

    def _fused(
        self, stored: Mapping[str, Sequence[str]], sizes: Sequence[tuple[int, ...]]
    ) -> Iterator[Fused]:
        wholes = [Traced(Window.over(n, s)) for n, s in zip(self.targets, sizes, strict=True)]
        made = self._apply(self.back, wholes)
        windows: dict[str, dict[str, Window]] = {target: {} for target in self.targets}
        pairs = zip(self.converter.source_patterns, self.back.target_patterns, strict=True)
        taken = 0
        for pattern, key in pairs:
            names = stored.get(pattern, [])
            numbers = [key.replace("*", str(i)) for i in range(len(names))]
            if any(number not in made for number in numbers):
                break
            taken += len(set(numbers))
            for name, number in zip(names, numbers, strict=True):
                windows[made[number].window.whole][name] = made[number].window
        if taken != len(made):
            got = sum(map(len, stored.values()))
            raise SourceError(f"expected {len(made)} tensors in the files, got {got}")
        for target, parts in windows.items():
            yield Fused(target, parts)

    def _apply(self, rule: Any, tensors: Sequence[Any]) -> dict[str, Any]:
        """Run a rule's operations on one tensor per source pattern."""
        made: dict[str, Any] = {
            pattern: [tensor] for pattern, tensor in zip(rule.source_patterns, tensors, strict=True)
        }
        for operation in rule.operations:
            made = operation.convert(
                made,
                source_patterns=rule.source_patterns,
                target_patterns=rule.target_patterns,
                full_layer_name=self.target,
                model=self.module,
                config=self.module.config,
                missing_keys=None,
            )
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def _named(self, key: str) -> str:
        """Return the name of the parameter that an operation calls by its pattern."""
        patterns = self.converter.target_patterns
        return self.targets[patterns.index(key)]
