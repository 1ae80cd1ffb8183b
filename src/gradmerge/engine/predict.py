"""What the merged network, and a task's own source, predict on a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradmerge.engine.merged import MergedModel
from gradmerge.errors import ConfigError
from gradmerge.objectives import Objective, Predictions, next_token_rows

Batch = Mapping[str, Any]
_NOT_INPUTS = frozenset({"labels", "bytes_per_token"})


def is_causal(network: nn.Module) -> bool:
    """Whether a network predicts the next token."""
    return type(network).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def by_task(merged: MergedModel, batch: Batch) -> dict[str, Batch]:
    """A training batch as batches by task.

    Raises:
        ConfigError: it names other tasks, or none where there are several.
    """
    tasks = tuple(merged.tasks)
    if all(isinstance(value, Mapping) for value in batch.values()):
        unknown = [name for name in batch if name not in tasks]
        if unknown:
            raise ConfigError(
                f"the batch has tasks {unknown}; expected some of {', '.join(tasks)}."
            )
        return dict(batch)
    if len(tasks) != 1:
        raise ConfigError(
            "a training batch must map task names to batches, got the keys "
            f"{', '.join(map(str, batch))}; tasks are {', '.join(tasks)}."
        )
    return {tasks[0]: batch}


def rows_of(
    merged: MergedModel, task: str, batch: Batch
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits of a task's batch as rows, labels, and the rows kept (see `next_token_rows`).

    Raises:
        ConfigError: the network's output has no logits.
    """
    inputs = {key: value for key, value in batch.items() if key not in _NOT_INPUTS}
    output = merged(task=task, **inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"{type(merged.skeleton).__name__} returned {type(output).__name__}; expected "
            "a tensor of logits or an output with `logits`."
        )
    config = getattr(merged.skeleton, "config", None)
    decodes = getattr(config, "is_encoder_decoder", False)
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    causal = is_causal(merged.skeleton)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return next_token_rows(wide, batch.get("labels"), mask, causal)


def expert_rows(merged: MergedModel, task: str, batch: Batch, source: str | None = None) -> Tensor:
    """Logits of a source, without one the task's own, run by the same network, without gradient."""
    with merged.as_source(source or merged.tasks[task], own=True):
        return rows_of(merged, task, batch)[0].detach()


def require_ensemble(merged: MergedModel, objective: Objective) -> None:
    """Refuse an ensemble of sources that do not share a head.

    Raises:
        ConfigError: a term needs the ensemble, and tensors are private.
    """
    private = merged.plan.private
    if objective.needs_ensemble and private:
        terms = [type(term).__name__ for term in objective.terms if term.needs_ensemble]
        raise ConfigError(
            f"{', '.join(terms)} averages what all sources predict, so they must share a head, but "
            f"each keeps its own {', '.join(sorted(private)[:3])}. Use KLToSource, whose teacher "
            "is the task's own source."
        )


def predict(
    merged: MergedModel, objective: Objective, task: str, batch: Batch, shared: bool
) -> Predictions:
    """What an objective needs of a task's batch.

    Raises:
        ConfigError: the task has no labels and a term needs them.
    """
    teacher = expert_rows(merged, task, batch) if objective.needs_teacher else None
    ensemble = None
    if objective.needs_ensemble:
        ensemble = [expert_rows(merged, task, batch, name) for name in merged.plan.sources]
    logits, labels, _ = rows_of(merged, task, batch)
    if labels is None and objective.needs_labels:
        terms = [type(term).__name__ for term in objective.terms if term.needs_labels]
        raise ConfigError(
            f"task {task} has no labels, which {', '.join(terms)} needs; name its "
            "label column, or use Entropy or KLToSource."
        )
    return Predictions(logits, labels, teacher, shared, ensemble)
