"""Scores per task over an evaluation, and results of finished splits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torchmetrics import MeanMetric, MetricCollection

from gradmerge.common.memory import trim_heap
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.parts import in_parts
from gradmerge.engine.reading import Measure, reading_of
from gradmerge.export.history import History
from gradmerge.objectives import Objective, Predictions
from gradmerge.objectives.base import UNLABELLED
from gradmerge.training.data import MergeDataModule
from gradmerge.training.examples import Stage
from gradmerge.training.generation import answers
from gradmerge.training.measures import SCORES, Score, build_metrics
from gradmerge.training.per_example import ExampleScores, owners_of


class TaskScores:
    """Metrics of several tasks over one evaluation, built at the first batch of each task."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._kinds: dict[str, tuple[Measure, int]] = {}
        self._metrics: dict[str, MetricCollection] = {}
        self._losses: dict[str, MeanMetric] = {}

    def score(self, task: str) -> Score | None:
        """Return the score by which a task is judged, once it has labelled rows."""
        return SCORES[self._kinds[task][0]] if task in self._kinds else None

    def update(
        self,
        task: str,
        logits: Tensor,
        labels: Tensor,
        measure: Measure = "classes",
        bytes_per_token: float = 1.0,
    ) -> None:
        """Add a batch of logits and labels; unlabelled rows do not count."""
        labelled = labels != UNLABELLED
        if not bool(labelled.all()):
            logits, labels = logits[labelled], labels[labelled]
        if len(labels) == 0:
            return
        if task not in self._metrics:
            self._build(task, measure, logits.shape[-1], logits.device)
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

    def _build(
        self, task: str, measure: Measure, classes: int, device: torch.device | None
    ) -> None:
        self._metrics[task] = build_metrics(measure, classes).to(device)
        self._kinds[task] = measure, classes

    def _agree(self) -> None:
        """Give every process the same metrics in the same order.

        Synchronising a metric involves all processes, so it would hang if one that had no row of a
        task lacked the metric.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        every: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(every, (self._kinds, list(self._losses)))
        kinds = {task: kind for own, _ in every for task, kind in own.items()}
        for task in kinds.keys() - self._metrics.keys():
            measure, classes = kinds[task]
            self._build(task, measure, classes, self._device)
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


def generated_scores(
    merged: MergedModel,
    task: str,
    data: MergeDataModule,
    stage: Stage,
    place: tuple[int, int],
    kept: ExampleScores | None = None,
) -> dict[str, float]:
    """Return the mean scores of the texts that a task generates, over all processes.

    Args:
        merged: the merged model.
        task: the task, which has `generation`.
        data: gives the questions.
        stage: the split.
        place: rank of this process and number of processes, which share the questions.
        kept: also gets the scores of each text.
    """
    options = data.tasks[task].generation
    assert options is not None
    rank, world = place
    own = data.questions(task, stage)[rank::world]
    means = {name: MeanMetric().to(merged.device) for name in options.names}
    for question, text in answers(merged, task, own, data.processor, options, data.eval_batch_size):
        found = options.scores(text, question.wanted, question.row)
        for name, value in found.items():
            means[name].update(value)
        if kept is not None:
            kept.add_generated(task, found)
    return {name: float(mean.compute()) for name, mean in means.items()}


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
        self.score = SCORES["classes"]
        """Score by which the tasks are judged: that of the first which has labels."""
        self.kept: ExampleScores | None = None
        """The last pass example by example, if that is asked for."""
        self._running: dict[str, TaskScores] = {}
        self._network: nn.Module | None = None

    def begin(self, network: nn.Module, device: torch.device) -> None:
        """Start a pass over a split."""
        self._running = {who: TaskScores(device) for who in ("merged", "expert")}
        self.kept = None if self.kept is None else ExampleScores()
        self._network = network
        self.score = SCORES[reading_of(network).measure(None)]

    def add(
        self,
        task: str,
        batch: Mapping[str, Any],
        predictions: Predictions,
        objective: Objective | None,
        expert: Callable[[], Tensor] | None,
        owners: Tensor | None = None,
    ) -> None:
        """Add the merged model's predictions on a batch.

        Args:
            task: the task.
            batch: the batch, which may have a number of bytes per token.
            predictions: the predictions on it.
            objective: gives the loss; None if the data lack what it needs.
            expert: gives the logits of the task's own source, if they are scored, too.
            owners: numbers of the rows' examples within the batch, if the predictions are a part
                of those on the batch.
        """
        merged, labels = self._running["merged"], predictions.labels
        rows = objective.rows(predictions) if objective else 0
        if objective and rows:
            merged.update_loss(task, objective.loss(predictions), rows)
        if labels is None:
            return
        assert self._network is not None
        measure = reading_of(self._network, batch).measure(labels)
        size = float(batch.get("bytes_per_token", 1.0))
        merged.update(task, predictions.logits, labels, measure, size)
        if self.kept is not None:
            count = 0
            if owners is None:
                owners, count = owners_of(self._network, batch, len(labels))
            self.kept.add(task, predictions.logits, labels, owners, measure, size)
            self.kept.close_batch(task, count)
        if expert is not None:
            logits = predictions.teacher if predictions.teacher is not None else expert()
            self._running["expert"].update(task, logits, labels, measure, size)

    def add_in_parts(
        self,
        merged: MergedModel,
        task: str,
        batch: Mapping[str, Any],
        objective: Objective,
        source: str | None,
    ) -> bool:
        """Add the predictions on a batch whose logits are large, some at a time (see `in_parts`).

        Args:
            merged: the model.
            task: the task.
            batch: the batch.
            objective: gives the loss.
            source: the task's own source, if it is scored, too.

        Returns:
            False if nothing was added, because all logits are needed at once, or are small.
        """
        if batch.get("labels") is None or not objective.adds_over_rows:
            return False
        parts = in_parts(merged, task, batch)
        if parts is None:
            return False
        for logits, labels, texts in parts:
            self.add(task, batch, Predictions(logits, labels), objective, None, texts)
        if self.kept is not None:
            self.kept.close_batch(task, len(batch["labels"]))
        if source is not None:
            size = float(batch.get("bytes_per_token", 1.0))
            with merged.as_source(source, own=True):
                for logits, labels, _ in in_parts(merged, task, batch) or ():
                    assert labels is not None
                    self._running["expert"].update(task, logits, labels, "language", size)
        return True

    def finish(
        self,
        stage: str,
        share: Callable[[str, tuple[str, ...]], float],
        keep: bool,
        more: Mapping[str, Mapping[str, float]] | None = None,
    ) -> tuple[Scores, dict[str, float]]:
        """Return the scores by task and their averages; the loss is weighted as in training.

        Args:
            stage: the split.
            share: returns a task's share of the objective, given all tasks.
            keep: store the results; false after a partial pass.
            more: further scores by task, such as those of generated texts.
        """
        trim_heap()  # or what the passes have freed would lie beside the memory of later steps
        found = self._running["merged"].compute()
        for task, values in (more or {}).items():
            found.setdefault(task, {}).update(values)
        if keep and stage not in self.experts:
            self.experts[stage] = self._running["expert"].compute()
        judged = {task: self._running["merged"].score(task) for task in found}
        self.score = next((score for score in judged.values() if score), self.score)
        for task, values in found.items():
            score = judged[task] or self.score
            expert = self.experts.get(stage, {}).get(task, {}).get(score.name)
            own = values.get(score.name)
            if expert is not None and own is not None:
                values["normalised"] = normalised(score, own, expert)
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
