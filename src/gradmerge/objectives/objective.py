"""Weighted sum of terms and regularisers that training minimises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from gradmerge.common.errors import ConfigError, nearest, shorten
from gradmerge.common.finite import require_finite_options
from gradmerge.objectives.base import (
    UNLABELLED,
    AbstractRegulariser,
    AbstractTerm,
    Predictions,
    Wanted,
)
from gradmerge.objectives.regularisers import FisherToInit
from gradmerge.objectives.terms import CrossEntropy


@dataclass(frozen=True)
class Objective:
    """Weighted mean of the terms over tasks, plus weighted regularisers.

        L = sum_t w_t sum_i a_i term_i(task t) / sum_t w_t + sum_j b_j regulariser_j(c)

    Task weights are normalised, so the learning rate does not depend on the number of tasks.
    """

    terms: list[AbstractTerm] = field(default_factory=list)
    """Losses on the predictions, each with its weight. Default: CrossEntropy."""
    regularisers: list[AbstractRegulariser] = field(default_factory=list)
    """Penalties on the coefficients, each with its weight."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Weight of each task by name; tasks that are not listed have weight 1."""

    def __post_init__(self) -> None:
        """Validate the weights and fill in the default term."""
        require_finite_options(self)
        if not self.terms:
            # a default that is an instance could not be written to YAML
            object.__setattr__(self, "terms", [CrossEntropy()])
        wrong = [name for name, weight in self.task_weights.items() if weight < 0]
        if wrong:
            raise ConfigError(f"task_weights: weights must not be negative: {', '.join(wrong)}.")

    @property
    def needs_labels(self) -> bool:
        """True if any term needs labels."""
        return any(term.needs_labels for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        """True if any term needs the task's own source."""
        return any(term.needs_teacher for term in self.terms)

    @property
    def wanted(self) -> Wanted:
        """The outputs of the task's own source that the terms read."""
        return reduce(or_, (term.wanted for term in self.terms), Wanted())

    @property
    def needs_ensemble(self) -> bool:
        """True if any term needs all sources."""
        return any(term.needs_ensemble for term in self.terms)

    @property
    def adds_over_rows(self) -> bool:
        """True if every term has a loss per row, of which it is the mean."""
        return all(term.adds_over_rows for term in self.terms)

    def require_tasks(self, tasks: Iterable[str]) -> None:
        """Reject weights of unknown tasks, and weights of 0 for all tasks.

        Raises:
            ConfigError: a weighted task does not exist, or every task has weight 0.
        """
        known = list(tasks)
        for name in self.task_weights:
            if name not in known:
                raise ConfigError(
                    f"task_weights: unknown task {name!r} (choose from {', '.join(known)})."
                    f"{nearest(name, known)}"
                )
        if known and not any(self.task_weights.get(name, 1.0) for name in known):
            raise ConfigError(
                f"task_weights: every task here has weight 0 ({shorten(known)}), so nothing would "
                "be learned and the monitored loss would always be 0. Give one of them a weight."
            )

    def share(self, task: str, tasks: Iterable[str]) -> float:
        """Return `w_t / sum_t w_t` over the tasks of a step."""
        weights = {name: self.task_weights.get(name, 1.0) for name in tasks}
        total = sum(weights.values())
        return weights[task] / total if total else 0.0

    def rows(self, predictions: Predictions) -> int:
        """Return the number of rows in the mean: labelled rows only, if a term needs labels."""
        if not self.needs_labels:
            return len(predictions.logits)
        labels = predictions.labels
        return 0 if labels is None else int((labels != UNLABELLED).sum())

    def loss(self, predictions: Predictions) -> Tensor:
        """Return the weighted sum of the terms for one task."""
        losses = [term.weight * term.loss(predictions) for term in self.terms]
        return torch.stack(losses).sum()

    @property
    def importance_batches(self) -> int:
        """Number of training batches on which `FisherToInit` measures importance; 0 without it."""
        return max((r.batches for r in self.regularisers if isinstance(r, FisherToInit)), default=0)

    def penalty(
        self,
        coefficients: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        importance: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the weighted sum of the regularisers; `importance` is F of `FisherToInit`."""
        losses = [
            r.weight
            * (
                r.penalty(coefficients, start, importance)
                if isinstance(r, FisherToInit)
                else r.penalty(coefficients, start)
            )
            for r in self.regularisers
        ]
        return torch.stack(losses).sum()
