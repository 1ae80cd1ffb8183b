"""What a layer-wise merge logs beside its losses: where it starts, and how it scores in the end.

As a fit does: `init/<source>`, `selection/...`, the results of the export. Nothing of the network's
size is held: the examples pass one merged block after the other, and a source's tensor lives while
its layer runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from gradmerge.drivers.layerwise.cache import Activations
from gradmerge.drivers.layerwise.chain import Chain
from gradmerge.drivers.layerwise.files import Starts
from gradmerge.engine.autograd import checksums
from gradmerge.engine.plan import Plan
from gradmerge.engine.predict import Batch, expert_rows, is_causal, predict, rows_of
from gradmerge.objectives import Objective
from gradmerge.training.scores import Scores, SplitScores


@dataclass(frozen=True)
class _Passed:
    """A batch that has passed the merged blocks; its tensors are among the activations."""

    task: str
    name: str
    before: tuple[torch.Size, int]
    """What its hidden state before the first block was, to know it again."""


class FinishedMerge:
    """The finished merge as a network that predicts, by the tasks that it serves.

    Args:
        chain: the network.
        tasks: task -> its expert, whose private tensors it uses.
        read: gives a finished tensor of an expert's task, by the expert and the tensor's name.
        activations: where hidden states are kept.
    """

    def __init__(
        self,
        chain: Chain,
        tasks: Mapping[str, str],
        read: Callable[[str, str], Tensor],
        activations: Activations,
    ) -> None:
        self.chain, self.tasks, self._read = chain, tasks, read
        self._activations = activations
        self._is_source = False
        self._passed: dict[str, deque[_Passed]] = {task: deque() for task in tasks}

    @property
    def plan(self) -> Plan:
        """What is merged."""
        return self.chain.plan

    @property
    def skeleton(self) -> nn.Module:
        """The network."""
        return self.chain.skeleton

    @torch.no_grad()
    def pass_blocks(self, batches: Iterable[tuple[str, Batch]]) -> None:
        """Let batches pass the merged blocks, one block's tensors in memory at a time, so that a
        block is merged once for all of them. What is called then continues with the hidden states.

        Args:
            batches: task and inputs, on the chain's device, in the order in which they will be
                asked for.
        """
        kept: dict[tuple[str, str], Tensor] = {}

        def read(task: str, name: str) -> Tensor:
            owner = "" if name in self.plan.tensors else self.tasks[task]
            if (owner, name) not in kept:
                kept[owner, name] = self._read(self.tasks[task], name)
            return kept[owner, name]

        calls, store = {}, self._activations
        for number, (task, inputs) in enumerate(batches):
            with self.chain.weights(partial(read, task)):
                start = self.chain.start(inputs)
            passed = _Passed(task, f"score/{number}", _known_by(start.hidden))
            store.put(passed.name, start.hidden)
            for i, tensor in enumerate(start.constants):
                store.put(f"{passed.name}/{i}", tensor)
            calls[passed] = start.calls, len(start.constants)
            self._passed[task].append(passed)
        for number in range(len(self.chain.blocks)):
            kept.clear()
            for passed, (call, count) in calls.items():
                place = self.chain.device
                constants = [store.get(f"{passed.name}/{i}").to(place) for i in range(count)]
                hidden = store.get(passed.name).to(place, copy=True)
                with self.chain.weights(partial(read, passed.task)):
                    hidden = self.chain.run(number, call[number], hidden, constants)
                store.put(passed.name, hidden)

    def __call__(self, *, task: str, **inputs: Any) -> Any:
        """What the network gives of a task's inputs."""
        place = self.chain.place
        moved = {k: place(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        if self._is_source:
            return self.skeleton(**moved)
        with self.chain.weights(partial(self._read, self.tasks[task])):
            waiting = self._passed[task]
            if waiting:
                with suppress(_Other):
                    return self.chain.end(moved, partial(self._after, waiting))
            return self.skeleton(**moved)

    def _after(self, waiting: deque[_Passed], hidden: Tensor) -> Tensor:
        """The hidden state after the last block, of the batch that is next."""
        if waiting[0].before != _known_by(hidden):
            raise _Other
        return self._activations.get(waiting.popleft().name).to(self.chain.device, copy=True)

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


class _Other(Exception):  # noqa: N818 (it is no error)
    """It is another batch than the one that is next."""


def _known_by(hidden: Tensor) -> tuple[torch.Size, int]:
    """What tells a hidden state from others, those with the same values in another order, too."""
    return hidden.shape, checksums([hidden.float()])[0]


class ScoreModule(lightning.LightningModule):
    """Scores a merge with `trainer.validate`, as a fit's validation does.

    A loss is that of the configured objective, where the data have what it needs.

    Args:
        network: the merge.
        objective: the configured one.
        score_experts: also run each task's own source, for normalised scores.
        step: steps of the whole run, at which scores are logged.
        inputs: what of a batch the network takes, on its device.
    """

    def __init__(
        self,
        network: FinishedMerge,
        objective: Objective,
        score_experts: bool,
        step: int,
        inputs: Callable[[Batch], Batch],
    ) -> None:
        super().__init__()
        self._inputs = inputs
        self.network, self.objective = network, objective
        self._score_experts, self._step = score_experts, step
        self._scores = SplitScores()

    @property
    def results(self) -> dict[str, Scores]:
        """By split; empty where there was nothing to score."""
        return {stage: found for stage, found in self._scores.results.items() if len(found) > 1}

    def on_validation_epoch_start(self) -> None:
        """Start the scores; all batches pass the merged blocks first."""
        self._scores.begin(is_causal(self.network.skeleton), self.device)
        self.network.pass_blocks(self._batches())

    def _batches(self) -> Iterator[tuple[str, Batch]]:
        """Those that will be scored, and none that will not."""
        trainer: Any = self.trainer
        loaders = trainer.val_dataloaders
        for task, loader, limit in zip(
            self.network.tasks, loaders, trainer.num_val_batches, strict=True
        ):
            for batch in islice(loader, None if limit == float("inf") else int(limit)):
                if batch.get("labels") is not None or self._has_loss(batch):
                    yield task, self._inputs(batch)

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
