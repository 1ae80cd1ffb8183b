"""Directions after a chain of steps: computed when asked for, or once and for all."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gradmerge.preprocess.base import AbstractPreprocess, Chain, Site
from gradmerge.preprocess.sparsity import AbstractSelection, Selection
from gradmerge.sources.base import Shared

Lazy = Callable[[], Iterator[tuple[Site, Callable[[], Tensor]]]]


class ProcessedDirections(Shared):
    """Directions `[sources, *shape]` of every tensor, in float32, after all steps.

    A static merge asks for each tensor once, and none is held. Training asks at every step:
    `keep` writes all of them to a folder for temporary files first (`TMPDIR`; 4 bytes per entry
    and source), from which they are mapped; the folder is removed with this object.

    Args:
        steps: in the order they run.
        every: gives all tensors, and a call that reads the directions of each.
    """

    def __init__(self, steps: Sequence[AbstractPreprocess], every: Lazy) -> None:
        self._steps, self._every = steps, every
        self._kept: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._made: Chain | None = None

    @property
    def _chain(self) -> Chain:
        # An export hashes in one thread and merges in another: both may come first.
        with self._lock:
            if self._made is None:
                self._made = Chain(self._steps, lambda: ((s, read()) for s, read in self._every()))
            return self._made

    @cached_property
    def _reads(self) -> dict[str, tuple[Site, Callable[[], Tensor]]]:
        return {site.name: (site, read) for site, read in self._every()}

    def read(self, name: str) -> Tensor:
        """The directions of a tensor."""
        if name in self._kept:
            return self._kept[name]
        site, read = self._reads[name]
        return self._chain(read(), site)

    def select(
        self, name: str, sources: Sequence[Tensor], origin: Tensor | None
    ) -> Selection | None:
        """The same without storing them, where every step only zeroes and scales.

        Args:
            name: the tensor.
            sources: `theta_k`.
            origin: `A`; None for zero.

        Returns:
            None where a step does more, or the directions are kept.
        """
        steps = [step for step in self._chain.steps if isinstance(step, AbstractSelection)]
        if name in self._kept or len(steps) < len(self._chain.steps):
            return None
        directions, (site, _) = Selection(sources, origin), self._reads[name]
        # masks are written to in place, also while a trainer evaluates in inference mode
        with torch.inference_mode(False), torch.no_grad():
            for step in steps if directions.size else ():
                step.select(directions, site)
        return directions

    def is_kept(self, name: str) -> bool:
        """Whether the directions of a tensor lie in a file."""
        return name in self._kept

    def keep(self) -> None:
        """Compute all directions once, if there is any step."""
        if self._kept or not self._steps:
            return
        folder = Path(tempfile.mkdtemp(prefix="gradmerge-directions-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        kept = {}
        for i, name in enumerate(self._reads):
            path = folder / f"{i}.safetensors"
            save_file({name: self.read(name).contiguous()}, path)
            with safe_open(path, framework="pt") as file:
                kept[name] = file.get_tensor(name)
        self._kept = kept
