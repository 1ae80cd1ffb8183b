"""The backward passes of a step's losses, by memory mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradmerge.engine.autograd import backward_of, scalar
from gradmerge.engine.leaves import Leaves

_LAYERS = 2
"""Layers whose tensors a backward pass keeps for all tasks, which are not in step to the node."""

Losses = Sequence[Callable[[], Tensor]]


def backward(model: Any, losses: Losses, scale: float) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return gradients by key, apart from those that a step's proxies get, and the losses.

    Args:
        model: the `MergedModel`, whose passes the losses run.
        losses: callables that return scalar losses.
        scale: factor on the losses, and so on the gradients.
    """
    if model.memory == "resident":
        return _resident(model, losses, scale)
    values: list[Tensor] = []
    made, shared = model.parameters_made, model.plan.tensors.keys()
    # a parameter put together of merged tensors and those of a task is made for each task
    mixed = any(0 < len(shared & made.names(key)) < len(made.names(key)) for key in made.built)
    count = 1 if mixed else model.tasks_at_once
    for first in range(0, len(losses), count):
        values += _streamed(model, losses[first : first + count], scale)
    model._saved.forget()
    return {}, values


def _resident(model: Any, losses: Losses, scale: float) -> tuple[dict[str, Tensor], list[Tensor]]:
    model._refresh(graph=False)
    merged, made, plan = model._resident.theta, model.parameters_made, model.plan
    learned = {key for key in made.built if made.learned(key, model.state)}
    agree = partial(plan.order_of, learned) if plan.is_shared else None
    leaves = Leaves(learned, merged.__getitem__, partial(made.contract, model.state), agree)
    model._resident.theta = leaves
    try:
        values = leaves.accumulate(losses, scale)
    finally:
        model._resident.theta = merged
    model.touched |= leaves.touched
    return leaves.grads, values


def _streamed(model: Any, runs: Losses, scale: float) -> list[Tensor]:
    """Run passes in step, and one backward pass of the sum of their losses."""
    if len(runs) == 1:
        return [backward_of(runs[0], scale)]
    values = model._together.losses(runs, model.device)
    with model._saved.keeping(_LAYERS):
        backward_of(lambda: torch.stack([scalar(value) for value in values]).sum(), scale)
    return [value.detach() for value in values]
