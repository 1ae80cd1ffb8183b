"""Every step supports any tensor and any number of sources."""

from __future__ import annotations

import pytest
import torch

from gradmerge import Recipe
from gradmerge.coefficients import Constant, Model
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.preprocess import (
    LARV,
    TSVM,
    WUDI,
    Breadcrumbs,
    Consensus,
    ElectSign,
    IsoC,
    IsoCTS,
    MagnitudeDrop,
    Orthogonalise,
    ParameterCompetition,
    RandomDrop,
    SelectTop,
    ShareOfSquares,
    Site,
    Trim,
    Unify,
)
from gradmerge.preprocess.base import Chain
from tiny import Normalised, build, relatives

STEPS = [
    Breadcrumbs(),
    Consensus(),
    ElectSign(),
    IsoC(),
    IsoCTS(),
    LARV(),
    MagnitudeDrop(),
    Orthogonalise(),
    Orthogonalise(scope="tensor"),
    ParameterCompetition(),
    RandomDrop(),
    SelectTop(),
    ShareOfSquares(),
    Trim(),
    Trim(scope="model"),
    TSVM(),
    TSVM(rank="sparsity", outliers=3),
    Unify(),
    WUDI(steps=2),
]
SHAPES = [(), (1,), (9,), (6, 5), (1, 7), (4, 1), (4, 3, 2, 2), (0,), (0, 3), (2, 0)]
names = lambda step: repr(step)  # noqa: E731


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("step", STEPS, ids=names)
def test_any_shape_and_number_of_sources(step, num):
    generator = torch.Generator().manual_seed(0)
    tensors = {str(shape): torch.randn(num, *shape, generator=generator) for shape in SHAPES}
    tensors["nothing"] = torch.zeros(num, 4, 4)
    site = [Site(name, tuple("abcde"[:num])) for name in tensors]

    def passes():
        for where, directions in zip(site, tensors.values(), strict=True):
            yield where, directions.clone()

    run = Chain([step], passes)
    for where, directions in passes():
        shape = directions.shape
        got = run(directions, where)
        assert got.shape == shape
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        assert torch.isfinite(got).all()
        if where.name == "nothing":
            assert not got.any()


@pytest.mark.parametrize("step", STEPS, ids=names)
def test_the_same_directions_whenever_they_are_asked_for(step):
    models = relatives(build(Normalised))
    recipe = Recipe(
        {"a": models[1], "b": models[2]},
        base=models[0],
        preprocess=[step],
        coefficients=Model(),
        init=Constant(1.0),
    )
    first, second = open_plan(recipe, with_skeleton=False), open_plan(recipe, with_skeleton=False)
    second.prepare_learning()
    raw = first.initial_raw()
    for name in reversed(list(first.tensors)):
        got, kept = FitState(first, raw).materialise(name), FitState(second, raw).materialise(name)
        assert torch.equal(got, kept)
        origin = models[0].state_dict()[name]
        directions = torch.stack(list(first.terms(name).dense().sources))
        torch.testing.assert_close(got, origin + directions.sum(dim=0))
