"""Base classes of steps on directions: `B'_1..K = f(B_1..K)`, one tensor at a time."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.common.typing import Origin
from gradmerge.operators import MaskedDirections
from gradmerge.sources.collected import Needs, Readable, Statistic


@dataclass(frozen=True)
class Site:
    """Tensor and sources to which directions belong."""

    name: str
    """Name of the tensor."""
    sources: tuple[str, ...]
    """Names of the sources, in order."""
    collected: Readable | None = field(default=None, compare=False, repr=False)
    """Statistics of the sources on data, for steps that need them."""
    takes_part: bool = True
    """False if the recipe freezes the tensor at the origin."""
    origin: Callable[[], Tensor | None] | None = field(default=None, compare=False, repr=False)
    """Reads what directions are measured from; gives None for zero."""

    def statistics(self, kind: str, shape: Sequence[int]) -> list[Statistic] | None:
        """Return the statistics of all sources at this tensor; None if any source has none.

        Args:
            kind: of statistic.
            shape: of the tensor.

        Raises:
            ConfigError: the merge was given no statistics at all, or those of another shape.
        """
        if self.collected is None:
            raise ConfigError(
                f"{self.name}: expected statistics ({kind}) for a preprocess step, got none."
            )
        found = [self.collected.read(kind, source, self.name) for source in self.sources]
        known = [statistic for statistic in found if statistic is not None]
        for statistic in known:
            statistic.require_shape(self.name, shape)
        return known if len(known) == len(found) else None

    def generator(self, seed: int, source: str) -> torch.Generator:
        """Return a generator that depends only on seed, tensor and source."""
        key = f"{seed}\n{self.name}\n{source}".encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(number)


Step = Callable[[Tensor, Site], Tensor]
Passes = Callable[[], Iterator[tuple[Site, Tensor]]]


class AbstractPreprocess(ABC):
    """Step on the directions of one tensor at a time, without gradient."""

    @property
    def needs(self) -> Needs | None:
        """Statistics on data that the step needs; None if it works on weights alone."""
        return None

    def require(self, origin: Origin) -> None:  # noqa: B027 (most have none)
        """Reject an unsupported origin, before any checkpoint is opened.

        Raises:
            ConfigError: the step does not support it.
        """

    @abstractmethod
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        """Return new directions `[sources, *shape]`, float32; the given ones may be overwritten."""

    def survey(self, passes: Passes) -> Step:
        """Return the function to run on each tensor, by default the step itself.

        A step that has to see all tensors first overrides this.

        Args:
            passes: iterates over the directions of all tensors, after the previous steps, from the
                start at each call.
        """
        return self


class AbstractSelection(AbstractPreprocess):
    """Step that zeroes entries of each direction and may rescale the others.

    A static merge then stores one byte per entry and source instead of the new directions.
    """

    @property
    def only_selects(self) -> bool:
        """True if the options leave it at one mask and one factor per direction."""
        return True

    @abstractmethod
    def select(self, directions: MaskedDirections, site: Site) -> None:
        """Update the masks and factors of `directions` in place."""

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        if not directions.numel():
            return directions
        masked = MaskedDirections(list(directions), None)
        self.select(masked, site)
        for direction, mask, factor in zip(directions, masked.masks, masked.factors, strict=True):
            if mask is not None:
                direction.masked_fill_(mask.view(direction.shape) == 0, 0)
            if factor != 1:
                direction.mul_(factor)
        return directions


@contextmanager
def rescaled(directions: MaskedDirections, rescale: str) -> Iterator[None]:
    """Give the entries that a block keeps the L1 norms from before it, with `rescale` l1."""
    which = range(len(directions)) if rescale == "l1" else ()
    before = [directions.sum_magnitudes(k) for k in which]
    yield
    for k, norm in enumerate(before):
        directions.restore(k, norm)


class Chain:
    """Sequence of steps; steps that need it see every tensor first.

    Args:
        steps: steps in the order in which they run.
        passes: iterates over the directions of all tensors, before the first step, from the start
            at each call.
    """

    def __init__(self, steps: Sequence[AbstractPreprocess], passes: Passes) -> None:
        self.steps: list[Step] = []
        self._passes = passes
        for step in steps:
            self.steps.append(step.survey(self._so_far))

    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        """Return the directions after all steps; the given ones may be overwritten."""
        for step in self.steps:
            directions = step(directions, site)
        return directions

    def _so_far(self) -> Iterator[tuple[Site, Tensor]]:
        for site, directions in self._passes():
            yield site, self(directions, site)
