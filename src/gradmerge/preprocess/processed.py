"""Directions after a chain of steps, computed on demand or once for training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gradmerge.common.memory import in_file, in_shared_file
from gradmerge.operators import MaskedDirections
from gradmerge.preprocess.base import AbstractPreprocess, AbstractSelection, Chain, Site
from gradmerge.sources.base import Shared

Lazy = Callable[[], Iterator[tuple[Site, Callable[[], Tensor]]]]


class ProcessedDirections(Shared):
    """Directions `[sources, *shape]` of every tensor, in float32, after all steps.

    A static merge reads each tensor once and keeps none. Training reads them at every step, so
    after `keep` the first read writes all of them to temporary files (in `TMPDIR`; 4 bytes per
    entry and source), from which they are memory-mapped; their space is released with this object.
    A checkpoint that is opened for its coefficients computes none.

    Args:
        steps: steps in the order in which they run.
        every: iterates over all tensors, each with a function that reads its directions.
    """

    def __init__(self, steps: Sequence[AbstractPreprocess], every: Lazy) -> None:
        self._steps, self._every = steps, every
        self._keeps = False
        self._kept: dict[str, Tensor] = {}
        self._lock = threading.RLock()
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
        if self._keeps:
            if not self._kept:
                self._write()
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
            None if a step does more than that, or if the directions are kept in files.
        """
        every = self._chain.steps
        steps = [s for s in every if isinstance(s, AbstractSelection) and s.only_selects]
        if self._keeps or len(steps) < len(every):
            return None
        directions, (site, _) = MaskedDirections(sources, origin), self._reads[name]
        # masks are updated in place, also while a trainer evaluates in inference mode
        with torch.inference_mode(False), torch.no_grad():
            for step in steps if directions.size else ():
                step.select(directions, site)
        return directions

    @property
    def is_kept(self) -> bool:
        """True if directions are read from files."""
        return self._keeps

    def keep(self) -> None:
        """Store all directions in files from the first read on, if there is any step."""
        self._keeps = bool(self._steps)

    def keep_divided(
        self,
        share: tuple[int, int],
        shapes: Mapping[str, Sequence[int]],
        folder: Path,
        wait: Callable[[], None],
    ) -> None:
        """Store all directions now, of which each of several processes computes some.

        Args:
            share: number of this process, from 0, and number of processes.
            shapes: shapes of all tensors.
            folder: folder that the processes share; the files in it are not needed afterwards.
            wait: returns once all processes have called it.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            index, count = share
            largest = sorted(self._reads, key=lambda name: -torch.Size(shapes[name]).numel())
            files = {
                name: in_shared_file(
                    folder / f"{i}.bin", (len(site.sources), *shapes[name]), torch.float32
                )
                for i, (name, (site, _)) in enumerate(self._reads.items())
            }
            for name in largest[index::count]:
                site, read = self._reads[name]
                files[name].copy_(self._chain(read(), site))
            wait()
            self._keeps, self._kept = True, files

    def _write(self) -> None:
        # A backward pass saves these tensors, though an evaluation may read them first.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._kept:
                return  # by another thread
            kept = {}
            for name, (site, read) in self._reads.items():
                made = self._chain(read(), site)
                kept[name] = in_file(made.shape, made.dtype).copy_(made)
            self._kept = kept
