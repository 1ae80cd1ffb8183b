"""Persistent buffers of the merged network: BatchNorm statistics above all.

Buffers are no parameters: they cannot be learned, and the sources' statistics describe other
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradmerge.plan import Plan


class NetworkBuffers:
    """The buffers of a plan's skeleton, by their names in the files, set by the recipe's rule."""

    def __init__(self, plan: Plan, skeleton: nn.Module) -> None:
        self._plan = plan
        self._skeleton = skeleton
        places = plan.binding.buffers if plan.binding else {}
        self._places = {name: places[name] for name in plan.buffers if name in places}
        self.set({name: plan.buffer(name) for name in self._places})

    def values(self) -> dict[str, Tensor]:
        """The buffers as they stand (not copies)."""
        return {name: self._skeleton.get_buffer(place) for name, place in self._places.items()}

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Write buffers in place."""
        own = self.values()
        for name, value in values.items():
            own[name].copy_(value)

    @property
    def batch_norms(self) -> list[nn.modules.batchnorm._BatchNorm]:
        """BatchNorm layers that keep running statistics."""
        kind = nn.modules.batchnorm._BatchNorm
        found = [module for module in self._skeleton.modules() if isinstance(module, kind)]
        return [module for module in found if module.track_running_stats]

    def train(self, mode: bool) -> None:
        """Batch statistics while training, if the rule is to recompute afterwards."""
        if mode and self._plan.recipe.buffers == "recompute":
            for norm in self.batch_norms:
                norm.train()
                norm.momentum = 0.0  # running statistics stay those of the last recomputation

    @contextmanager
    def of_source(self, source: str) -> Iterator[None]:
        """A source's own buffers, in evaluation mode, for the length of the context."""
        kept = {name: value.clone() for name, value in self.values().items()}
        modes = {module: module.training for module in self._skeleton.modules()}
        checkpoint = self._plan.sources[source]
        try:
            self._skeleton.eval()
            self.set({name: checkpoint.read(name) for name in kept})
            yield
        finally:
            self.set(kept)
            for module, mode in modes.items():
                module.training = mode

    @torch.no_grad()
    def recompute(self, runs: Sequence[Callable[[], object]]) -> None:
        """Plain means of the BatchNorm statistics over the batches of the given forward passes."""
        norms = self.batch_norms
        if not norms or not runs:
            return
        settings = [(module, module.momentum, module.training) for module in norms]
        try:
            for module in norms:
                module.reset_running_stats()
                module.momentum = None  # None: the plain mean over all batches
                module.train()
            for run in runs:
                run()
        finally:
            for module, momentum, training in settings:
                module.momentum = momentum
                module.train(training)
