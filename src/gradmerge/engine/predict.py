"""Predictions of the merged network and of the sources on a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradmerge.common.errors import ConfigError
from gradmerge.engine.heads import rows_by_head
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.reading import NEXT_TOKEN, NOT_INPUTS, reading_of
from gradmerge.objectives import Objective, Predictions

Batch = Mapping[str, Any]


def is_causal(network: nn.Module) -> bool:
    """Return True if a network predicts the next token."""
    return reading_of(network) is NEXT_TOKEN


def by_task(merged: MergedModel, batch: Batch) -> dict[str, Batch]:
    """Split a training batch by task.

    Raises:
        ConfigError: the batch names unknown tasks, or none although there are several.
    """
    tasks = tuple(merged.tasks)
    if all(isinstance(value, Mapping) for value in batch.values()):
        unknown = [name for name in batch if name not in tasks]
        if unknown:
            raise ConfigError(
                f"batch: unknown tasks {', '.join(map(repr, unknown))} (choose from "
                f"{', '.join(tasks)})."
            )
        return dict(batch)
    if len(tasks) != 1:
        raise ConfigError(
            f"batch: expected batches by task ({', '.join(tasks)}), got the keys "
            f"{', '.join(map(str, batch))}."
        )
    return {tasks[0]: batch}


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
    return reading_of(merged.skeleton, batch).rows(output, batch, merged.skeleton)


def expert_rows(merged: MergedModel, task: str, batch: Batch, source: str | None = None) -> Tensor:
    """Logits of a source, without one the task's own, run by the same network, without gradient."""
    source = source or merged.tasks[task]
    with merged.as_source(source, own=True):
        rows = rows_by_head(merged, task, batch, source) or rows_of(merged, task, batch)
    return rows[0].detach()


def require_ensemble(merged: MergedModel, objective: Objective) -> None:
    """Reject an ensemble of sources that do not share a head.

    Raises:
        ConfigError: a term needs the ensemble and the recipe has private tensors.
    """
    private = merged.plan.private
    if objective.needs_ensemble and private:
        terms = [type(term).__name__ for term in objective.terms if term.needs_ensemble]
        raise ConfigError(
            f"{', '.join(terms)} averages the predictions of all sources, so they must share a "
            f"head, but each keeps its own {', '.join(sorted(private)[:3])}.\n"
            "Use KLToSource, whose teacher is the task's own source."
        )


def predict(
    merged: MergedModel, objective: Objective, task: str, batch: Batch, shared: bool
) -> Predictions:
    """Return the predictions that an objective needs for a task's batch.

    Raises:
        ConfigError: a term needs labels and the task has none.
    """
    teacher = expert_rows(merged, task, batch) if objective.needs_teacher else None
    ensemble = None
    if objective.needs_ensemble:
        ensemble = [expert_rows(merged, task, batch, name) for name in merged.plan.sources]
    logits, labels, _ = rows_by_head(merged, task, batch) or rows_of(merged, task, batch)
    if labels is None and objective.needs_labels:
        raise no_labels(task, objective)
    return Predictions(logits, labels, teacher, shared, ensemble)


def no_labels(task: str, objective: Objective) -> ConfigError:
    """Return the error of a task without the labels that an objective needs."""
    terms = [type(term).__name__ for term in objective.terms if term.needs_labels]
    return ConfigError(
        f"task {task} has no labels, but {', '.join(terms)} needs them; name its label column, or "
        "use Entropy or KLToSource."
    )
