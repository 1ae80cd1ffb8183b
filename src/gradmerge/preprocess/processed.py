"""Directions after a chain of steps, computed on demand or once for training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from gradmerge.common.memory import in_file
from gradmerge.operators import MaskedDirections
from gradmerge.preprocess.base import AbstractPreprocess, AbstractSelection, Chain, Site
from gradmerge.sources.base import Shared

Lazy = Callable[[], Iterator[tuple[Site, Callable[[], Tensor]]]]


class ProcessedDirections(Shared):
    """Directions `[sources, *shape]` of every tensor, in float32, after all steps.

    A static merge reads each tensor once and keeps none. Training reads them at every step, so
    `keep` first writes them to temporary files (in `TMPDIR`; 4 bytes per entry and source), from
    which they are memory-mapped; their space is released with this object.

    Args:
        steps: steps in the order in which they run.
        every: iterates over all tensors, each with a function that reads its directions.
    """

    def __init__(self, steps: Sequence[AbstractPreprocess], every: Lazy) -> None:
        self._steps, self._every = steps, every
        self._kept: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._made: Chain | None = None

    @property
    def _chain(self) -> Chain:
        # an export hashes in one thread and merges in another; either may be first
        with self._lock:
            if self._made is None:
                self._made = Chain(self._steps, lambda: ((s, read()) for s, read in self._every()))
            return self._made

    @cached_property
    def _reads(self) -> dict[str, tuple[Site, Callable[[], Tensor]]]:
        return {site.name: (site, read) for site, read in self._every()}

    def read(self, name: str) -> Tensor:
        """Return the directions of a tensor."""
        if name in self._kept:
            return self._kept[name]
        site, read = self._reads[name]
        return self._chain(read(), site)

    def select(
        self, name: str, sources: Sequence[Tensor], origin: Tensor | None
    ) -> MaskedDirections | None:
        """Return the directions of a tensor as masks, if every step only zeroes and scales.

        Args:
            name: name of the tensor.
            sources: `theta_k`.
            origin: `A`; None for zero.

        Returns:
            None if a step does more than that, or if the directions are kept in a file.
        """
        every = self._chain.steps
        steps = [s for s in every if isinstance(s, AbstractSelection) and s.only_selects]
        if name in self._kept or len(steps) < len(every):
            return None
        directions, (site, _) = MaskedDirections(sources, origin), self._reads[name]
        # masks are updated in place, also while a trainer evaluates in inference mode
        with torch.inference_mode(False), torch.no_grad():
            for step in steps if directions.size else ():
                step.select(directions, site)
        return directions

    def is_kept(self, name: str) -> bool:
        """Return whether the directions of a tensor are stored in a file."""
        return name in self._kept

    def keep(self) -> None:
        """Compute all directions and store them in files, if there is any step."""
        if self._kept or not self._steps:
            return
        kept = {}
        for name in self._reads:
            read = self.read(name)
            kept[name] = in_file(read.shape, read.dtype).copy_(read)
        self._kept = kept
