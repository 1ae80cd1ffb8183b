"""Merging by singular directions.

Tensors of more than two axes are taken as matrices `[out, rest]`. Vectors, and matrices that are
too narrow to have directions of their own, are averaged: `B'_k = B_k / K`. Decompositions are in
float64; singular values of zero take no part in any of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.errors import ConfigError
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
    """Task singular vectors, made orthogonal to one another (TSV-M, arXiv 2412.00081).

        B_k = U_k S_k V_k^T,  cut to its r = floor(min(out, rest) / K) largest singular values
        U' = nearest orthogonal factor of [U_1 ... U_K],  V' likewise
        B'_k = U'_k S_k V'_k^T

    so that the sum of the directions is TSV-M's delta and each stays its source's own. Matrices
    with a side below K are averaged. In the published code only tensors of two axes are decomposed,
    and arbitrary vectors stand for singular values of zero; here those take no part.

    The options are the two ideas of RESM, first called R-TSVM (arXiv 2502.06876): a rank chosen
    from each layer's sparsity, and weights by outliers. The exact formulas of the paper could not
    be verified; those at the options are ours.
    """

    rank: Literal["equal", "sparsity"] = "equal"
    """How many singular values a source keeps: r of the formula, or fewer in sparse layers,
    max(1, floor(r min(1, pi/2 (sum |b|)^2 / (n sum b^2)))) over the layer's n entries b, which is r
    where they are normally distributed."""
    outliers: float | None = None
    """Weigh row i of source k by K m_ki / sum_j m_ji before decomposing (all by 1 where the sum is
    0), with m_ki the sum of magnitudes of the row's outliers: entries whose magnitude is more than
    so many standard deviations above the mean magnitude of the source's tensor. Off by default;
    3 is usual."""

    def __post_init__(self) -> None:
        """Check the outliers' bound."""
        if self.outliers is not None and self.outliers < 0:
            raise ConfigError(
                f"TSVM.outliers: expected standard deviations of at least 0, got {self.outliers}."
            )

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
            lefts.append(left[:, :kept].clone())  # the rest of a view would stay in memory
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
    """The summed delta with all its singular values equal (Iso-C, arXiv 2502.04959).

        sum_k B_k = U S V^T,  B'_k = mean(S) U V^T / K

    No part of this is one source's, so that all directions are equal. Singular values of zero are
    neither raised nor counted in the mean.
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
    """A common and task-specific subspace with equal singular values (Iso-CTS, arXiv 2502.04959).

        sum_k B_k = U S V^T, cut to its c largest singular values: the common subspace
        (I - U U^T) B_k = U_k S_k V_k^T, cut to t each, K t + c = min(out, rest)
        U' = nearest orthogonal factor of [U_1 ... U_K U],  V' likewise
        s = mean of all K t + c singular values
        B'_k = s (U'_k V'_k^T + U' V'^T / K)

    The common part is no source's own and shared equally. Singular values of zero are neither
    raised nor counted.
    """

    common: float = 0.8
    """Share of the directions that are common, in [0, 1]; what is left is rounded so that all
    sources get as many."""

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 <= self.common <= 1:
            raise ConfigError(f"IsoCTS.common: expected a share in [0, 1], got {self.common}.")

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
    """`most`, or less where few entries carry most of the matrix."""
    squares = float(matrix.square().sum(dtype=torch.float64))
    if not squares:
        return most
    spread = float(matrix.abs().sum(dtype=torch.float64)) ** 2 / (matrix.numel() * squares)
    return max(1, int(most * min(1.0, math.pi / 2 * spread)))


def _outlier_weights(matrices: Tensor, deviations: float) -> Tensor:
    """Weight of each source's rows, `[sources, out, 1]`."""
    masses = []
    for matrix in matrices:
        magnitude = matrix.abs()
        bound = magnitude.mean() + deviations * magnitude.std(unbiased=False)
        masses.append((magnitude * (magnitude > bound)).sum(dim=1))
    mass = torch.stack(masses)
    total = mass.sum(dim=0)
    weight = torch.where(total > 0, len(mass) * mass / total, torch.ones((), dtype=total.dtype))
    return weight.unsqueeze(-1)
