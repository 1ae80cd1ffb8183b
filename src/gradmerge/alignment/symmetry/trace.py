"""The permutation groups of a network, derived from one run.

Every parameter's axes start as unknown units (`units.py`). The network runs on a tiny input, and
each ATen operator that it calls says which units must be the same, consist of smaller ones, or keep
their order (`rules.py`). The freedom that is left is the specification. Weights are stand-ins that
hold one number each, so no memory of the model's size is needed. (A graph from `torch.export` or
`make_fx` would not do: neither gets past a choice that depends on values, such as experts.)

The trace also tells which units are multiplied one by one with others: those may only change
places. `y = a b`, entry by entry, follows any permutation of the units of a and b, but no map that
mixes them: `(T a) (T b)` is not `T (a b)`. So it is with a gate and what it gates, with the cells
of a recurrent layer, and, in a product of two activations that sums over the units, with queries
and keys: `(T q) . (T k)` is `q . k` for orthogonal maps alone. A function of one tensor,
`x sigmoid(x)`, is no such product: all element-wise functions are followed approximately.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, count
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from gradmerge.alignment.symmetry.rules import (
    Call,
    Label,
    Rule,
    fixed_label,
    rule_of,
    tensors_in,
)
from gradmerge.alignment.symmetry.units import Dim, fresh, pin_all
from gradmerge.errors import ConfigError, shorten
from gradmerge.sources.skeleton import empty_like_parameter

_HINT = (
    "Give a hand-written specification instead (`spec:` of the alignment), or leave the alignment "
    "out."
)

# Outputs of transformers beside the predictions.
_BESIDE = re.compile(
    r"(hidden_states?|attentions?|past_key_values|cache_params|router_logits|mems)$"
)

_RESHAPING = {"t", "transpose", "squeeze", "unsqueeze"}
"""In place, these change the shape of their argument."""
_SHAPED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "bincount"}
_PRODUCTS = {"mm", "bmm", "mv", "dot"}
_WRITES = _PRODUCTS | {"convolution", "embedding"}
"""Operators whose result is a new activation."""
_PARTS = {"slice", "select", "unbind", "split", "split_with_sizes", "unsafe_split"}
_PARTS |= {"index", "_unsafe_index", "gather"}
"""Operators that read by place: the halves of a gated linear unit are two activations."""


@dataclass
class Traced:
    """Units that a trace found, before they become a specification."""

    labels: dict[str, Label] = field(default_factory=dict)
    """Axes of every parameter and persistent buffer, by its first name in the module."""
    reached: set[str] = field(default_factory=set)
    """Names of the tensors that the run used."""
    reads: set[tuple[str, int]] = field(default_factory=set)
    """Parameters' axes that products sum over."""
    seen: list[tuple[str, int, Label]] = field(default_factory=list)
    """Module, call and dimensions of every module's output, in order."""
    multiplied: list[Dim] = field(default_factory=list)
    """Dimensions whose units are multiplied one by one with others."""


@dataclass
class _Value:
    """The units of one tensor, and where its entries are from."""

    tensor: Tensor
    """Held, so that its identity stays unique."""
    label: Label | Callable[[], Any] | None
    """None: no rule tells; a function: found once another operator reads the tensor."""
    writers: frozenset[int] = frozenset()
    """Numbers of the products that wrote it."""
    weight: bool = False
    """Made of parameters and buffers alone."""


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
    mode = _Tracing(module, names)
    with torch.no_grad(), _slow_paths(), mode.follow(module):
        out = run(module, example, mode)
    for leaf in tensors_of(out):
        pin_all(mode.label(leaf), "it is the network's output")
    found = mode.traced
    lost = [name for name in found.labels if name not in found.reached]
    missed = [name for name in lost if not any(re.search(p, name) for p in unreached)]
    if missed:
        why = f", by values that depend on weights ({mode.branches[0]})" if mode.branches else ""
        raise ConfigError(
            f"alignment: {type(skeleton).__name__} did not reach {shorten(missed)} on the "
            f"example{why}.\nWith other inputs they might read or write permuted units, so the "
            "trace has to see them: give `example` inputs that reach them,\nor name those that "
            f"take no part in the network, as regular expressions in `unreached`. {_HINT}"
        )
    for name in lost:
        pin_all(found.labels[name], "the run does not reach it")
    taken = {unit for dim in mode.taken for unit in dim.units()}
    for unit in (unit for dim in mode.left for unit in dim.units()):
        if unit not in taken:
            unit.pinned = unit.pinned or "slices leave it out, which other inputs might take"
    return found


def stand_in(skeleton: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, dict[int, str]]:
    """Copy a network with parameters that hold one number each.

    Returns:
        The copy, whose floating-point buffers are in `dtype`, and the names of its parameters and
        persistent buffers by identity.
    """
    names: dict[int, str] = {}
    memo: dict[int, Any] = {}
    for name, parameter in skeleton.named_parameters():
        kind = dtype if parameter.dtype.is_floating_point else parameter.dtype
        empty = empty_like_parameter(parameter, kind, torch.device("cpu"))
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        names[id(memo[id(parameter)])] = name
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
                    names[id(buffer)] = name
    return module, names


def run(module: nn.Module, example: Mapping[str, Any], mode: AbstractContextManager[object]) -> Any:
    """Return the network's output on an example, within a mode."""
    inputs = {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in example.items()
    }
    with mode:
        return module(**inputs)


def tensors_of(out: Any) -> list[Tensor]:
    """Return the tensors of an output: a tensor, or a sequence, mapping or dataclass of tensors.

    A mapping with logits is taken without the hidden states, attentions and caches that
    transformers returns beside them, whose units would be fixed.

    Raises:
        ConfigError: there are none, or an object whose content cannot be told.
    """
    if isinstance(out, Mapping) and any(str(name).startswith("logits") for name in out):
        out = {name: value for name, value in out.items() if not _BESIDE.search(str(name))}
    found = _leaves(out)
    if not found:
        raise ConfigError(
            "alignment: expected a network that returns tensors, or a sequence, mapping or "
            f"dataclass of tensors, got {type(out).__name__}. {_HINT}"
        )
    return found


def _leaves(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if dataclasses.is_dataclass(out) and not isinstance(out, Mapping):
        out = [getattr(out, f.name) for f in dataclasses.fields(out)]
    if isinstance(out, Mapping):
        out = list(out.values())
    if isinstance(out, (list, tuple)):
        return [leaf for value in out for leaf in _leaves(value)]
    if out is None or isinstance(out, (bool, int, float, str)):
        return []
    raise ConfigError(
        f"alignment: the network gives a {type(out).__name__} among its outputs, in which units "
        f"cannot be found. Let it give tensors. {_HINT}"
    )


@contextmanager
def _slow_paths() -> Iterator[None]:
    """Disable fused transformer, attention and recurrent layers, each of them one operator."""
    before = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        torch._C._set_mkldnn_enabled(before[1])


class _Tracing(TorchDispatchMode):
    """Carries labels from operator to operator.

    Args:
        module: the network, with stand-ins for weights.
        names: its parameters and persistent buffers by identity.
    """

    def __init__(self, module: nn.Module, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.traced = Traced()
        self.taken: list[Dim] = []
        self.left: list[Dim] = []
        self.branches: list[str] = []
        """Operators that hand values which depend on weights to the program."""
        self._values: dict[int, _Value] = {}
        self._products = count()
        self._path: list[str] = []
        self._calls: dict[str, int] = {}
        self._seen: set[tuple[int, int]] = set()
        for tensor in [*module.parameters(), *module.buffers()]:
            name = names.get(id(tensor))
            if name is not None:
                label = [
                    Dim(fresh(size).expression, frozenset({(name, axis)}))
                    for axis, size in enumerate(tensor.shape)
                ]
                self._values[id(tensor)] = _Value(tensor, label, weight=True)
                self.traced.labels[name] = label

    @contextmanager
    def follow(self, module: nn.Module) -> Iterator[None]:
        """Keep track of the submodule that is running, and of its output."""
        hooks = []
        for path, owner in module.named_modules():
            hooks.append(owner.register_forward_pre_hook(lambda *_, p=path: self._path.append(p)))
            hooks.append(owner.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        path = self._path.pop()
        call = self._calls.get(path, 0)
        self._calls[path] = call + 1
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(first, Tensor):
            return
        state = id(first), first._version  # the output of an identity shows nothing new
        value = self._values.get(id(first))
        if state not in self._seen and value is not None and isinstance(value.label, list):
            self.traced.seen.append((path, call, value.label))
        self._seen.add(state)

    @property
    def where(self) -> str:
        """The module that is running."""
        return (self._path[-1] if self._path else "") or "the network itself"

    def _value(self, tensor: Tensor) -> _Value:
        """Look a tensor up; one that the network did not make is a constant."""
        if id(tensor) not in self._values:
            label = fixed_label(tensor, "it is a constant or an input")
            self._values[id(tensor)] = _Value(tensor, label)
        return self._values[id(tensor)]

    def label(self, tensor: Tensor) -> Label:
        """The dimensions of a tensor.

        Raises:
            ConfigError: it is an output that the rules say nothing about.
        """
        if id(tensor) in self.names:
            self.traced.reached.add(self.names[id(tensor)])
        value = self._value(tensor)
        if callable(value.label):
            value.label = value.label()
        if value.label is None:
            raise ConfigError(
                f"alignment: module {self.where} reads an output of an operator that the trace "
                f"has no rule for (log-sums, statistics). {_HINT}"
            )
        return value.label  # type: ignore[return-value]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator and label its results."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        mutates = func._schema.is_mutable
        rule = rule_of(name, func)
        given = tensors_in((args, kwargs))
        if rule is None and not all(dim.is_fixed for t in given for dim in self.label(t)):
            with self:
                if func in decomposition_table and not mutates:
                    return decomposition_table[func](*args, **kwargs)
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            raise ConfigError(
                f"alignment: the trace has no rule for operator {func} (in module {self.where} of "
                f"the network), so it cannot know which units it keeps apart. {_HINT}"
            )
        out = func(*args, **kwargs)
        made = tensors_in(out)
        self._note_branch(name, func, given, made)
        call = self._call(func, name, args, kwargs, out)
        if made:
            labels = self._labels(rule, call, made, mutates)
            self._note_products(call)
            self._keep(call, labels, made, mutates and (rule is None or name in _RESHAPING))
        return out

    def _call(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Call:
        described = func._schema.arguments
        arguments = {a.name: a.default_value for a in described}
        arguments.update(zip(arguments, args, strict=False))
        arguments.update(kwargs)

        def leave(taken: Dim, left: Sequence[Dim]) -> None:
            self.taken.append(taken)
            self.left.extend(left)

        reads = self.traced.reads
        reason = f"{name} in {self.where}"
        return Call(
            name, arguments, out, self.label, lambda dim: reads.update(dim.owners), leave, reason
        )

    def _labels(
        self, rule: Rule | None, call: Call, made: Sequence[Tensor], mutates: bool
    ) -> list[Any]:
        """A label for each result, or None where the rule tells none."""
        if rule is None:
            return [fixed_label(leaf, f"{call.reason} makes it") for leaf in made]
        if call.name == "select" and not mutates:
            # networks take a column of their units to learn its shape, which fixes nothing
            return [partial(rule, call)]
        found: Any = rule(call)
        if not found or isinstance(found[0], Dim):
            found = [found] * len(made)
        return [
            label if [dim.size for dim in label] == list(leaf.shape) else None
            for leaf, label in zip(made, found, strict=True)
        ]

    def _keep(
        self, call: Call, labels: Sequence[Any], made: Sequence[Tensor], reshapes: bool
    ) -> None:
        """Note the labels of results, and the products that wrote them."""
        given = [self._value(tensor) for tensor in call.tensors]
        writers = frozenset[int]().union(*(value.writers for value in given))
        weight = bool(given) and all(value.weight for value in given)
        for leaf, label in zip(made, labels, strict=True):
            new = call.name in _WRITES or (writers and call.name in _PARTS)
            own = frozenset({next(self._products)}) if new and not weight else writers
            known = self._values.get(id(leaf))
            if known is not None and not reshapes:  # an argument, given back or written to
                label = known.label
            self._values[id(leaf)] = _Value(leaf, label, frozenset() if weight else own, weight)

    def _note_branch(
        self, name: str, func: Any, given: Sequence[Tensor], made: Sequence[Tensor]
    ) -> None:
        """Note an operator that hands values which depend on weights to the program."""
        values = [self._value(tensor) for tensor in given]
        if any(value.weight or value.writers for value in values):
            masked = name == "index" and any(t.dtype == torch.bool for t in given)
            if not made or masked or name in _SHAPED_BY_VALUES:
                self.branches.append(f"{func} in {self.where}")

    def _note_products(self, call: Call) -> None:
        """Note units that an operator multiplies one by one with others."""
        found = self.traced.multiplied
        written = [tensor for tensor in call.tensors if self._value(tensor).writers]
        if call.name in _PRODUCTS and len(written) == 2:
            found.append(call.label(written[0])[-1])
        elif call.name == "convolution" and call["groups"] > 1 and written:
            found.append(call.label(call["input"])[-len(call["stride"]) - 1])
        elif call.name in ("prod", "cumprod") and written:
            # of stacked activations, or of the units themselves
            found += [dim for dim in call.dims if dim.size != 1]
        elif call.name in ("mul", "div", "addcmul", "addcdiv"):
            for one, two in combinations(written, 2):
                self._note_pair(one, two)
        elif call.name == "lerp" and isinstance(call["weight"], Tensor):
            for name in ("self", "end"):
                self._note_pair(call["weight"], call[name])

    def _note_pair(self, one: Tensor, two: Tensor) -> None:
        """Note a product, entry by entry, of activations that different products wrote."""
        if len({frozenset[int](), self._value(one).writers, self._value(two).writers}) == 3:
            dims = zip(self.label(one)[::-1], self.label(two)[::-1], strict=False)
            self.traced.multiplied += [a for a, b in dims if a.size == b.size != 1]
