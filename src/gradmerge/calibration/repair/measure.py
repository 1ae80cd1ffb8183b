"""Passes through a network that measure its layers channel by channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from gradmerge.calibration.observers import (
    Enough,
    Hook,
    Observer,
    after_call,
    before_call,
    removing,
)
from gradmerge.calibration.repair.layers import Layer
from gradmerge.calibration.repair.survey import Run
from gradmerge.engine.buffers import Moments
from gradmerge.errors import ConfigError


def measure(
    layers: Sequence[Layer], runs: Sequence[Run], whole: bool = False, norms: Hook = before_call
) -> Channels:
    """Observe layers in passes with the weights in place.

    Args:
        layers: the layers.
        runs: the passes.
        whole: whether a pass goes on when all layers have been called.
        norms: whether moments of a BatchNorm are of its inputs or of its outputs.
    """
    channels = Channels(layers, whole, norms)
    with channels.watching():
        for run in runs if layers else ():
            channels.mask = run.mask
            with suppress(Enough):
                run.call()
            channels.end_pass()
    return channels


class Channels(Observer):
    """Moments of what layers put out, and their calls."""

    def __init__(self, layers: Sequence[Layer], whole: bool, norms: Hook) -> None:
        self._layers, self._whole, self._norms = layers, whole, norms
        self._calls: Counter[str] = Counter()
        self.moments = {layer.place: Moments() for layer in layers}
        """By place."""
        self.calls: Counter[str] = Counter()
        """Most calls per pass, by place."""

    @override
    def hooks(self) -> Iterator[RemovableHandle]:
        for layer in self._layers:
            hook = self._norms if layer.is_norm else after_call
            yield hook(layer.module, partial(self._add, layer))

    def _add(self, layer: Layer, values: Tensor) -> None:
        self._calls[layer.place] += 1
        self.moments[layer.place].add(layer.channels(values.detach(), self.mask))
        if len(self._calls) == len(self._layers) and not self._whole:
            raise Enough

    def end_pass(self) -> None:
        """Count the calls of the next pass anew."""
        self.calls |= self._calls
        self._calls.clear()


@contextmanager
def called_once(layers: Sequence[Layer], runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Give the runs, which fail if a layer that the sources call once is called again in a pass.

    Raises:
        ConfigError: a layer is called again.
    """
    called: set[str] = set()

    def note(layer: Layer, _: Tensor) -> None:
        if layer.place in called:
            raise ConfigError(
                f"REPAIR: the merged network calls {layer.place} more than once in a pass, though "
                "the sources call it once on the same data. No correction holds for all calls at "
                f"once. Name {layer.weight or layer.place} in `skip` of REPAIR, or leave it out of "
                "`finalisers`."
            )
        called.add(layer.place)

    def call(run: Run) -> object:
        called.clear()
        return run.call()

    with removing([after_call(la.module, partial(note, la)) for la in layers if la.calls == 1]):
        yield [replace(run, call=partial(call, run)) for run in runs]
