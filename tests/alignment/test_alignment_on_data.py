"""Maps from moments of activations, against numpy, SciPy and closed forms, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.optimize import linear_sum_assignment
from sklearn import cross_decomposition

from gradmerge.alignment import (
    CCA,
    ActivationMatching,
    AlignmentContext,
    LinearMap,
    Moments,
    OptimalTransport,
    PermutationSpec,
)
from gradmerge.alignment.mixing import kept_apart
from gradmerge.alignment.moments import Pairing, correlation, covariances, squared_distances
from gradmerge.alignment.symmetry.spec import Axis, Factor, Place, Segment, UnitGroup
from gradmerge.alignment.transport import sinkhorn
from gradmerge.common.errors import ConfigError
from permutations import plain_axis

SIZE = 7
ORDER = torch.tensor([3, 0, 6, 1, 5, 2, 4])


class Seen:
    """Moments of explicit activations, `[rows, size]` by source, all of one group."""

    def __init__(self, **rows):
        self.rows = rows

    def moments(self, group, first, second):
        assert group == "units"
        a, b = self.rows[first], self.rows[second]
        n = len(a)
        return Moments(n, a.mean(0), b.mean(0), a.T @ a / n, b.T @ b / n, a.T @ b / n)


GROUP = UnitGroup("units", SIZE, (Place("l", -1, 0, (SIZE,), 0),))


def spec_of(**tensors):
    return PermutationSpec({"units": GROUP}, tensors)


PLAIN = spec_of(w=(plain_axis([SIZE], ["units"]), plain_axis([3], [None], "in")))


def correlated(seed, rows=400, size=SIZE):
    """Correlated units of several scales with means, `[rows, size]`."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    scales = torch.rand(size, generator=generator, dtype=torch.float64) + 0.2
    rows = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return (rows @ mix + 2) * scales


def context_of(spec=PLAIN, **rows):
    return AlignmentContext(spec, dict.fromkeys(rows), (), activations=Seen(**rows))


def aligned(method, spec=PLAIN, **rows):
    return method.align(context_of(spec, **rows))


def rotation(seed, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(values).Q


# ---- moments --------------------------------------------------------------------------------


def test_moments_of_units_are_numpys():
    x, y = correlated(0), correlated(1) + 0.5 * correlated(0)
    moments = Seen(a=x, b=y).moments("units", "a", "b")
    both = np.corrcoef(x.numpy(), y.numpy(), rowvar=False)[:SIZE, SIZE:]
    np.testing.assert_allclose(correlation(moments).numpy(), both, atol=1e-12)
    whole = np.cov(x.numpy(), y.numpy(), rowvar=False, bias=True)
    xx, yy, xy = covariances(moments)
    np.testing.assert_allclose(xx, whole[:SIZE, :SIZE], atol=1e-10)
    np.testing.assert_allclose(yy, whole[SIZE:, SIZE:], atol=1e-10)
    np.testing.assert_allclose(xy, whole[:SIZE, SIZE:], atol=1e-10)
    apart = (x[:, :, None] - y[:, None, :]).square().mean(0)
    torch.testing.assert_close(squared_distances(moments), apart, atol=1e-10, rtol=0)


def test_a_unit_that_never_varies_correlates_with_none():
    x, y = correlated(0), correlated(1)
    x[:, 2], y[:, 4] = 3.7, 0.0
    found = correlation(Seen(a=x, b=y).moments("units", "a", "b"))
    assert torch.isfinite(found).all()
    assert not found[2].any()
    assert not found[:, 4].any()
    assert found.count_nonzero() == (SIZE - 1) ** 2


def test_moments_of_a_mean_are_those_of_mean_activations():
    a, b, c, y = (correlated(seed) for seed in range(4))
    order, matrix = ORDER, correlated(9, SIZE)
    targets = {
        "a": {"units": order},
        "b": {},
        "c": {"units": LinearMap(matrix, torch.linalg.inv(matrix))},
    }
    context = context_of(a=a, b=b, c=c, y=y)
    came = Pairing(context, GROUP, "y", targets, {}).moments_of_mean()
    mean = (a[:, order] + b + c @ matrix.T) / 3
    expected = Seen(m=mean, y=y).moments("units", "m", "y")
    for part in ("first_mean", "second_mean", "first", "second", "cross"):
        torch.testing.assert_close(
            getattr(came, part), getattr(expected, part), rtol=1e-12, atol=1e-12
        )


# ---- activation matching --------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["correlation", "covariance"])
def test_a_planted_permutation_is_found(metric):
    x, order = correlated(0), ORDER
    noise = 1e-3 * correlated(1)
    found = aligned(ActivationMatching(metric=metric), a=x, b=(x + noise)[:, order])
    assert found.maps["a"] == {}
    if metric == "correlation":
        assert torch.equal(found.maps["b"]["units"], torch.argsort(order))
        assert found.objective["b"][-1] == pytest.approx(SIZE, abs=1e-3)
    gain = correlation if metric == "correlation" else lambda m: covariances(m)[2]
    moments = Seen(a=x, b=(x + noise)[:, order]).moments("units", "a", "b")
    rows, columns = linear_sum_assignment(-gain(moments).numpy())
    assert found.maps["b"]["units"].tolist() == columns.tolist()
    assert found.objective["b"][-1] == pytest.approx(float(gain(moments)[rows, columns].sum()))


def test_scales_count_in_covariances_and_not_in_correlations():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(500, SIZE, generator=generator, dtype=torch.float64)
    y = base + 0.1 * torch.randn(500, SIZE, generator=generator, dtype=torch.float64)
    y[:, 0] += 100 * base[:, 1]  # unit 0 is now mostly unit 1, and large
    first = aligned(ActivationMatching(), a=base, b=y).maps["b"]["units"]
    by_size = aligned(ActivationMatching(metric="covariance"), a=base, b=y).maps["b"]["units"]
    assert int(by_size[1]) == 0
    assert first.tolist() == list(range(SIZE)) or int(first[1]) in (0, 1)


def test_four_sources_come_together_at_their_running_mean():
    x, generator = correlated(0), torch.Generator().manual_seed(3)
    orders = [torch.randperm(SIZE, generator=generator) for _ in range(4)]
    rows = {name: x[:, order] for name, order in zip("abcd", orders, strict=True)}
    found = aligned(ActivationMatching(reference="mean"), **rows)
    came = [
        values[:, found.maps[name].get("units", torch.arange(SIZE))]
        for name, values in rows.items()
    ]
    for other in came[1:]:
        torch.testing.assert_close(other, came[0], rtol=0, atol=0)
    assert found.report["reference"] == "mean"


@pytest.mark.parametrize("metric", ["correlation", "covariance"])
def test_rounds_towards_the_mean_raise_the_sum_over_pairs_and_end(metric):
    generator = torch.Generator().manual_seed(0)
    shared = correlated(0)
    rows = {
        name: (shared + 2 * correlated(i + 1))[:, torch.randperm(SIZE, generator=generator)]
        for i, name in enumerate("abcd")
    }
    rows["b"] = 10 * rows["b"]

    def over_pairs(maps):
        moved = [rows[n][:, maps[n].get("units", torch.arange(SIZE))].numpy() for n in rows]
        measure = np.corrcoef if metric == "correlation" else np.cov
        every = measure(np.concatenate(moved, axis=1), rowvar=False).reshape(4, SIZE, 4, SIZE)
        return sum(np.trace(every[i, :, j]) for i in range(4) for j in range(i))

    sums = [over_pairs({name: {} for name in rows})]
    for rounds in (1, 2, 100):
        found = aligned(
            ActivationMatching(metric=metric, reference="mean", max_iter=rounds), **rows
        )
        sums.append(over_pairs(found.maps))
    assert sums == sorted(sums)
    assert sums[1] > sums[0]
    assert found.report["rounds"] < 20
    context = context_of(**rows)
    for name in rows:
        others = {other: found.maps[other] for other in rows if other != name}
        again = ActivationMatching(metric=metric).match(context, name, others, {})
        assert torch.equal(again.maps["units"], found.maps[name]["units"]), name


def test_methods_on_data_say_what_they_miss():
    context = AlignmentContext(PLAIN, {"a": None, "b": None}, ())
    with pytest.raises(ConfigError, match="ActivationMatching needs the sources' activations on"):
        ActivationMatching().align(context)
    spec = PermutationSpec({"others": UnitGroup("others", 3)}, {})
    with pytest.raises(ConfigError, match="no group of units was seen in any module's output"):
        aligned(CCA(), spec, a=correlated(0), b=correlated(1))
    both = PermutationSpec({"units": GROUP, "others": UnitGroup("others", 3)}, {})
    with pytest.warns(UserWarning, match="1 groups are the output of no module and stay in their"):
        found = aligned(ActivationMatching(), both, a=correlated(0), b=correlated(1))
    assert set(found.maps["b"]) == {"units"}


# ---- CCA ------------------------------------------------------------------------------------


def test_cca_undoes_a_rotation():
    x, turn = correlated(0), rotation(1)
    found = aligned(CCA(gamma=0.0), a=x, b=x @ turn).maps["b"]["units"]
    torch.testing.assert_close(found.matrix, turn, rtol=0, atol=1e-8)  # y = turn^T x in columns
    torch.testing.assert_close(x @ turn @ found.matrix.T, x, rtol=0, atol=1e-7)
    torch.testing.assert_close(
        found.matrix @ found.inverse, torch.eye(SIZE, dtype=torch.float64), rtol=0, atol=1e-10
    )


def test_cca_of_permuted_units_is_the_permutation():
    x, order = correlated(0), ORDER
    for gamma in (0.0, 0.1):  # adding to the diagonal commutes with a permutation
        found = aligned(CCA(gamma=gamma), a=x, b=x[:, order]).maps["b"]["units"]
        expected = torch.eye(SIZE, dtype=torch.float64)[torch.argsort(order)]
        torch.testing.assert_close(found.matrix, expected, rtol=0, atol=1e-8)
        torch.testing.assert_close(found.inverse, expected.T, rtol=0, atol=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_cca_is_the_papers_formula(gamma):
    x, y = correlated(0), correlated(1) + correlated(0) @ rotation(2)
    found = aligned(CCA(gamma=gamma), a=x, b=y)
    change = found.maps["b"]["units"]
    whole = np.cov(x.numpy(), y.numpy(), rowvar=False, bias=True)
    s_xx = whole[:SIZE, :SIZE] + gamma * np.eye(SIZE)
    s_yy = whole[SIZE:, SIZE:] + gamma * np.eye(SIZE)
    rx, ry = scipy.linalg.sqrtm(s_xx).real, scipy.linalg.sqrtm(s_yy).real
    ix, iy = np.linalg.inv(rx), np.linalg.inv(ry)
    u, s, vt = np.linalg.svd(ix @ whole[:SIZE, SIZE:] @ iy)
    rows = iy @ vt.T @ u.T @ rx  # T = S_yy^-1/2 V U^T S_xx^1/2, for rows y T
    np.testing.assert_allclose(change.matrix.numpy(), rows.T, atol=1e-7)
    np.testing.assert_allclose(change.inverse.numpy(), (ix @ u @ vt @ ry).T, atol=1e-7)
    np.testing.assert_allclose(change.matrix @ change.inverse, np.eye(SIZE), atol=1e-9)
    assert found.objective["b"] == [pytest.approx(s.sum(), abs=1e-8)]


def test_canonical_correlations_are_scikit_learns_and_those_of_orthonormal_bases():
    x, y = correlated(0), correlated(1) + 0.5 * correlated(0) @ rotation(2)
    gain = aligned(CCA(gamma=0.0), a=x, b=y).objective["b"][-1]
    bases = [np.linalg.qr((v - v.mean(0)).numpy())[0] for v in (x, y)]
    canonical = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    assert gain == pytest.approx(canonical.sum(), abs=1e-8)
    reference = cross_decomposition.CCA(n_components=2, max_iter=20_000, tol=1e-14)
    scores = reference.fit_transform(x.numpy(), y.numpy())
    for i in range(2):
        found = np.corrcoef(scores[0][:, i], scores[1][:, i])[0, 1]
        assert found == pytest.approx(canonical[i], abs=1e-5)


def test_cca_of_several_sources_is_to_the_mean_of_those_before():
    x = correlated(0)
    rows = {"a": x, "b": x @ rotation(1), "c": x @ rotation(2)}
    found = aligned(CCA(gamma=0.0, reference="mean"), **rows)
    for name in "bc":
        came = rows[name] @ found.maps[name]["units"].matrix.T
        torch.testing.assert_close(came, x, rtol=0, atol=1e-6)


def test_cca_refuses_what_has_no_inverse():
    x, y = correlated(0), correlated(1)
    y[:, 3] = 0.0
    with pytest.raises(ConfigError, match="covariance of the 7 units of units has no inverse"):
        aligned(CCA(gamma=0.0), a=x, b=y)
    change = aligned(CCA(), a=x, b=y).maps["b"]["units"]
    torch.testing.assert_close(
        change.matrix @ change.inverse, torch.eye(SIZE, dtype=torch.float64), rtol=0, atol=1e-9
    )


# ---- optimal transport ----------------------------------------------------------------------


def costs(seed=0, size=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, size, generator=generator, dtype=torch.float64)


def plain_sinkhorn(cost, level, rounds=20_000):
    """Scalings of the kernel, as first published (arXiv 1306.0895)."""
    kernel = np.exp(-cost / level)
    u = v = np.ones(len(cost))
    for _ in range(rounds):
        u = 1 / len(cost) / (kernel @ v)
        v = 1 / len(cost) / (kernel.T @ u)
    return u[:, None] * kernel * v[None, :]


@pytest.mark.parametrize("level", [0.02, 0.2, 5.0])
def test_sinkhorn_meets_its_marginals_and_is_the_scaling_algorithm(level):
    cost = costs()
    plan = sinkhorn(cost, level, tolerance=1e-12)
    even = torch.full((12,), 1 / 12, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(0), even, rtol=0, atol=1e-12)
    torch.testing.assert_close(plan.sum(1), even, rtol=0, atol=1e-12)
    np.testing.assert_allclose(plan.numpy(), plain_sinkhorn(cost.numpy(), level), atol=1e-10)


def test_sinkhorn_is_an_assignment_as_the_entropy_goes():
    cost = costs(7)  # any other assignment costs 0.11 more
    rows, columns = linear_sum_assignment(cost.numpy())
    plan = sinkhorn(cost, 1e-3)
    expected = torch.zeros_like(cost)
    expected[rows, columns] = 1 / 12
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-6)
    assert sinkhorn(cost, 1e4).sub(1 / 144).abs().max() < 1e-6


def test_sinkhorn_arrives_where_turns_stall():
    """Nearly a permutation; optimal if and only if marginals hold and `r log P + C = f + g`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=generator, dtype=torch.float64)
    x = x + 2 * torch.randn(500, 1, generator=generator, dtype=torch.float64)
    y = x + 0.5 * torch.randn(500, 64, generator=generator, dtype=torch.float64)
    cost = squared_distances(Seen(a=x, b=y).moments("units", "a", "b"))
    cost[:8, :8] = cost[:8, :8].mean()  # eight units that no cost tells apart
    level = 0.1 * float(cost.median())
    with pytest.raises(ConfigError, match="after 100 iterations"):
        sinkhorn(cost, level, tolerance=1e-12, iterations=100)
    plan = sinkhorn(cost, level, tolerance=1e-12)
    even = torch.full((64,), 1 / 64, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(0), even, rtol=0, atol=1e-12)
    torch.testing.assert_close(plan.sum(1), even, rtol=0, atol=1e-12)
    potentials = level * plan.log() + cost
    rest = potentials - potentials[:1] - potentials[:, :1] + potentials[0, 0]
    assert rest.abs().max() < 1e-10


def test_sinkhorn_takes_costs_that_would_overflow_and_says_when_it_gave_up():
    plan = sinkhorn(1e6 + 1e3 * costs(), 100.0)
    assert torch.isfinite(plan).all()
    with pytest.raises(ConfigError, match=r"12 units did not converge: after 3 iterations"):
        sinkhorn(costs(), 1e-3, iterations=3)


@pytest.mark.parametrize("cost", ["euclidean", "squared", "correlation"])
def test_transport_averages_units_with_the_plan(cost):
    x, y = correlated(0), correlated(0)[:, ORDER] + 0.3 * correlated(1)
    method = OptimalTransport(cost=cost, regularisation=0.2)
    change = aligned(method, a=x, b=y).maps["b"]["units"]
    apart = np.sqrt((np.square(x.numpy()[:, :, None] - y.numpy()[:, None, :])).mean(0))
    if cost == "squared":
        apart = apart**2
    if cost == "correlation":
        apart = 1 - np.corrcoef(x.numpy(), y.numpy(), rowvar=False)[:SIZE, SIZE:]
    level = 0.2 * float(torch.from_numpy(apart).median())
    expected = SIZE * plain_sinkhorn(apart, level)
    np.testing.assert_allclose(change.matrix.numpy(), expected, atol=1e-7)
    np.testing.assert_allclose(change.inverse.numpy(), expected.T, atol=1e-7)
    torch.testing.assert_close(change.matrix.sum(1), torch.ones(SIZE).double(), atol=1e-7, rtol=0)


def test_exact_transport_is_a_permutation_and_the_limit_of_the_entropic():
    x, order = correlated(0), ORDER
    y = x[:, order] + 0.01 * correlated(1)
    exact = aligned(OptimalTransport(regularisation=0.0), a=x, b=y).maps["b"]["units"]
    assert torch.equal(exact, torch.argsort(order))
    nearly = aligned(OptimalTransport(regularisation=1e-3), a=x, b=y).maps["b"]["units"]
    torch.testing.assert_close(
        nearly.matrix, torch.eye(SIZE, dtype=torch.float64)[exact], rtol=0, atol=1e-6
    )


# ---- what must not be mixed ------------------------------------------------------------------

UNITS = plain_axis([SIZE], ["units"])
READS = plain_axis([SIZE], ["units"], "in")
ALONG, GAIN, SQUARE = (plain_axis([SIZE], ["units"], role) for role in ("along", "gain", "square"))
FREE = plain_axis([5], [None])
BLOCKS = Axis((Segment((Factor(SIZE, "units"), Factor(4))),))
FLATTENED = Axis((Segment((Factor(SIZE, "units"), Factor(4))),), "in")


@pytest.mark.parametrize(
    ("tensors", "allowed"),
    [
        ({"l.weight": (UNITS, FREE), "l.bias": (ALONG,), "next.weight": (FREE, READS)}, True),
        ({"l.weight": (UNITS, FREE), "n.weight": (GAIN,), "n.running_var": (SQUARE,)}, True),
        ({"l.weight": (UNITS, FREE), "n.weight": (GAIN,), "n.bias": (ALONG,)}, False),
        ({"l.weight": (BLOCKS, FREE), "next.weight": (FREE, FLATTENED)}, False),
        ({"l.weight": (UNITS, FREE), "next.weight": (FREE, FLATTENED)}, True),
    ],
    ids=["plain", "batch norm", "layer norm", "heads", "flattened"],
)
def test_heads_and_normalised_residual_streams_keep_a_permutation(tensors, allowed):
    spec = spec_of(**tensors)
    assert (kept_apart(spec, "units") is None) is allowed
    x, order = correlated(0), ORDER
    for method in (CCA(), OptimalTransport()):
        change = aligned(method, spec, a=x, b=x[:, order]).maps["b"]["units"]
        if allowed:
            assert isinstance(change, LinearMap)
        else:
            assert torch.equal(change, torch.argsort(order))


def test_gains_are_those_of_the_nearest_diagonal():
    """`argmin_d |diag(d) T - T diag(g)|`, a row at a time by least squares."""
    spec = spec_of(**{"n.weight": (GAIN,), "n.bias": (ALONG,)})
    matrix, gains = correlated(0, SIZE), torch.rand(SIZE, dtype=torch.float64) + 0.5
    maps = {"units": LinearMap(matrix, torch.linalg.inv(matrix))}
    wanted = (matrix * gains).numpy()
    expected = [
        np.linalg.lstsq(row[:, None].numpy(), target, rcond=None)[0][0]
        for row, target in zip(matrix, wanted, strict=True)
    ]
    came = spec.apply(maps, "n.weight", gains)
    np.testing.assert_allclose(came.numpy(), expected, atol=1e-12)
    assert came.min() >= gains.min()
    torch.testing.assert_close(spec.apply(maps, "n.bias", gains), matrix @ gains)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ActivationMatching, {"metric": "cosine"}, "expected correlation or covariance"),
        (CCA, {"gamma": -1.0}, "CCA.gamma: expected 0 or more, got -1.0"),
        (CCA, {"gamma": math.nan}, "CCA.gamma: expected 0 or more, got nan"),
        (OptimalTransport, {"regularisation": -0.1}, "regularisation: expected 0 or more"),
        (OptimalTransport, {"cost": "cosine"}, "expected euclidean, squared or"),
        (OptimalTransport, {"tolerance": 0.0}, "tolerance: expected a number above 0, got 0.0"),
        (OptimalTransport, {"iterations": 0}, "iterations: expected at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(**options)
