"""What a finaliser is, and what it may look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True)
class FinalSite:
    """A merged tensor, and what it was merged from; weights are read when asked for."""

    name: str
    """The tensor's name."""
    names: tuple[str, ...]
    """All merged tensors of the network."""
    origin: Callable[[], Tensor | None]
    """`A`; None for zero."""
    sources: Callable[[], list[Tensor]]
    """`theta_k` of every source, before any preprocess."""
    facts: dict[str, float] = field(default_factory=dict, repr=False)
    """What a finaliser has found out about the sources and wants to keep from call to call."""


class AbstractFinaliser(ABC):
    """A step over merged weights, `theta' = f(theta)`."""

    # without annotations: the parser would look for their names in a subclass's module
    needs_data = False
    """Whether it is made of what the network does on data, and has to be computed first."""

    @abstractmethod
    def finish(self, theta: Tensor, site: FinalSite) -> Tensor:
        """The finished tensor, from a merged one in float32 or wider; may write over it."""


class AbstractRescale(AbstractFinaliser):
    """`theta' = A + f (theta - A)` with one number f a tensor."""

    @abstractmethod
    def factor(self, delta: Tensor, site: FinalSite) -> float:
        """The number f, from `delta = theta - A`."""

    @override
    def finish(self, theta: Tensor, site: FinalSite) -> Tensor:
        return self.rescale(theta, site)[0]

    def rescale(self, theta: Tensor, site: FinalSite) -> tuple[Tensor, float]:
        """The finished tensor, and its factor; of a factor of 1 the same bits."""
        origin = site.origin()
        anchor = None if origin is None else origin.to(theta)
        delta = theta if anchor is None else theta - anchor
        factor = self.factor(delta, site)
        if factor == 1.0:
            return theta, factor
        return (theta.mul_(factor) if anchor is None else anchor + delta.mul_(factor)), factor
