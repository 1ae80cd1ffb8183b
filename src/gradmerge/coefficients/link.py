"""Links: constraints on coefficients, each wrapping a granularity or another link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.coefficients.base import AbstractCoefficients, Layout, MergeTensor
from gradmerge.coefficients.granularity import Column, Component, Partition, Row
from gradmerge.coefficients.granularity import Tensor as TensorGranularity
from gradmerge.errors import ConfigError


@dataclass(frozen=True)
class AbstractLink(AbstractCoefficients):
    """A link takes everything but the constraint from what it wraps."""

    inner: AbstractCoefficients = field(default_factory=TensorGranularity)
    """The granularity (or link) that is wrapped."""

    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        """That of the wrapped granularity."""
        return self.inner.layout(tensors)

    def num_rows(self, num_sources: int) -> int:
        """That of the wrapped granularity."""
        return self.inner.num_rows(num_sources)


class _Entrywise(AbstractLink):
    """A link of each entry by itself."""

    @property
    def by_entry(self) -> bool:
        """As what is wrapped."""
        return self.inner.by_entry


class _ClampThatReturns(torch.autograd.Function):
    """Clamp whose gradient vanishes at a bound only where descent would push further out.

    A plain clamp has no gradient once a coefficient is at a bound, so it can never come back: 10 to
    31% of the layer-wise coefficients released with AdaMerging sit at exactly 0.
    """

    @staticmethod
    def forward(ctx: Any, raw: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(raw)
        ctx.low, ctx.high = low, high
        return raw.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (raw,) = ctx.saved_tensors
        (grad,) = grads
        outward = ((raw <= ctx.low) & (grad > 0)) | ((raw >= ctx.high) & (grad < 0))
        return grad.masked_fill(outward, 0.0), None, None


@dataclass(frozen=True)
class Clamp(_Entrywise):
    """`c = min(max(z, low), high)`, with a gradient that can come back from the bound."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not self.low < self.high:
            raise ConfigError(f"Clamp: low {self.low} must be below high {self.high}.")

    @override
    def link(self, raw: Tensor) -> Tensor:
        clamped: Tensor = _ClampThatReturns.apply(self.inner.link(raw), self.low, self.high)
        return clamped

    @override
    def pull_back(self, coefficient: Tensor) -> Tensor:
        _require_within(coefficient, self.low, self.high, "Clamp")
        return self.inner.pull_back(coefficient)


@dataclass(frozen=True)
class Sigmoid(_Entrywise):
    """`c = 1 / (1 + exp(-z))`, between 0 and 1 (NP Merge)."""

    eps: float = 0.01
    """Starting coefficients are pulled into [eps, 1 - eps]: a saturated sigmoid does not learn."""

    def __post_init__(self) -> None:
        """Check eps."""
        _require_eps(self.eps, 0.5, "Sigmoid")

    @override
    def link(self, raw: Tensor) -> Tensor:
        return torch.sigmoid(self.inner.link(raw))

    @override
    def pull_back(self, coefficient: Tensor) -> Tensor:
        _require_within(coefficient, 0.0, 1.0, "Sigmoid")
        return self.inner.pull_back(torch.logit(coefficient, eps=self.eps))


@dataclass(frozen=True)
class Tanh(_Entrywise):
    """`c = tanh(z)`, between -1 and 1 (SUPERMERGE, arXiv 2412.10416)."""

    eps: float = 0.01
    """Starting coefficients are pulled into [eps - 1, 1 - eps]."""

    def __post_init__(self) -> None:
        """Check eps."""
        _require_eps(self.eps, 1, "Tanh")

    @override
    def link(self, raw: Tensor) -> Tensor:
        return torch.tanh(self.inner.link(raw))

    @override
    def pull_back(self, coefficient: Tensor) -> Tensor:
        _require_within(coefficient, -1.0, 1.0, "Tanh")
        return self.inner.pull_back(torch.atanh(coefficient.clamp(self.eps - 1, 1 - self.eps)))


@dataclass(frozen=True)
class Softmax(_Entrywise):
    """`c_k = exp(z_k) / sum_j exp(z_j)`: positive, summing to 1 over the sources (learned soup)."""

    eps: float = 1e-4
    """Starting coefficients below this are raised to it."""

    def __post_init__(self) -> None:
        """Check eps."""
        _require_eps(self.eps, 1, "Softmax")

    def num_rows(self, num_sources: int) -> int:
        """That of the wrapped granularity.

        Raises:
            ConfigError: a single source, whose coefficient would be 1 whatever is learned.
        """
        if num_sources < 2:
            raise ConfigError(
                "Softmax: expected at least two sources, got one, whose coefficient would always "
                "be 1. Use Sigmoid or Clamp."
            )
        return self.inner.num_rows(num_sources)

    @override
    def link(self, raw: Tensor) -> Tensor:
        return torch.softmax(self.inner.link(raw), dim=0)

    @override
    def pull_back(self, coefficient: Tensor) -> Tensor:
        _require_within(coefficient, 0.0, 1.0, "Softmax")
        _require_sum_of_one(coefficient, "Softmax")
        return self.inner.pull_back(coefficient.clamp_min(self.eps).log())


@dataclass(frozen=True)
class Complement(_Entrywise):
    """Two sources share one number: `c = (a, 1 - a)` with `a` from the wrapped coefficients."""

    def num_rows(self, num_sources: int) -> int:
        """One row.

        Raises:
            ConfigError: not exactly two sources.
        """
        if num_sources != 2:
            raise ConfigError(
                f"Complement: expected exactly two sources, got {num_sources}. "
                "Use Softmax for more."
            )
        return self.inner.num_rows(1)

    @override
    def link(self, raw: Tensor) -> Tensor:
        first = self.inner.link(raw)
        return torch.cat([first, 1 - first])

    @override
    def pull_back(self, coefficient: Tensor) -> Tensor:
        _require_sum_of_one(coefficient, "Complement")
        return self.inner.pull_back(coefficient[:1])


class _StraightThrough(torch.autograd.Function):
    """`1[z > 0]`, with the gradient of `sigmoid(z / temperature)`."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(raw)
        ctx.temperature = temperature
        # sigmoid(z / T) > 1/2, free of rounding
        return (raw > 0).to(raw.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (raw,) = ctx.saved_tensors
        soft = torch.sigmoid(raw / ctx.temperature)
        return grads[0] * soft * (1 - soft) / ctx.temperature, None


@dataclass(frozen=True)
class HardMask(_Entrywise):
    """`c = 1[sigmoid(z / temperature) > 1/2]`: 0 or 1 (AdaRank, arXiv 2503.22178).

    The gradient is that of the sigmoid (straight through). As in the authors' code the temperature
    divides: at 10 the slope is nearly the same everywhere, so that no coefficient saturates.
    """

    temperature: float = 10.0
    start: float = 0.1
    """Raw number of a coefficient that starts at 1; of one that starts at 0 it is `-start`."""

    def __post_init__(self) -> None:
        """Check both numbers."""
        for name in ("temperature", "start"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"HardMask: {name} must be positive, got {getattr(self, name)}.")

    @override
    def link(self, raw: Tensor) -> Tensor:
        mask: Tensor = _StraightThrough.apply(self.inner.link(raw), self.temperature)
        return mask

    @override
    def pull_back(self, coefficient: Tensor) -> Tensor:
        between = coefficient[(coefficient.abs() > 1e-6) & ((coefficient - 1).abs() > 1e-6)]
        if between.numel():
            raise ConfigError(
                "HardMask: starting coefficients must be 0 or 1, got "
                f"{between.flatten()[0].item():.4g}. Use init Constant 1 or LeadingComponents; a "
                "scale belongs to the operator (Components.scale), or is learned (WithScale)."
            )
        raw = torch.where(coefficient > 0.5, self.start, -self.start)
        return self.inner.pull_back(raw.to(coefficient.dtype))


def _require_within(coefficient: Tensor, low: float, high: float, name: str) -> None:
    outside = coefficient[(coefficient < low - 1e-6) | (coefficient > high + 1e-6)]
    if outside.numel():
        raise ConfigError(
            f"{name}: starting coefficients must lie in [{low:g}, {high:g}], got "
            f"{outside.flatten()[0].item():.4g}. Change the init or the link."
        )


def _require_sum_of_one(coefficient: Tensor, name: str) -> None:
    total = coefficient.sum(dim=0).flatten()
    if total.numel() == 0:
        return
    worst = total[(total - 1).abs().argmax()].item()
    if not abs(worst - 1) <= 1e-3:
        raise ConfigError(
            f"{name}: starting coefficients must sum to 1 over the sources, got a sum of "
            f"{worst:.4g}. Use init Uniform or Mixup, or another link."
        )


def _require_eps(eps: float, high: float, name: str) -> None:
    if not 0 < eps < high:
        raise ConfigError(f"{name}: eps must lie between 0 and {high}, got {eps}.")


@dataclass(frozen=True)
class WithScale(AbstractLink):
    """`c_kj = s_k m_kj`, one learned number `s_k` a tensor and source beside what is wrapped, m.

    With `HardMask` over `Component` it is AdaRank (arXiv 2503.22178; the authors' code learns a
    coefficient per tensor and source beside the masks, at one rate). With `Column` and others all
    of a tensor's coefficients can move together. A tensor with a single coefficient per source (a
    bias) has the scale alone: no mask, and any real number.

    Raw numbers are `[sources, 1 + n]` of n wrapped coefficients, the scale first. Gradients:
    `dL/ds_k = sum_j m_kj dL/dc_kj` and `dL/dm_kj = s_k dL/dc_kj`. At the start `s_k` is the
    coefficient of largest magnitude, so that masks are told by init `Scaled` of `LeadingComponents`
    and one number alone by `Constant`.
    """

    inner: AbstractCoefficients = field(default_factory=lambda: HardMask(Component()))
    """Column, Row, Partition or Component, or a link of them."""
    start: float = 1.0
    """The scale where all coefficients of a tensor and source start at 0, which tell none."""

    def __post_init__(self) -> None:
        """Check what is wrapped."""
        inner = self.inner
        while isinstance(inner, AbstractLink):
            inner = inner.inner
        if not isinstance(inner, (Column, Row, Partition, Component)):
            raise ConfigError(
                "WithScale: expected Column, Row, Partition or Component inside, got "
                f"{type(inner).__name__}. One number a tensor needs no scale beside it, and of "
                "one per weight (Element) the scale is one direction among them already."
            )

    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        """That of what is wrapped, with room for the scale."""
        slots = self.inner.layout(tensors).slots
        shapes = {slot.key: tuple(1 + n for n in slot.shape) for slot in slots.values()}
        return Layout(slots, shapes)

    def num_rows(self, num_sources: int) -> int:
        """One row a source.

        Raises:
            ConfigError: what is wrapped has another number of rows.
        """
        rows = self.inner.num_rows(num_sources)
        if rows != num_sources:
            raise ConfigError(
                f"WithScale: expected one row of raw numbers per source inside, got {rows} for "
                f"{num_sources} sources ({type(self.inner).__name__}), which leave no place for a "
                "scale of each. Leave that link or the scale out."
            )
        return rows

    @override
    def link(self, raw: Tensor) -> Tensor:
        return raw if raw.dim() == 1 else raw[:, :1] * self.inner.link(raw[:, 1:])

    @override
    def pull_back(self, coefficient: Tensor) -> Tensor:
        if coefficient.dim() == 1:
            return coefficient
        padded = torch.nn.functional.pad(coefficient, (1, 0))
        largest = padded.gather(1, padded.abs().argmax(dim=1, keepdim=True))
        scale = torch.where(largest == 0, self.start, largest).to(coefficient)
        return torch.cat([scale, self.inner.pull_back(coefficient / scale)], dim=1)
