"""Spectral steps against dense re-typed formulas in numpy and scipy (float64), and closed cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from gradmerge.common.errors import ConfigError
from gradmerge.preprocess import TSVM, IsoC, IsoCTS, Orthogonalise, Site


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def site(num, name="layers.0.weight"):
    return Site(name, tuple("abcdefgh"[:num]))


def close(got, expected, scale=1.0):
    """Compare within a few units of float32, the dtype of directions."""
    error = float(np.abs(got.double().numpy() - expected).max())
    assert error <= 2e-6 * max(scale, float(np.abs(expected).max())), error


def orthogonal(rows, columns, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))
    return q


def svd(matrix):
    return np.linalg.svd(matrix, full_matrices=False)


def tsv_m(matrices):
    """TSV-M's delta by its definition: cut, concatenate, nearest orthogonal factors, recompose."""
    rank = min(matrices[0].shape) // len(matrices)
    parts = [svd(matrix) for matrix in matrices]
    left = scipy.linalg.polar(np.concatenate([u[:, :rank] for u, _, _ in parts], axis=1))[0]
    right = scipy.linalg.polar(np.concatenate([v[:rank] for _, _, v in parts]))[0]
    return left @ np.diag(np.concatenate([s[:rank] for _, s, _ in parts])) @ right


def iso_cts(matrices, common):
    """Iso-CTS's delta by its definition."""
    num, least = len(matrices), min(matrices[0].shape)
    total = round((least - int(least * common)) / num) * num
    kept, own = least - total, total // num
    u, s, v = svd(sum(matrices))
    lefts, singular, rights = [u[:, :kept]], [s[:kept]], [v[:kept]]
    for matrix in matrices:
        uk, sk, vk = svd(matrix - lefts[0] @ lefts[0].T @ matrix)
        lefts.append(uk[:, :own])
        singular.append(sk[:own])
        rights.append(vk[:own])
    left = scipy.linalg.polar(np.concatenate(lefts, axis=1))[0]
    right = scipy.linalg.polar(np.concatenate(rights))[0]
    return np.concatenate(singular).mean() * left @ right


@pytest.mark.parametrize("num", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16), (10, 4, 3, 3)])
def test_tsv_m_is_the_sum_of_its_directions(num, shape):
    directions = draw(num, *shape)
    got = TSVM()(directions.clone(), site(num))
    assert got.dtype == torch.float32
    matrices = directions.double().view(num, shape[0], -1).numpy()
    close(got.sum(dim=0).view(shape[0], -1), tsv_m(matrices))


def test_tsv_m_of_orthogonal_directions_is_lossless():
    """If singular vectors are orthogonal already, every source is recovered."""
    left, right = orthogonal(20, 12), orthogonal(30, 12, seed=1)
    parts = [slice(4 * k, 4 * k + 4) for k in range(3)]
    values = np.array([5.0, 3.0, 2.0, 1.0])
    stacked = np.stack([left[:, p] @ np.diag(values * (k + 1)) @ right[:, p].T
                        for k, p in enumerate(parts)])  # fmt: skip
    got = TSVM()(torch.from_numpy(stacked).float(), site(3))
    close(got, stacked)


def test_tsv_m_keeps_a_share_of_each_source():
    got = TSVM()(draw(3, 12, 20), site(3)).double()
    for direction in got:
        values = torch.linalg.svdvals(direction)
        assert values[3] > 1e-2
        assert values[4] < 1e-5
    # the directions of two sources meet neither in rows nor in columns
    assert (got[0].T @ got[1]).abs().max() < 1e-5
    assert (got[0] @ got[1].T).abs().max() < 1e-5


def test_tsv_m_of_one_source_is_the_source():
    directions = draw(1, 9, 14)
    torch.testing.assert_close(TSVM()(directions.clone(), site(1)), directions)


def test_zero_directions_disturb_no_other():
    directions = torch.stack([draw(12, 20), torch.zeros(12, 20)])
    got = TSVM()(directions.clone(), site(2))
    u, s, v = svd(directions[0].double().numpy())
    close(got[0], u[:, :6] @ np.diag(s[:6]) @ v[:6])
    assert not got[1].any()


def test_the_same_source_twice_merges_to_itself():
    """Equal singular vectors share one place, and nothing arbitrary fills the rest."""
    one = draw(12, 20)
    got = TSVM()(torch.stack([one, one]), site(2)).sum(dim=0)
    u, s, v = svd(one.double().numpy())
    close(got, u[:, :6] @ np.diag(s[:6]) @ v[:6])


@pytest.mark.parametrize("make", [TSVM, IsoC, IsoCTS])
@pytest.mark.parametrize("shape", [(), (7,), (1,), (1, 9), (1, 4, 5)])
def test_vectors_are_averaged(make, shape):
    directions = draw(3, *shape)
    got = make()(directions.clone(), site(3))
    torch.testing.assert_close(got, directions / 3)


def test_tsv_m_averages_matrices_that_are_too_narrow():
    directions = draw(5, 3, 40)
    torch.testing.assert_close(TSVM()(directions.clone(), site(5)), directions / 5)


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (10, 4, 3, 3)])
def test_iso_c_has_equal_singular_values(num, shape):
    directions = draw(num, *shape)
    got = IsoC()(directions.clone(), site(num))
    merged = got.sum(dim=0).double().view(shape[0], -1)
    u, s, v = svd(directions.double().sum(dim=0).view(shape[0], -1).numpy())
    close(merged, s.mean() * u @ v)
    values = torch.linalg.svdvals(merged)
    torch.testing.assert_close(values, torch.full_like(values, s.mean()), rtol=1e-6, atol=0)
    assert all(torch.equal(direction, got[0]) for direction in got)


def test_iso_c_leaves_the_null_space_alone():
    left, right = orthogonal(20, 3), orthogonal(30, 3, seed=1)
    low = torch.from_numpy(left @ np.diag([3.0, 2.0, 1.0]) @ right.T)
    # exactly of rank three in float32 too: small integers
    low = (low * 8).round()[:, :3] @ torch.eye(3, 30, dtype=torch.float64)
    got = IsoC()(low.float()[None], site(1))[0].double()
    values = torch.linalg.svdvals(got)
    expected = torch.linalg.svdvals(low)[:3].mean()
    torch.testing.assert_close(values[:3], expected.expand(3), rtol=1e-6, atol=0)
    assert values[3] < 1e-6


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("num", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (10, 4, 3, 3)])
def test_iso_cts_against_its_definition(num, shape, common):
    directions = draw(num, *shape)
    got = IsoCTS(common)(directions.clone(), site(num))
    matrices = directions.double().view(num, shape[0], -1).numpy()
    merged = got.sum(dim=0).view(shape[0], -1)
    close(merged, iso_cts(matrices, common))
    values = torch.linalg.svdvals(merged.double())
    torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-5, atol=0)


def test_iso_cts_gives_each_source_its_own_directions():
    got = IsoCTS(0.5)(draw(2, 12, 30), site(2)).double()
    shared = got.mean(dim=0)
    own = torch.linalg.svdvals(got[0] - got[1])
    assert own[5] > 1e-2, "three of the first source's and three of the second's"
    assert own[6] < 1e-5
    assert torch.linalg.matrix_rank(shared, tol=1e-4) == 12


def test_iso_cts_of_many_sources_keeps_within_the_matrix():
    directions = draw(8, 3, 9)
    got = IsoCTS(0.0)(directions.clone(), site(8))
    close(got.sum(dim=0), iso_cts(list(directions.double().numpy()), 1.0))


@pytest.mark.parametrize("make", [TSVM, IsoC, IsoCTS])
def test_nothing_comes_of_nothing(make):
    assert not make()(torch.zeros(3, 8, 6), site(3)).any()
    assert make()(torch.zeros(3, 0, 6), site(3)).shape == (3, 0, 6)
    assert make()(torch.zeros(3, 0), site(3)).shape == (3, 0)


# ---- RESM's two ideas -------------------------------------------------------------------------


def test_the_rank_of_dense_layers_is_whole_and_of_sparse_ones_less():
    dense, sparse = draw(40, 60), draw(40, 60, seed=1)
    sparse *= torch.rand(40, 60, generator=torch.Generator().manual_seed(2)) < 0.1
    flat = torch.rand(40, 60, generator=torch.Generator().manual_seed(3)) + 1
    got = TSVM(rank="sparsity")(torch.stack([dense, sparse, flat]), site(3)).double()
    ranks = [int((torch.linalg.svdvals(d) > 1e-4).sum()) for d in got]
    most = 40 // 3
    spread = float(sparse.abs().sum()) ** 2 / (2400 * float(sparse.square().sum()))
    assert ranks[2] == most
    assert most - 1 <= ranks[0] <= most, "normally distributed but for chance"
    assert ranks[1] == max(1, math.floor(most * math.pi / 2 * spread)) < most // 4


def test_outliers_weigh_rows():
    directions = torch.zeros(2, 4, 50)
    directions += 0.01 * draw(2, 4, 50)
    directions[0, 0, 3], directions[1, 0, 7] = 3.0, -1.0  # both have outliers in row 0
    directions[1, 1, 5] = 2.0  # one of them in row 1
    weighted = directions.clone()
    weighted[0, 0] *= 2 * 3 / 4
    weighted[1, 0] *= 2 * 1 / 4
    weighted[0, 1] *= 0
    weighted[1, 1] *= 2
    got = TSVM(outliers=3)(directions.clone(), site(2))
    torch.testing.assert_close(got, TSVM()(weighted, site(2)), rtol=1e-5, atol=1e-6)


def test_options_are_checked():
    with pytest.raises(ConfigError, match="outliers: expected at least 0"):
        TSVM(outliers=-1)
    with pytest.raises(ConfigError, match=r"common: expected a share in \[0, 1\], got 1.2"):
        IsoCTS(1.2)


@pytest.mark.parametrize("make", [TSVM, IsoC, IsoCTS, Orthogonalise])
def test_tensors_that_are_not_finite_are_named(make):
    directions = draw(2, 6, 8)
    directions[1, 2, 3] = torch.nan
    with pytest.raises(ConfigError, match=r"layers\.0\.weight: expected finite.*direction of b"):
        make()(directions, site(2))
