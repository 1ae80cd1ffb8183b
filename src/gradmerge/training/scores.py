"""Scores per task: accuracy, macro-F1 and calibration error, or perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
)

from gradmerge.export.history import History
from gradmerge.objectives import Objective, Predictions
from gradmerge.objectives.base import UNLABELLED


@dataclass(frozen=True)
class Score:
    """Metric by which a task is judged."""

    name: str
    higher_is_better: bool


ACCURACY = Score("accuracy", True)
BITS_PER_BYTE = Score("bits_per_byte", False)


def build_metrics(causal: bool, num_classes: int) -> tuple[MetricCollection, Score]:
    """Return the metrics of a task and the score by which it is judged."""
    if causal:
        return MetricCollection({"language": _Language()}), BITS_PER_BYTE
    collection = MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "macro_f1": MulticlassF1Score(num_classes, average="macro"),
            "calibration_error": _CalibrationError(num_classes, n_bins=15),
        },
        compute_groups=False,
    )
    return collection, ACCURACY


class _CalibrationError(MulticlassCalibrationError):
    """Calibration error of logits: torchmetrics mistakes logits within [0, 1] for probabilities."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits `[rows, classes]` and labels `[rows]`."""
        super().update(preds.softmax(dim=-1), target)


class _Language(Metric):
    """Perplexity per token, and bits per byte, which is comparable between tokenizers."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, bytes_per_token: float = 1.0) -> None:
        """Add logits `[rows, vocab]` and labels `[rows]`."""
        self.nats += functional.cross_entropy(logits, labels, reduction="sum").double()
        self.tokens += len(labels)
        self.bytes += len(labels) * bytes_per_token

    def compute(self) -> dict[str, Tensor]:
        """Return perplexity and bits per byte."""
        return {
            "perplexity": (self.nats / self.tokens).exp(),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
        }


class TaskScores:
    """Metrics of several tasks over one evaluation, built at the first batch of each task."""

    def __init__(self, causal: bool, device: torch.device | None = None) -> None:
        self._causal = causal
        self._device = device
        self._classes: dict[str, int] = {}
        self._metrics: dict[str, MetricCollection] = {}
        self._losses: dict[str, MeanMetric] = {}
        self.score = BITS_PER_BYTE if causal else ACCURACY

    def update(
        self, task: str, logits: Tensor, labels: Tensor, bytes_per_token: float = 1.0
    ) -> None:
        """Add a batch of logits and labels; unlabelled rows do not count."""
        labelled = labels != UNLABELLED
        if not bool(labelled.all()):
            logits, labels = logits[labelled], labels[labelled]
        if len(labels) == 0:
            return
        if task not in self._metrics:
            self._build(task, logits.shape[-1], logits.device)
        # a metric gets those of the keyword arguments that it takes
        self._metrics[task].update(logits, labels, bytes_per_token=bytes_per_token)

    def update_loss(self, task: str, loss: Tensor, rows: int) -> None:
        """Add the loss of a batch, weighted by its rows."""
        if task not in self._losses:
            self._losses[task] = MeanMetric().to(loss.device)
        self._losses[task].update(loss, rows)

    def compute(self) -> dict[str, dict[str, float]]:
        """Return `{task: {metric: value}}` over all processes."""
        self._agree()
        found: dict[str, dict[str, float]] = {
            task: {} for task in {**self._losses, **self._metrics}
        }
        for task, metrics in self._metrics.items():
            found[task] = {name: float(value) for name, value in metrics.compute().items()}
        for task, loss in self._losses.items():
            found[task]["loss"] = float(loss.compute())
        return found

    def _build(self, task: str, classes: int, device: torch.device | None) -> None:
        metrics, _ = build_metrics(self._causal, classes)
        self._metrics[task] = metrics.to(device)
        self._classes[task] = classes

    def _agree(self) -> None:
        """Give every process the same metrics in the same order.

        Synchronising a metric involves all processes, so it would hang if one that had no row of a
        task lacked the metric.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        every: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(every, (self._classes, list(self._losses)))
        classes = {task: count for own, _ in every for task, count in own.items()}
        for task in classes.keys() - self._metrics.keys():
            self._build(task, classes[task], self._device)
        for task in {task for _, own in every for task in own} - self._losses.keys():
            self._losses[task] = MeanMetric().to(self._device)
        self._metrics = {task: self._metrics[task] for task in sorted(self._metrics)}
        self._losses = {task: self._losses[task] for task in sorted(self._losses)}


def normalised(score: Score, merged: float, expert: float) -> float:
    """Return merged relative to expert: 1 equals the expert, and higher is better."""
    above, below = (merged, expert) if score.higher_is_better else (expert, merged)
    return above / below if below else math.nan


def mean_scores(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each score over the tasks that have it."""
    names = dict.fromkeys(name for values in found.values() for name in values)
    means = {}
    for name in names:
        values = [task[name] for task in found.values() if name in task]
        means[name] = sum(values) / len(values)
    return means


Scores = dict[str, dict[str, float]]


class SplitScores:
    """Scores of the running split, accumulated by batch, and results of finished splits.

    Sources never change, so each split is scored with the tasks' own sources only once.
    """

    def __init__(self) -> None:
        self.results: dict[str, Scores] = {}
        """`{split: {task or "average": {metric: value}}}` of the merged model."""
        self.experts: dict[str, Scores] = {}
        """`{split: {task: {metric: value}}}` of the tasks' own sources."""
        self._running: dict[str, TaskScores] = {}

    def begin(self, causal: bool, device: torch.device) -> None:
        """Start a pass over a split."""
        self._running = {who: TaskScores(causal, device) for who in ("merged", "expert")}

    @property
    def score(self) -> Any:
        """Score by which tasks are judged."""
        return self._running["merged"].score

    def add(
        self,
        task: str,
        batch: Mapping[str, Any],
        predictions: Predictions,
        objective: Objective | None,
        expert: Callable[[], Tensor] | None,
    ) -> None:
        """Add the merged model's predictions on a batch.

        Args:
            task: the task.
            batch: the batch, which may have a number of bytes per token.
            predictions: the predictions on it.
            objective: gives the loss; None if the data lack what it needs.
            expert: gives the logits of the task's own source, if they are scored, too.
        """
        merged, labels = self._running["merged"], predictions.labels
        rows = objective.rows(predictions) if objective else 0
        if objective and rows:
            merged.update_loss(task, objective.loss(predictions), rows)
        if labels is None:
            return
        size = float(batch.get("bytes_per_token", 1.0))
        merged.update(task, predictions.logits, labels, size)
        if expert is not None:
            logits = predictions.teacher if predictions.teacher is not None else expert()
            self._running["expert"].update(task, logits, labels, size)

    def finish(
        self, stage: str, share: Callable[[str, tuple[str, ...]], float], keep: bool
    ) -> tuple[Scores, dict[str, float]]:
        """Return the scores by task and their averages; the loss is weighted as in training.

        Args:
            stage: the split.
            share: returns a task's share of the objective, given all tasks.
            keep: store the results; false after a partial pass.
        """
        found = self._running["merged"].compute()
        if keep and stage not in self.experts:
            self.experts[stage] = self._running["expert"].compute()
        for task, values in found.items():
            expert = self.experts.get(stage, {}).get(task, {}).get(self.score.name)
            own = values.get(self.score.name)
            if expert is not None and own is not None:
                values["normalised"] = normalised(self.score, own, expert)
        averages = mean_scores(found)
        if "loss" in averages:
            shares = {task: share(task, tuple(found)) for task in found}
            averages["loss"] = sum(shares[t] * v.get("loss", 0.0) for t, v in found.items())
        if keep:
            self.results[stage] = {**found, "average": averages}
        return found, averages

    def record(
        self, history: History, step: int, found: Scores, averages: Mapping[str, float]
    ) -> None:
        """Add the selection scores of a step, and those of the experts, to a history."""
        score, experts = self.score, self.experts.get("selection", {})
        history.score, history.higher_is_better = score.name, score.higher_is_better
        for name, value in logged("selection", found, averages).items():
            if name == "selection/loss" or name.endswith(f"/{score.name}"):
                history.add(name, step, value)
        own = {task: v[score.name] for task, v in experts.items() if score.name in v}
        history.experts = own
        if len(own) > 1 and own.keys() == found.keys():
            history.experts = {**own, "average": sum(own.values()) / len(own)}


def logged(split: str, found: Scores, averages: Mapping[str, float]) -> dict[str, float]:
    """Return scores by the names under which a fit logs them."""
    values = {f"{split}/{task}/{n}": v for task, scores in found.items() for n, v in scores.items()}
    for name, value in averages.items():
        values[f"{split}/loss" if name == "loss" else f"{split}/average/{name}"] = value
    return values
