"""Raw coefficients of one block after another: where they start, and the files they end in.

A file holds `z` of each slot, `[rows, *slot]`, by the slot's name. Files are mapped when they are
read, so that the coefficients of a whole model are never in memory at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gradmerge.coefficients.base import Slot
from gradmerge.engine.plan import Plan
from gradmerge.export.writer import Entry, write_safetensors


def slot_id(slot: Slot) -> str:
    """Return a name for the raw coefficients of one slot."""
    return slot.key if slot.index is None else f"{slot.key}/{slot.index}"


class Starts:
    """Starting coefficients of a plan, of some tensors at a time.

    `plan.initial_raw()` makes all at once; for Element they are K times the model.

    Args:
        plan: an opened recipe.
        dtype: of raw coefficients.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype) -> None:
        self._plan, self.dtype = plan, dtype
        self._context = plan.init_context()

    def slots(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return the slots of tensors by name, and the tensors that share each."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(slot_id(self._plan.layout.slots[name]), []).append(name)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor's raw coefficients."""
        layout = self._plan.layout
        slot = layout.slots[name]
        own = layout.shapes[slot.key] if slot.index is None else slot.shape
        return (self._plan.num_rows, *own)

    def one(self, names: Sequence[str]) -> Tensor:
        """Return `z` of a slot that these tensors share: the mean of what the init gives each."""
        recipe = self._plan.recipe
        total: Any = 0
        for name in names:
            slot = self._plan.layout.slots[name]
            value = recipe.init.coefficient(self._context.tensors[name], slot, self._context)
            total = total + value.double()
        mean = total if len(names) == 1 else total / len(names)
        # through float32, as a merge of the whole model starts
        return recipe.coefficients.pull_back(mean).float().to(self.dtype)

    def means(self) -> dict[str, float]:
        """Return the mean coefficient of each source, with one slot in memory at a time."""
        plan = self._plan
        num, learned = len(plan.sources), plan.learned
        total = torch.zeros(num, dtype=torch.float64)
        with torch.no_grad():
            for shared in self.slots(learned).values():
                coefficient = plan.recipe.coefficients.link(self.one(shared))
                means = coefficient.reshape(num, -1).mean(dim=1, dtype=torch.float64)
                total += len(shared) * means.cpu()
        return dict(zip(plan.sources, (total / len(learned)).tolist(), strict=True))

    def write(self, path: Path, names: Iterable[str]) -> None:
        """Write a file of the starts of these tensors, with one slot in memory at a time."""
        entries = [
            Entry(slot, self.shape(shared[0]), self.dtype, partial(self.one, shared))
            for slot, shared in self.slots(names).items()
        ]
        _write_whole(path, entries)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors at hand."""
    entries = [Entry(n, tuple(t.shape), t.dtype, t.detach().cpu) for n, t in tensors.items()]
    _write_whole(path, entries)


def _write_whole(path: Path, entries: Sequence[Entry]) -> None:
    """Write a safetensors file that exists completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write_safetensors(work, entries)
    work.replace(path)


def read_mapped(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped."""
    file: Any = safe_open(str(path), framework="pt")
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assembled(plan: Plan, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return raw coefficients as a plan takes them, given those of all slots by name.

    Tables that tensors share by columns are put together; all others stay where they are mapped.
    """
    raw: dict[str, Tensor] = {}
    for slot in plan.layout.slots.values():
        part = parts[slot_id(slot)]
        if slot.index is None:
            raw[slot.key] = part
            continue
        if slot.key not in raw:
            shape = (plan.num_rows, *plan.layout.shapes[slot.key])
            raw[slot.key] = torch.zeros(shape, dtype=part.dtype)
        raw[slot.key][:, slot.index] = part
    return raw
