"""The layers that REPAIR corrects, and their order, from passes over the data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter

from torch import Tensor

from gradmerge.calibration.repair.dataflow import Dataflow
from gradmerge.calibration.repair.layers import UNKNOWN, Layer, joined, layers_of
from gradmerge.engine.merged import MergedModel
from gradmerge.errors import ConfigError, shorten
from gradmerge.finalisers import REPAIR

_LAST = "it is a last layer: no other reads its output"
_RETURNED = "the network gives out its output as it is"
_NORMALISED = "it feeds a BatchNorm"
_USUAL = (_LAST, _RETURNED, _NORMALISED, UNKNOWN)


@dataclass(frozen=True)
class Run:
    """A forward pass over one batch."""

    call: Callable[[], object]
    mask: Tensor | None = None
    """`[batch, tokens]`, 0 on padding."""


@dataclass
class Survey:
    """The layers to correct, in order."""

    stages: list[list[Layer]]
    """In the order of their calls; layers that are given the same tensor stand together, a
    BatchNorm alone."""
    left: dict[str, str]
    """Weights that are left alone, with the reason."""

    @property
    def layers(self) -> list[Layer]:
        """Layers that are corrected."""
        return [layer for stage in self.stages for layer in stage if layer.weight is not None]

    @property
    def unusual(self) -> dict[str, str]:
        """Weights that are left alone for a reason that a user should know."""
        return {name: why for name, why in self.left.items() if why not in _USUAL}

    def leave(self, layer: Layer, why: str, calls: int) -> None:
        """Leave a layer alone after all; statistics of a BatchNorm are still recomputed."""
        self.left[str(layer.weight)] = why
        kept = [replace(layer, weight=None, bias=None, calls=calls)] if layer.is_norm else []
        stages = [
            [new for own in stage for new in (kept if own is layer else [own])]
            for stage in self.stages
        ]
        self.stages = [stage for stage in stages if stage]


def survey_of(merged: MergedModel, repair: REPAIR, runs: Sequence[Run]) -> Survey:
    """Find the layers to correct from passes over all batches.

    Args:
        merged: the merged model, with any weights in place.
        repair: the finaliser's options.
        runs: the passes.

    Raises:
        ConfigError: batches call the layers in contradicting orders.
    """
    layers, others = layers_of(merged)
    flow = Dataflow(merged.skeleton, layers)
    for run in runs:
        flow.record(run.call)
    times: Counter[str] = Counter()
    for sequence in flow.passes:
        times |= Counter(place for place, _ in sequence)
    kept: dict[str, Layer] = {}
    left: dict[str, str] = {}
    for place, calls in times.items():
        layer = layers[place]
        why = _reason(merged, repair, layer, calls, flow)
        if layer.weight is not None and why is not None:
            left[layer.weight] = why
        if layer.weight is not None and why is None:
            kept[place] = replace(layer, bias=_bias(merged, place))
        elif layer.is_norm:
            kept[place] = Layer(place, layer.module, calls=calls)
    reached = {layers[place].weight for place in times}
    for layer in layers.values():
        if layer.weight is not None and layer.weight not in reached:
            left[layer.weight] = "no pass calls it"
    return Survey(_stages(kept, flow), left | others)


def _reason(
    merged: MergedModel, repair: REPAIR, layer: Layer, calls: int, flow: Dataflow
) -> str | None:
    """Return why a layer is left alone, if it is."""
    name, place = str(layer.weight), layer.place
    assert merged.plan.binding is not None
    places = merged.plan.binding.parameters.get(name, ())
    reasons = {
        f"its weight is shared by {shorten(list(places))}": len(places) > 1,
        "it is frozen": name in merged.state.fixed,
        "skip names it": any(re.search(pattern, name) for pattern in repair.skip),
        f"it is called {calls} times a pass": calls > 1,
        _NORMALISED: not layer.is_norm and place in flow.normalised,
        _LAST: place not in flow.read,
        _RETURNED: place in flow.returned,
        "its weight is transformed before use": place in flow.transformed,
    }
    return next((why for why, holds in reasons.items() if holds), None)


def _bias(merged: MergedModel, place: str) -> str | None:
    """Return the tensor of a layer's bias if it is the layer's alone and may change."""
    plan = merged.plan
    assert plan.binding is not None
    bias = joined(place, "bias")
    name = next((n for n, places in plan.binding.parameters.items() if places == (bias,)), None)
    return name if name in plan.tensors and name not in merged.state.fixed else None


def _stages(layers: Mapping[str, Layer], flow: Dataflow) -> list[list[Layer]]:
    """Order layers as all passes call them, and group those that are always given one tensor."""
    inputs: dict[str, dict[int, int]] = {place: {} for place in layers}
    sequences: list[list[str]] = []
    for number, calls in enumerate(flow.passes):
        for place, entry in calls:
            if place in layers:
                inputs[place].setdefault(number, entry)
        sequences.append(list(dict.fromkeys(place for place, _ in calls if place in layers)))
    stages: list[list[Layer]] = []
    for place in in_order(sequences):
        before = stages[-1][-1] if stages else None
        alone = before is None or before.is_norm or layers[place].is_norm
        if alone or inputs[place] != inputs[before.place]:  # type: ignore[union-attr]
            stages.append([])
        stages[-1].append(layers[place])
    return stages


def in_order(sequences: Sequence[Sequence[str]]) -> list[str]:
    """Return one sequence that keeps the order of each.

    Raises:
        ConfigError: they contradict each other.
    """
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for sequence in sequences:
        for i, place in enumerate(sequence):
            sorter.add(place, *sequence[max(0, i - 1) : i])
    try:
        return list(sorter.static_order())
    except CycleError as error:
        raise ConfigError(
            "REPAIR corrects layers in the order of their calls, and batches call "
            f"{shorten(sorted(set(error.args[1])))} in orders that contradict each other. Name "
            "some of them in `skip` of REPAIR (regular expressions of weights), or leave it out of "
            "`finalisers`."
        ) from error
