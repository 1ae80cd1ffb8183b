"""Passes through a network that measure its layers channel by channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
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
from gradmerge.engine.buffers import Moments
from gradmerge.errors import ConfigError

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
        settle: called with a layer, its moments and its output as soon as it was measured; a tensor
            that it returns replaces the output.
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


@contextmanager
def called_once(network: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Reject passes that call a layer again which the sources call once."""
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

    start = before_call(network, lambda _: called.clear())
    with removing([start, *(after_call(la.module, partial(note, la)) for la in layers)]):
        yield
