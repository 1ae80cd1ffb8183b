"""How directions are combined into one tensor, and the gradient of that in the coefficients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gradmerge._typing import Origin
from gradmerge.errors import ConfigError


@dataclass(frozen=True)
class Terms:
    """The frozen tensors of one merge, each of the same shape, in its own dtype."""

    sources: list[Tensor]
    origin: Tensor | None
    """The origin's tensor; None when the origin is zero or the mean of the sources."""
    mean_origin: bool = False
    """Whether the origin is the mean of the sources."""
    directions: bool = False
    """Whether `sources` hold directions: the origin has been taken off already."""
    masks: list[Tensor | None] | None = None
    """A byte an entry of each source, flat: its direction is zero where its mask is."""
    factors: list[float] | None = None
    """What each direction is multiplied by; given with `masks`."""
    facts: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """What an operator has found out about these tensors and wants to keep from call to call; the
    tensors never change, so a plan hands the same dictionary on every time."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the merged tensor."""
        return self.sources[0].shape

    def dense(self) -> Terms:
        """The same with directions written out, in float32 or wider, and without masks."""
        if self.masks is None or self.factors is None:
            return self
        directions = []
        for source, mask, factor in zip(self.sources, self.masks, self.factors, strict=True):
            direction = source.to(self.accumulate_dtype, copy=True)
            if self.origin is not None and not self.directions:
                direction.sub_(self.origin.to(direction))
            if mask is not None:
                direction.masked_fill_(mask.view(self.shape).to(direction.device) == 0, 0)
            directions.append(direction.mul_(factor))
        return Terms(directions, self.origin, directions=True, facts=self.facts)

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """float64 if any term is, else float32."""
        terms = [*self.sources, *([self.origin] if self.origin is not None else [])]
        wide = any(term.dtype == torch.float64 for term in terms)
        return torch.float64 if wide else torch.float32


@dataclass(frozen=True)
class Spread:
    """How coefficients `[sources, *slot]` spread over a tensor's entries."""

    kind: Literal["scalar", "axis", "partition", "element", "component"]
    axis: int = 0
    parts: Tensor | None = None
    """Part of each entry (partition only), `[entries]`."""


@dataclass(frozen=True)
class View:
    """A tensor seen as `[outer, width, inner]`, with coefficients along `width`.

    `width` is 1 for a scalar coefficient and all entries for one per weight.
    """

    outer: int
    width: int
    inner: int

    @classmethod
    def of(cls, shape: torch.Size, spread: Spread) -> View:
        """The view in which a spread's coefficients lie along one axis."""
        size = shape.numel()
        if spread.kind == "axis":
            outer = shape[: spread.axis].numel()
            return cls(outer, shape[spread.axis], shape[spread.axis + 1 :].numel())
        return cls(1, 1, size) if spread.kind == "scalar" else cls(1, size, 1)


class AbstractOperator(ABC):
    """`theta = combine(terms, c)`."""

    # without an annotation: the parser would look for its names in a subclass's module
    differentiable = True
    """Whether coefficients can be learned through it: `contract` is the gradient of `combine`."""
    by_entry = False
    """Whether an entry is merged, and contracted, from its own entries and coefficients alone, so
    that a tensor with a coefficient per weight may be taken part by part, each flat."""
    by_component = False
    """Whether coefficients may stand on singular components (a spread of kind `component`)."""

    def require(self, num_sources: int, origin: Origin) -> None:  # noqa: B027 (most have none)
        """Refuse a merge that it cannot express; called before anything is opened.

        Raises:
            ConfigError: another number of sources is needed, or another origin.
        """

    @abstractmethod
    def combine(self, terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
        """Write the merged tensor into `out` (its dtype and device are the result's) and return
        it.
        """

    @abstractmethod
    def contract(self, terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
        """`dL/dc`, `[sources, *slot]`, from `grad = dL/dtheta`."""


def require_base(who: str, origin: Origin) -> None:
    """Refuse an operator that measures from a base where there is none.

    Raises:
        ConfigError: the origin is another.
    """
    if origin != "base":
        raise ConfigError(
            f"{who}: expected directions from a base, got origin {origin}; set `base` (and leave "
            "`origin` out), or choose another operator."
        )
