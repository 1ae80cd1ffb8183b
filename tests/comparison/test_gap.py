"""The share of the gap that a merge closes between the reference and the experts."""

from __future__ import annotations

import math

import pytest

from gradmerge.comparison.results import Comparison, Outcome, Row


def gap(metric: str, reference: float, merged: float, bound: float) -> float:
    rows = [
        Row(name, kind, {0: Outcome(0, {"test": {"average": {metric: score}}})})
        for name, kind, score in (
            ("plain", "average", reference),
            ("learned", "method", merged),
            ("experts", "bound", bound),
        )
    ]
    found = Comparison(rows, ["a"], metric, "plain")
    return found.gap_closed(rows[1])


@pytest.mark.parametrize(
    ("metric", "reference", "bound"), [("accuracy", 0.5, 0.9), ("bits_per_byte", 0.9, 0.5)]
)
def test_the_share_is_that_of_the_way_to_experts_which_are_better(metric, reference, bound):
    merged = reference + 0.25 * (bound - reference)
    assert gap(metric, reference, merged, bound) == pytest.approx(0.25)
    assert math.isnan(gap(metric, bound, merged, reference))
    assert math.isnan(gap(metric, reference, merged, reference))
