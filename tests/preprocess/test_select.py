"""Entries chosen by all sources (SCE, TALL masks) against mergekit and re-typed formulas."""

from __future__ import annotations

import pytest
import torch

from gradmerge import Recipe
from gradmerge.coefficients import Constant, Model
from gradmerge.common.errors import ConfigError
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.preprocess import Consensus, ElectSign, SelectTop, ShareOfSquares, Site
from tiny import Perceptron, build, relatives

SITE = Site("layers.0.weight", ("a", "b", "c"))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 0.99, 1.0])
def test_select_top_keeps_the_largest_variance(density):
    directions = draw(3, 20, 31)
    directions[:, :4] = directions[:1, :4]  # no variance: never counted
    got = SelectTop(density)(directions.clone(), SITE)
    variance = directions.double().var(dim=0, unbiased=False).flatten()
    count = 20 * 31 if density == 1 else int(16 * 31 * density)
    mask = torch.zeros(20 * 31, dtype=torch.bool)
    mask[variance.argsort()[20 * 31 - count :]] = True
    assert torch.equal(got, directions * mask.view(20, 31))


def test_one_source_has_no_variance():
    directions = draw(1, 10)
    assert not SelectTop(0.9)(directions.clone(), Site("x", ("a",))).any()
    assert torch.equal(SelectTop(1.0)(directions.clone(), Site("x", ("a",))), directions)


def test_share_of_squares_by_hand():
    directions = torch.tensor([[3.0, -1.0, 0.0], [1.0, 2.0, 0.0]])
    got = ShareOfSquares()(directions.clone(), Site("x", ("a", "b")))
    first = 2 / 3  # squares 10 and 5
    expected = torch.tensor([[3 * first, 0.0, 0.0], [1 - first, 2.0, 0.0]])
    torch.testing.assert_close(got, expected)
    # tiny directions get equal weights, as in mergekit
    small = ShareOfSquares()(directions.mul(1e-4), Site("x", ("a", "b")))
    torch.testing.assert_close(small, torch.tensor([[1.5e-4, 0.0, 0.0], [0.5e-4, 2e-4, 0.0]]))


@pytest.mark.parametrize("shape", [(20, 31), (40,), (6, 4, 2, 2)])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_the_chain_is_mergekits_sce(shape, scale, density):
    methods = pytest.importorskip("mergekit.merge_methods.sce", reason="mergekit is the oracle")
    base = pytest.importorskip("mergekit.merge_methods.base")
    origin = draw(*shape, seed=9)
    sources = [origin + scale * (k + 1) * draw(*shape, seed=k) for k in range(3)]
    group = base.TensorGroup.from_tensors([origin, *sources], base_index=0)
    expected = methods.sce_merge.merge_group(group, int8_mask=False, select_topk=density)
    directions = torch.stack(sources) - origin
    directions = ShareOfSquares()(SelectTop(density)(directions, SITE), SITE)
    torch.testing.assert_close(origin + directions.sum(dim=0), expected, rtol=0, atol=1e-6)
    assert (expected - origin).abs().max() > 0


def test_the_recipe_of_sce_merges_like_mergekit():
    methods = pytest.importorskip("mergekit.merge_methods.sce", reason="mergekit is the oracle")
    base = pytest.importorskip("mergekit.merge_methods.base")
    models = relatives(build(Perceptron))
    recipe = Recipe(
        {"a": models[1], "b": models[2]},
        base=models[0],
        preprocess=[SelectTop(0.4), ShareOfSquares()],
        coefficients=Model(),
        init=Constant(1.0),
    )
    plan = open_plan(recipe, with_skeleton=False)
    raw = plan.initial_raw()
    for name in plan.tensors:
        tensors = [model.state_dict()[name] for model in models]
        group = base.TensorGroup.from_tensors(tensors, base_index=0)
        expected = methods.sce_merge.merge_group(group, int8_mask=False, select_topk=0.4)
        torch.testing.assert_close(
            FitState(plan, raw).materialise(name), expected, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("least", [0, 1, 2, 3, 4])
def test_consensus_counts_the_tasks_that_use_an_entry(least):
    directions = draw(3, 20, 31).double()
    thresholds = [0.2, 0.5, 0.8]
    got = Consensus(thresholds, least)(directions.float(), SITE)
    multi = directions.sum(dim=0)
    masks = torch.stack(
        [t.abs() >= lam * (multi - t).abs() for t, lam in zip(directions, thresholds, strict=True)]
    )
    expected = directions.float() * (masks.sum(dim=0) >= least)
    assert torch.equal(got, expected)
    assert got.any() == (least <= 3)


def test_consensus_of_closed_cases():
    # all agree; one alone; two that cancel the third's share
    directions = torch.tensor([[1.0, 5.0, 4.0], [1.0, 0.0, -2.0], [1.0, 0.0, -2.0]])
    got = Consensus(0.4, 2)(directions.clone(), SITE)
    assert torch.equal(got[:, 0], directions[:, 0])
    assert not got[:, 1].any(), "selfish entries go"
    assert torch.equal(Consensus(0.4, 1)(directions.clone(), SITE)[:, 1], directions[:, 1])
    assert torch.equal(Consensus(0.0, 3)(directions.clone(), SITE), directions)


def test_invalid_options_are_rejected():
    with pytest.raises(ConfigError, match="expected one density for all sources, got a list"):
        SelectTop([0.1, 0.2, 0.3])
    with pytest.raises(ConfigError, match=r"density: expected a share in \[0, 1\], got 2"):
        SelectTop(2)
    with pytest.raises(ConfigError, match="threshold: expected a number of at least 0, got -1"):
        Consensus(-1)
    with pytest.raises(ConfigError, match="least: expected at least 0, got -1"):
        Consensus(0.4, -1)


def test_electing_signs_first_gives_the_same_directions_but_other_weights():
    """After `ElectSign` the squares would be those of the remaining entries."""
    directions = torch.tensor([[3.0, -1.0], [1.0, 2.0]])
    site = Site("x", ("a", "b"))
    before = ShareOfSquares()(directions.clone(), site).sum(dim=0)
    after = ShareOfSquares()(ElectSign()(directions.clone(), site), site).sum(dim=0)
    assert not torch.allclose(before, after)
