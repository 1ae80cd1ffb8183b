"""The layers that REPAIR corrects, their order, and their channels in the sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter

from torch import Tensor

from gradmerge.calibration.repair.dataflow import Dataflow
from gradmerge.calibration.repair.layers import UNKNOWN, Layer, joined, layers_of
from gradmerge.calibration.repair.measure import Channels, Run
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.common.patterns import matches
from gradmerge.engine.merged import MergedModel
from gradmerge.finalisers import REPAIR

_LAST = "it is a last layer: no other reads its output"
_RETURNED = "the network gives out its output as it is"
_NORMALISED = "it feeds a BatchNorm"
_USUAL = (_LAST, _RETURNED, _NORMALISED, UNKNOWN)


@dataclass(frozen=True)
class Survey:
    """The layers to correct, in order, and their channels in the sources."""

    stages: list[list[Layer]]
    """In the order of their calls; layers that are given the same tensor stand together, a
    BatchNorm alone."""
    left: dict[str, str]
    """Weights that are left alone, with the reason."""
    own: dict[str, dict[str, tuple[Tensor, Tensor]]]
    """Mean and deviation of channels, `[channels]` in float64, by source and weight."""

    @property
    def layers(self) -> list[Layer]:
        """Layers that are corrected."""
        return [layer for stage in self.stages for layer in stage if layer.weight]

    @property
    def unusual(self) -> dict[str, str]:
        """Weights that are left alone for a reason that a user should know."""
        return {name: why for name, why in self.left.items() if why not in _USUAL}


def survey_of(
    merged: MergedModel, repair: REPAIR, runs: Sequence[Run], sources: Sequence[str]
) -> Survey:
    """Find the layers to correct, and measure them, in passes of the sources that set targets; the
    first shows where outputs go.
    """
    layers, others = layers_of(merged)
    flow = Dataflow(merged.skeleton, layers)
    with merged.as_source(sources[0]):
        for run in runs:
            flow.record(run.call)
    most: Counter[str] = Counter()
    for sequence in flow.passes:
        most |= Counter(place for place, _ in sequence)
    weighted = {place: layer for place, layer in layers.items() if layer.weight}
    reasons = {
        layer.weight: _reason(merged, repair, layer, most[place], flow)
        for place, layer in weighted.items()
    }
    left = {name: why for name, why in reasons.items() if why}
    kept = {
        place: replace(layer, bias=_bias(merged, place))
        for place, layer in weighted.items()
        if layer.weight not in left
    }
    own = {}
    for source in sources:
        with merged.as_source(source):
            found = Channels(list(kept.values()), whole=True, inputs=False).measure(runs)
        measured = ((kept[place].weight, m) for place, m in found.moments.items() if m.rows)
        own[source] = {weight: (m.mean, m.deviation) for weight, m in measured}
        for place, calls in found.calls.items():
            if calls > 1:
                left[kept.pop(place).weight] = f"source {source} calls it {calls} times a pass"
        most |= found.calls
    if merged.plan.recipe.buffers == "recompute":
        for place, calls in most.items():
            if place not in kept and layers[place].is_norm:
                kept[place] = Layer(place, layers[place].module, calls=calls)
    return Survey(_stages(kept, flow), left | others, own)


def _reason(
    merged: MergedModel, repair: REPAIR, layer: Layer, calls: int, flow: Dataflow
) -> str | None:
    """Return why a layer is left alone, if it is."""
    name, place = layer.weight, layer.place
    assert merged.plan.binding is not None
    places = merged.plan.binding.parameters.get(name, ())
    reasons = {
        f"its weight is shared by {shorten(list(places))}": len(places) > 1,
        "no pass calls it": not calls,
        "it is frozen": name in merged.state.fixed,
        "skip names it": matches(repair.skip, name),
        f"it is called {calls} times a pass": calls > 1,
        _NORMALISED: not layer.is_norm and place in flow.normalised,
        _LAST: place not in flow.read,
        _RETURNED: place in flow.returned,
        "its weight is transformed before use": place in flow.transformed,
    }
    return next((why for why, holds in reasons.items() if holds), None)


def _bias(merged: MergedModel, place: str) -> str:
    """Return the tensor of a layer's bias if it is the layer's alone and may change."""
    plan, bias = merged.plan, (joined(place, "bias"),)
    assert plan.binding is not None
    name = next((n for n, places in plan.binding.parameters.items() if places == bias), "")
    return name if name in plan.tensors and name not in merged.state.fixed else ""


def _stages(layers: Mapping[str, Layer], flow: Dataflow) -> list[list[Layer]]:
    """Order layers as all passes call them, and group those that are always given one tensor."""
    passes = [[call for call in calls if call[0] in layers] for calls in flow.passes]
    firsts = [dict(reversed(calls)) for calls in passes]
    stages: list[list[Layer]] = []
    for place in in_order([list(dict.fromkeys(place for place, _ in calls)) for calls in passes]):
        layer, before = layers[place], stages[-1][-1] if stages else None
        if (
            before is None
            or before.is_norm
            or layer.is_norm
            or any(first.get(place) != first.get(before.place) for first in firsts)
        ):
            stages.append([])
        stages[-1].append(layer)
    return stages


def in_order(sequences: Sequence[Sequence[str]]) -> list[str]:
    """Return one sequence that keeps the order of each."""
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
