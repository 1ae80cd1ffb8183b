"""Steps over directions: `B'_1..K = f(B_1..K)`, one tensor of the network at a time."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradmerge.errors import ConfigError
from gradmerge.sources.collected import Needs, Readable, Statistic


@dataclass(frozen=True)
class Site:
    """Which directions these are."""

    name: str
    """The tensor's name."""
    sources: tuple[str, ...]
    """Names of the sources, in order."""
    collected: Readable | None = field(default=None, compare=False, repr=False)
    """Statistics of the sources on data, for steps that need them."""
    takes_part: bool = True
    """Whether the tensor is merged; one that the recipe freezes at the origin is not."""

    def statistics(self, kind: str) -> list[Statistic] | None:
        """What is known of each source at this tensor; None where nothing was collected for it.

        Raises:
            ConfigError: no statistics were given at all.
        """
        if self.collected is None:
            raise ConfigError(f"{self.name}: a step needs statistics ({kind}), and none are given.")
        found = [self.collected.read(kind, source, self.name) for source in self.sources]
        known = [statistic for statistic in found if statistic is not None]
        return known if len(known) == len(found) else None

    def generator(self, seed: int, source: str) -> torch.Generator:
        """Random numbers that depend on seed, tensor and source alone, not on what was drawn
        before.
        """
        key = f"{seed}\n{self.name}\n{source}".encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(number)


Step = Callable[[Tensor, Site], Tensor]
Passes = Callable[[], Iterator[tuple[Site, Tensor]]]


class AbstractPreprocess(ABC):
    """A step over directions."""

    @property
    def needs(self) -> Needs | None:
        """What it reads of the sources' statistics on data; None for a step over weights alone."""
        return None

    @abstractmethod
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        """New directions `[sources, *shape]`, float32, from such; may write over them."""

    def survey(self, passes: Passes) -> Step:
        """What runs on each tensor; a step that has to see all tensors first overrides this.

        Args:
            passes: gives all tensors' directions, as the steps before leave them, anew each call.
        """
        return self


class Chain:
    """All steps as one; those that need it see every tensor first.

    Args:
        steps: in the order they run.
        passes: gives all tensors' directions before the first step, anew each call.
    """

    def __init__(self, steps: Sequence[AbstractPreprocess], passes: Passes) -> None:
        self.steps: list[Step] = []
        self._passes = passes
        for step in steps:
            self.steps.append(step.survey(self._so_far))

    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        """Directions after all steps; may write over those given."""
        for step in self.steps:
            directions = step(directions, site)
        return directions

    def _so_far(self) -> Iterator[tuple[Site, Tensor]]:
        for site, directions in self._passes():
            yield site, self(directions, site)
