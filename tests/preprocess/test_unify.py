"""EMR-Merging's election against its formula over whole vectors."""

from __future__ import annotations

import pytest
import torch

from gradmerge.preprocess import Site, Unify
from gradmerge.preprocess.base import Chain
from gradmerge.preprocess.unify import elect, masked

SHAPES = [(20, 31), (40,), (6, 4, 2, 2), (), (0, 3)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flat_of(directions):
    return directions.reshape(len(directions), directions[0].numel())


def model(num):
    tensors = {f"t{i}": draw(num, *s, seed=i) * (1 + i) for i, s in enumerate(SHAPES)}
    sources = tuple("abcdefgh"[:num])

    def passes():
        for name, directions in tensors.items():
            yield Site(name, sources), directions.clone()

    return tensors, passes


def unified(flat):
    """`u` and the masks of whole vectors, by the formula."""
    sign = torch.where(flat.sum(dim=0) > 0, 1.0, -1.0)
    largest = (flat.abs() * ((flat * sign) > 0)).max(dim=0).values
    vector = sign * largest
    return vector, flat * vector > 0


@pytest.mark.parametrize("num", [1, 2, 5])
def test_masks_and_scales_over_the_whole_model(num):
    tensors, passes = model(num)
    step = Chain([Unify()], passes)
    got = torch.cat([flat_of(step(d, site)) for site, d in passes()], dim=1)
    flat = torch.cat([flat_of(d) for d in tensors.values()], dim=1)
    vector, masks = unified(flat)
    kept = masks * vector
    scales = flat.abs().double().sum(dim=1) / kept.abs().double().sum(dim=1)
    torch.testing.assert_close(got, (scales[:, None] * kept).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        got.abs().double().sum(dim=1), flat.abs().double().sum(dim=1), rtol=1e-6, atol=0
    )
    if num == 1:
        torch.testing.assert_close(got, flat)


def test_scales_of_the_authors_code_count_each_tensors_mean():
    tensors, passes = model(3)
    own, kept = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for directions in tensors.values():
        if directions.numel():
            vector, masks = unified(flat_of(directions))
            own += flat_of(directions).abs().double().mean(dim=1)
            kept += (masks * vector).abs().double().mean(dim=1)
    assert Unify("means").scales(passes) == pytest.approx((own / kept).tolist(), rel=1e-6)
    assert Unify("sums").scales(passes) != pytest.approx((own / kept).tolist(), rel=1e-3)


def test_the_elected_vector_by_hand():
    directions = torch.tensor([[3.0, -1.0, 2.0, 0.0, 0.5], [-1.0, -4.0, -2.0, 0.0, 1.0]])
    vector, masks = elect(directions.clone())
    assert vector.tolist() == [3.0, -4.0, -2.0, 0.0, 1.0], "what cancels counts as negative"
    assert masks.tolist() == [
        [True, True, False, False, True],
        [False, True, True, False, True],
    ]
    assert masked(vector, masks[0], 2.0).tolist() == [6.0, -8.0, 0.0, 0.0, 2.0]


def test_a_zero_direction_stays_zero():
    directions = torch.stack([draw(9, 4), torch.zeros(9, 4)])
    site = Site("x", ("a", "b"))
    assert Unify().scales(lambda: iter([(site, directions)])) == [1.0, 1.0]
    got = Unify()(directions.clone(), site)
    assert torch.equal(got, directions)
