"""OPCM's sequential projection against the published recursion with whole bases, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradmerge.common.errors import ConfigError
from gradmerge.preprocess import Orthogonalise, Site
from gradmerge.preprocess.base import Chain

SHAPES = {"a": (14, 9), "b": (9, 14), "c": (11,), "d": (6, 3, 2, 2), "e": ()}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(num):
    tensors = {
        n: draw(num, *shape, seed=i) * (i + 1) for i, (n, shape) in enumerate(SHAPES.items())
    }
    sources = tuple("uvwxyz"[:num])

    def passes():
        for name, directions in tensors.items():
            yield Site(name, sources), directions.clone()

    return tensors, passes


def published(tensors, alpha):
    """The recursion as published: at each step project, add, and divide by lambda_t."""
    arrays = {
        n: d.double().numpy().reshape(len(d), *matrix(d.shape[1:])) for n, d in tensors.items()
    }
    num = len(next(iter(arrays.values())))
    merged = {n: d[0].copy() for n, d in arrays.items()}
    norm = lambda parts: np.sqrt(sum((p**2).sum() for p in parts))  # noqa: E731
    norms = [norm(d[k] for d in arrays.values()) for k in range(num)]
    before = 1.0
    for k in range(1, num):
        for n, d in arrays.items():
            new = d[k]
            if new.ndim == 2:
                u, s, vh = np.linalg.svd(merged[n], full_matrices=True)
                rank = int(np.argmax(np.cumsum(s) / s.sum() > alpha))
                q = u.T @ new @ vh.T
                np.fill_diagonal(q, 0)
                q[:rank, :rank] = 0
                new = u @ q @ vh
            merged[n] = before * merged[n] + new
        length, mean = norm(merged.values()), np.mean(norms[: k + 1])
        before = length / mean
        merged = {n: m / before for n, m in merged.items()}
    return merged


def matrix(shape):
    return (shape[0], int(np.prod(shape[1:]))) if len(shape) > 1 else tuple(shape)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("num", [1, 2, 4])
def test_the_sum_is_the_published_delta(num, alpha):
    tensors, passes = model(num)
    step = Chain([Orthogonalise(alpha)], passes)
    expected = published(tensors, alpha)
    for site, directions in passes():
        merged = step(directions, site).sum(dim=0).double().numpy()
        wanted = expected[site.name].reshape(merged.shape)
        np.testing.assert_allclose(merged, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


def test_the_norm_is_the_mean_of_the_norms():
    tensors, passes = model(3)
    step = Chain([Orthogonalise()], passes)
    merged = sum(float(step(d, s).sum(dim=0).double().square().sum()) for s, d in passes())
    norms = torch.zeros(3, dtype=torch.float64)
    for directions in tensors.values():
        norms += directions.double().reshape(3, -1).square().sum(dim=1)
    assert merged**0.5 == pytest.approx(float(norms.sqrt().mean()), rel=1e-6)


def test_norms_may_be_each_tensors_own():
    tensors, passes = model(3)
    step = Chain([Orthogonalise(scope="tensor")], passes)
    for site, directions in passes():
        one = {site.name: tensors[site.name]}
        merged = step(directions, site).sum(dim=0).double().numpy()
        wanted = published(one, 0.5)[site.name].reshape(merged.shape)
        np.testing.assert_allclose(merged, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


def test_a_repeated_source_adds_nothing():
    """Projected off itself with everything protected, it becomes zero."""
    one = draw(8, 12)
    got = Orthogonalise(1.0)(torch.stack([one, one]), Site("x", ("a", "b")))
    assert got[1].abs().max() < 1e-6 * float(one.norm())
    torch.testing.assert_close(got.sum(dim=0), one)


def test_orthogonal_directions_stay_as_they_are_but_for_the_scale():
    directions = torch.zeros(2, 6, 8)
    directions[0, :3, :4] = draw(3, 4)
    directions[1, 3:, 4:] = draw(3, 4, seed=1)
    got = Orthogonalise()(directions.clone(), Site("x", ("a", "b")))
    norms = directions.double().flatten(1).norm(dim=1)
    scale = float(norms.mean() / norms.square().sum().sqrt())
    torch.testing.assert_close(got, directions * scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_merge_may_go_on_from_an_earlier_one(scope):
    """Continuing the merge of two sources, with its lambda, equals merging all four at once."""
    tensors, passes = model(4)
    options = {"scope": scope, "alpha": 0.4}

    def some(first, last):
        return lambda: ((cut(s, last - first), d[first:last].clone()) for s, d in passes())

    def cut(site, num):
        return Site(site.name, site.sources[:num])

    def lengths(parts):
        return {n: float(p.double().norm()) for n, p in parts.items()}

    early = Chain([Orthogonalise(**options)], some(0, 2))
    merged = {s.name: early(d, s).sum(dim=0) for s, d in some(0, 2)()}
    own, first = lengths({n: d[0] for n, d in tensors.items()}), {}
    for site, directions in some(0, 2)():
        first[site.name] = float(early(directions, site)[0].double().norm())
    scale = sum(own.values()) / sum(first.values())  # lambda, by which the first was divided
    if scope == "tensor":
        site, _ = next(iter(passes()))
        tensors = {site.name: tensors[site.name]}
        scale = own[site.name] / first[site.name]
    whole = Chain([Orthogonalise(**options)], passes)

    def onto():
        for site, directions in passes():
            if site.name in tensors:
                yield cut(site, 3), torch.cat([merged[site.name][None], directions[2:]])

    late = Chain([Orthogonalise(**options, earlier_scale=scale, earlier_sources=2)], onto)
    full = {s.name: (s, d) for s, d in passes()}
    for site, directions in onto():
        got = late(directions, site).sum(dim=0)
        wanted = whole(*reversed(full[site.name])).sum(dim=0)
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_zero_directions(scope):
    directions = torch.stack([torch.zeros(5, 4), draw(5, 4), torch.zeros(5, 4)])
    site = Site("x", ("a", "b", "c"))
    step = Chain([Orthogonalise(scope=scope)], lambda: iter([(site, directions.clone())]))
    torch.testing.assert_close(step(directions.clone(), site), directions / 3)
    nothing = torch.zeros(3, 5, 4)
    step = Chain([Orthogonalise(scope=scope)], lambda: iter([(site, nothing.clone())]))
    assert torch.equal(step(nothing.clone(), site), nothing)


def test_alpha_is_a_share():
    with pytest.raises(ConfigError, match=r"alpha: expected a share in \[0, 1\], got 1.5"):
        Orthogonalise(1.5)
    for wrong in ({"earlier_scale": 0.0}, {"earlier_sources": 0}):
        with pytest.raises(ConfigError, match=r"earlier_\w+: expected"):
            Orthogonalise(**wrong)
