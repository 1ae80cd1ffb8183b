"""Raw coefficients of one block after another: where they start, and the files they end in.

A file holds `z` of each slot, `[rows, *slot]`, by the slot's name. Files are mapped when they are
read, so that the coefficients of a whole model are never in memory at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gradmerge.drivers.layerwise.blocks import slot_id
from gradmerge.engine.plan import Plan
from gradmerge.export.writer import Entry, write_safetensors


class Starts:
    """Starting coefficients of a plan, of some tensors at a time.

    `plan.initial_raw()` makes all at once; of an Element merge they are K times the model.

    Args:
        plan: an opened recipe.
        dtype: of raw coefficients.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype) -> None:
        self._plan, self.dtype = plan, dtype
        self._context = plan.init_context()

    def slots(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The slots of tensors, by name, and the tensors that share each."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(slot_id(self._plan.layout.slots[name]), []).append(name)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor's raw coefficients."""
        layout = self._plan.layout
        slot = layout.slots[name]
        own = layout.shapes[slot.key] if slot.index is None else slot.shape
        return (self._plan.num_rows, *own)

    def one(self, names: Sequence[str]) -> Tensor:
        """`z` of a slot that these tensors share: the mean of what the init gives each."""
        recipe = self._plan.recipe
        total = None
        for name in names:
            slot = self._plan.layout.slots[name]
            value = recipe.init.coefficient(self._context.tensors[name], slot, self._context)
            total = value.double() if total is None else total.add_(value)
        assert total is not None
        mean = total if len(names) == 1 else total.div_(len(names))
        # through float32, as a merge of the whole model starts
        return recipe.coefficients.pull_back(mean).float().to(self.dtype)

    def write(self, path: Path, names: Iterable[str]) -> None:
        """A file of the start of these tensors, one slot in memory at a time."""
        entries = [
            Entry(slot, self.shape(shared[0]), self.dtype, partial(self.one, shared))
            for slot, shared in self.slots(names).items()
        ]
        write_whole(path, entries)


def write_whole(path: Path, entries: Sequence[Entry]) -> None:
    """A safetensors file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write_safetensors(work, entries)
    work.replace(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The same, of tensors at hand."""

    def given(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor.detach().cpu()

    entries = [Entry(n, tuple(t.shape), t.dtype, given(t)) for n, t in tensors.items()]
    write_whole(path, entries)


def read_mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped."""
    file: Any = safe_open(str(path), framework="pt")
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assembled(plan: Plan, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Raw coefficients as a plan takes them, of those of all slots by their names.

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
