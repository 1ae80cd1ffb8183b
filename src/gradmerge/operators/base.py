"""How directions are combined into one tensor, and the gradient of that in the coefficients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradmerge._typing import Origin


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

    @property
    def shape(self) -> torch.Size:
        """Shape of the merged tensor."""
        return self.sources[0].shape

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """float64 if any term is, else float32."""
        terms = [*self.sources, *([self.origin] if self.origin is not None else [])]
        wide = any(term.dtype == torch.float64 for term in terms)
        return torch.float64 if wide else torch.float32


@dataclass(frozen=True)
class Spread:
    """How coefficients `[sources, *slot]` spread over a tensor's entries."""

    kind: Literal["scalar", "axis", "partition", "element"]
    axis: int = 0
    parts: Tensor | None = None
    """Part of each entry (partition only), `[entries]`."""


@dataclass(frozen=True)
class View:
    """A tensor seen as `[outer, width, inner]`, with coefficients along `width`.

    `width` is 1 for a scalar coefficient and all entries for one a weight.
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
