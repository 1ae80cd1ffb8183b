"""Passes through a network that measure what its layers put out, channel by channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from gradmerge.calibration.observers import Enough, first_argument, without_padding
from gradmerge.calibration.repair.layers import Layer, Run, channel_axis
from gradmerge.engine.buffers import Moments
from gradmerge.errors import ConfigError

Channels = dict[str, tuple[Tensor, Tensor]]
"""Mean and deviation by weight, `[channels]`, float64."""


def output_channels(
    layers: Sequence[Layer], runs: Sequence[Run], whole: bool = False, once: bool = True
) -> tuple[Channels, Counter[str]]:
    """Mean and deviation of layers' output channels by weight, with the weights in place; and the
    most calls a pass, by place (see `watch`).
    """
    moments = {layer.place: Moments() for layer in layers}

    def take(layer: Layer, output: Tensor, mask: Tensor | None) -> None:
        moments[layer.place].take(channels_of(layer, output, mask))

    calls = watch(layers, runs, take, after_call, whole, once)
    every = ((layer, moments[layer.place]) for layer in layers)
    return {str(layer.weight): (m.mean, m.deviation) for layer, m in every if m.rows}, calls


def watch(
    layers: Sequence[Layer],
    runs: Sequence[Run],
    take: Callable[[Layer, Tensor, Tensor | None], None],
    register: Callable[[nn.Module, Callable[[Tensor], None]], Any],
    whole: bool = False,
    once: bool = True,
) -> Counter[str]:
    """Every run to the point where all layers have been called (`whole`: to its end); the most
    calls a pass.

    Raises:
        ConfigError: a layer is called again, which is to be called `once`.
    """
    most: Counter[str] = Counter()
    if not layers:
        return most
    mask: Tensor | None = None
    calls: Counter[str] = Counter()

    def seen(layer: Layer, values: Tensor) -> None:
        calls[layer.place] += 1
        if calls[layer.place] > 1 and once:
            raise called_again(layer)
        take(layer, values.detach(), mask)
        if len(calls) == len(layers) and not whole:
            raise Enough

    hooks = [register(layer.module, partial(seen, layer)) for layer in layers]
    try:
        for run in runs:
            mask = run.mask
            calls.clear()
            with suppress(Enough):
                run.call()
            most |= calls
    finally:
        for hook in hooks:
            hook.remove()
    return most


@contextmanager
def called_once(layers: Sequence[Layer], runs: Sequence[Run]) -> Iterator[list[Run]]:
    """The runs, which stop when one of these layers is called a second time in a pass.

    Raises:
        ConfigError: one is.
    """
    called: set[str] = set()

    def note(layer: Layer, _: Tensor) -> None:
        if layer.place in called:
            raise called_again(layer)
        called.add(layer.place)

    def afresh(run: Run) -> object:
        called.clear()
        return run.call()

    hooks = [after_call(layer.module, partial(note, layer)) for layer in layers if layer.calls == 1]
    try:
        yield [replace(run, call=partial(afresh, run)) for run in runs]
    finally:
        for hook in hooks:
            hook.remove()


def called_again(layer: Layer) -> ConfigError:
    """What is said of a layer that only the merged network calls again."""
    return ConfigError(
        f"REPAIR: the merged network calls {layer.place} more than once in a pass, though the "
        "sources call it once on the same data: its course depends on the weights. No correction "
        f"holds for all calls at once. Name {layer.weight or layer.place} in `skip` of REPAIR, or "
        "leave it out of `finalisers`."
    )


def take_batch(moments: Moments, layer: Layer, batch: Tensor, mask: Tensor | None) -> None:
    """Take in what a BatchNorm is given."""
    moments.take(batch)


def before_call(module: nn.Module, seen: Callable[[Tensor], None]) -> Any:
    """Have a function see what a module is called with."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen(first_argument(args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def after_call(module: nn.Module, seen: Callable[[Tensor], Tensor | None]) -> Any:
    """Have a function see what a module gives, and put something else in its place."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        return seen(output)

    return module.register_forward_hook(hook)


def channels_of(layer: Layer, output: Tensor, mask: Tensor | None) -> Tensor:
    """A layer's outputs as `[rows, channels, ...]`, without rows of padding (which a BatchNorm
    normalises like others).
    """
    if layer.is_norm:
        return output
    kept, axis = without_padding(output, mask, channel_axis(layer.module, output))
    return kept.movedim(axis, -1).flatten(0, -2) if kept.dim() > 1 else kept[None]
