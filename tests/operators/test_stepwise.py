"""`Linear(form="directions")`: every difference, product and sum is rounded, in a given order."""

from __future__ import annotations

import pytest
import torch

from gradmerge.common.errors import ConfigError
from gradmerge.engine.recipe import Recipe
from gradmerge.operators import Linear, Spread, Terms
from tiny import build, fit, module_of, recipe_of, relatives


def tensors(num, dtype=torch.float32, size=(300, 500)):
    torch.manual_seed(0)
    origin = torch.randn(size)
    return origin.to(dtype), [(origin + 0.1 * torch.randn(size)).to(dtype) for _ in range(num)]


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 8, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_sum_is_that_of_stacked_directions_bit_for_bit(num, dtype):
    origin, sources = tensors(num, dtype)
    c = torch.randn(num)
    wide = torch.promote_types(dtype, torch.float32)
    directions = torch.stack([source.to(wide) - origin.to(wide) for source in sources])
    expected = origin.to(wide) + (directions * c.to(wide).view(-1, 1, 1)).sum(dim=0)
    out = torch.empty(origin.shape, dtype=wide)
    Linear("directions").combine(Terms(sources, origin), c, Spread("scalar"), out)
    assert torch.equal(out, expected)
    other = Linear().combine(Terms(sources, origin), c, Spread("scalar"), torch.empty_like(out))
    if dtype == torch.float32:
        assert not torch.equal(other, expected)
    torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(1,), (7,), (65_537,), (2 * 65_536 + 3,)])
def test_chunks_do_not_show(size):
    origin, sources = tensors(6, size=size)
    c = torch.randn(6)
    expected = origin + ((torch.stack(sources) - origin) * c.view(-1, 1)).sum(dim=0)
    terms = Terms(sources, origin)
    out = Linear("directions").combine(terms, c, Spread("scalar"), torch.empty_like(origin))
    assert torch.equal(out, expected)


def test_directions_that_a_preprocess_made_are_summed_as_they_are():
    origin, sources = tensors(3)
    c = torch.tensor([0.3, -0.5, 0.7])
    expected = origin + (torch.stack(sources) * c.view(-1, 1, 1)).sum(dim=0)
    terms = Terms(sources, origin, directions=True)
    out = Linear("directions").combine(terms, c, Spread("scalar"), torch.empty_like(origin))
    assert torch.equal(out, expected)


def test_finer_coefficients_take_the_default_form():
    origin, sources = tensors(2)
    c = torch.rand(2, 500)
    found = [
        Linear(form).combine(
            Terms(sources, origin), c, Spread("axis", axis=1), torch.empty_like(origin)
        )
        for form in ("weights", "directions")
    ]
    assert torch.equal(*found)


def test_no_coefficient_is_the_origin_and_the_result_may_be_narrow():
    origin, sources = tensors(2)
    terms, zero = Terms(sources, origin), torch.zeros(2)
    out = torch.empty(origin.shape, dtype=torch.bfloat16)
    Linear("directions").combine(terms, zero, Spread("scalar"), out)
    assert torch.equal(out, origin.bfloat16())


def test_it_learns_as_the_default_does(tmp_path):
    found = []
    for form in ("weights", "directions"):
        module = module_of(relatives(build()))
        recipe = recipe_of(relatives(build()), operator=Linear(form))
        module = type(module)(recipe)
        fit(tmp_path / form, module)
        found.append({name: c.detach() for name, c in module.merged.coefficients().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)
        assert not torch.equal(value, torch.full_like(value, 0.3))


def test_it_wants_a_base():
    models = relatives(build())
    sources = dict(zip("ab", models[1:], strict=True))
    for options, origin in [({}, "zero"), ({"base": models[0], "origin": "mean"}, "mean")]:
        with pytest.raises(ConfigError, match=f"sums directions from a base, got origin {origin}"):
            Recipe(sources, operator=Linear("directions"), **options)
    with pytest.raises(ConfigError, match="form: expected weights or directions, got 'steps'"):
        Recipe(sources, operator=Linear("steps"))
