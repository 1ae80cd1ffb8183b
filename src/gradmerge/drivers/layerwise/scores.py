"""Scores of the finished merge: its batches pass one merged block after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial

import torch

from gradmerge.drivers.layerwise.chain import BlockChain, Passing
from gradmerge.engine.outputs import Batch, rows_of
from gradmerge.engine.predict import expert_rows
from gradmerge.engine.reading import Pairs
from gradmerge.export.history import History
from gradmerge.objectives import Objective, Predictions
from gradmerge.training.scores import Scores, SplitScores


@torch.no_grad()
def score(
    chain: BlockChain,
    objective: Objective,
    batches: Callable[[], Iterable[tuple[str, Batch]]],
    experts: bool,
    history: History,
    step: int,
) -> Scores:
    """Score a merge with one of its blocks in memory at a time, merged once for all batches.

    Args:
        chain: the network, whose coefficients are all known.
        objective: the configured one, which gives the loss where the data have what it needs.
        batches: gives the same placed batches at each call, with their tasks.
        experts: also score each task's own source, for normalised scores.
        history: takes the scores.
        step: number of steps behind them.

    Returns:
        Scores by task and their `average`; empty if there is nothing to score.
    """

    def scored() -> Iterator[tuple[str, Batch, bool]]:
        for task, batch in batches():
            pairs = isinstance(batch.get("reading"), Pairs)
            lacks_labels = batch.get("labels") is None and not pairs
            lacks_ensemble = objective.needs_ensemble and bool(chain.plan.private)
            lacks = (lacks_labels and objective.needs_labels) or lacks_ensemble
            # hidden states are those of one pass through the whole network
            has_loss = not (lacks or objective.wanted.layers)
            if batch and (has_loss or not lacks_labels):
                yield task, batch, has_loss

    scores = SplitScores()
    scores.begin(chain.model.skeleton, chain.model.device)
    theta = cache(partial(chain.theta, finished=True))
    with chain.weights(theta):
        passing = [
            chain.enter(batch, chain.model.tasks[task], f"score/{number}")
            for number, (task, batch, _) in enumerate(scored())
        ]
        for block in range(len(chain.blocks)):
            theta.cache_clear()
            for passed in passing:
                chain.store.put(passed.name, chain.run(block, passed))
    theta.cache_clear()
    for (task, batch, has_loss), passed in zip(scored(), passing, strict=True):
        own = objective if has_loss else None
        expert = partial(expert_rows, chain.model, task, batch) if experts else None
        scores.add(task, batch, _predictions(chain, own, task, batch, passed), own, expert)
    found, averages = scores.finish("selection", objective.share, True)
    scores.record(history, step, found, averages)
    return {**found, "average": averages} if found else {}


def _predictions(
    chain: BlockChain, objective: Objective | None, task: str, batch: Batch, passed: Passing
) -> Predictions:
    """Return the predictions on a batch that has passed all blocks, and those of its teachers."""
    model, ensemble, teacher = chain.model, None, None
    if objective and objective.needs_teacher:
        teacher = expert_rows(model, task, batch)
    if objective and objective.needs_ensemble:
        ensemble = [expert_rows(model, task, batch, source) for source in chain.plan.sources]
    with chain.leaving(passed), chain.weights(partial(chain.theta, finished=True)):
        logits, labels, _ = rows_of(model, task, batch)
    return Predictions(logits, labels, teacher, False, ensemble)
