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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
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
    Traced,
    opaque,
    rule_of,
    tensors_in,
)
from gradmerge.alignment.symmetry.units import Dim, fixed, fresh, pin
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.common.patterns import matches, require_matches
from gradmerge.sources.skeleton import empty_like_parameter

_HINT = (
    "Give a hand-written specification instead (`spec:` of the alignment), or leave the alignment "
    "out."
)

# Outputs of transformers beside the predictions.
_BESIDE = re.compile(
    r"(hidden_states?|attentions?|past_key_values|cache_params|router_logits|mems)$"
)

_PRODUCTS = {"mm", "bmm", "mv", "dot"}
_WRITES = _PRODUCTS | {"convolution", "embedding"}
"""Operators whose result is a new activation."""
_PARTS = {"slice", "select", "unbind", "split", "split_with_sizes", "unsafe_split"}
_PARTS |= {"index", "_unsafe_index", "gather"}
"""Operators that read by place: the halves of a gated linear unit are two activations."""


@dataclass
class _Value:
    """The units of one tensor, and where its entries are from."""

    tensor: Tensor
    """Held, so that its identity stays unique."""
    label: Label | Callable[[], Any]
    """A function: found once another operator reads the tensor."""
    writers: frozenset[int] = frozenset()
    """Numbers of the products that wrote it."""
    weight: bool = False
    """Made of parameters and buffers alone."""
    read: bool = False
    """An operator has asked for its label."""


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
    module, tensors = stand_in(skeleton, torch.float32)
    mode = _Tracing(module, tensors)
    with torch.no_grad(), _slow_paths():
        out = run(module, example, mode)
    for leaf in tensors_of(out):
        pin(*mode.label(leaf))
    found = mode.traced
    lost = [name for name, tensor in tensors.items() if not mode.value(tensor).read]
    require_matches({"unreached": unreached}, tensors, "parameter of the network")
    missed = [name for name in lost if not matches(unreached, name)]
    if missed:
        raise ConfigError(
            f"alignment: {type(skeleton).__name__} did not reach {shorten(missed)} on the example."
            "\nOther inputs, or choices by values that depend on weights (experts), might, and the "
            "trace has to see them: give `example` inputs\nthat reach them, or name those that "
            f"take no part in the network, as regular expressions in `unreached`. {_HINT}"
        )
    for name in lost:
        pin(*found.labels[name])
    taken = {unit for dim in found.taken for unit in dim.units()}
    for unit in {unit for dim in found.left for unit in dim.units()} - taken:
        unit.pinned = True
    return found


def stand_in(skeleton: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """Copy a network with parameters that hold one number each.

    Returns:
        The copy, whose floating-point buffers are in `dtype`, and its parameters and persistent
        floating-point buffers by name.
    """
    tensors: dict[str, Tensor] = {}
    memo: dict[int, Any] = {}
    for name, parameter in skeleton.named_parameters():
        kind = dtype if parameter.dtype.is_floating_point else parameter.dtype
        empty = empty_like_parameter(parameter, kind, torch.device("cpu"))
        memo[id(parameter)] = tensors[name] = nn.Parameter(empty, requires_grad=False)
    module = copy.deepcopy(skeleton, memo).eval()
    config: Any = getattr(module, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # keys and values of a cache would pass for outputs
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # grouped products take no stand-ins
    saved = set(module.state_dict(keep_vars=True))
    for name, buffer in list(module.named_buffers(remove_duplicate=False)):
        if buffer.is_floating_point():
            path, _, key = name.rpartition(".")
            owner = module.get_submodule(path)
            owner._buffers[key] = buffer = buffer.to(dtype, copy=True)
            if name in saved:
                tensors[name] = buffer
    return module, tensors


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
    if isinstance(out, Mapping):
        out = list(out.values())
    elif dataclasses.is_dataclass(out):
        out = [getattr(out, part.name) for part in dataclasses.fields(out)]
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
        module: a copy of the network, with stand-ins for weights, to which hooks are added.
        tensors: its parameters and persistent buffers by name.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.traced = Traced()
        self._values: dict[int, _Value] = {}
        self._products = count()
        self._path: list[str] = []
        self._calls: Counter[str] = Counter()
        self._seen: set[tuple[int, int]] = set()
        for name, tensor in tensors.items():
            sizes = enumerate(tensor.shape)
            label = [Dim(fresh(n).expression, frozenset({(name, i)})) for i, n in sizes]
            self._values[id(tensor)] = _Value(tensor, label, weight=True)
            self.traced.labels[name] = label
        for path, owner in module.named_modules():
            owner.register_forward_pre_hook(lambda *_, p=path: self._path.append(p))
            owner.register_forward_hook(self._leave)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        path = self._path.pop()
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(first, Tensor):
            state = id(first), first._version  # the output of an identity shows nothing new
            label = self.value(first).label
            if state not in self._seen and isinstance(label, list):
                self.traced.seen.append((path, self._calls[path], label))
            self._seen.add(state)
        self._calls[path] += 1

    def value(self, tensor: Tensor) -> _Value:
        """Look a tensor up; one that the network did not make is a constant."""
        if id(tensor) not in self._values:
            self._values[id(tensor)] = _Value(tensor, list(map(fixed, tensor.shape)))
        return self._values[id(tensor)]

    def label(self, tensor: Tensor) -> Label:
        """Return the dimensions of a tensor that is read."""
        value = self.value(tensor)
        value.read = True
        if callable(value.label):
            value.label = value.label()
        return value.label  # type: ignore[return-value]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator and label its results."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        rule = rule_of(name, func)
        given = tensors_in((args, kwargs))
        if rule is None and not all(dim.is_fixed for t in given for dim in self.label(t)):
            return self._decomposed(func, args, kwargs)
        out = func(*args, **kwargs)
        arguments = {a.name: a.default_value for a in func._schema.arguments}
        arguments |= {**dict(zip(arguments, args, strict=False)), **kwargs}
        call = Call(name, arguments, out, self.label, self.traced)
        if tensors_in(out):
            self._note_products(call)
            self._keep(call, rule or opaque, func._schema.is_mutable)
        return out

    def _decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator without a rule by those that it consists of."""
        with self:
            if func in decomposition_table:
                out = decomposition_table[func](*args, **kwargs)
                in_place = func._schema.name.endswith("_") and out is not args[0]
                return args[0].copy_(out) if in_place else out
            out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            where = (self._path[-1] if self._path else "") or "the network itself"
            raise ConfigError(
                f"alignment: the trace has no rule for operator {func} (in module {where} of "
                f"the network), so it cannot know which units it keeps apart. {_HINT}"
            )
        return out

    def _keep(self, call: Call, rule: Rule, mutates: bool) -> None:
        """Note the labels of results, and the products that wrote them."""
        given = [self.value(tensor) for tensor in call.tensors]
        writers = frozenset[int]().union(*(value.writers for value in given))
        weight = bool(given) and all(value.weight for value in given)
        new = not weight and (call.name in _WRITES or (writers and call.name in _PARTS))
        owned = weight and call.name not in _WRITES
        made = tensors_in(call.out)

        def labels() -> list[Label]:
            found: Any = rule(call)
            found = found if found and isinstance(found[0], list) else [found] * len(made)
            return found if owned else [[Dim(dim.expression) for dim in own] for own in found]

        # networks take a column of their units to learn its shape, which fixes nothing
        own: list[Any] = [lambda: labels()[0]] if call.name == "select" else labels()
        for leaf, label in zip(made, own, strict=True):
            if mutates or id(leaf) not in self._values:  # no argument that is given back
                number = frozenset({next(self._products)}) if new else writers
                self._values[id(leaf)] = _Value(leaf, label, number, weight, read=mutates)

    def _note_products(self, call: Call) -> None:
        """Note units that an operator multiplies one by one with others."""
        written = [tensor for tensor in call.tensors if self.value(tensor).writers]
        found = self.traced.multiplied
        if call.name in _PRODUCTS and len(written) == 2:
            found.append(call.label(written[0])[-1])
        elif call.name == "convolution" and call["groups"] > 1 and written:
            found.append(call.label(call["input"])[-len(call["stride"]) - 1])
        elif call.name in ("prod", "cumprod") and written:
            found += call.dims  # of stacked activations, or of the units themselves
        elif call.name in ("mul", "div") and len({self.value(t).writers for t in written}) == 2:
            one, two = (call.label(tensor)[::-1] for tensor in written)
            found += [a for a, b in zip(one, two, strict=False) if a.size == b.size]
