"""What a layer-wise merge logs beside its losses: where it starts, and how it scores in the end.

As a fit does: `init/<source>`, `selection/...`, the results of the export. The whole network runs,
but a merged tensor, or a source's, lives while its layer runs, so nothing of the network's size is
held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from gradmerge.drivers.chain import Chain
from gradmerge.drivers.raw_files import Starts
from gradmerge.objectives import Objective
from gradmerge.plan import Plan
from gradmerge.prediction import Batch, expert_rows, is_causal, predict, rows_of
from gradmerge.scoring import Scores, SplitScores


class FinishedMerge:
    """The finished merge as a network that predicts, by the tasks that it serves.

    Args:
        chain: the network.
        tasks: task -> its expert, whose private tensors it uses.
        read: gives a finished tensor of an expert's task, by the expert and the tensor's name.
    """

    def __init__(
        self, chain: Chain, tasks: Mapping[str, str], read: Callable[[str, str], Tensor]
    ) -> None:
        self.chain, self.tasks, self._read = chain, tasks, read
        self._is_source = False

    @property
    def plan(self) -> Plan:
        """What is merged."""
        return self.chain.plan

    @property
    def skeleton(self) -> nn.Module:
        """The network."""
        return self.chain.skeleton

    def __call__(self, *, task: str, **inputs: Any) -> Any:
        """What the network gives of a task's inputs."""
        place = self.chain.place
        moved = {k: place(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        read = partial(self._read, self.tasks[task])
        with nullcontext() if self._is_source else self.chain.weights(read):
            return self.skeleton(**moved)

    @contextmanager
    def as_source(self, source: str, own: bool = False) -> Iterator[None]:
        """Within the context the network is one source; `own` changes nothing, as no alignment
        that mixes units comes here.
        """
        before, self._is_source = self._is_source, True
        try:
            with self.chain.as_source(source):
                yield
        finally:
            self._is_source = before


class ScoreModule(lightning.LightningModule):
    """Scores a merge with `trainer.validate`, as a fit's validation does.

    A loss is that of the configured objective, where the data have what it needs.

    Args:
        network: the merge.
        objective: the configured one.
        score_experts: also run each task's own source, for normalised scores.
        step: steps of the whole run, at which scores are logged.
    """

    def __init__(
        self, network: FinishedMerge, objective: Objective, score_experts: bool, step: int
    ) -> None:
        super().__init__()
        self.network, self.objective = network, objective
        self._score_experts, self._step = score_experts, step
        self._scores = SplitScores()

    @property
    def results(self) -> dict[str, Scores]:
        """By split; empty where there was nothing to score."""
        return {stage: found for stage, found in self._scores.results.items() if len(found) > 1}

    def on_validation_epoch_start(self) -> None:
        """Start the scores."""
        self._scores.begin(is_causal(self.network.skeleton), self.device)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one task's batch."""
        task = list(self.network.tasks)[dataloader_idx]
        labels, of_objective = batch.get("labels"), self._has_loss(batch)
        if labels is None and not of_objective:
            return
        teacher = None
        if of_objective:
            predictions = predict(self.network, self.objective, task, batch, False)
            rows = self.objective.rows(predictions)
            if rows:
                self._scores.add_loss(task, self.objective.loss(predictions), rows)
            logits, labels, teacher = predictions.logits, predictions.labels, predictions.teacher
        else:
            logits, labels, _ = rows_of(self.network, task, batch)
        if labels is None:
            return
        bytes_per_token = float(batch.get("bytes_per_token", 1.0))
        self._scores.add("merged", task, logits, labels, bytes_per_token)
        if self._score_experts:
            expert = expert_rows(self.network, task, batch) if teacher is None else teacher
            self._scores.add("expert", task, expert, labels, bytes_per_token)

    def _has_loss(self, batch: Batch) -> bool:
        """Whether the objective, which did not learn here, has a value of these data."""
        lacks_labels = self.objective.needs_labels and batch.get("labels") is None
        lacks_ensemble = self.objective.needs_ensemble and bool(self.network.plan.private)
        return not (lacks_labels or lacks_ensemble)

    def on_validation_epoch_end(self) -> None:
        """Log the scores by the names that a fit gives them."""
        found, averages = self._scores.finish("selection", self.objective.share, True)
        for task, values in found.items():
            for name, value in values.items():
                self.log(f"selection/{task}/{name}", value)
        for name, value in averages.items():
            key = "selection/loss" if name == "loss" else f"selection/average/{name}"
            self.log(key, value, prog_bar=name in ("loss", self._scores.score.name))
        if found:
            self.log("step", float(self._step))  # the axis of the blocks' losses


def initial_coefficients(plan: Plan, starts: Starts) -> dict[str, float]:
    """`provenance.mean_coefficients` of the start, one slot in memory at a time."""
    num, learned = len(plan.sources), plan.learned
    total = torch.zeros(num, dtype=torch.float64)
    with torch.no_grad():
        for shared in starts.slots(learned).values():
            coefficient = plan.recipe.coefficients.link(starts.one(shared))
            means = coefficient.reshape(num, -1).mean(dim=1, dtype=torch.float64)
            total += len(shared) * means.cpu()
    return dict(zip(plan.sources, (total / len(learned)).tolist(), strict=True))
