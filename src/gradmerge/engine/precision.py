"""Dtypes of a network's tensors in a computation of a given dtype, as transformers loads them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Precision:
    """The dtype of each parameter and buffer of a network, by its place.

    A network of transformers has the dtypes of `from_pretrained(dtype=...)`: tensors that its code
    makes in a dtype of its own keep it (rotary frequencies, routers), and so do those that it lists
    as to be kept in float32. All other floating-point tensors follow the computation, as by
    `Module.to`. Integers and complex numbers are never cast.

    Args:
        network: the network before its parameters are replaced.
    """

    def __init__(self, network: nn.Module) -> None:
        tensors = [
            *network.named_parameters(remove_duplicate=False),
            *network.named_buffers(remove_duplicate=False),
        ]
        self._own = {place: tensor.dtype for place, tensor in tensors}
        self._parts = _pretrained_parts(network)
        self._known: dict[torch.dtype, Mapping[str, torch.dtype]] = {}

    def of(self, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
        """Return the dtype of every tensor by its place, for a computation of `dtype`."""
        if dtype not in self._known:
            floats = {p: own for p, own in self._own.items() if own.is_floating_point}
            loaded: dict[str, torch.dtype] = {}
            if any(own != dtype for own in floats.values()):
                for prefix, kind, config in self._parts:
                    found = _loaded(kind, config, dtype)
                    loaded.update({prefix + place: own for place, own in found.items()})
            kept = {p: own if own == dtype else loaded.get(p, dtype) for p, own in floats.items()}
            self._known[dtype] = {**self._own, **kept}
        return self._known[dtype]


def _pretrained_parts(network: nn.Module) -> list[tuple[str, Any, Any]]:
    """Return prefix, class and config of the outermost models of transformers."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return []
    parts: list[tuple[str, Any, Any]] = []
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        inside = any(prefix.startswith(outer) for outer, *_ in parts)
        if isinstance(module, PreTrainedModel) and not inside:
            parts.append((prefix, type(module), module.config))
    return parts


def _loaded(kind: Any, config: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes of `from_pretrained(dtype=...)`; none if the class builds otherwise."""
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            twin: Any = kind._from_config(copy.deepcopy(config), dtype=dtype)
    except Exception:  # a class with a constructor of its own
        return {}
    tensors = [
        *twin.named_parameters(remove_duplicate=False),
        *twin.named_buffers(remove_duplicate=False),
    ]
    found: dict[str, torch.dtype] = {place: tensor.dtype for place, tensor in tensors}
    plan = twin._get_dtype_plan(dtype) if hasattr(twin, "_get_dtype_plan") else {}
    for place in twin.state_dict():
        for pattern, kept in plan.items():
            if re.search(pattern.replace("*", ".*"), place):
                found[place] = kept
    return found
