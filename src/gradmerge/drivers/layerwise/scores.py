"""Scores of the finished merge: its batches pass one merged block after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from gradmerge.drivers.layerwise.activations import Activations
from gradmerge.drivers.layerwise.block import MergedWeights
from gradmerge.drivers.layerwise.chain import Chain, Passing
from gradmerge.engine.predict import Batch, expert_rows, is_causal, rows_of
from gradmerge.objectives import Objective, Predictions
from gradmerge.training.scores import Scores, SplitScores

TaskBatch = tuple[str, Batch]


@torch.no_grad()
def score(
    weights: MergedWeights,
    objective: Objective,
    batches: Callable[[], Iterable[TaskBatch]],
    store: Activations,
    experts: bool,
) -> Scores:
    """Score a merge with one of its blocks in memory at a time, merged once for all batches.

    Args:
        weights: of the whole merge.
        objective: the configured one, which gives the loss where the data have what it needs.
        batches: gives the same placed batches at each call, with their tasks.
        store: activations that hold hidden states between blocks.
        experts: also score each task's own source, for normalised scores.

    Returns:
        Scores by task and their `average`; empty if there is nothing to score.
    """
    chain = weights.chain
    scores = SplitScores()
    scores.begin(is_causal(chain.model.skeleton), chain.model.device)
    passing = _pass_blocks(weights, _scored(chain, objective, batches()), store)
    for (task, batch), passed in zip(_scored(chain, objective, batches()), passing, strict=True):
        _add(scores, weights, objective, task, batch, passed, experts)
    found, averages = scores.finish("selection", objective.share, True)
    return {**found, "average": averages} if found else {}


def _scored(
    chain: Chain, objective: Objective, batches: Iterable[TaskBatch]
) -> Iterator[TaskBatch]:
    """Leave out batches with neither labels nor a loss."""
    for task, batch in batches:
        if batch and (batch.get("labels") is not None or _has_loss(chain, objective, batch)):
            yield task, batch


def _has_loss(chain: Chain, objective: Objective, batch: Batch) -> bool:
    """Return whether the objective, which block-wise matching does not minimise, has a value."""
    lacks_labels = objective.needs_labels and batch.get("labels") is None
    return not (lacks_labels or (objective.needs_ensemble and chain.plan.private))


def _pass_blocks(
    weights: MergedWeights, batches: Iterable[TaskBatch], store: Activations
) -> list[Passing]:
    chain = weights.chain
    read, kept = weights.kept(finished=True)
    with chain.weights(read):
        passing = [
            chain.enter(batch, chain.model.tasks[task], store, f"score/{number}")
            for number, (task, batch) in enumerate(batches)
        ]
        for block in range(len(chain.blocks)):
            kept.clear()
            for passed in passing:
                store.put(passed.name, chain.run(block, passed))
    return passing


def _add(
    scores: SplitScores,
    weights: MergedWeights,
    objective: Objective,
    task: str,
    batch: Batch,
    passed: Passing,
    experts: bool,
) -> None:
    """Add a batch that has passed all blocks."""
    chain, model = weights.chain, weights.chain.model
    has_loss = _has_loss(chain, objective, batch)
    ensemble = expert = None
    if (experts and batch.get("labels") is not None) or (has_loss and objective.needs_teacher):
        expert = expert_rows(model, task, batch)
    if has_loss and objective.needs_ensemble:
        ensemble = [expert_rows(model, task, batch, source) for source in chain.plan.sources]
    read = partial(weights.read, passed.source, finished=True)
    with model.as_weights(read), chain.leaving(passed):
        logits, labels, _ = rows_of(model, task, batch)
    if has_loss:
        predictions = Predictions(logits, labels, expert, False, ensemble)
        rows = objective.rows(predictions)
        if rows:
            scores.add_loss(task, objective.loss(predictions), rows)
    if labels is None:
        return
    bytes_per_token = float(batch.get("bytes_per_token", 1.0))
    scores.add("merged", task, logits, labels, bytes_per_token)
    if experts and expert is not None:
        scores.add("expert", task, expert, labels, bytes_per_token)
