"""Raw coefficients of one block after another: where they start, and the files they end in.

A file holds `z` of each slot, `[rows, *slot]`. Files are mapped when they are read, so that the
coefficients of a whole model are never in memory at once.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gradmerge.coefficients import Layout
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


class Starts:
    """Starting coefficients of a plan, of some tensors at a time, by the keys of `with_own_keys`.

    `plan.initial_raw()` makes all at once; for Element they are K times the model.

    Args:
        plan: an opened recipe.
        dtype: of raw coefficients.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype) -> None:
        self._plan, self.dtype = plan, dtype
        self._context = plan.init_context()
        self._layout = with_own_keys(plan).layout

    def sharing(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return the keys of tensors' raw coefficients, and the tensors that share each."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self._layout.slots[name].key, []).append(name)
        return found

    def one(self, names: Sequence[str]) -> Tensor:
        """Return `z` of a slot that these tensors share: the mean of what the init gives each."""
        recipe, slots = self._plan.recipe, self._plan.layout.slots
        total: Any = 0
        for name in names:
            value = recipe.init.coefficient(self._context.tensors[name], slots[name], self._context)
            total = total + value.double()
        # through float32, as a merge of the whole model starts
        return recipe.coefficients.pull_back(total / len(names)).float().to(self.dtype)

    def means(self) -> dict[str, float]:
        """Return the mean coefficient of each source, with one slot in memory at a time."""
        plan = self._plan
        num, learned = len(plan.sources), plan.learned
        total = torch.zeros(num, dtype=torch.float64)
        with torch.no_grad():
            for shared in self.sharing(learned).values():
                coefficient = plan.recipe.coefficients.link(self.one(shared))
                means = coefficient.reshape(num, -1).mean(dim=1, dtype=torch.float64)
                total += len(shared) * means.cpu()
        return dict(zip(plan.sources, (total / len(learned)).tolist(), strict=True))

    def entries(self, names: Iterable[str]) -> list[Entry]:
        """Return the starts of these tensors for `write_whole`, each made as it is written."""
        num, shapes = self._plan.num_rows, self._layout.shapes
        return [
            Entry(key, (num, *shapes[key]), self.dtype, partial(self.one, shared))
            for key, shared in self.sharing(names).items()
        ]


def write_whole(path: Path, entries: Sequence[Entry]) -> None:
    """Write a safetensors file that exists completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write_safetensors(work, entries)
    work.replace(path)


def read_mapped(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped."""
    file: Any = safe_open(str(path), framework="pt")
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
