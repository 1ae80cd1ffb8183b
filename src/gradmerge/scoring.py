"""Scores of the evaluation splits: of the merged model, and once of each task's own source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradmerge.metrics import TaskScores, mean_scores, normalised

Scores = dict[str, dict[str, float]]


class SplitScores:
    """What is scored of a split, batch by batch, and what came of each split.

    The tasks' own sources never change, so each split is scored with them once.
    """

    def __init__(self) -> None:
        self.results: dict[str, Scores] = {}
        """By split: by task and `average`, the scores by name."""
        self.experts: dict[str, Scores] = {}
        """By split and task, the scores of the task's own source."""
        self._running: dict[str, TaskScores] = {}

    def begin(self, causal: bool, device: torch.device) -> None:
        """Start a pass over a split."""
        self._running = {who: TaskScores(causal, device) for who in ("merged", "expert")}

    @property
    def score(self) -> Any:
        """What tasks are judged by."""
        return self._running["merged"].score

    def add_loss(self, task: str, loss: Tensor, rows: int) -> None:
        """The merged model's loss on a batch."""
        self._running["merged"].update_loss(task, loss, rows)

    def add(
        self, who: str, task: str, logits: Tensor, labels: Tensor, bytes_per_token: float
    ) -> None:
        """A batch's predictions of `merged` or of the `expert`."""
        self._running[who].update(task, logits, labels, bytes_per_token)

    def finish(
        self, stage: str, share: Callable[[str, tuple[str, ...]], float], keep: bool
    ) -> tuple[Scores, dict[str, float]]:
        """All scores by task, and their averages; the loss is weighted as in training.

        Args:
            stage: the split.
            share: a task's share of the objective, given all tasks.
            keep: whether this was a whole pass, whose results stand.
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
