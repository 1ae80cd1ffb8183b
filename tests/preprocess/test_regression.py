"""RegMean, MaTS and Fisher merging against their formulas, on given statistics."""

from __future__ import annotations

import pytest
import torch

from gradmerge.common.errors import ConfigError
from gradmerge.preprocess import FisherScale, MaTS, RegMean, Site
from gradmerge.sources.collected import Statistic

SOURCES = ("a", "b", "c")


class Given:
    """Statistics of one tensor, by source."""

    def __init__(self, statistics):
        self.statistics = statistics

    def read(self, kind, source, tensor):
        return self.statistics.get(source)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def inputs(count=3, rows=40, width=5):
    """Return inputs `X_k` of different scale, number and mean for each source."""
    return [
        (1 + k) * draw(rows + 7 * k, width, seed=k) @ draw(width, width, seed=50 + k) + 0.3 * k
        for k in range(count)
    ]


def grams(every, part="gram", axis=1):
    return {
        source: Statistic({part: (x.T @ x)[None]}, len(x), axis, 0.0)
        for source, x in zip(SOURCES, every, strict=False)
    }


def site(statistics, count=3):
    return Site("layer.weight", SOURCES[:count], Given(statistics))


def merged(step, weights, statistics):
    """`sum_k B'_k` with origin zero: the method's own solution."""
    return step(weights.float().clone(), site(statistics, len(weights))).double().sum(dim=0)


EXACT = {"damping": 0.0, "normalise": False, "off_diagonal": 1.0}


def closed_form(every, weights, off_diagonal=1.0, normalise=False, shares=(1.0, 1.0, 1.0)):
    """The paper's formula, for weights `[out, in]`, by explicit inverse."""
    total, right = 0, 0
    for x, weight, share in zip(every, weights, shares, strict=True):
        gram = x.T @ x / (len(x) if normalise else 1)
        gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diag())
        total, right = total + share * gram, right + share * gram @ weight.T
    return (torch.linalg.inv(total) @ right).T


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("normalise", [False, True])
def test_regmean_is_the_closed_form(off_diagonal, normalise):
    every, weights = inputs(), draw(3, 4, 5, seed=9)
    step = RegMean(off_diagonal, normalise=normalise, damping=0.0, weights=[1.0, 2.0, 0.5])
    expected = closed_form(every, weights, off_diagonal, normalise, (1.0, 2.0, 0.5))
    torch.testing.assert_close(merged(step, weights, grams(every)), expected, atol=2e-6, rtol=2e-6)


def test_regmean_of_linear_regressions_is_the_regression_on_all_data():
    every = inputs()
    targets = [
        x @ draw(5, 4, seed=20 + k) + draw(len(x), 4, seed=30 + k) for k, x in enumerate(every)
    ]
    weights = torch.stack(
        [torch.linalg.lstsq(x, y).solution.T for x, y in zip(every, targets, strict=True)]
    )
    whole = torch.linalg.lstsq(torch.cat(every), torch.cat(targets)).solution.T
    got = merged(RegMean(**EXACT), weights, grams(every))
    torch.testing.assert_close(got, whole, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("step", [RegMean(), MaTS(), RegMean(off_diagonal=1.0, damping=0.1)])
def test_identical_gram_matrices_give_the_average_and_one_source_itself(step):
    weights = draw(3, 4, 5, seed=9)
    same = grams([inputs()[0]] * 3)
    torch.testing.assert_close(merged(step, weights, same), weights.mean(dim=0), atol=1e-6, rtol=0)
    one = merged(step, weights[:1], grams(inputs()))
    torch.testing.assert_close(one, weights[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("step", [RegMean(), MaTS(iterations=3), FisherScale()])
def test_the_merge_does_not_depend_on_the_origin(step):
    every, weights = inputs(), draw(3, 4, 5, seed=9)
    known = grams(every)
    if isinstance(step, FisherScale):
        fishers = draw(3, 4, 5, seed=4).square().float()
        known = {
            s: Statistic({"fisher": f}, 1, 1, float(f.norm()))
            for s, f in zip(SOURCES, fishers, strict=True)
        }
    base = draw(4, 5, seed=12)
    got = base + merged(step, weights - base, known)
    torch.testing.assert_close(got, merged(step, weights, known), atol=3e-6, rtol=0)


def test_inputs_that_no_data_reach_are_averaged():
    every = inputs()
    for x in every:
        x[:, 2] = 0
    weights = draw(3, 4, 5, seed=9)
    got = merged(RegMean(), weights, grams(every))
    torch.testing.assert_close(got[:, 2], weights[:, :, 2].mean(dim=0), atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match=r"Gram matrices of layer\.weight are singular"):
        merged(RegMean(damping=0.0), weights, grams(every))


def test_weights_stored_transposed_and_convolutions_in_groups():
    every, weights = inputs(), draw(3, 4, 5, seed=9)
    stored = weights.mT.contiguous()
    got = merged(RegMean(**EXACT), stored, grams(every, axis=0))
    torch.testing.assert_close(got.T, closed_form(every, weights), atol=2e-6, rtol=2e-6)
    # two groups of two outputs, with three inputs by two positions each
    first, second = inputs(width=6), inputs(width=6)[::-1]
    weights = draw(3, 4, 3, 2, seed=5)
    both = {
        s: Statistic({"gram": torch.stack([a.T @ a, b.T @ b])}, 1, 1, 0.0)
        for s, a, b in zip(SOURCES, first, second, strict=True)
    }
    got = merged(RegMean(**EXACT), weights, both)
    flat = weights.flatten(2)
    expected = torch.cat([closed_form(first, flat[:, :2]), closed_form(second, flat[:, 2:])])
    torch.testing.assert_close(got.flatten(1), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("step", [RegMean(weights=[1.0, 2.0, 1.0]), MaTS(weights=[1.0, 2.0, 1.0])])
def test_tensors_without_statistics_are_averaged_by_the_weights(step):
    weights = draw(3, 4, 5, seed=9)
    expected = (weights[0] + 2 * weights[1] + weights[2]) / 4
    torch.testing.assert_close(merged(step, weights, {}), expected, atol=1e-6, rtol=0)


# ---- MaTS -----------------------------------------------------------------------------------


def outputs(count=3, width=4):
    return [draw(30, width, seed=70 + k) @ draw(width, width, seed=80 + k) for k in range(count)]


def test_mats_is_the_direct_solve_for_gram_matrices():
    every, weights = inputs(), draw(3, 4, 5, seed=9)
    step = MaTS(iterations=200, tolerance=1e-13, damping=0.0, weights=[1.0, 2.0, 0.5])
    expected = closed_form(every, weights, normalise=True, shares=(1.0, 2.0, 0.5))
    torch.testing.assert_close(merged(step, weights, grams(every)), expected, atol=1e-6, rtol=1e-6)


def kfac(every, gradients):
    return {
        s: Statistic({"input": (x.T @ x)[None], "output": (d.T @ d)[None] / 30}, len(x), 1, 0.0)
        for s, x, d in zip(SOURCES, every, gradients, strict=True)
    }


def test_mats_is_the_direct_solve_for_kfac():
    """vec(D W G) = (D kron G) vec(W) for rows laid out one after another."""
    every, gradients, weights = inputs(), outputs(), draw(3, 4, 5, seed=9)
    step = MaTS(2000, 1e-13, "kfac", damping=0.0, weights=[1.0, 2.0, 0.5])
    total, right = 0, 0
    for x, d, weight, share in zip(every, gradients, weights, (1.0, 2.0, 0.5), strict=True):
        matrix = share * torch.kron(d.T @ d / 30, x.T @ x / len(x))
        total, right = total + matrix, right + matrix @ weight.flatten()
    expected = torch.linalg.solve(total, right).view(4, 5)
    got = merged(step, weights, kfac(every, gradients))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_few_iterations_of_mats_are_those_of_conjugate_gradient_from_the_average():
    """A textbook loop on the sum; the step's parts add up to its iterate."""
    every, gradients, weights = inputs(), outputs(), draw(3, 4, 5, seed=9)
    matrices = [
        torch.kron(d.T @ d / 30, x.T @ x / len(x)) for x, d in zip(every, gradients, strict=True)
    ]
    total = sum(matrices)
    x = weights.mean(dim=0).flatten()
    r = sum(m @ w.flatten() for m, w in zip(matrices, weights, strict=True)) - total @ x
    p = r.clone()
    for count in range(4):
        step = MaTS(count, 0.0, "kfac", damping=0.0)
        got = merged(step, weights, kfac(every, gradients))
        torch.testing.assert_close(got.flatten(), x, atol=2e-6, rtol=2e-6)
        alpha = (r @ r) / (p @ total @ p)
        x = x + alpha * p
        new = r - alpha * total @ p
        p = new + (new @ new) / (r @ r) * p
        r = new


# ---- Fisher ---------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_fisher_is_the_weighted_mean(normalise):
    weights = draw(3, 4, 5, seed=9)
    fishers = draw(3, 4, 5, seed=4).square() * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1)
    fishers[:, 0, 0] = 0  # without information: the plain mean
    norms = [2.0, 3.0, 0.5]
    known = {
        s: Statistic({"fisher": f}, 1, 1, norm)
        for s, f, norm in zip(SOURCES, fishers, norms, strict=True)
    }
    scaled = fishers / (torch.tensor(norms).view(3, 1, 1) if normalise else 1)
    scaled = scaled.clamp(min=1e-4) * torch.tensor([1.0, 2.0, 1.0]).view(3, 1, 1)
    expected = (scaled * weights).sum(dim=0) / scaled.sum(dim=0)
    step = FisherScale(floor=1e-4, normalise=normalise, weights=[1.0, 2.0, 1.0])
    torch.testing.assert_close(merged(step, weights, known), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RegMean(off_diagonal=1.5), r"off_diagonal: expected .* \[0, 1\], got 1\.5"),
        (lambda: RegMean(damping=-1), "damping: expected at least 0, got -1"),
        (lambda: RegMean(weights=0.0), r"RegMean\.weights: expected a number above 0"),
        (lambda: MaTS(iterations=-1), "iterations: expected at least 0, got -1"),
        (lambda: FisherScale(floor=0), "floor: expected a number above 0"),
        (lambda: FisherScale(labels="data", per="batch"), "per batch needs labels: model"),
        (lambda: RegMean()(torch.zeros(1, 2, 2), Site("x", ("a",))), "expected statistics .gram."),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
