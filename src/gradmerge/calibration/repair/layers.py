"""Which layers REPAIR corrects, and in which order: what one pass through the network tells."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import count, pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.weak import WeakTensorKeyDictionary

from gradmerge.calibration.observers import (
    first_argument,
    is_linear,
    is_linear_in_its_weight,
    tolerance_of,
)
from gradmerge.calibration.repair.dataflow import Flow, version
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.plan import Plan
from gradmerge.errors import ConfigError, shorten
from gradmerge.finalisers import REPAIR
from gradmerge.sources.skeleton import input_axis

UNKNOWN = "no layer of a known kind holds it"
"""What is said of tables and matrices that may be no layer's weight (positions)."""
_WITHOUT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
_OTHERS = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)


@dataclass(frozen=True)
class ScaledWeight:
    """The tensor of a layer that scales its output channels."""

    name: str
    """Its name in the files."""
    axis: int
    """Its axis of channels."""
    groups: int = 1
    """Of a transposed convolution, whose weight is `[in, out / groups, ...]`."""


def has_channels(module: nn.Module) -> bool:
    """Whether a module is a layer of a kind that can be scaled."""
    return isinstance(module, (nn.Linear, _ConvNd)) or is_linear(module)


def channel_axis(module: nn.Module, output: Tensor) -> int:
    """The axis of channels of what a module (a BatchNorm, too) gives."""
    if isinstance(module, _ConvNd):
        return output.dim() - 1 - len(module.kernel_size)
    return 1 if isinstance(module, nn.modules.batchnorm._BatchNorm) else output.dim() - 1


def scaled_weights(plan: Plan) -> tuple[dict[str, ScaledWeight], dict[str, str]]:
    """By the module's name; and tensors of layers that cannot be scaled, with the reason.

    Left out are private tensors, and weights that anything else uses, too (an embedding tied to the
    output layer).
    """
    skeleton, binding = plan.skeleton, plan.binding
    assert skeleton is not None
    assert binding is not None
    names = {place: name for name, places in binding.parameters.items() for place in places}
    found: dict[str, ScaledWeight] = {}
    others: dict[str, str] = {}
    for place, module in skeleton.named_modules():
        own = {k: names[joined(place, k)] for k in _weights(module)}
        own = {k: name for k, name in own.items() if name in plan.tensors}
        if has_channels(module):
            known = _scaled(module, place, own)
            if known is None:
                why = "its layer's weight is computed from it"
                others.update({name: why for name in own.values() if name not in others})
            elif all(
                has_channels(skeleton.get_submodule(p.rpartition(".")[0]))
                or p.rpartition(".")[0].endswith("parametrizations.weight")
                for p in binding.parameters[known.name]
            ):
                found[place] = known
        elif not isinstance(module, _WITHOUT) and "parametrizations" not in place.split("."):
            for key, name in own.items():
                if len(binding.parameters[name]) == 1:
                    others.update(_of_other(module, key, name))
    return found, others


def _of_other(module: nn.Module, key: str, name: str) -> dict[str, str]:
    """A weight of a module of another kind, where it looks like one: several axes beyond 1."""
    stored: Any = module._parameters[key]  # the attribute would ask for the merged tensor
    axes = sum(size > 1 for size in stored.shape)
    if axes < 2:
        return {}
    warns = axes > 2 or isinstance(module, _OTHERS)
    return {name: f"REPAIR corrects no {type(module).__name__}" if warns else UNKNOWN}


def _weights(module: nn.Module) -> list[str]:
    """Parameters of a module but for its bias, and those that its weight is computed from."""
    own = [key for key, _ in module.named_parameters(recurse=False) if key != "bias"]
    inner = "parametrizations.weight."
    return own + [key for key, _ in module.named_parameters() if key.startswith(inner)]


def _scaled(module: Any, place: str, own: Mapping[str, str]) -> ScaledWeight | None:
    """What scales a layer; None where its weight is computed otherwise."""
    transposed = isinstance(module, _ConvTransposeNd)
    axis = 1 - input_axis_of(module)
    if "weight" in own:
        return ScaledWeight(own["weight"], axis, module.groups if transposed else 1)
    norm: Any = next(
        (h for h in module._forward_pre_hooks.values() if isinstance(h, WeightNorm)), None
    )
    key = "weight_g"
    if "parametrizations" in module._modules:
        steps = list(getattr(module.parametrizations, "weight", ()))
        norm = steps[0] if len(steps) == 1 and isinstance(steps[0], _WeightNorm) else None
        key = "parametrizations.weight.original0"
    if norm is None or norm.dim != axis or key not in own:
        return None
    return ScaledWeight(own[key], axis) if not transposed or module.groups == 1 else None


def input_axis_of(module: nn.Module) -> int:
    """See `input_axis`."""
    return input_axis(module, "weight")


def joined(place: str, attribute: str) -> str:
    """The name of a module's parameter; a network may be a layer itself."""
    return f"{place}.{attribute}" if place else attribute


def is_plain(module: Any, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> bool:
    """Whether an output is what the layer's kind makes of its input and its weight, bias included
    (to `tolerance_of`).
    """
    inputs = first_argument(args, kwargs)
    if is_linear(module):
        return is_linear_in_its_weight(module, inputs, output, input_axis_of(module))
    kind = next(kind for kind in type(module).__mro__ if kind.__module__ == _ConvNd.__module__)
    expected = kind.forward(module, *args, **kwargs).float()  # type: ignore[attr-defined]
    if expected.shape != output.shape:
        return False
    apart = (output.detach().float() - expected).norm()
    return float(apart) <= tolerance_of(output) * float(expected.norm())


_LAST = "it is a last layer: no other reads its output"
_GIVEN = "the network gives out its output as it is"
_FEEDS = "it feeds a BatchNorm"
_USUAL = (_LAST, _GIVEN, _FEEDS, UNKNOWN)


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
    groups: int = 1
    """See `ScaledWeight`."""
    calls: int = 1
    """Calls a pass; more than one only of a BatchNorm that is recomputed alone."""

    @property
    def is_norm(self) -> bool:
        """Whether it is a BatchNorm."""
        return not has_channels(self.module)


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

    def leave(self, layer: Layer, why: str, calls: int) -> None:
        """Correct a layer no longer; of a BatchNorm the statistics stay to be recomputed."""
        self.left[str(layer.weight)] = why
        kept = replace(layer, weight=None, bias=None, calls=calls) if layer.is_norm else None
        stages = [[kept if own is layer else own for own in stage] for stage in self.stages]
        found = [[own for own in stage if own is not None] for stage in stages]
        self.stages = [stage for stage in found if stage]

    @property
    def unusual(self) -> dict[str, str]:
        """Weights that are left alone for another reason than the usual ones."""
        return {name: why for name, why in self.left.items() if why not in _USUAL}


@dataclass(frozen=True)
class _Call:
    run: int
    place: str
    module: nn.Module
    entry: tuple[int, int]
    """A number for its input, and how often that had been written to."""
    fed_by: str | None
    """The layer whose output, as it was, is its input."""
    is_plain: bool
    """Whether the output is the input times the stored weight."""


def survey_of(merged: MergedModel, repair: REPAIR, runs: Sequence[Run]) -> Survey:
    """Let all batches pass, and sort the layers by what they do on the way.

    Args:
        merged: the merged model, with any weights in place.
        repair: what is to be done.
        runs: the passes.

    Raises:
        ConfigError: batches call the layers in orders that contradict each other.
    """
    weights, others = scaled_weights(merged.plan)
    calls: list[_Call] = []
    flow, marks = Flow(), _Marks()
    for number, run in enumerate(runs):
        with _noted(merged, weights, flow, marks, number, calls), flow:
            run.call()
    survey = _Surveyor(merged.plan, repair, weights, calls, flow).survey
    survey.left.update(others)
    return survey


class _Surveyor:
    def __init__(
        self,
        plan: Plan,
        repair: REPAIR,
        weights: Mapping[str, ScaledWeight],
        calls: Sequence[_Call],
        flow: Flow,
    ) -> None:
        assert plan.binding is not None
        self._plan, self._repair, self._flow = plan, repair, flow
        self._places = plan.binding.parameters
        self._names = {place: name for name, places in self._places.items() for place in places}
        times = Counter((call.run, call.place) for call in calls)
        self._times: Counter[str] = Counter()
        for (_, place), often in times.items():
            self._times[place] = max(self._times[place], often)
        self._feeding = {call.fed_by for call in calls if not has_channels(call.module)}
        self._plain = {call.place: True for call in calls}
        for call in calls:
            self._plain[call.place] &= call.is_plain
        self.survey = Survey()
        found: dict[str, Layer] = {}
        for call in {call.place: call for call in calls}.values():
            weight = weights.get(call.place)
            layer = self._linear(call, weight) if has_channels(call.module) else self._norm(call)
            if layer is not None:
                found[call.place] = layer
        self.survey.stages = _stages(found, calls)
        called = {weights[place].name for place in self._times if place in weights}
        for weight in weights.values():
            if weight.name not in called:
                self.survey.left[weight.name] = "no pass calls it"

    def _linear(self, call: _Call, weight: ScaledWeight | None) -> Layer | None:
        if weight is None:  # a private head, an embedding's weight, or a computed one
            return None
        name = weight.name
        why = self._against(call.place, name)
        if why is None and call.place in self._feeding:
            why = _FEEDS
        why = why or self._last(call.place)
        if why is None and not self._plain[call.place]:
            why = "its weight is transformed before use"
        if why is not None:
            self.survey.left[name] = why
            return None
        bias = self._bias(call.place)
        return Layer(call.place, call.module, name, bias, weight.axis, weight.groups)

    def _norm(self, call: _Call) -> Layer | None:
        times = self._times[call.place]
        name = self._names.get(joined(call.place, "weight"))
        if name is None or name not in self._plan.tensors:  # none to correct, or a task's own
            return Layer(call.place, call.module, None, calls=times)
        why = self._against(call.place, name) or self._last(call.place)
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

    def _last(self, place: str) -> str | None:
        """Whether it gives an output of the network, whose values are not to be changed."""
        if place not in self._flow.read:
            return _LAST
        return _GIVEN if place in self._flow.given else None

    def _bias(self, place: str) -> str | None:
        """The tensor of a layer's bias, where it is the layer's alone and not frozen."""
        name = self._names.get(joined(place, "bias"))
        if name is None or name not in self._plan.tensors or name in self._plan.fixed:
            return None
        return name if len(self._places[name]) == 1 else None


def _stages(layers: Mapping[str, Layer], calls: Sequence[_Call]) -> list[list[Layer]]:
    """Layers in an order that holds for every run; those that are always given one tensor stand
    together.
    """
    runs: dict[int, list[str]] = {}
    entries: dict[str, dict[int, tuple[int, int]]] = {place: {} for place in layers}
    for call in calls:
        if call.place in layers and call.run not in entries[call.place]:
            runs.setdefault(call.run, []).append(call.place)
            entries[call.place][call.run] = call.entry
    stages: list[list[Layer]] = []
    before: dict[int, tuple[int, int]] | None = None
    for place in in_order(list(runs.values())):
        layer, entry = layers[place], entries[place]
        if before == entry and not layer.is_norm:
            stages[-1].append(layer)
        else:
            stages.append([layer])
        before = None if layer.is_norm else entry
    return stages


def in_order(sequences: Sequence[Sequence[str]]) -> list[str]:
    """One sequence that keeps the order of each; where it is open, the order of appearance.

    Raises:
        ConfigError: there is none.
    """
    number: dict[str, int] = {}
    after: dict[str, set[str]] = {}
    for sequence in sequences:
        for place in sequence:
            number.setdefault(place, len(number))
            after.setdefault(place, set())
        for one, two in pairwise(sequence):
            after[one].add(two)
    waiting = Counter(place for places in after.values() for place in places)
    ready = [number[place] for place in after if not waiting[place]]
    heapify(ready)
    places = list(number)
    found: list[str] = []
    while ready:
        found.append(places[heappop(ready)])
        for place in after[found[-1]]:
            waiting[place] -= 1
            if not waiting[place]:
                heappush(ready, number[place])
    left = [place for place in places if place not in set(found)]
    if left:
        raise ConfigError(
            "REPAIR corrects layers in the order of their calls, and batches call some in orders "
            f"that contradict each other: among {shorten(left)}. A layer's correction would change "
            "what others were corrected for. Name some of them in `skip` of REPAIR (regular "
            "expressions of weights), or leave it out of `finalisers`."
        )
    return found


class _Marks:
    """What is noted of tensors on their way, without a mark on them and without keeping them: to
    hold all inputs would take much memory, and some are the data's own.
    """

    def __init__(self) -> None:
        self._numbers, self._made = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self._count = count()

    def number(self, tensor: Tensor) -> int:
        """The tensor's own number."""
        if tensor not in self._numbers:
            self._numbers[tensor] = next(self._count)
        return int(self._numbers[tensor])

    def leaves(self, place: str, tensor: Tensor) -> None:
        """A layer gives it."""
        self._made[tensor] = place, version(tensor)

    def fed_by(self, tensor: Tensor) -> str | None:
        """The layer that gave it, as it is."""
        place, when = self._made.get(tensor, (None, 0))
        return place if when == version(tensor) else None


@contextmanager
def _noted(
    merged: MergedModel,
    weights: Mapping[str, ScaledWeight],
    flow: Flow,
    marks: _Marks,
    run: int,
    calls: list[_Call],
) -> Iterator[None]:
    """Note the calls of linear layers and BatchNorm within the context, in order."""
    norms = merged.statistics.batch_norms
    known = {call.place for call in calls}

    def enter(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        flow.enters((args, kwargs))

    def watch(place: str, module: nn.Module) -> Any:
        def note(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> None:
            entry = first_argument(args, kwargs)
            state, fed_by = (marks.number(entry), version(entry)), marks.fed_by(entry)
            # at once: what comes next may write to both
            plain = place in known or (place in weights and is_plain(module, args, kwargs, output))
            calls.append(_Call(run, place, module, state, fed_by, plain))
            flow.leaves(place, output)
            if has_channels(module):
                marks.leaves(place, output)

        return module.register_forward_hook(note, with_kwargs=True)

    def end(_: nn.Module, __: Any, output: Any) -> None:
        flow.ends(output)

    hooks = []
    for place, module in merged.skeleton.named_modules():
        if has_channels(module) or module in norms:
            hooks += [module.register_forward_pre_hook(enter, with_kwargs=True)]
            hooks += [watch(place, module)]
    hooks += [merged.skeleton.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
