"""Raw coefficients of one block after another: where they start, and the files they end in.

A file holds `z` of each slot, `[rows, *slot]`. Files are mapped when they are read, so that the
coefficients of a whole model are never in memory at once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gradmerge.coefficients import Layout
from gradmerge.common.atomic import whole_file
from gradmerge.engine.plan import Plan
from gradmerge.export.writer import Entry, write_safetensors


def with_own_keys(plan: Plan) -> Plan:
    """Return the same plan with a raw parameter for each slot, instead of tables of many."""
    slots, shapes = {}, {}
    for name, slot in plan.layout.slots.items():
        key = slot.key if slot.index is None else f"{slot.key}/{slot.index}"
        shapes[key] = plan.layout.shapes[key] if slot.index is None else slot.shape
        slots[name] = replace(slot, key=key, index=None)
    other = copy.copy(plan)
    other.layout = Layout(slots, shapes)
    return other


class Starts(Mapping[str, Tensor]):
    """Raw coefficients at the start, by the keys of `with_own_keys`, each made when it is read.

    `plan.initial_raw()` makes all at once; for Element they are K times the model.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype) -> None:
        self._plan, self._dtype = plan, dtype
        self._context = plan.init_context()
        self._layout = with_own_keys(plan).layout
        self._sharing: dict[str, list[str]] = {}
        for name, slot in self._layout.slots.items():
            self._sharing.setdefault(slot.key, []).append(name)

    def __getitem__(self, key: str) -> Tensor:
        """Return `z` of a slot: the mean of what the init gives each of its tensors."""
        recipe, slots, context = self._plan.recipe, self._plan.layout.slots, self._context
        total: Any = 0
        for name in self._sharing[key]:
            value = recipe.init.coefficient(context.tensors[name], slots[name], context)
            total = total + value.double()
        # through float32, as a merge of the whole model starts
        mean = total / len(self._sharing[key])
        return recipe.coefficients.pull_back(mean).float().to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sharing)

    def __len__(self) -> int:
        return len(self._sharing)

    def entry(self, key: str) -> Entry:
        """Return an entry of a file, whose `z` is made as it is written."""
        shape = (self._plan.num_rows, *self._layout.shapes[key])
        return Entry(key, shape, self._dtype, partial(self.__getitem__, key))


def write_whole(path: Path, entries: Sequence[Entry]) -> None:
    """Write a safetensors file that exists completely or not at all."""
    with whole_file(path) as work:
        write_safetensors(work, entries)


def read_mapped(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped."""
    file: Any = safe_open(str(path), framework="pt")
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
