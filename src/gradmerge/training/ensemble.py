"""Scores of the sources' mean prediction, which takes all of them at inference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradmerge.engine.merged import MergedModel
from gradmerge.engine.outputs import Batch, rows_of
from gradmerge.objectives import Predictions
from gradmerge.training.data import MergeDataModule
from gradmerge.training.measures import Score
from gradmerge.training.per_example import AbstractExamples, ExampleScores
from gradmerge.training.scores import Scores, SplitScores


def ensemble_scores(
    module: Any, data: MergeDataModule
) -> tuple[Scores, dict[str, dict[str, AbstractExamples]], Score]:
    """Return the ensemble's scores on the test split, those of examples, and the score that counts.

    `p = (1/K) sum_k softmax(logits_k)`. Each source has its own body, and the task's own private
    tensors (heads), so that its predictions are about the task's classes.

    Args:
        module: a `MergeModule` of the sources, with its tasks.
        data: the tasks, prepared.
    """
    scores, merged = SplitScores(), module.merged
    scores.kept = ExampleScores()
    scores.begin(merged.skeleton, module.device)
    module.eval()
    for task, loader in zip(module.tasks, data.test_dataloader(), strict=True):
        for batch in loader:
            placed = module.transfer_batch_to_device(batch, module.device, 0)
            logits, labels = mean_rows(merged, task, placed)
            scores.add(task, placed, Predictions(logits, labels), module.objective, None)
    scores.finish("test", module.objective.share, keep=True)
    return scores.results["test"], scores.kept.compute(), scores.score


@torch.no_grad()
def mean_rows(merged: MergedModel, task: str, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return the logarithm of the sources' mean probabilities, `[rows, classes]`, and labels."""
    plan, total, labels = merged.plan, None, None
    for name, checkpoint in plan.sources.items():

        def read(tensor: str, source: str = name) -> Tensor | None:
            if tensor in plan.private:
                return None
            return plan.read(source, tensor, device=merged.device)

        with merged.network_buffers.of(checkpoint), merged.as_weights(read):
            logits, labels, _ = rows_of(merged, task, batch)
        found = logits.log_softmax(dim=-1)
        total = found if total is None else torch.logaddexp(total, found)
    assert total is not None
    return total - math.log(len(plan.sources)), labels
