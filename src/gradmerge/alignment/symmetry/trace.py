"""The permutation groups of a network, derived by running it once.

Every parameter's axes start as unknown units (`units.py`). The network runs on a tiny input, and
each ATen operator that it calls says which units must be the same, consist of smaller ones, or keep
their order (`rules.py`, `shapes.py`). What is left is the specification. Weights are stand-ins that
hold one number each, so that no memory of the model's size is needed.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradmerge.alignment.symmetry.products import Multiplied
from gradmerge.alignment.symmetry.rules import RULES, Call, Label, attention, pointwise
from gradmerge.alignment.symmetry.shapes import fixed_label
from gradmerge.alignment.symmetry.units import Dim, fresh, pin_all, unify
from gradmerge.errors import ConfigError, shorten
from gradmerge.sources.skeleton import empty_like_parameter

_HINT = (
    "Give a hand-written specification instead (`spec:` of the alignment), or leave the alignment "
    "out."
)


# in place they change the shape of what they are called with
_RESHAPING = {f"aten::{name}" for name in ("t", "transpose", "squeeze", "unsqueeze")}
_SHAPED_BY_VALUES = {
    f"aten::{name}" for name in ("nonzero", "masked_select", "_unique2", "bincount")
}


# What outputs of transformers hold beside predictions.
_BESIDE = re.compile(
    r"(hidden_states?|attentions?|past_key_values|cache_params|router_logits|mems)$"
)


@dataclass
class Traced:
    """What a trace found, before it becomes a specification."""

    labels: dict[str, Label]
    """Axes of every parameter and persistent buffer, by its first name in the module."""
    reached: set[str]
    """Those that the run used."""
    reads: set[tuple[str, int]] = field(default_factory=set)
    """Parameters' axes that products sum over."""
    seen: list[tuple[str, int, Label]] = field(default_factory=list)
    """Module, call and dimensions of every module's output, in order."""
    multiplied: list[Dim] = field(default_factory=list)
    """Dimensions whose units are multiplied one by one with others (`multiplied.py`)."""


def trace(skeleton: nn.Module, example: Mapping[str, Any], unreached: Sequence[str] = ()) -> Traced:
    """Run a network on an example and carry its parameters' units along.

    Args:
        skeleton: the network; its weights are not used and not changed.
        example: arguments of its forward by name.
        unreached: regular expressions of parameters that take no part in the network.

    Raises:
        ConfigError: it calls an operator that has no rule, or the example does not reach a
            parameter that other inputs might.
    """
    module, names = stand_in(skeleton, torch.float32)
    mode = _Tracing(names)
    with torch.no_grad(), _slow_paths(), mode.follow(module):
        out = run(module, example, mode)
    for leaf in tensors_of(out):
        pin_all(mode.label(leaf), "it is the network's output")
    lost = [name for name in mode.traced.labels if name not in mode.traced.reached]
    idle = [name for name in lost if any(re.search(pattern, name) for pattern in unreached)]
    if len(lost) > len(idle):
        missed = [name for name in lost if name not in idle]
        why = f", by values that depend on weights ({mode.branches[0]})" if mode.branches else ""
        raise ConfigError(
            f"alignment: {type(skeleton).__name__} did not reach {shorten(missed)} on the "
            f"example{why}. With other inputs they might read or write units that were put into "
            "another order, so they have to be seen: give `example` inputs that reach them; or, if "
            "they take no part in what is wanted of the network, name them as regular expressions "
            f"in `unreached`. {_HINT}"
        )
    for name in lost:
        pin_all(mode.traced.labels[name], "the run does not reach it")
    taken = {unit for dim in mode.taken for unit in dim.units()}
    for dim in mode.left:
        for unit in dim.units():
            if unit not in taken:
                unit.pin("slices leave it out, which other inputs might take")
    mode.traced.multiplied = mode.multiplied.dims
    return mode.traced


def stand_in(skeleton: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, dict[int, str]]:
    """A copy of a network whose parameters hold one number each, and their names by identity.

    Persistent buffers are named, too; all floating-point buffers are copied in `dtype`.
    """
    first: dict[int, str] = {}
    memo: dict[int, Any] = {}
    for name, parameter in skeleton.named_parameters():
        kind = dtype if parameter.dtype.is_floating_point else parameter.dtype
        empty = empty_like_parameter(parameter, kind, torch.device("cpu"))
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        first[id(memo[id(parameter)])] = name
    module = copy.deepcopy(skeleton, memo).eval()
    config: Any = getattr(module, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # keys and values of a cache would pass for outputs
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # grouped products take no stand-ins
    saved = set(module.state_dict(keep_vars=True))
    for path, owner in module.named_modules():
        for key, buffer in list(owner._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                owner._buffers[key] = buffer = buffer.to(dtype, copy=True)
                name = f"{path}.{key}" if path else key
                if name in saved:
                    first[id(buffer)] = name
    return module, first


def run(module: nn.Module, example: Mapping[str, Any], mode: AbstractContextManager[object]) -> Any:
    """The network's output on an example, within a mode."""
    inputs = {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in example.items()
    }
    with mode:
        return module(**inputs)


def tensors_of(out: Any) -> list[Tensor]:
    """The tensors of a network's output: a tensor, or those in a sequence, mapping or dataclass.

    Of a mapping with logits all but the hidden states, attentions and caches that transformers
    hands out beside them, whose units would be fixed.

    Raises:
        ConfigError: there are none, or something of another kind, whose content cannot be told.
    """
    if isinstance(out, Mapping) and any(str(name).startswith("logits") for name in out):
        out = {name: value for name, value in out.items() if not _BESIDE.search(str(name))}
    found = _leaves(out)
    if not found:
        raise ConfigError(
            "alignment: expected a network that gives tensors, a sequence, a mapping or a "
            f"dataclass of such, got {type(out).__name__}: what it computes could not be told. "
            f"{_HINT}"
        )
    return found


def _leaves(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, Mapping):
        return [leaf for value in out.values() for leaf in _leaves(value)]
    if isinstance(out, (list, tuple)):
        return [leaf for value in out for leaf in _leaves(value)]
    if dataclasses.is_dataclass(out):
        return [leaf for f in dataclasses.fields(out) for leaf in _leaves(getattr(out, f.name))]
    if out is None or isinstance(out, (bool, int, float, str)):
        return []
    raise ConfigError(
        f"alignment: the network gives a {type(out).__name__} among its outputs, in which units "
        f"cannot be found. Let it give tensors. {_HINT}"
    )


@contextmanager
def _slow_paths() -> Iterator[None]:
    """Without fused transformer and recurrent layers, which would be one operator each."""
    before = torch.backends.mha.get_fastpath_enabled()
    fused = torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        torch._C._set_mkldnn_enabled(fused)


class _Tracing(TorchDispatchMode):
    """Carries labels from operator to operator.

    Args:
        names: parameters and persistent buffers by identity.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.traced = Traced({}, set())
        self._labels: dict[int, tuple[Tensor, Label | None]] = {}  # holds tensors: ids stay unique
        self.taken: list[Dim] = []
        self.left: list[Dim] = []
        self.branches: list[str] = []
        """Operators that hand values which depend on weights to the program."""
        self._derived: set[int] = set(names)
        self.multiplied = Multiplied(names)
        self._waiting: dict[int, tuple[Tensor, Callable[[], Any]]] = {}
        self._path: list[str] = []
        self._calls: dict[str, int] = {}
        self._seen: set[tuple[int, int]] = set()

    @contextmanager
    def follow(self, module: nn.Module) -> Iterator[None]:
        """Label the parameters; keep track of which submodule is running."""
        self._register(module)
        hooks = []
        for path, owner in module.named_modules():
            hooks.append(owner.register_forward_pre_hook(lambda *_, p=path: self._path.append(p)))
            hooks.append(owner.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _register(self, module: nn.Module) -> None:
        everything = [*module.parameters(), *module.buffers()]
        for tensor in everything:
            name = self.names.get(id(tensor))
            if name is None:
                continue
            label = [
                Dim(fresh(size).expression, frozenset({(name, axis)}))
                for axis, size in enumerate(tensor.shape)
            ]
            self._labels[id(tensor)] = tensor, label
            self.traced.labels[name] = label

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        path = self._path.pop()
        call = self._calls.get(path, 0)
        self._calls[path] = call + 1
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(first, Tensor):
            return
        state = id(first), first._version  # what an identity gives back shows nothing new
        if state not in self._seen:
            self._seen.add(state)
            label = self._labels.get(id(first), (first, None))[1]
            if label is not None:
                self.traced.seen.append((path, call, label))

    @property
    def where(self) -> str:
        """The module that is running."""
        return (self._path[-1] if self._path else "") or "the network itself"

    def label(self, tensor: Tensor) -> Label:
        """Dimensions of a tensor; what the network did not make is a constant.

        Raises:
            ConfigError: it is an output that the rules say nothing about.
        """
        if id(tensor) in self.names:
            self.traced.reached.add(self.names[id(tensor)])
        if id(tensor) in self._waiting:
            self._set(tensor, self._waiting.pop(id(tensor))[1]())
        if id(tensor) not in self._labels:
            self._labels[id(tensor)] = tensor, fixed_label(tensor, "it is a constant or an input")
        label = self._labels[id(tensor)][1]
        if label is None:
            raise ConfigError(
                f"alignment: module {self.where} reads an output of an operator that the trace "
                f"has no rule for (log-sums, statistics). {_HINT}"
            )
        return label

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator and label what comes out."""
        kwargs = kwargs or {}
        name = func._schema.name.removesuffix("_")
        mutates = func._schema.is_mutable
        rule = RULES.get(name)
        if name.startswith("aten::_scaled_dot_product"):
            rule = attention
        elif rule is None and torch.Tag.pointwise in func.tags:
            rule = pointwise
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if rule is None and not all(d.is_fixed for t in tensors for d in self.label(t)):
            table = {} if mutates else torch._decomp.core_aten_decompositions()
            if func in table:
                with self:
                    return table[func](*args, **kwargs)
            raise ConfigError(
                f"alignment: the trace has no rule for operator {func} (in module {self.where} of "
                f"the network), so it cannot know which units it keeps apart. {_HINT}"
            )
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(id(tensor) in self._derived for tensor in tensors):
            self._derived.update(id(leaf) for leaf in made)
            masked = name == "aten::index" and any(t.dtype == torch.bool for t in tensors)
            if not made or masked or name in _SHAPED_BY_VALUES:
                self.branches.append(f"{func} in {self.where}")
        if rule is None:
            for leaf in made:
                label = fixed_label(leaf, f"{func} in {self.where} makes it")
                self._set(leaf, label, mutates)
            return out
        if not made:
            return out
        call = self._call(func, name, args, kwargs, out)
        if name == "aten::select" and not mutates:
            # networks take a column of their units to learn its shape, which fixes nothing
            self._waiting[id(out)] = out, partial(rule, call)
            self.multiplied.follow(call, made)
            return out
        found: Any = rule(call)
        self.multiplied.follow(call, made)
        if mutates and name not in _RESHAPING:
            return out  # what was written to keeps its dimensions, unified with the rest
        labels: list[Any] = [found] if isinstance(out, Tensor) else [*found, *[None] * len(made)]
        for leaf, label in zip(made, labels, strict=False):
            self._set(leaf, label, mutates)
        return out

    def _call(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Call:
        described = func._schema.arguments
        arguments = {a.name: a.default_value for a in described}
        arguments.update(zip(arguments, args, strict=False))
        arguments.update(kwargs)
        reason = f"{name.removeprefix('aten::')} in {self.where}"
        return Call(name, arguments, out, self.label, self._contract, self._leave_out, reason)

    def _leave_out(self, taken: Dim, left: Sequence[Dim]) -> None:
        self.taken.append(taken)
        self.left.extend(left)

    def _contract(self, dim: Dim) -> None:
        self.traced.reads |= dim.owners

    def _set(self, tensor: Tensor, label: Label | None, replace: bool = False) -> None:
        if label is not None and [dim.size for dim in label] != list(tensor.shape):
            raise AssertionError(f"dimensions {[d.size for d in label]} of {tuple(tensor.shape)}")
        known = None if replace else self._labels.get(id(tensor), (tensor, None))[1]
        if known is None or label is None:
            self._labels[id(tensor)] = tensor, label
            return
        for one, two in zip(known, label, strict=True):  # an operator that gave back its argument
            unify(one, two, f"an operator in {self.where}")
