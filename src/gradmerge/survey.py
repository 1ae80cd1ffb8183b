"""Which layers REPAIR corrects, and in which order: what one pass through the network tells."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gradmerge.errors import shorten
from gradmerge.finalisers import REPAIR
from gradmerge.merged import MergedModel
from gradmerge.observation import (
    LinearLayer,
    first_argument,
    is_linear,
    is_linear_in_its_weight,
    linear_layers,
)
from gradmerge.plan import Plan

_LAST = "it is the network's last layer"
_FEEDS = "it feeds a BatchNorm"


@dataclass(frozen=True)
class Run:
    """A forward pass over one batch."""

    call: Callable[[], object]
    mask: Tensor | None = None
    """`[batch, tokens]`, 0 on padding."""


@dataclass(frozen=True)
class Layer:
    """A layer whose output channels are corrected, or a BatchNorm that is recomputed alone."""

    place: str
    module: nn.Module
    weight: str | None
    """The tensor that takes the scale; None for a BatchNorm that is recomputed alone."""
    bias: str | None = None
    """The tensor that takes scale and shift; None where there is none to be changed."""
    axis: int = 0
    """The weight's axis of output channels."""
    calls: int = 1
    """Calls a pass; more than one only of a BatchNorm that is recomputed alone."""

    @property
    def is_norm(self) -> bool:
        """Whether it is a BatchNorm."""
        return not is_linear(self.module)


@dataclass
class Survey:
    """Which layers are corrected, in which order."""

    stages: list[list[Layer]] = field(default_factory=list)
    """In the order of their calls; layers that are given one tensor stand together."""
    left: dict[str, str] = field(default_factory=dict)
    """Weights that are left alone, and why."""

    @property
    def layers(self) -> list[Layer]:
        """Those that are corrected."""
        return [layer for stage in self.stages for layer in stage if layer.weight is not None]

    @property
    def unusual(self) -> dict[str, str]:
        """Weights that are left alone for another reason than the usual ones."""
        return {name: why for name, why in self.left.items() if why not in (_LAST, _FEEDS)}


@dataclass(frozen=True, eq=False)
class _Call:
    place: str
    module: nn.Module
    input: Tensor
    output: Tensor
    input_version: int
    """How often the input had been written to when the layer was called."""
    output_version: int
    """The same of the output when the layer returned it."""
    is_plain: bool
    """Whether the output is the input times the stored weight."""


def survey_of(merged: MergedModel, repair: REPAIR, run: Run) -> Survey:
    """Let one batch pass, and sort the layers by what they do on the way.

    Args:
        merged: the merged model, with any weights in place.
        repair: what is to be done.
        run: the pass.
    """
    layers = linear_layers(merged.plan)
    with _noted(merged, layers) as calls:
        run.call()
    return _Surveyor(merged.plan, repair, layers, calls).survey


class _Surveyor:
    def __init__(
        self,
        plan: Plan,
        repair: REPAIR,
        layers: Mapping[str, LinearLayer],
        calls: Sequence[_Call],
    ) -> None:
        assert plan.binding is not None
        self._plan, self._repair = plan, repair
        self._places = plan.binding.parameters
        self._names = {place: name for name, places in self._places.items() for place in places}
        self._times = Counter(call.place for call in calls)
        linear = [call for call in calls if is_linear(call.module)]
        self._last = linear[-1].place if linear else None
        self._feeding = set(_feeding(calls))
        self.survey = Survey()
        axes = {place: layer.axis for layer in layers.values() for place in layer.places}
        before: tuple[int, int] | None = None
        for call in calls:
            axis = axes.get(call.place)
            layer = self._linear(call, axis) if is_linear(call.module) else self._norm(call)
            if layer is None:
                continue
            entry = id(call.input), call.input_version
            if before == entry and not layer.is_norm:
                self.survey.stages[-1].append(layer)
            else:
                self.survey.stages.append([layer])
            before = None if layer.is_norm else entry
        for name, known in layers.items():
            if not any(place in self._times for place in known.places):
                self.survey.left[name] = "no pass calls it"

    def _linear(self, call: _Call, axis: int | None) -> Layer | None:
        if axis is None:  # a private head, or an embedding's weight
            return None
        name = self._names[_tensor(call.place, "weight")]
        why = self._against(call.place, name)
        if why is None and call.place in self._feeding:
            why = _FEEDS
        if why is None and call.place == self._last:
            why = _LAST
        if why is None and not call.is_plain:
            why = "its weight is transformed before use"
        if why is not None:
            self.survey.left[name] = why
            return None
        return Layer(call.place, call.module, name, self._bias(call.place), 1 - axis)

    def _norm(self, call: _Call) -> Layer | None:
        times = self._times[call.place]
        name = self._names.get(_tensor(call.place, "weight"))
        if times > 1 and any(call.place == seen.place for s in self.survey.stages for seen in s):
            return None
        if name is None or name not in self._plan.tensors:  # none to correct, or a task's own
            return Layer(call.place, call.module, None, calls=times)
        why = self._against(call.place, name)
        if why is not None:
            self.survey.left[name] = why
            return Layer(call.place, call.module, None, calls=times)
        return Layer(call.place, call.module, name, self._bias(call.place))

    def _against(self, place: str, name: str) -> str | None:
        """Why a weight cannot be changed."""
        if len(self._places[name]) > 1:
            return f"its weight is shared by {shorten(list(self._places[name]))}"
        if name in self._plan.fixed:
            return "it is frozen"
        if any(re.search(pattern, name) for pattern in self._repair.skip):
            return "skip names it"
        if self._times[place] > 1:
            return f"it is called {self._times[place]} times a pass"
        return None

    def _bias(self, place: str) -> str | None:
        """The tensor of a layer's bias, where it is the layer's alone and not frozen."""
        name = self._names.get(_tensor(place, "bias"))
        if name is None or name not in self._plan.tensors or name in self._plan.fixed:
            return None
        return name if len(self._places[name]) == 1 else None


def _tensor(place: str, attribute: str) -> str:
    """The name of a module's parameter; a network may be a layer itself."""
    return f"{place}.{attribute}" if place else attribute


def _feeding(calls: Sequence[_Call]) -> Iterator[str]:
    """Linear layers whose output is a BatchNorm's input, as it is."""
    outputs = {id(call.output): call for call in calls if is_linear(call.module)}
    for call in calls:
        source = outputs.get(id(call.input))
        if source is None or is_linear(call.module):
            continue
        if source.output_version == call.input_version:
            yield source.place


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; those of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def _noted(merged: MergedModel, layers: Mapping[str, LinearLayer]) -> Iterator[list[_Call]]:
    """Calls of linear layers and BatchNorm within the context, in order."""
    calls: list[_Call] = []
    axes = {place: layer.axis for layer in layers.values() for place in layer.places}
    norms = merged.statistics.batch_norms

    def watch(place: str, module: nn.Module) -> Any:
        def note(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> None:
            entry = first_argument(args, kwargs)
            # at once: what comes next may write to both
            plain = place in axes and is_linear_in_its_weight(
                module, entry[:1], output[:1], axes[place]
            )
            versions = _version(entry), _version(output)
            calls.append(_Call(place, module, entry, output, *versions, plain))

        return module.register_forward_hook(note, with_kwargs=True)

    hooks = [
        watch(place, module)
        for place, module in merged.skeleton.named_modules()
        if is_linear(module) or module in norms
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
