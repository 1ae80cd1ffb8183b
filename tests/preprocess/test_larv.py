"""LARV's statistics, scores and factors against their formulas in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gradmerge import Recipe
from gradmerge.common.errors import ConfigError
from gradmerge.preprocess import LARV, Site
from gradmerge.preprocess.base import Chain

SOURCES = ("code", "plays")
LAYERS = 6


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(unchanged=()):
    """Six blocks of two matrices, one wide and one tall, and a bias; embeddings before them."""
    shapes = {"embed.weight": (7, 5), "head.weight": (7, 5)}
    for i in range(LAYERS):
        shapes |= {f"layers.{i}.a.weight": (5, 8), f"layers.{i}.b.weight": (8, 5)}
        shapes |= {f"layers.{i}.b.bias": (8,)}
    base, directions = {}, {}
    for seed, (name, shape) in enumerate(shapes.items()):
        base[name] = draw(*shape, seed=seed)
        low = [draw(shape[0], 1 + (seed + k) % 3, seed=100 * k + seed) for k in range(2)]
        changed = [u @ draw(u.shape[1], *shape[1:], seed=seed + 7) for u in low]
        # diffuse and concentrated changes, so that effective ranks differ
        directions[name] = (
            torch.stack(
                [
                    (c + 0.3 * k * draw(*shape, seed=seed + 50)).reshape(shape)
                    for k, c in enumerate(changed)
                ]
            )
            if len(shape) > 1
            else torch.stack([draw(*shape, seed=seed + k) for k in range(2)])
        )
        for layer in unchanged:
            if name.startswith(f"layers.{layer}."):
                directions[name][0] = 0
    return base, directions


def run(step, base, directions):
    def passes():
        for name, found in directions.items():
            site = Site(name, SOURCES, origin=lambda name=name: base[name])
            yield site, found.clone()

    chain = Chain([step], passes)
    return {site.name: chain(found, site) for site, found in passes()}


def rank(matrix):
    energy = np.linalg.svd(matrix, compute_uv=False) ** 2
    p = energy / energy.sum()
    return math.exp(-sum(x * math.log(x) for x in p if x > 0))


def conflict(a, b):
    left, right = a @ b.T - b @ a.T, a.T @ b - b.T @ a
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return (np.linalg.norm(left) + np.linalg.norm(right)) / (2 * size)


def scores(base, directions, k, contrast=1.0, depth=0.5):
    """The published score of each layer of source k, over the layers that it has changed."""
    found = {}
    for i in range(LAYERS):
        pairs = [
            (base[n].double().numpy(), directions[n][k].double().numpy())
            for n in (f"layers.{i}.a.weight", f"layers.{i}.b.weight")
        ]
        pairs = [(a, b) for a, b in pairs if b.any()]
        if pairs:
            e = np.mean([rank(a) / rank(b) for a, b in pairs])
            found[i] = e, np.mean([conflict(a, b) for a, b in pairs])
    c = np.array([c for _, c in found.values()])
    z = (c - c.mean()) / c.std()
    return {
        i: e**contrast * ((i + 1) / LAYERS) ** depth / (1 + math.log1p(math.exp(at)))
        for (i, (e, _)), at in zip(found.items(), z, strict=True)
    }


def factors(got, directions, k):
    return {
        i: float(
            (got[f"layers.{i}.b.bias"][k] / directions[f"layers.{i}.b.bias"][k]).double().mean()
        )
        for i in range(LAYERS)
    }


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("options", [{}, {"contrast": 0.5, "depth": 2.0}])
def test_continuous_factors_equal_the_formula(k, options):
    base, directions = model()
    got = run(LARV(kind="continuous", amount=0.4, slope=2.0, **options), base, directions)
    want = scores(base, directions, k, **options)
    for i, found in factors(got, directions, k).items():
        assert found == pytest.approx(1 + 0.4 * math.tanh(2.0 * (want[i] - 1)), abs=1e-6)


@pytest.mark.parametrize("k", [0, 1])
def test_each_third_of_the_layers_has_its_level(k):
    base, directions = model()
    got = factors(run(LARV(levels=(0.5, 1.0, 2.0)), base, directions), directions, k)
    want = scores(base, directions, k)
    ordered = sorted(want, key=want.get)
    assert [round(got[i], 5) for i in ordered] == [0.5, 0.5, 1.0, 1.0, 2.0, 2.0]


def test_all_tensors_of_a_layer_have_its_factor_and_those_outside_none():
    base, directions = model()
    got = run(LARV(levels=(0.5, 2.0)), base, directions)
    for k in range(2):
        for i, factor in factors(got, directions, k).items():
            for part in ("a.weight", "b.weight"):
                name = f"layers.{i}.{part}"
                assert torch.equal(got[name][k], directions[name][k] * round(factor, 6))
    for name in ("embed.weight", "head.weight"):
        assert torch.equal(got[name], directions[name])


def test_a_layer_that_a_source_has_not_changed_does_not_count():
    base, directions = model(unchanged=(0, 3))
    got = factors(run(LARV(levels=(0.5, 2.0)), base, directions), directions, 0)
    want = scores(base, directions, 0)
    assert sorted(want) == [1, 2, 4, 5]
    ordered = sorted(want, key=want.get)
    assert [round(got[i], 5) for i in ordered] == [0.5, 0.5, 2.0, 2.0]


def test_a_merge_without_a_base_is_refused():
    with pytest.raises(ConfigError, match=r"LARV: expected task vectors from a base, .* zero"):
        Recipe({"a": "a", "b": "b"}, origin="zero", preprocess=[LARV()])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"levels": (1.0,)}, "LARV.levels: expected two numbers or more"),
        ({"levels": (1.0, math.nan)}, "LARV.levels: expected two numbers or more"),
        ({"amount": 1.0}, r"LARV.amount: expected a number in \(0, 1\)"),
        ({"depth": -1.0}, "LARV.depth: expected at least 0"),
    ],
)
def test_options_are_checked(options, error):
    with pytest.raises(ConfigError, match=error):
        LARV(**options)
