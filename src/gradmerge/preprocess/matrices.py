"""What the spectral steps share: tensors as matrices, and orthogonal factors of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradmerge.errors import ConfigError
from gradmerge.preprocess.base import Site

# Smaller singular values, beside the largest, are what float32 makes of zero.
_RESOLUTION = 1e-6


def matrices_of(directions: Tensor, site: Site, least: int = 2) -> Tensor | None:
    """Directions as matrices `[sources, out, rest]`, a view; None where a tensor has fewer than two
    axes, or a side below `least`.

    Raises:
        ConfigError: a direction is not finite, and so cannot be decomposed.
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
                f"{source}. Is that checkpoint whole?"
            )
    return directions.view(len(directions), *sides)


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U, S, V^T` in float64, without the singular values that are zero (below a millionth).

    What belongs to those is arbitrary: a decomposition may choose any directions for it, and a
    merge must not.
    """
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    if not len(values):
        return left, values, right
    rank = int((values > _RESOLUTION * values[0]).sum())
    return left[:, :rank], values[:rank], right[:rank]


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal factor of the polar decomposition, `P Q^T` of `P S Q^T`, of a float64 matrix.

    Of a matrix of full rank this is the nearest one with orthonormal columns (or rows); otherwise
    the partial isometry, which is zero on the null space and so unique. By the smaller of its two
    Gram matrices, in half the time of a singular value decomposition.
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
    """`B_k / K`: the sum of these is the mean direction."""
    return directions.div_(len(directions))


def shared(merged: Tensor, directions: Tensor) -> Tensor:
    """Write `merged / K` into each direction, where no part of it is one source's."""
    return directions.copy_((merged / len(directions)).view(directions.shape[1:]))
