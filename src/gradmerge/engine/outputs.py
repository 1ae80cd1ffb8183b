"""Outputs of a network on a batch: rows of logits, labels, and hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from gradmerge.common.patterns import require_matches
from gradmerge.engine.heads import rows_by_head
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.reading import NOT_INPUTS, reading_of
from gradmerge.objectives import Objective
from gradmerge.objectives.base import HIDDEN, UNLABELLED, outermost

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of all examples of a batch, one after another."""

    values: Tensor
    """`[rows, ...]`."""
    kept: Tensor | None = None
    """Mask of the positions of all examples that have a row; None if all have."""

    def split(self, examples: int) -> list[Tensor] | None:
        """Return the rows of each example; None if they do not run over the examples."""
        if self.kept is None:
            counts = [len(self.values) // examples] * examples
        elif self.kept.numel() % examples:
            return None
        else:
            counts = self.kept.reshape(examples, -1).sum(dim=1).tolist()
        return list(self.values.split(counts)) if sum(counts) == len(self.values) else None


@dataclass(frozen=True)
class Outputs:
    """Outputs of the merged network, or of a source, on a batch."""

    logits: Rows
    labels: Tensor | None
    hidden: dict[str, Rows]
    """Outputs of modules by name, `[tokens, width]` without padding."""


def outputs_of(
    merged: MergedModel,
    task: str,
    batch: Batch,
    layers: Sequence[str] = (),
    source: str | None = None,
) -> Outputs:
    """Run the network once on a task's batch.

    Args:
        merged: the model; with `source` it has that source's weights.
        task: the task.
        batch: its batch.
        layers: names of modules whose outputs are returned, too.
        source: the source that is asked, None for the merge.
    """
    with _capturing(merged, layers) as states:
        rows = rows_by_head(merged, task, batch, source) or rows_of(merged, task, batch)
    logits, labels, kept = rows
    # only now, since what a hook computes would be missing where activations are recomputed
    hidden = {n: without_padding(state, _mask_of(n, state, batch)) for n, state in states.items()}
    return Outputs(Rows(logits, kept), labels, hidden)


def rows_of(
    merged: MergedModel, task: str, batch: Batch
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return logits of a task's batch as rows, labels, and the rows kept (see `AbstractReading`).

    Raises:
        ConfigError: the network's output is of another kind than the batch needs.
    """
    inputs = {
        key: merged.place(value) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key not in NOT_INPUTS
    }
    output = merged(task=task, **inputs)
    logits, labels, kept = reading_of(merged.skeleton, batch).rows(output, batch, merged.skeleton)
    if labels is not None and "labels" in batch:
        labels = torch.where(labels == HIDDEN, UNLABELLED, labels)
    return logits, labels, kept


def layers_of(merged: MergedModel, objective: Objective) -> list[str]:
    """Return the names of the modules whose outputs an objective's terms compare.

    Raises:
        ConfigError: an expression matches no module; the message lists all of them.
    """
    names = [name for name, _ in merged.skeleton.named_modules() if name]
    for term in objective.terms:
        option = f"{type(term).__name__}.layers"
        require_matches({option: term.wanted.layers}, names, f"module of {_kind(merged)}")
    return outermost(objective.wanted.layers, names)


def _kind(merged: MergedModel) -> str:
    return type(merged.skeleton).__name__


@contextmanager
def _capturing(merged: MergedModel, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of modules in the last forward pass within the context."""
    found: dict[str, Tensor] = {}
    here = get_ident()  # passes of other tasks may run between

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        state = _first_tensor(output)
        if state is not None and state.dim() > 1 and get_ident() == here:
            found[name] = state

    def begin(*_: Any) -> None:  # frozen heads have passes of their own before
        if get_ident() == here:
            found.clear()

    hooks = [merged.register_forward_pre_hook(begin)] if layers else []
    for name in layers:
        module = merged.skeleton.get_submodule(name)
        hooks.append(module.register_forward_hook(partial(keep, name)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _first_tensor(output: Any) -> Tensor | None:
    """Return the hidden state among what a module returns: its first tensor."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    if not isinstance(values, Iterable):
        return None
    return next((value for value in values if isinstance(value, Tensor)), None)


def _mask_of(name: str, state: Tensor, batch: Batch) -> Tensor | None:
    """Return the mask of the tokens that a hidden state runs over, if there is one."""
    keys = ["attention_mask", "decoder_attention_mask"]
    for key in reversed(keys) if "decoder" in name else keys:
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.shape == state.shape[:2]:
            return mask.to(state.device) != 0
    return None


def without_padding(state: Tensor, mask: Tensor | None) -> Rows:
    """Return a hidden state as rows: tokens where it has three axes, else examples.

    Args:
        state: `[batch, tokens, width]`, or `[batch, ...]`.
        mask: `[batch, tokens]`, false on padding.
    """
    if state.dim() != 3:
        return Rows(state.flatten(1))
    if mask is None or bool(mask.all()):
        return Rows(state.flatten(0, 1))
    return Rows(state[mask], mask)
