"""Shared helpers of the spectral steps: tensors as matrices, and their orthogonal factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradmerge.common.errors import ConfigError
from gradmerge.preprocess.base import Site

# Singular values below this, relative to the largest, are zero up to float32 rounding.
_RESOLUTION = 1e-6


def matrices_of(directions: Tensor, site: Site, least: int = 2) -> Tensor | None:
    """Return directions as matrices `[sources, out, rest]` (a view).

    Returns None if the tensor has fewer than two axes, or a side smaller than `least`.

    Raises:
        ConfigError: a direction contains NaN or infinity.
    """
    if directions.dim() < 3:
        return None
    sides = directions.shape[1], math.prod(directions.shape[2:])
    if min(sides) < least:
        return None
    for source, direction in zip(site.sources, directions, strict=True):
        if not direction.isfinite().all():
            raise ConfigError(
                f"{site.name}: expected finite numbers, got NaN or infinity in the direction of "
                f"{source}. Is that checkpoint complete?"
            )
    return directions.view(len(directions), *sides)


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `U, S, V^T` in float64, without singular values below a millionth of the largest.

    Singular vectors of zero are arbitrary, so a merge must not depend on them.
    """
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    if not len(values):
        return left, values, right
    rank = int((values > _RESOLUTION * values[0]).sum())
    return left[:, :rank], values[:rank], right[:rank]


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonal polar factor of a float64 matrix: `P Q^T` of `P S Q^T`.

    For a matrix of full rank this is the nearest one with orthonormal columns (or rows), otherwise
    the partial isometry that is zero on the null space, and therefore unique. It is computed from
    the smaller Gram matrix, in half the time of a singular value decomposition.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return nearest_orthogonal(matrix.T).T
    if not matrix.numel():
        return matrix
    squares, right = torch.linalg.eigh(matrix.T @ matrix)
    kept = squares > _RESOLUTION**2 * squares[-1]
    right = right[:, kept]
    return matrix @ (right / squares[kept].sqrt()) @ right.T


def averaged(directions: Tensor) -> Tensor:
    """Divide directions by their number, so that their sum is the mean direction."""
    return directions.div_(len(directions))


def shared(merged: Tensor, directions: Tensor) -> Tensor:
    """Write `merged / K` into each direction, for results without parts of single sources."""
    return directions.copy_((merged / len(directions)).view(directions.shape[1:]))
