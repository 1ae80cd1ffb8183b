"""Links: constraints on coefficients; each wraps a granularity or another link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.coefficients.base import AbstractCoefficients, Layout, MergeTensor
from gradmerge.coefficients.granularity import Column, Component, Element, Partition, Row
from gradmerge.coefficients.granularity import Tensor as TensorGranularity
from gradmerge.common.errors import ConfigError, require


@dataclass(frozen=True)
class AbstractLink(AbstractCoefficients):
    """Base class of links: subclasses define `link` and its inverse `pull_back`.

    Layout and number of rows are those of the wrapped granularity.
    """

    inner: AbstractCoefficients = field(default_factory=TensorGranularity)
    """Granularity (or link) to wrap."""

    @property
    @override
    def needs_norms(self) -> bool:
        return self.inner.needs_norms

    @override
    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        return self.inner.layout(tensors)

    @override
    def num_rows(self, num_sources: int) -> int:
        return self.inner.num_rows(num_sources)


class _Entrywise(AbstractLink):
    """A link that acts on each entry separately."""

    @property
    @override
    def by_entry(self) -> bool:
        return self.inner.by_entry


class _ClampWithReturn(torch.autograd.Function):
    """Clamp whose gradient is zero at a bound only if a descent step would move further out.

    With a plain clamp the gradient is zero at and beyond the bounds, so a coefficient there can
    never return: 10 to 31% of the layer-wise coefficients released with AdaMerging are exactly 0.
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
    """Clamp coefficients to an interval: `c = min(max(z, low), high)`.

    At a bound the gradient is zero only if a descent step would move further out, so coefficients
    can return from it.
    """

    low: float = 0.0
    """Lower bound of the coefficients."""
    high: float = 1.0
    """Upper bound of the coefficients."""

    def __post_init__(self) -> None:
        """Validate the bounds."""
        require(self.low < self.high, "Clamp.low", f"a number below high {self.high}", self.low)

    @override
    def link(self, raw: Tensor) -> Tensor:
        clamped: Tensor = _ClampWithReturn.apply(self.inner.link(raw), self.low, self.high)
        return clamped

    @override
    def pull_back(self, coefficient: Tensor) -> Tensor:
        _require_within(coefficient, self.low, self.high, "Clamp")
        return self.inner.pull_back(coefficient)


@dataclass(frozen=True)
class Sigmoid(_Entrywise):
    """Logistic sigmoid: `c = 1 / (1 + exp(-z))` in (0, 1) (NP Merge, arXiv 2412.15467)."""

    eps: float = 0.01
    """Starting coefficients are clamped to [eps, 1 - eps], where gradients do not vanish."""

    def __post_init__(self) -> None:
        """Validate the margin."""
        require(0 < self.eps < 0.5, "Sigmoid.eps", "a number in (0, 0.5)", self.eps)

    @override
    def link(self, raw: Tensor) -> Tensor:
        return torch.sigmoid(self.inner.link(raw))

    @override
    def pull_back(self, coefficient: Tensor) -> Tensor:
        _require_within(coefficient, 0.0, 1.0, "Sigmoid")
        return self.inner.pull_back(torch.logit(coefficient, eps=self.eps))


@dataclass(frozen=True)
class Tanh(_Entrywise):
    """Hyperbolic tangent: `c = tanh(z)` in (-1, 1) (SUPERMERGE, arXiv 2412.10416)."""

    eps: float = 0.01
    """Starting coefficients are clamped to [eps - 1, 1 - eps]."""

    def __post_init__(self) -> None:
        """Validate the margin."""
        require(0 < self.eps < 1, "Tanh.eps", "a number in (0, 1)", self.eps)

    @override
    def link(self, raw: Tensor) -> Tensor:
        return torch.tanh(self.inner.link(raw))

    @override
    def pull_back(self, coefficient: Tensor) -> Tensor:
        _require_within(coefficient, -1.0, 1.0, "Tanh")
        return self.inner.pull_back(torch.atanh(coefficient.clamp(self.eps - 1, 1 - self.eps)))


@dataclass(frozen=True)
class Softmax(_Entrywise):
    """Softmax over two or more sources: `c_k = exp(z_k) / sum_j exp(z_j)`, positive with sum 1
    (learned soup, arXiv 2203.05482).
    """

    eps: float = 1e-4
    """Lower bound of the starting coefficients."""

    def __post_init__(self) -> None:
        """Validate the bound."""
        require(0 < self.eps < 1, "Softmax.eps", "a number in (0, 1)", self.eps)

    @override
    def num_rows(self, num_sources: int) -> int:
        if num_sources < 2:
            raise ConfigError(
                "Softmax: expected at least two sources, got one, whose coefficient would always "
                "be 1. Use Sigmoid or Clamp."
            )
        if any(isinstance(part, Shared) for part in _chain(self.inner)):
            raise ConfigError(
                "Softmax: expected coefficients of each source inside, got Shared, with which all "
                "would be 1. Remove one of them."
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
    """One number for two sources: `c = (a, 1 - a)`, with `a` from the wrapped coefficients."""

    @override
    def num_rows(self, num_sources: int) -> int:
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


@dataclass(frozen=True)
class Shared(_Entrywise):
    """The same coefficients for all sources: `c_kj = z_j`, one row of raw numbers.

    With `Tensor` or `Model` it is task arithmetic whose scales are learned; with a mask per weight
    it is one mask for all task vectors (`ConcreteMask`). The gradient is the sum over the sources.
    """

    @override
    def num_rows(self, num_sources: int) -> int:
        return self.inner.num_rows(1)

    @override
    def link(self, raw: Tensor) -> Tensor:
        return self.inner.link(raw)  # a single row counts for all sources

    @override
    def pull_back(self, coefficient: Tensor) -> Tensor:
        apart = (coefficient - coefficient[:1]).abs()
        if apart.numel() and apart.max() > 1e-6:
            raise ConfigError(
                "Shared: starting coefficients must be the same for all sources, got numbers that "
                f"differ by {apart.max().item():.4g}. Use init Uniform or Constant with one value."
            )
        return self.inner.pull_back(coefficient[:1])


@dataclass(frozen=True)
class ConcreteMask(AbstractLink):
    """Soft mask whose mean over a tensor is the scale (Concrete Subspace Learning, arXiv
    2312.06173).

        c_j = scale m_j / mean(m),  m_j = 1 / (1 + exp(-z_j / temperature))

    With the optimiser `LogisticNoise`, a training step draws `m` from the concrete (relaxed
    Bernoulli) distribution with logits z at this temperature, as published. Scores and exports are
    without noise, which is the median of `m`. The published mask is one for all sources: wrap
    `Shared` around it. All numbers start at `m = 1/2`, if coefficients start at the scale. A tensor
    with a single number has `c = 2 scale m`.
    """

    inner: AbstractCoefficients = field(default_factory=Element)
    """Granularity Element, Column, Row, Partition or Component, or a link around one of them."""
    temperature: float = 0.5
    """Divisor of the raw numbers inside the sigmoid."""
    scale: float = 0.3
    """Mean coefficient of a tensor."""
    eps: float = 1e-3
    """Starting values of m are clamped to [eps, 1 - eps], where gradients do not vanish."""

    def __post_init__(self) -> None:
        """Validate the numbers and the wrapped granularity."""
        name = type(self).__name__
        require(self.temperature > 0, f"{name}.temperature", "a positive number", self.temperature)
        require(self.scale > 0, f"{name}.scale", "a positive number", self.scale)
        require(0 < self.eps < 0.5, f"{name}.eps", "a number in (0, 0.5)", self.eps)
        inner = _chain(self.inner)[-1]
        if not isinstance(inner, (Element, Column, Row, Partition, Component)):
            raise ConfigError(
                f"{name}: expected Element, Column, Row, Partition or Component inside, got "
                f"{type(inner).__name__}, with one number per tensor, of which a mask leaves "
                "nothing. Choose a finer granularity."
            )

    @override
    def link(self, raw: Tensor) -> Tensor:
        mask = torch.sigmoid(self.inner.link(raw) / self.temperature)
        numbers = mask.reshape(len(mask), -1)
        if numbers.shape[1] <= 1:
            return 2 * self.scale * mask
        mean = numbers.mean(dim=1).reshape(-1, *[1] * (mask.dim() - 1))
        return mask * (self.scale / mean)

    @override
    def pull_back(self, coefficient: Tensor) -> Tensor:
        numbers = coefficient.reshape(len(coefficient), -1)
        means = numbers.mean(dim=1) if numbers.shape[1] > 1 else numbers.new_full((1,), self.scale)
        if numbers.numel() and (means - self.scale).abs().max() > 1e-3 * self.scale:
            worst = means[(means - self.scale).abs().argmax()].item()
            raise ConfigError(
                f"ConcreteMask: starting coefficients must have the mean {self.scale:g} (scale) in "
                f"each tensor, got {worst:.4g}. Use init Constant {self.scale:g}, or set scale."
            )
        _require_within(coefficient, 0.0, 2 * self.scale, "ConcreteMask")
        mask = coefficient / (2 * self.scale)
        return self.inner.pull_back(self.temperature * torch.logit(mask, eps=self.eps))


class _StraightThrough(torch.autograd.Function):
    """Step function `1[z > 0]` with the gradient of `sigmoid(z / temperature)`."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(raw)
        ctx.temperature = temperature
        # the same as sigmoid(z / T) > 1/2, without rounding
        return (raw > 0).to(raw.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (raw,) = ctx.saved_tensors
        soft = torch.sigmoid(raw / ctx.temperature)
        return grads[0] * soft * (1 - soft) / ctx.temperature, None


@dataclass(frozen=True)
class HardMask(_Entrywise):
    """Binary mask: `c = 1[sigmoid(z / temperature) > 1/2]`, 0 or 1 (AdaRank, arXiv 2503.22178).

    The gradient is that of the sigmoid (straight-through estimator). The temperature divides, as in
    the authors' code: at 10 the slope is nearly constant, so no coefficient saturates.
    """

    temperature: float = 10.0
    """Divisor of the raw numbers inside the sigmoid."""
    start: float = 0.1
    """Raw number of a coefficient that starts at 1; one that starts at 0 gets `-start`."""

    def __post_init__(self) -> None:
        """Validate temperature and start."""
        require(self.temperature > 0, "HardMask.temperature", "a positive number", self.temperature)
        require(self.start > 0, "HardMask.start", "a positive number", self.start)

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
                f"{between.flatten()[0].item():.4g}. Use init Constant 1 or LeadingComponents; "
                "set a scale in the operator (Components.scale) or learn one (WithScale)."
            )
        raw = torch.where(coefficient > 0.5, self.start, -self.start)
        return self.inner.pull_back(raw.to(coefficient.dtype))


def _chain(coefficients: AbstractCoefficients) -> list[AbstractCoefficients]:
    """Return coefficients with all that they wrap, the granularity last."""
    found = [coefficients]
    while isinstance(found[-1], AbstractLink):
        found.append(found[-1].inner)
    return found


def _require_within(coefficient: Tensor, low: float, high: float, name: str) -> None:
    outside = coefficient[(coefficient < low - 1e-6) | (coefficient > high + 1e-6)]
    if outside.numel():
        raise ConfigError(
            f"{name}: starting coefficients must lie in [{low:g}, {high:g}], got "
            f"{outside.flatten()[0].item():.4g}. Choose another init or link."
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


@dataclass(frozen=True)
class WithScale(AbstractLink):
    """Learned scale per tensor and source on top of the wrapped coefficients: `c_kj = s_k m_kj`.

    With `HardMask` over `Component` this is AdaRank (arXiv 2503.22178, whose code also learns a
    coefficient per tensor and source along with the masks, at the same rate). With `Column`, `Row`
    or `Partition` it lets all coefficients of a tensor move together. A tensor with a single
    coefficient per source (a bias) has only the scale: no mask, any real number.

    Raw numbers are `[sources, 1 + n]` for n wrapped coefficients, the scale first. Gradients:
    `dL/ds_k = sum_j m_kj dL/dc_kj` and `dL/dm_kj = s_k dL/dc_kj`. Initially `s_k` is the starting
    coefficient with the largest magnitude; use init `Scaled` of `LeadingComponents` to start from
    masks, or `Constant` to start from the scale alone.
    """

    inner: AbstractCoefficients = field(default_factory=lambda: HardMask(Component()))
    """Granularity Column, Row, Partition or Component, or a link around one of them."""
    start: float = 1.0
    """Initial scale if all coefficients of a tensor and source start at 0."""

    def __post_init__(self) -> None:
        """Validate the wrapped granularity."""
        inner = _chain(self.inner)[-1]
        if not isinstance(inner, (Column, Row, Partition, Component)):
            raise ConfigError(
                "WithScale: expected Column, Row, Partition or Component inside, got "
                f"{type(inner).__name__}. Other granularities have one coefficient per tensor or "
                "per weight, for which an additional scale is redundant."
            )

    @override
    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        slots = self.inner.layout(tensors).slots
        shapes = {slot.key: tuple(1 + n for n in slot.shape) for slot in slots.values()}
        return Layout(slots, shapes)

    @override
    def num_rows(self, num_sources: int) -> int:
        rows = self.inner.num_rows(num_sources)
        if rows != num_sources:
            raise ConfigError(
                f"WithScale: expected one row of raw numbers per source inside, got {rows} for "
                f"{num_sources} sources ({type(self.inner).__name__}). Remove that link or the "
                "scale."
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
