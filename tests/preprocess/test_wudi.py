"""WUDI's analytic gradient against autograd on the literal loss."""

from __future__ import annotations

import pytest
import torch

from gradmerge.common.errors import ConfigError
from gradmerge.preprocess import WUDI, Site
from gradmerge.preprocess.wudi import least_interference


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def interference(merged, directions):
    total = merged.new_zeros(())
    for direction in directions:
        product = (merged - direction) @ direction.T
        total = total + product.square().sum() / direction.square().sum()
    return total


def by_autograd(directions, steps, lr):
    merged = torch.nn.Parameter(directions.sum(dim=0))
    adam = torch.optim.Adam([merged], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        interference(merged, directions).backward()
        adam.step()
    return merged.detach()


@pytest.mark.parametrize("shape", [(8, 13), (13, 8), (3, 40)])
@pytest.mark.parametrize("num", [1, 2, 4])
def test_the_steps_are_those_of_autograd(num, shape):
    directions = 0.02 * draw(num, *shape)
    got = least_interference(directions, 30, 1e-3)
    torch.testing.assert_close(got, by_autograd(directions, 30, 1e-3), rtol=0, atol=1e-12)
    moved = (got - directions.sum(dim=0)).abs().max()
    assert moved > 1e-3 if num > 1 else moved == 0


def test_the_preprocess_shares_the_result_equally():
    directions = 0.02 * draw(3, 8, 13)
    got = WUDI(50, 1e-4)(directions.float(), Site("x", ("a", "b", "c")))
    assert got.dtype == torch.float32
    assert torch.equal(got[0], got[2])
    expected = by_autograd(directions, 50, 1e-4)
    torch.testing.assert_close(got.sum(dim=0).double(), expected, rtol=0, atol=1e-6)
    before = interference(directions.sum(dim=0), directions)
    assert interference(got.sum(dim=0).double(), directions) < 0.9 * before


def test_disjoint_inputs_interfere_with_nothing():
    """The sum is optimal if the rows of the sources are orthogonal."""
    directions = torch.zeros(2, 5, 8, dtype=torch.float64)
    directions[0, :, :4], directions[1, :, 4:] = draw(5, 4), draw(5, 4, seed=1)
    assert interference(directions.sum(dim=0), directions) == 0
    got = least_interference(directions, 30, 1e-3)
    assert torch.equal(got, directions.sum(dim=0))


def test_it_converges_to_the_closed_form():
    """With invertible G the minimum is C G^-1."""
    directions = draw(3, 6, 5)
    unit = directions / directions.flatten(1).norm(dim=1).view(-1, 1, 1)
    gram = sum(u.T @ u for u in unit)
    goal = sum(d @ u.T @ u for d, u in zip(directions, unit, strict=True))
    got = least_interference(directions, 3000, 5e-3)
    torch.testing.assert_close(got, goal @ torch.linalg.inv(gram), rtol=0, atol=3e-3)


@pytest.mark.parametrize("shape", [(), (7,), (4, 3, 2, 2), (0, 3)])
def test_other_tensors_are_averaged(shape):
    directions = draw(3, *shape).float()
    got = WUDI(2)(directions.clone(), Site("x", ("a", "b", "c")))
    torch.testing.assert_close(got, directions / 3)


def test_zero_directions_take_no_part():
    directions = 0.02 * draw(2, 6, 5)
    with_zero = torch.stack([directions[0], torch.zeros(6, 5, dtype=torch.float64), directions[1]])
    got = least_interference(with_zero, 20, 1e-3)
    torch.testing.assert_close(got, least_interference(directions, 20, 1e-3), rtol=0, atol=1e-12)
    assert not least_interference(torch.zeros(2, 3, 3), 5, 1e-3).any()


def test_numbers_are_checked():
    with pytest.raises(ConfigError, match="steps: expected at least 0, got -1"):
        WUDI(-1)
    with pytest.raises(ConfigError, match="lr: expected a positive number, got 0"):
        WUDI(lr=0)
