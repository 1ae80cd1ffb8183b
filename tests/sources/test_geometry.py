"""Norms, cosines and sign conflicts of directions against plain torch."""

from __future__ import annotations

import pytest
import torch

from gradmerge.sources import InMemory
from gradmerge.sources import geometry as module
from gradmerge.sources.geometry import direction_statistics

NAMES = ["a", "b"]
ORIGINS = ["base", "mean", "zero"]


def make(dtype=torch.float32, scale=1.0):
    """Three sources near a base, which share a third of the entries with it."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"a": (7, 11), "b": (13,), "not counted": (5,)}
    base = {
        n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)
        for n, s in shapes.items()
    }
    sources = []
    for _ in range(3):
        state = {}
        for name, tensor in base.items():
            noise = scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            keep = torch.rand(tensor.shape, generator=generator) < 1 / 3
            state[name] = torch.where(keep, tensor, (tensor + noise).to(dtype))
        sources.append(state)
    return base, sources


def flat(state):
    return torch.cat([state[name].double().flatten() for name in NAMES])


def directions(base, sources, origin):
    stacked = torch.stack([flat(source) for source in sources])
    if origin == "base":
        return stacked - flat(base)
    return stacked - stacked.mean(dim=0) if origin == "mean" else stacked


def ours(base, sources, origin, **options):
    opened = [InMemory(source).open() for source in sources]
    anchor = InMemory(base).open() if origin == "base" else None
    return direction_statistics(opened, anchor, NAMES, origin == "mean", **options)


@pytest.mark.parametrize("chunk", [5, 1 << 20])
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_plain_torch(monkeypatch, dtype, origin, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    base, sources = make(dtype)
    got = ours(base, sources, origin)
    expected = directions(base, sources, origin)
    tolerance = (
        {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-4}
    )
    torch.testing.assert_close(got.gram, expected @ expected.T, **tolerance)
    torch.testing.assert_close(got.norms, expected.norm(dim=1), **tolerance)
    cosines = torch.nn.functional.cosine_similarity(expected[:, None], expected[None], dim=-1)
    torch.testing.assert_close(got.cosines, cosines, **tolerance)
    assert got.entries == 7 * 11 + 13
    squared = float(flat(base) @ flat(base)) if origin == "base" else 0.0
    assert got.origin_squared == pytest.approx(squared, rel=1e-5)


def test_sign_conflict_counts_entries_that_both_change():
    base, sources = make()
    got = ours(base, sources, "base")
    moved = directions(base, sources, "base")
    for j in range(3):
        for k in range(3):
            both = (moved[j] != 0) & (moved[k] != 0)
            against = both & (moved[j].sign() == -moved[k].sign())
            assert got.shared[j, k] == both.sum()
            assert got.conflicts[j, k] == against.sum()
            assert got.sign_conflict[j, k] == against.sum().double() / both.sum()
    assert 0 < got.sign_conflict[0, 1] < 1
    assert got.sign_conflict[0, 0] == 0


def test_sign_conflict_can_be_left_out():
    base, sources = make()
    got = ours(base, sources, "base", signs=False)
    assert got.shared.sum() == got.conflicts.sum() == 0
    torch.testing.assert_close(got.gram, ours(base, sources, "base").gram)


def test_zero_direction_has_cosine_zero():
    base, sources = make()
    got = ours(base, [sources[0], base], "base")
    torch.testing.assert_close(got.cosines, torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double())
    assert got.norms[1] == 0
    assert got.sign_conflict[0, 1] == 0


def test_float64_differences_far_below_float32_are_kept():
    base, sources = make(torch.float64, scale=1e-11)
    expected = directions(base, sources, "base")
    torch.testing.assert_close(
        ours(base, sources, "base").norms, expected.norm(dim=1), rtol=1e-9, atol=0
    )
    assert (expected.norm(dim=1) > 0).all()
