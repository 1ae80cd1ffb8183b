"""DELLA's magnitude-dependent dropping against ranks by sorting, mergekit, and its own mean."""

from __future__ import annotations

import pytest
import torch

from gradmerge import Recipe
from gradmerge.coefficients import Constant, Model
from gradmerge.common.errors import ConfigError
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.preprocess import MagnitudeDrop, Site
from tiny import Normalised, build, relatives

SITE = Site("layers.0.weight", ("a", "b", "c"))
SHAPES = [(6, 50), (40,), (3, 8, 2, 2), (5, 1), (1, 7), (), (1,), (0, 4)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def probabilities(direction, density, epsilon):
    """Return probabilities from a full stable sort along axis 1, in float64."""
    if direction.dim() < 2:
        return probabilities(direction.view(1, -1), density, epsilon).view(direction.shape)
    size = direction.shape[1]
    ranks = direction.abs().sort(dim=1, stable=True).indices.argsort(dim=1).double()
    share = ranks / (size - 1) if size > 1 else torch.full_like(ranks, 0.5)
    return density - epsilon + 2 * epsilon * share


def drawn(shape, source, seed):
    """Return the draws of one source, row by row along axis 1, in the layout of the tensor."""
    generator = SITE.generator(seed, source)
    if len(shape) < 3:
        return torch.rand(shape, generator=generator)
    draws = torch.rand(shape[0], *shape[2:], shape[1], generator=generator)
    return draws.movedim(-1, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.2, 0.1), (0.9, 0.0)])
def test_magnitude_drop_keeps_by_rank_and_rescales_by_probability(shape, density, epsilon):
    directions = draw(3, *shape)
    got = MagnitudeDrop(density, epsilon, seed=3)(directions.clone(), SITE)
    for k, source in enumerate(SITE.sources):
        p = probabilities(directions[k], density, epsilon)
        draws = drawn(shape, source, 3)
        kept = draws < p
        expected = torch.where(kept, directions[k].double() / p, 0.0)
        torch.testing.assert_close(got[k].double(), expected, rtol=1e-6, atol=0)


def test_the_mean_over_draws_is_the_direction():
    directions = torch.rand(1, 4000, 16, generator=torch.Generator().manual_seed(1)) + 0.5
    directions = directions[:, :1].expand(-1, 4000, -1).contiguous()  # 4000 draws of one row
    got = MagnitudeDrop(0.4, 0.25)(directions.clone(), Site("x", ("a",)))[0].double()
    row = directions[0, 0].double()
    p = probabilities(directions[0, :1], 0.4, 0.25)[0]
    deviation = row * ((1 - p) / p / 4000).sqrt()
    assert ((got.mean(dim=0) - row).abs() < 5 * deviation).all()
    kept = (got != 0).double().mean(dim=0)
    assert ((kept - p).abs() < 5 * (p * (1 - p) / 4000).sqrt()).all()
    assert kept[row.argmax()] > 0.6 > 0.2 > kept[row.argmin()]


@pytest.mark.parametrize("shape", [(6, 50), (40,), (3, 8, 2, 2)])
@pytest.mark.parametrize("rescale", [True, False])
def test_equal_to_mergekit_given_the_same_draws(shape, rescale, monkeypatch):
    sparsify = pytest.importorskip("mergekit.sparsify", reason="mergekit is the oracle")
    directions = draw(3, *shape)
    name = "l1" if rescale else "none"
    got = MagnitudeDrop(0.5, 0.2, name, seed=5)(directions.clone(), SITE)
    for k, source in enumerate(SITE.sources):
        draws = drawn(shape, source, 5)
        monkeypatch.setattr(
            torch, "bernoulli", lambda p, draws=draws: (draws.view(p.shape) < p).to(p.dtype)
        )
        norm = sparsify.RescaleNorm.l1 if rescale else None
        expected = sparsify.della_magprune(directions[k], 0.5, 0.2, norm)
        torch.testing.assert_close(got[k], expected, rtol=1e-6, atol=0)


def test_the_recipe_of_della_linear_merges_like_mergekit_given_the_same_draws(monkeypatch):
    methods = pytest.importorskip("mergekit.merge_methods", reason="mergekit is the oracle")
    models = relatives(build(Normalised))
    recipe = Recipe(
        {"a": models[1], "b": models[2]},
        base=models[0],
        preprocess=[MagnitudeDrop([0.4, 0.7], 0.2, "l1", seed=2)],
        coefficients=Model(),
        init=Constant([0.3, 0.6]),
    )
    plan = open_plan(recipe, with_skeleton=False)
    raw = plan.initial_raw()
    for name in plan.tensors:
        tensors = [model.state_dict()[name] for model in models]
        site = Site(name, ("a", "b"))
        draws = iter(
            [torch.rand(tensors[0].shape, generator=site.generator(2, k)) for k in site.sources]
        )
        monkeypatch.setattr(
            torch, "bernoulli", lambda p, draws=draws: (next(draws).view(p.shape) < p).to(p.dtype)
        )
        expected = methods.get("della_linear").merge_group(
            methods.TensorGroup.from_tensors(tensors, base_index=0),
            weight={1: 0.3, 2: 0.6},
            density={1: 0.4, 2: 0.7},
            epsilon={1: 0.2, 2: 0.2},
            normalize=False,
            rescale=True,
            int8_mask=False,
            **{"lambda": 1.0},
        )
        torch.testing.assert_close(
            FitState(plan, raw).materialise(name), expected, rtol=0, atol=1e-6
        )


def test_draws_belong_to_a_source_and_tensor():
    directions = torch.ones(3, 2000)
    step = MagnitudeDrop(0.5, 0.1, "none", seed=4)
    got = step(directions.clone(), SITE)
    assert not torch.equal(got[0], got[1])
    again = step(torch.ones(2, 2000), Site(SITE.name, ("c", "a")))
    assert torch.equal(again, got[[2, 0]])
    other = step(torch.ones(3, 2000), Site("other", SITE.sources))
    assert not torch.equal(other[0], got[0])
    assert not torch.equal(
        MagnitudeDrop(0.5, 0.1, "none", seed=5)(torch.ones(3, 2000), SITE)[0], got[0]
    )


def test_shares_by_source_and_tensor_and_the_ends_of_the_range():
    directions = draw(3, 20, 30)
    settings = {r"layers\.0": [0.0, 0.5, 1.0], ".*": 0.5}
    got = MagnitudeDrop(settings, {".*": [0.0, 0.1, 0.3]})(directions.clone(), SITE)
    assert not got[0].any()
    assert torch.equal(got[2], directions[2])
    alone = MagnitudeDrop(0.5, 0.1)(directions[1:2].clone(), Site(SITE.name, ("b",)))
    assert torch.equal(got[1], alone[0])


def test_probabilities_must_lie_within_the_open_interval():
    with pytest.raises(ConfigError, match=r"must lie in \(0, 1\), got density 0.2 and epsilon"):
        MagnitudeDrop(0.2, 0.2)
    with pytest.raises(ConfigError, match=r"got density 0.9 and epsilon 0.1"):
        MagnitudeDrop([0.5, 0.9, 0.5], 0.1)(draw(3, 4), SITE)
    with pytest.raises(ConfigError, match=r"epsilon: expected a number in \[0, 0.5\), got 0.5"):
        MagnitudeDrop(0.5, 0.5)
    with pytest.raises(ConfigError, match=r"density.*expected a share in \[0, 1\], got 1.5"):
        MagnitudeDrop(1.5)
