"""What holds for every granularity, whatever a paper's numbers: exact ends, agreement, slopes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from gradmerge import MergedModel
from gradmerge.coefficients import (
    Column,
    Component,
    Constant,
    Element,
    Group,
    Mixup,
    Model,
    Partition,
    Row,
    Tensor,
    Uniform,
)
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.operators import Components, DisjointMean, Linear
from gradmerge.preprocess import ElectSign, Site, Trim
from tiny import build, recipe_of, relatives

EVERY = [Model(), Group(), Tensor(), Column(), Row(), Partition(3), Component(), Element()]
every = pytest.mark.parametrize("granularity", EVERY, ids=lambda g: type(g).__name__)


def recipe(models, granularity, **options):
    operator = Components() if isinstance(granularity, Component) else Linear()
    return recipe_of(models, coefficients=granularity, **{"operator": operator, **options})


def merged(recipe):
    plan = open_plan(recipe)
    raw = plan.initial_raw()
    return {name: FitState(plan, raw).materialise(name) for name in plan.tensors}


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_zero_is_the_base_bit_for_bit(granularity, dtype):
    models = relatives(build().to(dtype))
    for name, tensor in merged(recipe(models, granularity, init=Constant(0.0))).items():
        assert torch.equal(tensor, models[0].get_parameter(name)), name


@every
def test_one_source_at_one_is_that_source(granularity):
    models = relatives(build(), 2)
    exact = not isinstance(granularity, Component)  # a decomposition rounds
    for name, tensor in merged(recipe(models, granularity, init=Constant(1.0))).items():
        expected, limit = models[1].get_parameter(name), 0 if exact else 1e-6
        torch.testing.assert_close(tensor, expected, rtol=0, atol=limit)


@every
@pytest.mark.parametrize("origin", ["zero", "mean", "base"])
def test_uniform_is_the_mean_of_weights_and_biases(granularity, origin):
    models = relatives(build(), 4)
    for name, tensor in merged(recipe(models, granularity, origin=origin, init=Uniform())).items():
        mean = sum(model.get_parameter(name).double() for model in models[1:]) / 3
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6)


@every
def test_granularities_agree_where_coefficients_are_constant(granularity):
    models = relatives(build())
    plain = merged(recipe(models, Tensor(), init=Constant([0.4, -0.7])))
    for name, tensor in merged(recipe(models, granularity, init=Constant([0.4, -0.7]))).items():
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=1e-6)


@every
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_gradients_are_the_loss_s_finite_differences(granularity, memory):
    """Central differences in float64 along a random direction of all raw coefficients."""
    models = [model.double() for model in relatives(build())]
    options = {"init": Mixup(seed=3), "origin": "base"}
    network = MergedModel(recipe(models, granularity, **options), None, memory, torch.float64)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (5,), generator=generator)
    along = {
        key: torch.randn(raw.shape, generator=generator, dtype=torch.float64)
        for key, raw in network.raw.items()
    }
    cross_entropy(network(x), labels).backward()
    slope = sum((raw.grad * along[key]).sum() for key, raw in network.raw.items())

    def loss_at(step):
        with torch.no_grad():
            start = copy.deepcopy(dict(network.raw.items()))
            for key, raw in network.raw.items():
                raw.add_(along[key], alpha=step)
            found = cross_entropy(network(x), labels)
            for key, raw in network.raw.items():
                raw.copy_(start[key])
        return float(found)

    step = 1e-5
    expected = (loss_at(step) - loss_at(-step)) / (2 * step)
    assert abs(expected) > 1e-3
    assert float(slope) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [2, 5])
def test_elected_directions_agree_in_sign_and_add_up_to_ties_by_sum(count):
    """The split of AdaMerging++; TIES without normalisation is their sum."""
    models = relatives(build(), count + 1)
    steps, site = [Trim(0.4), ElectSign()], Site("body.weight", tuple("abcdef"[:count]))
    base = models[0].get_parameter(site.name).detach()
    taken = [model.get_parameter(site.name).detach() - base for model in models[1:]]
    trimmed = Trim(0.4)(torch.stack(taken), site)
    elected = torch.where(trimmed.sum(dim=0) >= 0, 1.0, -1.0)
    split = ElectSign()(trimmed.clone(), site)
    signs = split.sign()
    assert ((signs == 0) | (signs == elected)).all()
    assert 0 < int((signs != 0).sum()) < int((trimmed != 0).sum())
    ones = {"coefficients": Model(), "init": Constant(1.0)}
    summed = merged(recipe_of(models, **ones, preprocess=steps))
    ties = merged(
        recipe_of(models, **ones, preprocess=steps[:1], operator=DisjointMean(normalize=False))
    )
    for name, tensor in summed.items():
        torch.testing.assert_close(tensor, ties[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(summed[site.name], base + split.sum(dim=0), rtol=0, atol=1e-6)
