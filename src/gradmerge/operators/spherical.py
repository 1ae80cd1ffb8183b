"""Spherical interpolation and means on the sphere, as weights of the directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError, require
from gradmerge.common.typing import Origin
from gradmerge.operators.base import FlatView
from gradmerge.operators.span import AbstractSpan, norms_of, per_view

_NO_SUM = 1e-6
_NO_NORM = 1e-8
_NO_MEAN = 1e-14


@dataclass(frozen=True)
class Slerp(AbstractSpan):
    """Spherical linear interpolation of two directions (https://en.wikipedia.org/wiki/Slerp).

        theta = A + sin((1 - t) w) / sin(w) B_1 + sin(t w) / sin(w) B_2
        w = angle between B_1 and B_2,    t = c_2 / (c_1 + c_2)

    (t = 1/2 where the magnitude of the sum is below 1e-6.) Only the ratio of the coefficients
    matters, so one coefficient with the link `Complement` is enough. With origin zero and
    coefficients `[1 - t, t]` this is mergekit's slerp; with `threshold` near 1, its nuslerp; with
    origin base, its nuslerp with a base. Needs two sources and origin base or zero.

    Nearly collinear vectors (`|cos| > threshold`) are interpolated linearly. A direction shorter
    than 1e-8 counts as orthogonal to the other.
    """

    per: Literal["tensor", "row", "column"] = "tensor"
    """One angle per tensor, or one per vector along the last axis (row) or the first axis (column).
    In mergekit's nuslerp `nuslerp_flatten: false` is row, with `nuslerp_row_wise: true` column."""
    threshold: float = 0.9995
    """|cos| in [0, 1) above which interpolation is linear. 0.9995 is mergekit's slerp, 0.9999999
    its nuslerp, which goes to the precision of float32."""

    def __post_init__(self) -> None:
        """Validate the threshold."""
        # at 1 the sine of the angle may be 0
        require(0 <= self.threshold < 1, "Slerp.threshold", "a number in [0, 1)", self.threshold)

    @override
    def require(self, num_sources: int, origin: Origin) -> None:
        if num_sources != 2:
            raise ConfigError(
                f"Slerp: expected two sources, got {num_sources}; MultiSlerp and Karcher support "
                "any number."
            )
        if origin == "mean":
            raise ConfigError(
                "Slerp: measured from their mean, two directions are opposite and define no arc. "
                "Choose origin base or zero."
            )

    @override
    def gram_view(self, shape: torch.Size) -> FlatView:
        return per_view(self.per, shape)

    @override
    def weights(self, gram: Tensor, coefficient: Tensor) -> Tensor:
        total = coefficient.sum(dim=0)
        none = total.abs() < _NO_SUM
        t = torch.where(none, 0.5, coefficient[1] / torch.where(none, 1, total))
        norms = norms_of(gram)
        norms = torch.where(norms > _NO_NORM, norms, 1)
        cosine = (gram[:, 0, 1] / (norms[0] * norms[1])).clamp(-1, 1)
        linear = cosine.abs() > self.threshold
        # the branch that is not used must be finite, too, or gradients are not
        angle = torch.where(linear, 0, cosine).acos()
        on_arc = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / angle.sin()
        return torch.where(linear, torch.stack([1 - t, t]), on_arc)


@dataclass(frozen=True)
class MultiSlerp(AbstractSpan):
    """Normalised mean of unit directions, scaled to their mean length (mergekit's multislerp,
    https://goddard.blog/posts/multislerp-wow-what-a-cool-idea).

        theta = A + (sum_k a_k |B_k|) m / |m|,    m = sum_k a_k B_k / |B_k|,    a = c / sum c

    The published method then moves in the tangent space at `m` by the mean of the tangents, but
    that mean is zero (`sum a_k (u_k - <u_k, m/|m|> m/|m|) = m - m`), so nothing moves. Directions
    shorter than 1e-8 count as zero. Where `m` is zero, two sources are averaged linearly, as are
    directions that are all zero; with more sources, directions that cancel raise a `ConfigError`,
    as do coefficients that sum to zero.
    """

    normalize: bool = True
    """Divide the coefficients by their sum."""

    @override
    def weights(self, gram: Tensor, coefficient: Tensor) -> Tensor:
        norms = norms_of(gram)
        share = _shares("MultiSlerp", coefficient) if self.normalize else coefficient
        share = share.expand(torch.broadcast_shapes(share.shape, norms.shape))
        units = torch.where(norms > _NO_NORM, share / torch.where(norms > _NO_NORM, norms, 1), 0)
        square = _product(gram, units, units)
        nothing = square < _NO_MEAN
        if len(share) > 2 and bool((nothing & (norms > _NO_NORM).any(dim=0)).any()):
            raise ConfigError(
                "MultiSlerp: the weighted directions cancel out, so their mean has no direction. "
                "Choose other coefficients, or the operator Linear."
            )
        length = (share * norms).sum(dim=0)
        return torch.where(nothing, share, length * units / torch.where(nothing, 1, square).sqrt())


@dataclass(frozen=True)
class Karcher(AbstractSpan):
    """Weighted Karcher mean (Riemannian centre of mass) of unit directions, scaled to their mean
    length (mergekit's karcher, arXiv 2603.04972).

        theta = A + (sum_k c_k |B_k|) m
        m_0   = sum_k a_k u_k, normalised,    u_k = B_k / |B_k|,    a = c / sum c
        m_i+1 = exp_m(sum_k a_k log_m(u_k)),  until a step is below `tol`; at most `max_iter` steps

    mergekit takes the mean of all models, the base included, with equal coefficients: use origin
    zero and init `Uniform`. Directions no longer than `tol` contribute only to the length. A
    direction opposite to the mean, with no unique shortest path to it, is left out of that step.
    Gradients flow through the iterations. Coefficients that sum to zero raise a `ConfigError`.
    """

    max_iter: int = 10
    """Maximum number of steps."""
    tol: float = 1e-5
    """Tolerance in (0, 1): steps, angles and directions smaller than this count as zero."""

    def __post_init__(self) -> None:
        """Validate max_iter and tol."""
        require(self.max_iter >= 0, "Karcher.max_iter", "at least 0", self.max_iter)
        require(0 < self.tol < 1, "Karcher.tol", "a number in (0, 1)", self.tol)

    @override
    def weights(self, gram: Tensor, coefficient: Tensor) -> Tensor:
        norms = norms_of(gram)
        norms, coefficient = torch.broadcast_tensors(norms, coefficient)
        valid = norms > self.tol
        safe = torch.where(valid, norms, 1)
        # products of unit directions; rows of invalid ones do not matter, as their share is 0
        cosine = gram / (safe.T[:, :, None] * safe.T[:, None, :])
        share = _shares("Karcher", torch.where(valid, coefficient, 0), valid.any(dim=0))
        mean = self._start(cosine, share, valid)
        going = torch.ones_like(mean[0], dtype=torch.bool)
        for _ in range(self.max_iter):
            dots = _applied(cosine, mean).clamp(-1, 1)
            away = valid & (dots.abs() < math.cos(self.tol))
            angle = torch.where(away, dots, 0).acos()
            pull = torch.where(away, share * angle / angle.sin(), 0)
            tangent = pull - (pull * dots).sum(dim=0) * mean
            square = _product(cosine, tangent, tangent)
            going = going & (square >= self.tol**2)
            if not bool(going.any()):
                break
            step = torch.where(going, square, 1).sqrt()
            moved = step.cos() * mean + step.sin() / step * tangent
            moved = moved / torch.where(going, _product(cosine, moved, moved), 1).sqrt()
            mean = torch.where(going, moved, mean)
        return (coefficient * norms).sum(dim=0) * mean / safe

    def _start(self, cosine: Tensor, share: Tensor, valid: Tensor) -> Tensor:
        """Return weights of the normalised mean, or of the first direction if the mean is zero."""
        square = _product(cosine, share, share)
        nothing = square < self.tol**2
        first = valid & (valid.cumsum(dim=0) == 1)
        scaled = share / torch.where(nothing, 1, square).sqrt()
        return torch.where(nothing, first.to(share.dtype), scaled)


def _shares(who: str, coefficient: Tensor, needed: Tensor | None = None) -> Tensor:
    """Divide coefficients by their sum in each column; zero where none is needed."""
    total = coefficient.sum(dim=0)
    none = total.abs() < _NO_SUM
    if bool((none if needed is None else none & needed).any()):
        raise ConfigError(
            f"{who}: the coefficients sum to zero and cannot be normalised. Choose others (init "
            "Uniform), or a link whose coefficients sum to one (Softmax)."
        )
    return coefficient / torch.where(none, 1, total)


def _applied(gram: Tensor, vector: Tensor) -> Tensor:
    """Return `G v`, `[sources, n]`, for matrices `[n or 1, sources, sources]`."""
    return (gram @ vector.T[:, :, None])[:, :, 0].T


def _product(gram: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return `<x, y>`, `[n]`, of vectors given as weights of the directions; squares are >= 0."""
    found = (first * _applied(gram, second)).sum(dim=0)
    return found.clamp(min=0) if first is second else found
