"""Passes through a network that measure its layers channel by channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

from torch import Tensor

from gradmerge.calibration.observers import Enough, Hook, after_call, before_call, removing
from gradmerge.calibration.repair.layers import Layer
from gradmerge.calibration.repair.survey import Run
from gradmerge.engine.buffers import Moments
from gradmerge.errors import ConfigError


def measure(
    layers: Sequence[Layer], runs: Sequence[Run], whole: bool = False, norms: Hook = before_call
) -> tuple[dict[str, Moments], Counter[str]]:
    """Return moments of what layers put out, by place, and their most calls per pass.

    Args:
        layers: the layers.
        runs: the passes, with the weights in place.
        whole: whether a pass goes on when all layers have been called.
        norms: whether moments of a BatchNorm are of its inputs or of its outputs.
    """
    moments = {layer.place: Moments() for layer in layers}
    mask: Tensor | None = None
    calls: Counter[str] = Counter()
    most: Counter[str] = Counter()

    def take(layer: Layer, values: Tensor) -> None:
        calls[layer.place] += 1
        moments[layer.place].add(layer.channels(values.detach(), mask))
        if len(calls) == len(layers) and not whole:
            raise Enough

    handles = [
        (norms if layer.is_norm else after_call)(layer.module, partial(take, layer))
        for layer in layers
    ]
    with removing(handles):
        for run in runs if layers else ():
            mask = run.mask
            calls.clear()
            with suppress(Enough):
                run.call()
            most |= calls
    return moments, most


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
