"""Predictions of the merged network and of the sources on a batch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from gradmerge.common.errors import ConfigError
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.outputs import Batch, outputs_of
from gradmerge.engine.reading import NEXT_TOKEN, reading_of
from gradmerge.engine.teacher import Teacher
from gradmerge.objectives import Objective, Predictions


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


def expert_rows(merged: MergedModel, task: str, batch: Batch, source: str | None = None) -> Tensor:
    """Logits of a source, without one the task's own, run by the same network, without gradient."""
    source = source or merged.tasks[task]
    with merged.as_source(source, own=True):
        return outputs_of(merged, task, batch, source=source).logits.values.detach()


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
    merged: MergedModel,
    objective: Objective,
    task: str,
    batch: Batch,
    shared: bool,
    teacher: Teacher | None = None,
) -> Predictions:
    """Return the predictions that an objective needs for a task's batch.

    Args:
        merged: the model.
        objective: its terms decide what else runs on the batch.
        task: the task.
        batch: its batch.
        shared: True if every process holds rows of one global batch.
        teacher: the task's own source. Default: it runs on the batch.

    Raises:
        ConfigError: a term needs labels and the task has none.
    """
    teacher = teacher or Teacher(merged, objective)
    taught = teacher(task, batch)
    ensemble = None
    if objective.needs_ensemble:
        ensemble = [expert_rows(merged, task, batch, name) for name in merged.plan.sources]
    own = outputs_of(merged, task, batch, teacher.layers)
    if own.labels is None and objective.needs_labels:
        raise no_labels(task, objective)
    hidden = {name: rows.values for name, rows in own.hidden.items()}
    logits = own.logits.values
    return Predictions(
        logits, own.labels, shared=shared, ensemble=ensemble, hidden=hidden, **taught
    )


def no_labels(task: str, objective: Objective) -> ConfigError:
    """Return the error of a task without the labels that an objective needs."""
    terms = [type(term).__name__ for term in objective.terms if term.needs_labels]
    return ConfigError(
        f"task {task} has no labels, but {', '.join(terms)} needs them; name its label column, or "
        "use Entropy or KLToSource."
    )
