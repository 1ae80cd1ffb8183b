"""Merging by singular vectors.

Tensors with more than two axes are matrices `[out, rest]`. Vectors, and matrices too narrow to give
each source singular vectors of its own, are averaged: `B'_k = B_k / K`. Decompositions are in
float64 and ignore singular values of zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import require
from gradmerge.preprocess.base import AbstractPreprocess, Site
from gradmerge.preprocess.matrices import (
    averaged,
    decompose,
    matrices_of,
    nearest_orthogonal,
    shared,
)


@dataclass(frozen=True)
class TSVM(AbstractPreprocess):
    """Make the singular vectors of the tasks orthogonal to each other (TSV-M, arXiv 2412.00081).

        B_k = U_k S_k V_k^T,  cut to its r = floor(min(out, rest) / K) largest singular values
        U' = nearest orthogonal factor of [U_1 ... U_K],  V' likewise
        B'_k = U'_k S_k V'_k^T

    The sum of the directions is TSV-M's delta, and each direction belongs to its source. Matrices
    with a side smaller than K are averaged. The published code decomposes only tensors with two
    axes and uses arbitrary vectors for singular values of zero; here those are ignored.

    The options implement the two ideas of RESM, first called R-TSVM (arXiv 2502.06876): a rank that
    depends on the sparsity of the layer, and weights based on outliers. The exact formulas of the
    paper could not be verified; those given with the options are ours.
    """

    rank: Literal["equal", "sparsity"] = "equal"
    """Number of singular values per source: r as above, or fewer in sparse layers:
    max(1, floor(r min(1, pi/2 (sum |b|)^2 / (n sum b^2)))) for the n entries b of the layer, which
    is r if they are normally distributed."""
    outliers: float | None = None
    """Weigh row i of source k by K m_ki / sum_j m_ji before decomposing (by 1 if the sum is 0),
    where m_ki sums the magnitudes of the row's outliers: entries whose magnitude is more than this
    many standard deviations above the mean magnitude of the source's tensor. Off by default; 3 is
    usual."""

    def __post_init__(self) -> None:
        """Validate the bound of outliers."""
        require((self.outliers or 0) >= 0, "TSVM.outliers", "at least 0", self.outliers)

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        num = len(directions)
        matrices = matrices_of(directions, site, max(2, num))
        if matrices is None:
            return averaged(directions)
        if self.outliers is not None:
            matrices.mul_(_outlier_weights(matrices, self.outliers))
        most = min(matrices.shape[1:]) // num
        lefts, values, rights = [], [], []
        for matrix in matrices:
            kept = most if self.rank == "equal" else _sparse_rank(matrix, most)
            left, value, right = decompose(matrix)
            lefts.append(left[:, :kept].clone())  # a view would keep all of it in memory
            values.append(value[:kept])
            rights.append(right[:kept].clone())
        ranks = [len(value) for value in values]
        left = nearest_orthogonal(torch.cat(lefts, dim=1)).split(ranks, dim=1)
        right = nearest_orthogonal(torch.cat(rights)).split(ranks)
        for matrix, u, s, v in zip(matrices, left, values, right, strict=True):
            matrix.copy_((u * s) @ v)
        return directions


@dataclass(frozen=True)
class IsoC(AbstractPreprocess):
    """Make all singular values of the summed delta equal (Iso-C, arXiv 2502.04959).

        sum_k B_k = U S V^T,  B'_k = mean(S) U V^T / K

    The result has no parts of single sources, so all directions are equal. Singular values of zero
    stay zero and do not count in the mean.
    """

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        matrices = matrices_of(directions, site)
        if matrices is None:
            return averaged(directions)
        left, values, right = decompose(matrices.sum(dim=0))
        if not len(values):
            return directions.zero_()
        return shared((left @ right).mul_(values.mean()), directions)


@dataclass(frozen=True)
class IsoCTS(AbstractPreprocess):
    """Combine a common subspace with task-specific ones, at equal singular values (Iso-CTS, arXiv
    2502.04959).

        sum_k B_k = U S V^T, cut to its c largest singular values: the common subspace
        (I - U U^T) B_k = U_k S_k V_k^T, cut to t each, K t + c = min(out, rest)
        U' = nearest orthogonal factor of [U_1 ... U_K U],  V' likewise
        s = mean of all K t + c singular values
        B'_k = s (U'_k V'_k^T + U' V'^T / K)

    The common part is divided equally among the sources. Singular values of zero stay zero and do
    not count in the mean.
    """

    common: float = 0.8
    """Share of common singular vectors, in [0, 1]; the rest is rounded so that all sources get the
    same number."""

    def __post_init__(self) -> None:
        """Validate the share."""
        require(0 <= self.common <= 1, "IsoCTS.common", "a share in [0, 1]", self.common)

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        num = len(directions)
        matrices = matrices_of(directions, site)
        if matrices is None:
            return averaged(directions)
        least = min(matrices.shape[1:])
        own = min(round((least - int(least * self.common)) / num), least // num)
        left, values, right = decompose(matrices.sum(dim=0))
        common = least - num * own
        left, values, right = left[:, :common], values[:common], right[:common]
        lefts, rights, singular = [], [], []
        for matrix in matrices:
            rest = matrix.double()
            rest -= left @ (left.T @ rest)
            u, s, v = decompose(rest)
            lefts.append(u[:, :own].clone())
            singular.append(s[:own])
            rights.append(v[:own].clone())
        counted = torch.cat([*singular, values])
        if not len(counted):
            return directions.zero_()
        ranks = [*(len(s) for s in singular), len(values)]
        lefts = list(nearest_orthogonal(torch.cat([*lefts, left], dim=1)).split(ranks, dim=1))
        rights = list(nearest_orthogonal(torch.cat([*rights, right])).split(ranks))
        shared(lefts.pop() @ rights.pop(), directions)
        for matrix, u, v in zip(matrices, lefts, rights, strict=True):
            matrix.add_(u @ v)
        return directions.mul_(counted.mean().item())


def _sparse_rank(matrix: Tensor, most: int) -> int:
    """Return `most`, or a smaller rank if few entries carry most of the matrix."""
    squares = float(matrix.square().sum(dtype=torch.float64))
    if not squares:
        return most
    spread = float(matrix.abs().sum(dtype=torch.float64)) ** 2 / (matrix.numel() * squares)
    return max(1, int(most * min(1.0, math.pi / 2 * spread)))


def _outlier_weights(matrices: Tensor, deviations: float) -> Tensor:
    """Return the weight of each row of each source, `[sources, out, 1]`."""
    masses = []
    for matrix in matrices:
        magnitude = matrix.abs()
        bound = magnitude.mean() + deviations * magnitude.std(unbiased=False)
        masses.append((magnitude * (magnitude > bound)).sum(dim=1))
    mass = torch.stack(masses)
    total = mass.sum(dim=0)
    weight = torch.where(total > 0, len(mass) * mass / total, torch.ones((), dtype=total.dtype))
    return weight.unsqueeze(-1)
