"""Names of tensors as transformers' loader has them: renamed, with or without the base's prefix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Place:
    """The place of a stored tensor in the network."""

    name: str
    """Its name in the module, or what the name would be before it is fused or split."""
    fused: bool = False
    """Whether the loader fuses it with others or splits it (experts of some mixtures)."""


class Loader:
    """The loader's rules for one network; a module that is not of transformers has none.

    Args:
        module: the network, which may be without weights.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self.known = set(module.state_dict(keep_vars=True))
        """Names of the parameters and persistent buffers of the module."""

    @cached_property
    def _is_of_transformers(self) -> bool:
        try:
            from transformers import PreTrainedModel
            from transformers.core_model_loading import rename_source_key  # noqa: F401
        except ImportError:
            return False
        return isinstance(self._module, PreTrainedModel)

    def places(self, names: Sequence[str]) -> dict[str, Place]:
        """Return the place of each name, in the order of `names`."""
        places = {name: Place(name) for name in names}
        if self.known.issuperset(names) or not self._is_of_transformers:
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
            if pattern is None:
                places[name] = Place(target)
                continue
            plain = apply_renamings(name, renamings)
            converted, _ = apply_converters(plain, converters)
            if target == f"{prefix}.{converted}":
                plain = f"{prefix}.{plain}"
            elif target != converted:
                plain = plain.removeprefix(f"{prefix}.")
            places[name] = Place(plain, fused=True)
        return places

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
