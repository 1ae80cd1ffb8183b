"""The abstract finaliser, and what it may look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True)
class FinalSite:
    """A merged tensor and what it was merged from; weights are read on demand."""

    name: str
    """The tensor's name."""
    names: tuple[str, ...]
    """All merged tensors of the network."""
    origin: Callable[[], Tensor | None]
    """`A`; None for zero."""
    sources: Callable[[], list[Tensor]]
    """`theta_k` of every source, before any preprocess."""
    facts: dict[str, float] = field(default_factory=dict, repr=False)
    """Facts about the sources that a finaliser keeps from call to call."""


class AbstractFinaliser(ABC):
    """A step over merged weights, `theta' = f(theta)`."""

    # without annotations: the parser would look for their names in a subclass's module
    needs_data = False
    """True if it has to be computed on data first."""

    @abstractmethod
    def finish(self, theta: Tensor, site: FinalSite) -> Tensor:
        """Return the finished tensor of a merged one (float32 or wider), which it may overwrite."""


class AbstractRescale(AbstractFinaliser):
    """`theta' = A + f (theta - A)` with one number f per tensor."""

    @abstractmethod
    def factor(self, delta: Tensor, site: FinalSite) -> float:
        """Return the number f, given `delta = theta - A`."""

    @override
    def finish(self, theta: Tensor, site: FinalSite) -> Tensor:
        return self.rescale(theta, site)[0]

    def rescale(self, theta: Tensor, site: FinalSite) -> tuple[Tensor, float]:
        """Return the finished tensor and its factor; a factor of 1 changes no bit."""
        origin = site.origin()
        anchor = None if origin is None else origin.to(theta)
        delta = theta if anchor is None else theta - anchor
        factor = self.factor(delta, site)
        if factor == 1.0:
            return theta, factor
        return (theta.mul_(factor) if anchor is None else anchor + delta.mul_(factor)), factor
