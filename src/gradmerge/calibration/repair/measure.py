"""Passes through a network that measure its layers channel by channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from gradmerge.calibration.observers import Enough, Observer
from gradmerge.calibration.repair.layers import Layer
from gradmerge.engine.buffers import ChannelMoments

Settle = Callable[[Layer, ChannelMoments, Tensor], Tensor | None]


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
        inputs: whether moments of a BatchNorm are of its inputs, not of its outputs.
        settle: called with each layer, its moments and its output; a tensor replaces the output.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        whole: bool,
        inputs: bool = True,
        settle: Settle | None = None,
    ) -> None:
        self.watched = [(layer, layer.module) for layer in layers]
        self._whole, self._inputs, self._settle = whole, inputs, settle
        self._calls: Counter[str] = Counter()
        self.moments = {layer.place: ChannelMoments() for layer in layers}
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
    def before(self, key: Layer, module: nn.Module, inputs: Tensor) -> None:
        if key.is_norm and self._inputs:
            self._add(key, inputs)

    @override
    def after(
        self, key: Layer, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        return None if key.is_norm and self._inputs else self._add(key, output)

    def _add(self, layer: Layer, values: Tensor) -> Tensor | None:
        self._calls[layer.place] += 1
        moments = self.moments[layer.place]
        moments.add(layer.channels(values.detach(), self.mask))
        if self._settle is not None:
            return self._settle(layer, moments, values)
        if len(self._calls) == len(self.watched) and not self._whole:
            raise Enough
        return None
