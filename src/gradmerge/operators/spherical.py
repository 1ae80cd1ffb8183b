"""Interpolation and means on the sphere, as weights of the directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge._typing import Origin
from gradmerge.errors import ConfigError
from gradmerge.operators.base import View
from gradmerge.operators.span import AbstractSpan, norms_of, per_view

_NO_SUM = 1e-6
_NO_NORM = 1e-8
_NO_MEAN = 1e-14


@dataclass(frozen=True)
class Slerp(AbstractSpan):
    """Spherical linear interpolation of two directions (https://en.wikipedia.org/wiki/Slerp).

        theta = A + sin((1 - t) w) / sin(w) B_1 + sin(t w) / sin(w) B_2
        w = angle between B_1 and B_2,    t = c_2 / (c_1 + c_2)

    (t = 1/2 where the sum is below 1e-6 in magnitude.) Only the coefficients' ratio matters: one
    coefficient under the link `Complement` says all. With origin zero and `[1 - t, t]` this is
    mergekit's slerp, with `threshold` near 1 its nuslerp, with origin base its nuslerp with a
    base.

    Vectors closer to a line than `threshold` have no arc to speak of and are interpolated linearly.
    A direction shorter than 1e-8 counts as orthogonal to the other.
    """

    per: Literal["tensor", "row", "column"] = "tensor"
    """One angle a tensor, or one for each vector along its last axis (row) or first (column).
    mergekit's nuslerp: `nuslerp_flatten: false` is row, with `nuslerp_row_wise: true` column."""
    threshold: float = 0.9995
    """Linear where |cos| is larger; in [0, 1). 0.9995 is mergekit's slerp; its nuslerp, which stops
    at the precision of float32, is 0.9999999."""

    def __post_init__(self) -> None:
        """Check the threshold."""
        if not 0 <= self.threshold < 1:
            raise ConfigError(
                f"Slerp: expected a threshold in [0, 1), got {self.threshold}; at 1 the sine of "
                "an angle vanishes."
            )

    @override
    def require(self, num_sources: int, origin: Origin) -> None:
        if num_sources != 2:
            raise ConfigError(
                f"Slerp: expected two sources, got {num_sources}; MultiSlerp and Karcher take "
                "any number."
            )
        if origin == "mean":
            raise ConfigError(
                "Slerp: measured from their mean, two directions are opposite and have no arc; "
                "choose origin base or zero."
            )

    @override
    def gram_view(self, shape: torch.Size) -> View:
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
        # the branch that is not taken must be finite, too, or gradients are not
        angle = torch.where(linear, 0, cosine).acos()
        on_arc = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / angle.sin()
        return torch.where(linear, torch.stack([1 - t, t]), on_arc)


@dataclass(frozen=True)
class MultiSlerp(AbstractSpan):
    """Normalised mean of unit directions, at their mean length
    (https://goddard.blog/posts/multislerp-wow-what-a-cool-idea; mergekit's multislerp).

        theta = A + (sum_k a_k |B_k|) m / |m|,    m = sum_k a_k B_k / |B_k|,    a = c / sum c

    The published method then walks in the tangent space at `m` by the mean of the tangents, but
    that mean is zero (`sum a_k (u_k - <u_k, m/|m|> m/|m|) = m - m`), so the walk ends where it
    began. Lengths below 1e-8 are no directions. Where `m` vanishes, two sources are averaged as
    they are, and so are directions that are all zero.
    """

    normalize: bool = True
    """Whether coefficients are divided by their sum."""

    def weights(self, gram: Tensor, coefficient: Tensor) -> Tensor:
        """See `AbstractSpan.weights`.

        Raises:
            ConfigError: coefficients sum to zero, or directions balance out.
        """
        norms = norms_of(gram)
        share = _shares("MultiSlerp", coefficient) if self.normalize else coefficient
        share = share.expand(torch.broadcast_shapes(share.shape, norms.shape))
        units = torch.where(norms > _NO_NORM, share / torch.where(norms > _NO_NORM, norms, 1), 0)
        square = _product(gram, units, units)
        nothing = square < _NO_MEAN
        if len(share) > 2 and bool((nothing & (norms > _NO_NORM).any(dim=0)).any()):
            raise ConfigError(
                "MultiSlerp: the coefficients balance the directions out, so their mean has no "
                "direction; give other coefficients, or choose Linear."
            )
        length = (share * norms).sum(dim=0)
        return torch.where(nothing, share, length * units / torch.where(nothing, 1, square).sqrt())


@dataclass(frozen=True)
class Karcher(AbstractSpan):
    """Weighted Karcher mean of the unit directions, at their mean length (Riemannian centre of
    mass; mergekit's karcher, https://arxiv.org/abs/2603.04972).

        theta = A + (sum_k c_k |B_k|) m
        m_0   = sum_k a_k u_k, normalised,    u_k = B_k / |B_k|,    a = c / sum c
        m_i+1 = exp_m(sum_k a_k log_m(u_k)),  until the step is below `tol` or `max_iter` are done

    mergekit's is that of all models, the base among them, with equal coefficients: origin zero and
    init `Uniform`. Directions no longer than `tol` take part in the length alone, and one opposite
    to the mean, from which no way is the shortest, not in that step. Gradients run through the
    iterations.
    """

    max_iter: int = 10
    """Steps at most."""
    tol: float = 1e-5
    """Length of a step, of an angle and of a direction below which it counts as none."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.max_iter < 0:
            raise ConfigError(f"Karcher: expected max_iter >= 0, got {self.max_iter}.")
        if not 0 < self.tol < 1:
            raise ConfigError(f"Karcher: expected a tol in (0, 1), got {self.tol}.")

    def weights(self, gram: Tensor, coefficient: Tensor) -> Tensor:
        """See `AbstractSpan.weights`.

        Raises:
            ConfigError: the coefficients of what takes part sum to zero.
        """
        norms = norms_of(gram)
        norms, coefficient = torch.broadcast_tensors(norms, coefficient)
        valid = norms > self.tol
        safe = torch.where(valid, norms, 1)
        # of unit directions; those that do not count have no share, so their rows do not matter
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
        """The normalised mean in terms of unit directions; the first of them where it vanishes."""
        square = _product(cosine, share, share)
        nothing = square < self.tol**2
        first = valid & (valid.cumsum(dim=0) == 1)
        scaled = share / torch.where(nothing, 1, square).sqrt()
        return torch.where(nothing, first.to(share.dtype), scaled)


def _shares(who: str, coefficient: Tensor, needed: Tensor | None = None) -> Tensor:
    """Coefficients over their sum, a column at a time; zero where none is needed."""
    total = coefficient.sum(dim=0)
    none = total.abs() < _NO_SUM
    if bool((none if needed is None else none & needed).any()):
        raise ConfigError(
            f"{who}: the coefficients sum to zero, so they say no proportions; give others (init "
            "Uniform), or a link that sums to one (Softmax)."
        )
    return coefficient / torch.where(none, 1, total)


def _applied(gram: Tensor, vector: Tensor) -> Tensor:
    """`G v`, `[sources, n]`, of matrices `[n or 1, sources, sources]`."""
    return (gram @ vector.T[:, :, None])[:, :, 0].T


def _product(gram: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`<x, y>` of vectors given by weights of the directions, `[n]`; squares are never negative."""
    found = (first * _applied(gram, second)).sum(dim=0)
    return found.clamp(min=0) if first is second else found
