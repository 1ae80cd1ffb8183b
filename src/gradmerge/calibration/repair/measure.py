"""Passes through a network that measure its layers channel by channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from gradmerge.calibration.observers import Enough, Hook, Observer, after_call, before_call
from gradmerge.calibration.repair.layers import Layer
from gradmerge.engine.buffers import Moments

Settle = Callable[[Layer, Moments, Tensor], Tensor | None]


@dataclass(frozen=True)
class Run:
    """A forward pass over one batch."""

    call: Callable[[], object]
    mask: Tensor | None = None
    """`[batch, tokens]`, 0 on padding."""


class Channels(Observer):
    """Moments of what layers put out, and their calls.

    Args:
        layers: the layers.
        whole: whether a pass goes on when all layers have been called.
        norms: whether moments of a BatchNorm are of its inputs or of its outputs.
        settle: called with each layer, its moments and its output; a tensor replaces the output.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        whole: bool,
        norms: Hook = before_call,
        settle: Settle | None = None,
    ) -> None:
        self._layers, self._whole, self._norms, self._settle = layers, whole, norms, settle
        self._calls: Counter[str] = Counter()
        self.moments = {layer.place: Moments() for layer in layers}
        """By place."""
        self.calls: Counter[str] = Counter()
        """Most calls per pass, by place."""

    def measure(self, runs: Sequence[Run]) -> Channels:
        """Observe the layers in passes with the weights in place."""
        with self.watching():
            for run in runs:
                self.mask = run.mask
                with suppress(Enough):
                    run.call()
                self.calls |= self._calls
                self._calls.clear()
        return self

    @override
    def hooks(self) -> Iterator[RemovableHandle]:
        for layer in self._layers:
            hook = self._norms if layer.is_norm else after_call
            yield hook(layer.module, partial(self._add, layer))

    def _add(self, layer: Layer, values: Tensor) -> Tensor | None:
        self._calls[layer.place] += 1
        moments = self.moments[layer.place]
        moments.add(layer.channels(values.detach(), self.mask))
        if self._settle is not None:
            return self._settle(layer, moments, values)
        if len(self._calls) == len(self._layers) and not self._whole:
            raise Enough
        return None
