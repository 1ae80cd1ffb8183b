"""Rows of a comparison, each with its outcomes on several seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gradmerge.comparison.intervals import Examples, Interval, paired_intervals
from gradmerge.training.measures import SCORES
from gradmerge.training.per_example import from_arrays

_HIGHER = {score.name: score.higher_is_better for score in SCORES.values()}
_LOWER_IS_BETTER = ("loss", "perplexity", "calibration_error", "squared_error")


def is_higher_better(metric: str) -> bool:
    """Return whether more of a metric is better."""
    return _HIGHER.get(metric, metric not in _LOWER_IS_BETTER)


@dataclass(frozen=True)
class Outcome:
    """The final score of a row on one seed, as its record states it."""

    seed: int
    record: Mapping[str, Any]
    place: Path | None = None
    """The record's file; scores of single examples lie beside it."""
    only: Mapping[str, Outcome] = field(default_factory=dict)
    """The outcomes that tasks are taken from, of a row that is made of others."""

    @property
    def test(self) -> Mapping[str, Mapping[str, float]]:
        """Scores on the test split by task, and `average`."""
        return dict(self.record["test"])

    def score(self, task: str, metric: str) -> float:
        """Return a score of a task, NaN where it was not measured."""
        return float(self.test.get(task, {}).get(metric, math.nan))

    @cached_property
    def examples(self) -> Examples:
        """Scores of single examples, by task and metric."""
        if self.only:
            return {
                task: one.examples[task] for task, one in self.only.items() if task in one.examples
            }
        if self.place is None or not self.place.with_suffix(".npz").is_file():
            return {}
        with np.load(self.place.with_suffix(".npz"), allow_pickle=False) as arrays:
            return from_arrays({name: arrays[name] for name in arrays.files})


@dataclass
class Row:
    """A method or baseline."""

    name: str
    kind: str
    """base, expert, average, ensemble, method or bound."""
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    """By seed."""
    errors: dict[int, str] = field(default_factory=dict)
    """Why it has failed, by seed."""
    interval: Interval | None = None
    """Difference to the reference."""

    def scores(self, task: str, metric: str) -> list[float]:
        """Return a score on each seed."""
        return [outcome.score(task, metric) for outcome in self.outcomes.values()]

    def mean(self, task: str, metric: str) -> float:
        """Return the mean of a score over seeds, NaN without one."""
        values = self.scores(task, metric)
        return statistics.fmean(values) if values else math.nan

    def values(self, name: str) -> list[Any]:
        """Return an entry of the records of all seeds that have it."""
        found = (outcome.record.get(name) for outcome in self.outcomes.values())
        return [value for value in found if value is not None]

    def cost(self, name: str) -> float:
        """Return the mean of an entry of the records over seeds, 0 without one."""
        values = [float(value) for value in self.values(name)]
        return statistics.fmean(values) if values else 0.0


@dataclass
class Comparison:
    """All rows of a comparison.

    Args:
        rows: the rows.
        tasks: names of the tasks.
        metric: the score that is compared.
        reference: name of the row that the others are compared with.
        splits: identity of each task's test split by seed, which says what seeds share.
        curves: rows of learning curves, by method and number of examples per task.
        about: how the comparison was made, in a few sentences.
        others: the same rows on other test data, by their name.
    """

    rows: list[Row]
    tasks: Sequence[str]
    metric: str
    reference: str
    splits: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    curves: Mapping[str, Mapping[int, Row]] = field(default_factory=dict)
    about: Sequence[str] = ()
    others: Mapping[str, Comparison] = field(default_factory=dict)

    @property
    def higher_is_better(self) -> bool:
        """True if more of the metric is better."""
        return is_higher_better(self.metric)

    @property
    def scored(self) -> list[Row]:
        """Rows with a score, baselines first, methods from worst to best, the bound last."""
        order = ("base", "expert", "average", "ensemble", "method", "bound")
        sign = 1 if self.higher_is_better else -1

        def key(row: Row) -> tuple[int, float]:
            by_score = sign * row.mean("average", self.metric) if row.kind == "method" else 0.0
            return order.index(row.kind), by_score

        return sorted((row for row in self.rows if row.outcomes), key=key)

    @property
    def failed(self) -> list[Row]:
        """Rows that have failed on at least one seed."""
        return [row for row in self.rows if row.errors]

    def row(self, name: str) -> Row | None:
        """Return a row by its name."""
        return next((row for row in self.rows if row.name == name), None)

    def gap_closed(self, row: Row) -> float:
        """Return the share of the way from the reference to the bound.

        It is NaN without both, and where the bound is no better than the reference.

        `(s - s_reference) / (s_bound - s_reference)`
        """
        bound = next((r for r in self.rows if r.kind == "bound" and r.outcomes), None)
        reference = self.row(self.reference)
        if bound is None or reference is None or not reference.outcomes:
            return math.nan
        first, last = (r.mean("average", self.metric) for r in (reference, bound))
        if last == first or (last > first) != self.higher_is_better:
            return math.nan
        return (row.mean("average", self.metric) - first) / (last - first)

    def compare(self, resamples: int = 2000) -> None:
        """Give every row the interval of its difference to the reference, where there is one."""
        reference = self.row(self.reference)
        if reference is None or not reference.outcomes:
            return
        others = [row for row in self.rows if row.outcomes and row is not reference]
        found = paired_intervals(
            {seed: outcome.examples for seed, outcome in reference.outcomes.items()},
            {
                row.name: {seed: outcome.examples for seed, outcome in row.outcomes.items()}
                for row in others
            },
            self.tasks,
            self.metric,
            self.splits,
            resamples,
        )
        for row in others:
            row.interval = found.get(row.name)
