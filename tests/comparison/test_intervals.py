"""Paired bootstrap intervals against an independent loop, and against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gradmerge.comparison.intervals import paired_interval, paired_intervals
from gradmerge.training.per_example import Quotient


def right(values):
    values = np.asarray(values, dtype=float)
    return {"accuracy": Quotient(values, np.ones(len(values)))}


@pytest.fixture
def answers():
    """Right answers of two methods on 200 examples, which agree on most."""
    generator = np.random.default_rng(3)
    first = generator.random(200) < 0.7
    second = np.where(generator.random(200) < 0.8, first, ~first)
    return first.astype(float), second.astype(float)


def test_one_task_has_the_interval_of_scipy(answers):
    first, second = answers
    found = paired_interval({"t": right(first)}, {"t": right(second)}, "accuracy", 4000)
    oracle = stats.bootstrap(
        (first, second),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.difference == pytest.approx(first.mean() - second.mean())
    # both are Monte Carlo: a tenth of the width is about three standard errors of a quantile
    assert found.low == pytest.approx(oracle.low, abs=0.1 * (oracle.high - oracle.low))
    assert found.high == pytest.approx(oracle.high, abs=0.1 * (oracle.high - oracle.low))


def test_pairs_are_narrower_than_independent_samples(answers):
    first, second = answers
    paired = paired_interval({"t": right(first)}, {"t": right(second)}, "accuracy")
    shuffled = np.random.default_rng(0).permutation(second)
    apart = paired_interval({"t": right(first)}, {"t": right(shuffled)}, "accuracy")
    assert paired.high - paired.low < 0.8 * (apart.high - apart.low)
    same = paired_interval({"t": right(first)}, {"t": right(first)}, "accuracy")
    assert (same.difference, same.low, same.high, same.is_clear) == (0, 0, 0, False)


def test_tasks_count_alike_and_keep_their_sizes():
    """A task without any variance adds none, however many examples it has."""
    generator = np.random.default_rng(5)
    values = generator.random(50) < 0.5
    first = {"small": right(values), "large": right(np.ones(5000))}
    second = {"small": right(np.zeros(50)), "large": right(np.zeros(5000))}
    found = paired_interval(first, second, "accuracy")
    alone = paired_interval({"small": right(values)}, {"small": right(np.zeros(50))}, "accuracy")
    assert found.difference == pytest.approx((values.mean() + 1) / 2)
    width, own = (one.high - one.low for one in (found, alone))
    assert width == pytest.approx(own / 2, rel=0.05)


def test_quotients_are_resampled_as_quotients():
    """Bits per byte of texts of different lengths are no mean of the texts' own."""
    generator = np.random.default_rng(7)
    size = generator.integers(1, 50, 80).astype(float)
    bits = size * generator.random(80)
    base = {"t": {"bits_per_byte": Quotient(2 * size, size)}}
    found = paired_interval({"t": {"bits_per_byte": Quotient(bits, size)}}, base, "bits_per_byte")
    assert found.difference == pytest.approx(bits.sum() / size.sum() - 2)
    rows = generator.integers(80, size=(4000, 80))
    oracle = np.percentile(bits[rows].sum(1) / size[rows].sum(1) - 2, (2.5, 97.5))
    assert (found.low, found.high) == pytest.approx(tuple(oracle), abs=0.03)


def test_seeds_of_one_test_split_share_their_draws_and_others_do_not(answers):
    first, second = answers
    reference = {seed: {"t": right(second)} for seed in (0, 1)}
    row = {"row": {seed: {"t": right(first)} for seed in (0, 1)}}
    one = paired_interval(reference[0], row["row"][0], "accuracy")

    def width(splits):
        found = paired_intervals(reference, row, ["t"], "accuracy", splits, 4000)["row"]
        return found.high - found.low

    shared = width({0: {"t": "same"}, 1: {"t": "same"}})
    apart = width({0: {"t": "x"}, 1: {"t": "y"}})
    assert shared == pytest.approx(one.high - one.low, rel=0.1)
    assert apart == pytest.approx(shared / np.sqrt(2), rel=0.1)


def test_rows_without_scores_of_all_tasks_have_no_interval(answers):
    first, second = answers
    reference = {0: {"t": right(first), "u": right(second)}}
    rows = {"whole": {0: {"t": right(second), "u": right(first)}}, "part": {0: {"t": right(first)}}}
    assert list(paired_intervals(reference, rows, ["t", "u"], "accuracy", {}, 100)) == ["whole"]
    with pytest.raises(ValueError, match="t: methods were scored on different numbers of examples"):
        paired_interval({"t": right(first[:9])}, {"t": right(second)}, "accuracy")
