"""Rules that carry units through ATen operators.

A rule states what permuted arguments do to the result. Element-wise operators need the same units
on both sides; products sum over units that must agree; reductions do not depend on their order;
views, slices and concatenations move units about. Most norms, attention and fused layers have no
rule: the trace decomposes them into these operators.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradmerge.alignment.symmetry.units import (
    Dim,
    fixed,
    fresh,
    joined,
    pin,
    regroup,
    sliced,
    unify,
)

Label = list[Dim]
"""The dimensions of a tensor."""
Labels = Label | list[Label]
"""One label for all results, or a label per result."""


@dataclass
class Traced:
    """Units that a trace found, before they become a specification."""

    labels: dict[str, Label] = field(default_factory=dict)
    """Axes of every parameter and persistent buffer, by its first name in the module."""
    reads: set[tuple[str, int]] = field(default_factory=set)
    """Parameters' axes that products sum over."""
    seen: list[tuple[str, int, Label]] = field(default_factory=list)
    """Module, call and dimensions of every module's output, in order."""
    multiplied: list[Dim] = field(default_factory=list)
    """Dimensions whose units are multiplied one by one with others."""
    taken: list[Dim] = field(default_factory=list)
    """Stretches that slices take."""
    left: list[Dim] = field(default_factory=list)
    """Stretches that slices leave: another input may take more."""


@dataclass(frozen=True)
class Call:
    """One call of an operator."""

    name: str
    """Without namespace, overload and trailing underscore, e.g. `addmm`."""
    arguments: dict[str, Any]
    """By the schema's names, defaults included."""
    out: Any
    label: Callable[[Tensor], Label]
    """Return the dimensions of an argument."""
    traced: Traced

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return tensors_in(self.arguments)

    @property
    def dims(self) -> Label:
        """The dimensions of the first tensor among the arguments."""
        return self.label(self.tensors[0])

    @property
    def shape(self) -> torch.Size:
        """The shape of the first result."""
        return tensors_in(self.out)[0].shape

    @property
    def axes(self) -> list[int]:
        """Axes along which it works, from the front; all axes where it names none."""
        given, ndim = self.arguments.get("dim", self.arguments.get("dims")), len(self.dims)
        if given is None or given == []:
            return list(range(ndim))
        return [axis % max(ndim, 1) for axis in ([given] if isinstance(given, int) else given)]

    def sum_over(self, one: Dim, two: Dim) -> None:
        """Require the same units of two factors, which parameters among them read."""
        unify(one, two)
        self.traced.reads |= one.owners | two.owners


Rule = Callable[[Call], Labels]
_RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


_COMPOSED = {"lerp", "addcmul", "addcdiv"}
"""Element-wise operators that are decomposed to find what they multiply."""


def rule_of(name: str, operator: Any) -> Rule | None:
    """The rule of an operator, if it has one."""
    if name in _RULES:
        return _RULES[name]
    if _SPATIAL.fullmatch(name):
        return spatial
    return pointwise if torch.Tag.pointwise in operator.tags and name not in _COMPOSED else None


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and mappings."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# ---- element-wise operators ---------------------------------------------------------------------


@rule("_to_copy detach alias lift_fresh lift_fresh_copy _conj where masked_fill fill copy zero")
@rule("_softmax _log_softmax _safe_softmax")
def pointwise(call: Call) -> Labels:
    """Align axes at the right and unify them; a softmax, too, is the same in any order."""
    labels = [call.label(tensor) for tensor in call.tensors]
    found: Label = []
    for back, size in zip(range(-len(call.shape), 0), call.shape, strict=True):
        same = [label[back] for label in labels if len(label) >= -back and label[back].size == size]
        for other in same[1:]:
            unify(same[0], other)
        owners = frozenset[tuple[str, int]]().union(*(dim.owners for dim in same))
        found.append(Dim(same[-1].expression, owners) if same else fresh(size))
    return found


@rule("zeros ones full empty zeros_like ones_like full_like empty_like empty_permuted")
@rule("new_zeros new_ones new_full new_empty new_empty_strided empty_strided")
def uniform(call: Call) -> Labels:
    """The same everywhere, so that any units may run along it."""
    return [fresh(size) for size in call.shape]


# ---- products -----------------------------------------------------------------------------------


@rule("mm bmm mv dot")
def product(call: Call) -> Labels:
    """`[*batch, n, k] @ [*batch, k, m]`: the units that are summed over agree."""
    one, two = (call.label(tensor) for tensor in call.tensors)
    batch = len(two) - 2 if call.name == "bmm" else 0
    for i in range(batch):
        unify(one[i], two[i])
    call.sum_over(one[-1], two[batch])
    return [*one[:-1], *two[batch + 1 :]]


@rule("convolution")
def convolution(call: Call) -> Labels:
    """Channels are units, in groups or not; the places of pictures and kernels are fixed."""
    inputs, weight = call.label(call["input"]), call.label(call["weight"])
    places, groups = len(weight) - 2, call["groups"]
    channels = inputs[-places - 1]
    pin(*inputs[-places:], *weight[2:])
    # [out, in / groups, ...]; transposed [in, out / groups, ...]; outputs are groups x written
    group, per = regroup([weight[0]], [groups, weight[0].size // groups])
    first, second = regroup([channels], [groups, channels.size // groups])
    read, written = (per, weight[1]) if call["transposed"] else (weight[1], per)
    unify(group, first)
    call.sum_over(read, second)
    (out,) = regroup([group, written], [groups * written.size])
    if call["bias"] is not None:
        unify(out, call.label(call["bias"])[0])
    return [*inputs[: -places - 1], out, *map(fixed, call.shape[-places:])]


@rule("embedding")
def embedding(call: Call) -> Labels:
    """One row per token: tokens are fixed, columns are units."""
    rows, columns = call.label(call["weight"])
    pin(rows)
    return [*call.label(call["indices"]), columns]


# ---- reductions, and operators along an axis ----------------------------------------------------


@rule("sum mean amax amin var var_mean prod logsumexp any all linalg_vector_norm")
@rule("max min argmax argmin median mode kthvalue")
def reduction(call: Call) -> Labels:
    """No order changes the result, except for an index along the axis."""
    axes, dims = call.axes, call.dims
    if call.name.startswith("arg") or (isinstance(call.out, tuple) and call.name != "var_mean"):
        pin(*(dims[axis] for axis in axes if dims))
    if call.arguments.get("keepdim"):
        return [fresh(1) if i in axes else dim for i, dim in enumerate(dims)]
    return [dim for i, dim in enumerate(dims) if i not in axes]


@rule("cumsum cumprod logcumsumexp flip roll sort topk")
def ordered(call: Call) -> Labels:
    """The order along an axis matters."""
    axes, dims = call.axes, call.dims
    pin(*(dims[axis] for axis in axes if dims))
    sizes = enumerate(zip(dims, call.shape, strict=True))
    return [fixed(size) if i in axes else dim for i, (dim, size) in sizes]


_SPATIAL = re.compile(
    r"_?(adaptive_)?(max|avg)_pool[123]d(_with_indices)?|_?upsample_.*[123]d(_aa)?"
    r"|(reflection|replication)_pad[123]d"
)


def spatial(call: Call) -> Labels:
    """Each channel by itself; places are fixed."""
    count = int(re.findall(r"([123])d", call.name)[0])
    pin(*call.dims[-count:])
    return [*call.dims[:-count], *map(fixed, call.shape[-count:])]


# ---- views --------------------------------------------------------------------------------------


@rule("view _unsafe_view _reshape_alias squeeze unsqueeze")
def view(call: Call) -> Labels:
    """Row-major: factors stay in order."""
    return regroup(call.dims, call.shape)


@rule("as_strided")
def strided(call: Call) -> Labels:
    """A row-major view of all entries, as norms and pools take it, or one that fixes them."""
    whole = call.out.is_contiguous() and call.out.numel() == call.tensors[0].numel()
    return view(call) if whole else opaque(call)


@rule("permute transpose t")
def permute(call: Call) -> Labels:
    """Dimensions change places."""
    dims = list(call.dims)
    if call.name == "permute":
        return [dims[axis] for axis in call["dims"]]
    if dims:
        one, two = (0, -1) if call.name == "t" else (call["dim0"], call["dim1"])
        dims[one], dims[two] = dims[two], dims[one]
    return dims


@rule("expand repeat")
def repeat(call: Call) -> Labels:
    """Repetitions, which may change places, are the slower factor of a dimension."""
    padded = [fresh(1)] * (len(call.shape) - len(call.dims)) + call.dims
    found: Label = []
    for dim, size in zip(padded, call.shape, strict=True):
        times = fresh(size // max(dim.size, 1))
        found += [dim] if dim.size == size else regroup([times, dim], [size])
    return found


# ---- parts, and their concatenation -------------------------------------------------------------


@rule("select unbind")
def select(call: Call) -> Labels:
    """Taken by place: the order along that dimension is fixed."""
    dims, (axis,) = call.dims, call.axes
    pin(dims[axis])
    return [*dims[:axis], *dims[axis + 1 :]]


@rule("slice split split_with_sizes unsafe_split")
def cut(call: Call) -> Labels:
    """Stretches, one after the other; units within them may still change places."""
    dims, (axis,) = call.dims, call.axes
    whole, size = dims[axis], dims[axis].size
    taken = range(size)[slice(*map(call.arguments.get, ("start", "end", "step")))]
    if taken.step != 1:
        pin(whole)
    stop, cuts = taken.start, []
    for part in tensors_in(call.out):
        start, stop = stop, stop + part.shape[axis]
        cuts.append(sliced(whole, start, stop))
    call.traced.taken += cuts
    ends = ((0, taken.start), (stop, size))
    call.traced.left += [sliced(whole, start, end) for start, end in ends]
    return [[*dims[:axis], dim, *dims[axis + 1 :]] for dim in cuts]


@rule("cat stack")
def concatenate(call: Call) -> Labels:
    """One after the other along a (new) dimension; the others are the same."""
    axis = call["dim"] % len(call.shape)
    labels = [call.label(tensor) for tensor in call["tensors"]]
    if call.name == "stack":
        labels = [[*label[:axis], fresh(1), *label[axis:]] for label in labels]
    # vectors without entries may stand among tensors of more axes
    labels = [label for label in labels if len(label) == len(call.shape)]
    first, *rest = ([*label[:axis], *label[axis + 1 :]] for label in labels)
    for label in rest:
        for one, two in zip(first, label, strict=True):
            unify(one, two)
    return [*first[:axis], joined([label[axis] for label in labels]), *first[axis:]]


@rule("constant_pad_nd")
def pad(call: Call) -> Labels:
    """Padding is a stretch of its own, all of whose entries are the same."""
    dims, given = list(call.dims), call["pad"]
    for i, (before, after) in enumerate(zip(given[::2], given[1::2], strict=True)):
        dim = dims[-1 - i]
        if min(before, after) < 0 or dim.is_fixed:
            pin(dim)
            dims[-1 - i] = fixed(dim.size + before + after)
        else:
            dims[-1 - i] = joined([fresh(before), dim, fresh(after)])
    return dims


# ---- by index -----------------------------------------------------------------------------------


def agree(axis: int, one: Label, two: Label) -> None:
    """Require the same units along all axes but one, whose order is fixed."""
    for i, dims in enumerate(zip(one, two, strict=True)):
        if i != axis and dims[0].size == dims[1].size:
            unify(*dims)
        else:
            pin(*dims)


@rule("gather")
def gather(call: Call) -> Labels:
    """Taken by index: the order along that dimension is fixed, the others agree."""
    index = call.label(call["index"])
    agree(call.axes[0], call.dims, index)
    return index


@rule("index_add index_copy")
def add_at(call: Call) -> Labels:
    """Rows put where an index says: that dimension is fixed, the others agree."""
    pin(*call.label(call["index"]))
    agree(call.axes[0], call.dims, call.label(call["source"]))
    return call.dims


@rule("index _unsafe_index")
def index(call: Call) -> Labels:
    """Taken by tensors of indices: dimensions that have one are fixed, the others stay."""
    dims = list(call.label(call["self"]))
    kept: Label = []
    before = []  # dimensions that stay before one that is taken
    for one in call["indices"]:
        masks = one is not None and one.dtype in (torch.bool, torch.uint8)
        for dim in [dims.pop(0) for _ in range(one.ndim if masks else 1)]:
            if one is None:
                kept.append(dim)
            else:
                pin(dim, *call.label(one))
                before.append(len(kept))
    kept += dims
    front = before[0] if len(set(before)) == 1 else 0  # indices that are apart come first
    new = call.shape[front : len(call.shape) - len(kept) + front]
    return [*kept[:front], *map(fixed, new), *kept[front:]]


@rule("index_put _unsafe_index_put scatter scatter_add scatter_reduce index_fill nonzero")
@rule("masked_select masked_scatter slice_scatter select_scatter searchsorted bucketize bincount")
@rule("diagonal unfold")
def opaque(call: Call) -> Labels:
    """Arguments and results all keep their order."""
    for tensor in call.tensors:
        pin(*call.label(tensor))
    return [list(map(fixed, leaf.shape)) for leaf in tensors_in(call.out)]
