"""The tasks' own sources as teachers: what they return on a batch, and what is kept of it.

A teacher runs in the network of the merge, with its own weights and without gradient. Its outputs
on an example never change; with a `TeacherStore` each example runs once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradmerge.engine.merged import MergedModel
from gradmerge.engine.outputs import Batch, Outputs, Rows, layers_of, outputs_of
from gradmerge.engine.reading import NOT_INPUTS, AbstractReading, Logits, ZeroShot, reading_of
from gradmerge.engine.teacher_store import Entry, TeacherStore
from gradmerge.objectives import Leading, Objective
from gradmerge.objectives.base import UNLABELLED

_FORMAT = 1
"""Raised whenever entries of an older version would be wrong."""
_HIDDEN = "hidden/"


class Teacher:
    """Outputs of the tasks' own sources, as far as an objective compares with them.

    Args:
        merged: the model whose network they run in.
        objective: its terms say what they want.
        store: keeps the outputs on examples. Default: the source runs on every batch.

    Raises:
        ConfigError: a term names layers that the network does not have.
    """

    def __init__(
        self, merged: MergedModel, objective: Objective, store: TeacherStore | None = None
    ) -> None:
        self._merged, self._wanted, self.store = merged, objective.wanted, store
        self.layers = layers_of(merged, objective)
        """Names of the modules whose outputs are compared."""

    def __call__(self, task: str, batch: Batch) -> dict[str, Any]:
        """Return the fields of `Predictions` that are the teacher's."""
        if not (self._wanted.logits or self._wanted.leading or self.layers):
            return {}
        kept = self._remembered(task, batch)
        if kept is None:
            kept = {name: rows.values for name, rows in self._run(task, batch).items()}
        leading = {
            wanted: _leading(kept, _prefix(*wanted))
            for wanted in self._wanted.leading
            if not self._wanted.logits
        }
        hidden = {n.removeprefix(_HIDDEN): t for n, t in kept.items() if n.startswith(_HIDDEN)}
        return {"teacher": kept.get("logits"), "leading": leading, "teacher_hidden": hidden}

    def _run(self, task: str, batch: Batch) -> dict[str, Rows]:
        """Run the task's source on a batch and return what is wanted of its outputs, by name."""
        source = self._merged.tasks[task]
        with self._merged.as_source(source, own=True):
            outputs = outputs_of(self._merged, task, batch, self.layers, source)
        return self._kept(outputs)

    def _kept(self, outputs: Outputs) -> dict[str, Rows]:
        logits, mask = outputs.logits.values.detach(), outputs.logits.kept
        kept = {f"{_HIDDEN}{name}": state for name, state in outputs.hidden.items()}
        if self._wanted.logits:
            return {**kept, "logits": Rows(logits, mask)}
        for count, temperature in sorted(self._wanted.leading):
            leading, prefix = Leading.of(logits, count, temperature), _prefix(count, temperature)
            kept[f"{prefix}/log_p"] = Rows(leading.log_p, mask)
            kept[f"{prefix}/classes"] = Rows(leading.classes.int(), mask)  # half the bytes
            kept[f"{prefix}/log_rest"] = Rows(leading.log_rest, mask)
        return kept

    def _remembered(self, task: str, batch: Batch) -> dict[str, Tensor] | None:
        """Return what is kept of the batch's examples, asking the source about new ones.

        None without a store, and if rows of one example depend on the others.
        """
        reading = reading_of(self._merged.skeleton, batch)
        if self.store is None or (isinstance(reading, ZeroShot) and self.layers):
            return None  # hidden states of a text tower are those of the classes
        own = _own_inputs(reading, batch)
        if own is None:
            return None
        keys = self._keys(task, batch, own, reading)
        found = self.store.read(keys)
        new = [i for i, entry in enumerate(found) if entry is None]
        if new:
            part = batch
            if len(new) < len(found):
                part = {**batch, **{name: tensor[new] for name, tensor in own.items()}}
            entries = _by_example(self._run(task, part), len(new))
            if entries is None:
                return None
            self.store.write({keys[i]: entry for i, entry in zip(new, entries, strict=True)})
            for i, entry in zip(new, entries, strict=True):
                found[i] = entry
        known = [entry for entry in found if entry is not None]
        device = self._merged.device
        return {n: torch.cat([entry[n].to(device) for entry in known]) for n in known[0]}

    def _keys(
        self, task: str, batch: Batch, own: Mapping[str, Tensor], reading: AbstractReading
    ) -> list[bytes]:
        """Return a digest per example of all that the source's outputs on it depend on."""
        plan, device = self._merged.plan, self._merged.device.type
        names = (self._merged.tasks[task], "base", "(tokens)", "(units)")
        shared = {
            name: value
            for name, value in batch.items()
            if name not in own and name not in ("bytes_per_token", "reading")
        }
        if isinstance(reading, ZeroShot) and reading.texts:
            shared = {}  # the texts' digest stands for them
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        head = hashlib.blake2b(digest_size=32)
        stated = (
            _FORMAT,
            [plan.fingerprints.get(name) for name in names],
            [plan.side_hashes.get(name) for name in names],
            type(self._merged.skeleton).__qualname__,
            (self._wanted.logits, sorted(self._wanted.leading), self.layers),
            (self._merged.dtype, autocast, reading),
            sorted((n, v) for n, v in shared.items() if not isinstance(v, Tensor)),
        )
        head.update(repr(stated).encode())
        for name, tensor in sorted(shared.items()):
            if isinstance(tensor, Tensor):
                _update(head, name, tensor.cpu())
        masks = {name: _mask(name, reading, own) for name in own}
        on_cpu = {name: tensor.cpu() for name, tensor in sorted(own.items())}
        return [
            _digest(head.copy(), on_cpu, masks, i) for i in range(len(next(iter(own.values()))))
        ]


def _prefix(count: int, temperature: float) -> str:
    return f"top {count} at {temperature}"


def _leading(kept: Mapping[str, Tensor], prefix: str) -> Leading:
    classes = kept[f"{prefix}/classes"].long()
    return Leading(kept[f"{prefix}/log_p"], classes, kept[f"{prefix}/log_rest"])


def _own_inputs(reading: AbstractReading, batch: Batch) -> dict[str, Tensor] | None:
    """Return the entries of a batch with one row per example, labels included.

    None if rows of the predictions depend on several examples, or examples cannot be told apart.
    """
    if not isinstance(reading, (Logits, ZeroShot)):
        return None
    own = {name: v for name, v in batch.items() if isinstance(v, Tensor) and v.dim()}
    if isinstance(reading, ZeroShot):
        own = {n: v for n, v in own.items() if n.startswith("pixel_") or n in NOT_INPUTS}
    return (
        own
        if own and len({len(v) for v in own.values()}) == 1 and len(next(iter(own.values())))
        else None
    )


def _mask(name: str, reading: AbstractReading, own: Mapping[str, Tensor]) -> Tensor | None:
    """Return the mask `[batch, tokens]` of what an entry of a batch runs over, on the CPU."""
    decoded = name in NOT_INPUTS or name.startswith("decoder_")
    key = reading.mask if decoded and isinstance(reading, Logits) else "attention_mask"
    mask = own.get(key)
    return mask.cpu() != 0 if mask is not None and mask.dim() == 2 else None


def _digest(
    digest: Any, own: Mapping[str, Tensor], masks: Mapping[str, Tensor | None], i: int
) -> bytes:
    """Digest one example's own entries without padding, whose length its batch decides."""
    for name, tensor in own.items():
        row, mask = tensor[i], masks[name]
        is_text = mask is not None and row.dim() == 1 and not row.is_floating_point()
        if mask is not None and is_text and row.shape == mask[i].shape:
            # positions, too: padding on the left moves a text
            _update(digest, "positions", mask[i].nonzero())
            row = row[mask[i]]
        elif name == "labels" and row.dim() == 1:
            labelled = (row != UNLABELLED).nonzero()
            row = row[: int(labelled[-1]) + 1] if len(labelled) else row[:0]
        _update(digest, name, row)
    found: bytes = digest.digest()
    return found


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _by_example(kept: Mapping[str, Rows], examples: int) -> list[Entry] | None:
    """Return what is kept of each example; None if some output does not run over examples."""
    parts: dict[str, Sequence[Tensor]] = {}
    for name, rows in kept.items():
        split = rows.split(examples)
        if split is None:
            return None
        parts[name] = split
    return [{name: split[i] for name, split in parts.items()} for i in range(examples)]
