"""Moments of units: those of a mean of aligned sources, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradmerge.alignment.base import Activations, Moments
from gradmerge.alignment.spec import LinearMap, Map, Maps


def with_mean(
    activations: Activations, group: str, source: str, targets: Mapping[str, Maps]
) -> Moments | None:
    """Moments of the mean of aligned sources (first) and of one source (second).

    With `x = 1/m sum_k T_k a_k` over m targets and `y = a_s`, all are linear in the moments of
    pairs, so no pass over data is needed for any mean:

        E[x]     = 1/m   sum_k  T_k E[a_k]
        E[x x^T] = 1/m^2 sum_kl T_k E[a_k a_l^T] T_l^T
        E[x y^T] = 1/m   sum_k  T_k E[a_k y^T]

    Args:
        activations: moments of all pairs of sources.
        group: whose units.
        source: y.
        targets: the maps `T_k` of every target.

    Returns:
        None where the group was never seen.
    """
    share = 1 / len(targets)
    total: Moments | None = None
    for name, maps in targets.items():
        found = activations.moments(group, name, source)
        if found is None:
            return None
        own = maps.get(group)
        square = torch.zeros_like(found.first)
        for other, theirs in targets.items():
            pair = found.first if other == name else _cross(activations, group, name, other)
            square += _on_first(theirs.get(group), _on_first(own, pair).mT).mT
        part = Moments(
            found.rows,
            share * _on_first(own, found.first_mean),
            found.second_mean,
            share**2 * square,
            found.second,
            share * _on_first(own, found.cross),
        )
        total = part if total is None else _plus(total, part)
    return total


def _cross(activations: Activations, group: str, first: str, second: str) -> Tensor:
    found = activations.moments(group, first, second)
    assert found is not None  # seen in one pair, seen in all
    return found.cross


def _plus(one: Moments, two: Moments) -> Moments:
    mean, square = one.first_mean + two.first_mean, one.first + two.first
    return Moments(one.rows, mean, one.second_mean, square, one.second, one.cross + two.cross)


def _on_first(change: Map | None, values: Tensor) -> Tensor:
    """`T values` over the first axis."""
    if change is None:
        return values
    if isinstance(change, LinearMap):
        return change.matrix.to(values) @ values
    return values[change]


def covariances(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Centred: of the first, of the second, and across, each `[size, size]`."""
    one, two = moments.first_mean, moments.second_mean
    return (
        moments.first - torch.outer(one, one),
        moments.second - torch.outer(two, two),
        moments.cross - torch.outer(one, two),
    )


def correlation(moments: Moments) -> Tensor:
    """`corr(x_i, y_j)`, `[size, size]`; 0 where either unit does not vary."""
    first, second, cross = covariances(moments)
    scales = [
        _inverse_roots(own.diagonal(), square.diagonal())
        for own, square in ((first, moments.first), (second, moments.second))
    ]
    return scales[0][:, None] * cross * scales[1][None, :]


def _inverse_roots(variances: Tensor, squares: Tensor) -> Tensor:
    """`1 / sqrt(v)`; 0 where v is rounding of `E[x^2] - E[x]^2`."""
    lives = variances > 1e-13 * squares
    return torch.where(lives, variances.where(lives, torch.ones_like(variances)).rsqrt(), 0.0)


def squared_distances(moments: Moments) -> Tensor:
    """`E (x_i - y_j)^2`, `[size, size]`."""
    squares = moments.first.diagonal()[:, None] + moments.second.diagonal()[None, :]
    return (squares - 2 * moments.cross).clamp(min=0)
