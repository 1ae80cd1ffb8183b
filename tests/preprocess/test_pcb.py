"""PCB-Merging over a whole model in histograms, against its formula over one sorted vector."""

from __future__ import annotations

import pytest
import torch

from gradmerge.common.errors import ConfigError
from gradmerge.preprocess import ParameterCompetition, Site
from gradmerge.preprocess.base import Chain
from gradmerge.preprocess.pcb import _order_statistics


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(num, shapes):
    tensors = {f"t{i}": draw(num, *shape, seed=i) * (1 + i) * 0.3 for i, shape in enumerate(shapes)}
    sources = tuple("abcdefgh"[:num])

    def passes():
        for name, directions in tensors.items():
            yield Site(name, sources), directions.clone()

    return tensors, passes


def flat_of(directions):
    return directions.reshape(len(directions), directions[0].numel())


def minmax(x):
    low, high = x.min(dim=1, keepdim=True).values, x.max(dim=1, keepdim=True).values
    return (x - low) / (high - low)


def competition(flat, ratio, clip):
    """The published formula over whole vectors `[K, d]`, in float64."""
    num, size = flat.shape
    ordered = flat.abs().sort(dim=1).values
    low = ordered[:, int(size * clip)][:, None]
    high = ordered[:, max(0, int(size * (1 - clip) - 1))][:, None]
    clipped = flat.abs().clamp(low, high)
    within = torch.exp(num * minmax(clipped) ** 2)
    between = torch.tanh(flat * flat.sum(dim=0))
    score = within * between
    ordered = score.sort(dim=1).values
    floor = ordered[:, int(size * (1 - ratio))][:, None]
    share = minmax(score.clamp(floor, ordered[:, -1:]))
    return share * flat.sign() * clipped / share.sum(dim=0).clamp(min=1e-12)


@pytest.mark.parametrize(("ratio", "clip"), [(0.1, 0.0001), (0.3, 0.01), (0.05, 0.0)])
@pytest.mark.parametrize("num", [2, 4])
def test_equal_to_the_formula_over_the_whole_model(num, ratio, clip):
    tensors, passes = model(num, [(40, 30), (70,), (), (8, 4, 3, 3), (0, 3)])
    step = Chain([ParameterCompetition(ratio, clip)], passes)
    got = torch.cat([flat_of(step(d, site)) for site, d in passes()], dim=1).double()
    flat = torch.cat([flat_of(d) for d in tensors.values()], dim=1).double()
    expected = competition(flat, ratio, clip)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-6)
    # float32 scores may swap neighbours at the quantile, no more
    assert ((got != 0) != (expected != 0)).sum() <= 2 * num
    assert abs(int((got[0] != 0).sum()) - ratio * got.shape[1]) <= 2


def test_the_sum_is_an_average_weighted_by_shares():
    tensors, passes = model(2, [(50, 50)])
    step = Chain([ParameterCompetition(0.2)], passes)
    (merged,) = (step(d, site).sum(dim=0) for site, d in passes())
    biggest = tensors["t0"].abs().max(dim=0).values
    assert (merged.abs() <= biggest * 1.0001).all()


def test_order_statistics_are_exact_for_negative_numbers_and_ties():
    values = torch.cat([draw(2, 5000), -torch.ones(2, 50), torch.zeros(2, 50), -draw(2, 5000)], 1)
    pieces = values.split(1999, dim=1)

    def passes():
        for i, piece in enumerate(pieces):
            yield Site(str(i), ("a", "b")), piece.clone()

    ordered = values.sort(dim=1).values
    for first, second in ((0, 10_099), (17, 5050), (5049, 5051), (3333, 3334)):
        found = _order_statistics(passes, lambda d: d, lambda size, r=(first, second): r)
        for k in range(2):
            assert found[k] == (float(ordered[k, first]), float(ordered[k, second]))


def test_many_sources_do_not_overflow():
    tensors, _ = model(8, [(20, 20)])
    many = torch.cat([tensors["t0"]] * 13)
    sources = tuple(f"s{i}" for i in range(len(many)))
    step = Chain([ParameterCompetition(0.5)], lambda: iter([(Site("x", sources), many.clone())]))
    got = step(many.clone(), Site("x", sources))
    assert torch.isfinite(got).all()
    assert got.any()


def test_directions_without_a_winner_vanish():
    step = ParameterCompetition(0.5)
    assert not step(torch.zeros(2, 5, 5), Site("x", ("a", "b"))).any()
    got = step(torch.stack([draw(5, 5), torch.zeros(5, 5)]), Site("x", ("a", "b")))
    assert got[0].any()
    assert not got[1].any()


def test_shares_are_checked():
    with pytest.raises(ConfigError, match=r"density: expected a share in \(0, 1\], got 0"):
        ParameterCompetition(0)
    with pytest.raises(ConfigError, match=r"clip: expected a share in \[0, 0.5\), got 0.5"):
        ParameterCompetition(0.1, 0.5)
