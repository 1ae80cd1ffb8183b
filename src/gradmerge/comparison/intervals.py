"""Paired bootstrap intervals of differences between methods.

Examples of the test split are drawn with replacement, from each task as many as it has (so that
every task keeps its share), and the same ones for all methods. A difference is that of the averages
over tasks, averaged over seeds. Seeds whose test split is the same share their draws. The
interval says how far the difference depends on the examples of the test split, given these merges;
it does not say how far it would change with other seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradmerge.training.per_example import AbstractExamples

Examples = Mapping[str, Mapping[str, AbstractExamples]]
"""Scores of single examples by task and metric."""
_PART = 250
"""Resamples that are computed at a time."""


@dataclass(frozen=True)
class Interval:
    """A difference to the reference with its 95% interval."""

    difference: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """True if the interval does not contain 0."""
        return self.low > 0 or self.high < 0


def paired_interval(
    first: Examples, second: Examples, metric: str, resamples: int = 2000
) -> Interval:
    """Return the interval of the difference `first - second` of two evaluations of one split.

    Args:
        first: scores of single examples (`MergeModule.examples`).
        second: those of the reference, on the same examples.
        metric: the score, which both have for every task of the second.
        resamples: number of resamples; their seed is fixed.

    Raises:
        KeyError: a task has no such score.
    """
    found = paired_intervals({0: second}, {"": {0: first}}, list(second), metric, {}, resamples)
    return found[""]


def paired_intervals(
    reference: Mapping[int, Examples],
    rows: Mapping[str, Mapping[int, Examples]],
    tasks: Sequence[str],
    metric: str,
    splits: Mapping[int, Mapping[str, str]],
    resamples: int,
) -> dict[str, Interval]:
    """Return the interval of each row that has the scores of all tasks on some seed.

    Args:
        reference: scores of the reference, by seed.
        rows: scores of each row, by seed.
        tasks: the tasks, which count alike.
        metric: the score.
        splits: identity of each task's test split, by seed.
        resamples: number of resamples.
    """

    def has_all(examples: Examples | None) -> bool:
        return examples is not None and all(metric in examples.get(t, {}) for t in tasks)

    seeds = [seed for seed, examples in reference.items() if has_all(examples)]
    shared = {name: [s for s in seeds if has_all(own.get(s))] for name, own in rows.items()}
    names = [name for name in rows if shared[name]]
    # [rows, resamples]; the first column is the split itself
    total = {name: np.zeros(resamples + 1) for name in names}
    for task in tasks:
        for seed in seeds:
            base = reference[seed][task][metric]
            identity = splits.get(seed, {}).get(task, f"seed {seed}")
            own = [name for name in names if seed in shared[name]]
            if any(rows[name][seed][task][metric].count != base.count for name in own):
                raise ValueError(f"{task}: methods were scored on different numbers of examples.")
            at = 0
            for counts in _draws(f"{task} {identity}", base.count, resamples):
                place = slice(at, at + len(counts))
                drawn = base.resampled(counts)
                for name in own:
                    found = rows[name][seed][task][metric].resampled(counts)
                    total[name][place] += (found - drawn) / (len(tasks) * len(shared[name]))
                at += len(counts)
    return {name: _interval(total[name]) for name in names}


def _draws(identity: str, examples: int, resamples: int) -> Iterator[Any]:
    """Yield how often each example was drawn, first once each and then in resamples."""
    yield np.ones((1, examples), dtype=np.int64)
    number = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big")
    generator = np.random.default_rng(number)
    shares = np.full(examples, 1 / examples)
    for start in range(0, resamples, _PART):
        yield generator.multinomial(examples, shares, size=min(_PART, resamples - start))


def _interval(differences: Any) -> Interval:
    low, high = np.nanpercentile(differences[1:], (2.5, 97.5))
    return Interval(float(differences[0]), float(low), float(high))
