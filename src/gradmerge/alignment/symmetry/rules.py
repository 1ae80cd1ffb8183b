"""Rules that carry units through ATen operators.

A rule states what permuted arguments do to the result. Element-wise operators need the same units
on both sides; products sum over units that must agree; reductions do not depend on their order;
views, slices and concatenations move units about. Most norms, attention and fused layers have no
rule: the trace decomposes them into these operators.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradmerge.alignment.symmetry.units import (
    Dim,
    fixed,
    fresh,
    joined,
    pin_all,
    regroup,
    sliced,
    unify,
)
from gradmerge.errors import ConfigError

Label = list[Dim]
"""The dimensions of a tensor."""
Labels = Label | list[Label]
"""A label for every result of its shape, or one label per result."""


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and mappings."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


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
    contract: Callable[[Dim], None]
    """Note that a product sums over a dimension: its parameter reads these units."""
    leave: Callable[[Dim, Sequence[Dim]], None]
    """Note the parts that a slice takes and leaves: another input may take more."""
    reason: str
    """Operator and module, for units that it pins."""

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, *names: str) -> Any:
        """The first of these arguments that the schema has."""
        return next((self.arguments[name] for name in names if name in self.arguments), None)

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

    def same(self, one: Dim, two: Dim) -> None:
        """Require that two dimensions run over the same units."""
        unify(one, two, self.reason)

    def pin(self, *dims: Dim) -> None:
        """Fix the order along these dimensions."""
        pin_all(dims, self.reason)

    def fixed(self, size: int) -> Dim:
        """A new dimension whose order is fixed."""
        return fixed(size, self.reason)

    def regroup(self, dims: Sequence[Dim], sizes: Sequence[int]) -> Label:
        """The dimensions of a row-major view."""
        return regroup(dims, sizes, self.reason)

    def axes(self, *names: str) -> list[int]:
        """Axes given by the first of these arguments, from the front; all axes where none is."""
        given, ndim = self.get(*names), self.tensors[0].ndim
        if given is None or given == []:
            return list(range(ndim))
        return [axis % max(ndim, 1) for axis in ([given] if isinstance(given, int) else given)]


Rule = Callable[[Call], Labels]
_RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def rule_of(name: str, operator: Any) -> Rule | None:
    """The rule of an operator, if it has one."""
    if name in _RULES:
        return _RULES[name]
    if _SPATIAL.fullmatch(name):
        return spatial
    return pointwise if torch.Tag.pointwise in operator.tags else None


def bare(dims: Sequence[Dim]) -> Label:
    """The dimensions as those of an activation: no parameter owns them."""
    return [Dim(dim.expression) for dim in dims]


def fixed_label(tensor: Tensor, reason: str) -> Label:
    """Dimensions whose order is fixed."""
    return [fixed(size, reason) for size in tensor.shape]


# ---- element-wise operators ---------------------------------------------------------------------


@rule("_to_copy detach alias lift_fresh lift_fresh_copy _conj where masked_fill fill copy zero")
@rule("_softmax _log_softmax _safe_softmax")
def pointwise(call: Call) -> Labels:
    """Align axes at the right and unify them; a softmax, too, is the same in any order."""
    labels = [call.label(tensor) for tensor in call.tensors]
    weights = all(any(dim.owners for dim in label) for label in labels if label)
    found: Label = []
    for back, size in zip(range(-len(call.shape), 0), call.shape, strict=True):
        same = [label[back] for label in labels if len(label) >= -back and label[back].size == size]
        if not same or size == 1:
            found.append(Dim(((),)))
            continue
        for other in same[1:]:
            call.same(same[0], other)
        owners = [dim.owners for dim in same] if weights else []
        found.append(Dim(same[-1].expression, frozenset[tuple[str, int]]().union(*owners)))
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
        call.same(one[i], two[i])
    call.same(one[-1], two[batch])
    call.contract(one[-1])
    call.contract(two[batch])
    return bare([*one[:-1], *two[batch + 1 :]])


@rule("convolution")
def convolution(call: Call) -> Labels:
    """Channels are units, in groups or not; the places of pictures and kernels are fixed."""
    inputs, weight = call.label(call["input"]), call.label(call["weight"])
    places, groups = len(weight) - 2, call["groups"]
    channels = inputs[-places - 1]
    call.pin(*inputs[-places:], *weight[2:])
    # [out, in / groups, ...]; transposed [in, out / groups, ...]; outputs are groups x written
    group, per = call.regroup([weight[0]], [groups, weight[0].size // groups])
    first, second = call.regroup([channels], [groups, channels.size // groups])
    read, written = (per, weight[1]) if call["transposed"] else (weight[1], per)
    call.same(group, first)
    call.same(read, second)
    call.contract(weight[0] if call["transposed"] else weight[1])
    (out,) = bare(call.regroup([group, written], [groups * written.size]))
    if call["bias"] is not None:
        call.same(out, call.label(call["bias"])[0])
    return [*bare(inputs[: -places - 1]), out, *map(call.fixed, call.shape[-places:])]


@rule("embedding")
def embedding(call: Call) -> Labels:
    """One row per token: tokens are fixed, columns are units."""
    rows, columns = call.label(call["weight"])
    call.pin(rows)
    return bare([*call.label(call["indices"]), columns])


@rule("native_group_norm")
def group_norm(call: Call) -> Labels:
    """Groups of channels may change places as a whole, and channels within them."""
    channels, groups = call.dims[1], call["group"]
    call.regroup([channels], [groups, channels.size // groups])
    for name in ("weight", "bias"):
        if call[name] is not None:
            call.same(channels, call.label(call[name])[0])
    return bare(call.dims)


# ---- reductions, and operators along an axis ----------------------------------------------------


@rule("sum mean amax amin var var_mean prod logsumexp any all linalg_vector_norm")
def reduction(call: Call) -> Labels:
    """No order changes the result."""
    axes, dims = call.axes("dim"), call.dims
    if call.get("keepdim"):
        return [Dim(((),)) if i in axes else dim for i, dim in enumerate(dims)]
    return [dim for i, dim in enumerate(dims) if i not in axes]


@rule("max min argmax argmin median mode kthvalue")
def extremum(call: Call) -> Labels:
    """A reduction whose index, if it gives one, depends on the order; element-wise for two."""
    if len(call.tensors) == 2:
        return pointwise(call)
    if not isinstance(call.out, Tensor) or call.name.startswith("arg"):
        call.pin(*(call.dims[axis] for axis in call.axes("dim") if call.dims))
    return reduction(call)


@rule("cumsum cumprod logcumsumexp flip roll sort topk")
def ordered(call: Call) -> Labels:
    """The order along an axis matters."""
    axes, dims = call.axes("dim", "dims"), call.dims
    call.pin(*(dims[axis] for axis in axes if dims))
    return [
        call.fixed(size) if i in axes else Dim(dim.expression)
        for i, (dim, size) in enumerate(zip(dims, call.shape, strict=True))
    ]


_SPATIAL = re.compile(
    r"_?(adaptive_)?(max|avg)_pool[123]d(_with_indices)?|_?upsample_.*[123]d(_aa)?"
    r"|(reflection|replication)_pad[123]d"
)


def spatial(call: Call) -> Labels:
    """Each channel by itself; places are fixed."""
    count = int(re.findall(r"([123])d", call.name)[0])
    call.pin(*call.dims[-count:])
    return [*bare(call.dims[:-count]), *map(call.fixed, call.shape[-count:])]


# ---- views --------------------------------------------------------------------------------------


@rule("view _unsafe_view _reshape_alias squeeze unsqueeze")
def view(call: Call) -> Labels:
    """Row-major: factors stay in order."""
    return call.regroup(call.dims, call.shape)


@rule("permute transpose t")
def permute(call: Call) -> Labels:
    """Dimensions change places."""
    dims = list(call.dims)
    if call.name == "permute":
        return [dims[axis] for axis in call["dims"]]
    if call.name == "t":
        return dims[::-1]
    if dims:
        one, two = call["dim0"], call["dim1"]
        dims[one], dims[two] = dims[two], dims[one]
    return dims


@rule("as_strided")
def strided(call: Call) -> Labels:
    """Another layout of the same entries, as pools write it.

    Raises:
        ConfigError: it takes other entries.
    """
    length, plain = 1, call["storage_offset"] in (None, 0)
    for size, stride in zip(call["size"][::-1], call["stride"][::-1], strict=True):
        plain &= size == 1 or stride == length
        length *= size
    if [dim.size for dim in call.dims] != list(call["size"]) or not plain:
        raise ConfigError(
            f"alignment: the trace has no rule for {call.reason} where it takes other entries "
            "than those of its argument, in order.\nGive a hand-written specification instead "
            "(`spec:` of the alignment)."
        )
    return call.dims


@rule("expand")
def expand(call: Call) -> Labels:
    """Repetitions are all the same, so they may change places."""
    lead = len(call.shape) - len(call.dims)
    padded = [Dim(((),))] * lead + call.dims
    return [
        dim if dim.size == size else fresh(size)
        for dim, size in zip(padded, call.shape, strict=True)
    ]


@rule("repeat")
def repeat(call: Call) -> Labels:
    """Repetitions of a whole dimension are its slower factor."""
    padded = [Dim(((),))] * (len(call.shape) - len(call.dims)) + call.dims
    found: Label = []
    for dim, size in zip(padded, call.shape, strict=True):
        times = fresh(size // max(dim.size, 1))
        found += [dim] if dim.size == size else bare(call.regroup([times, dim], [size]))
    return found


# ---- parts, and their concatenation -------------------------------------------------------------


@rule("select unbind")
def select(call: Call) -> Labels:
    """Taken by place: the order along that dimension is fixed."""
    dims, (axis,) = call.dims, call.axes("dim")
    call.pin(dims[axis])
    left = [*dims[:axis], *dims[axis + 1 :]]
    return left if isinstance(call.out, Tensor) else [left] * len(call.out)


@rule("slice")
def take_slice(call: Call) -> Labels:
    """A stretch; units within it may still change places."""
    dims, (axis,) = call.dims, call.axes("dim")
    size, length = dims[axis].size, call.shape[axis]
    if length == size:
        return dims
    if call["step"] != 1:
        call.pin(dims[axis])
        cut = call.fixed(length)
    else:
        start = call["start"] or 0
        start = max(0, min(size, start + size if start < 0 else start))
        bounds = [(0, start), (start, start + length), (start + length, size)]
        before, cut, after = (sliced(dims[axis], a, b, call.reason) for a, b in bounds)
        call.leave(cut, [before, after])
    return [*dims[:axis], cut, *dims[axis + 1 :]]


@rule("split split_with_sizes unsafe_split")
def split(call: Call) -> Labels:
    """Stretches, one after the other."""
    dims, (axis,) = call.dims, call.axes("dim")
    found: list[Label] = []
    start = 0
    for part in call.out:
        stop = start + part.shape[axis]
        cut = sliced(dims[axis], start, stop, call.reason)
        found.append([*dims[:axis], cut, *dims[axis + 1 :]])
        start = stop
    return found


@rule("cat")
def concatenate(call: Call) -> Labels:
    """One after the other along a dimension; the others are the same."""
    axis = call["dim"] % len(call.shape)
    first, *rest = (call.label(t) for t in call["tensors"] if t.ndim == len(call.shape))
    for label in rest:
        for i, (one, two) in enumerate(zip(first, label, strict=True)):
            if i != axis:
                call.same(one, two)
    along = [label[axis] for label in (first, *rest)]
    whole = joined(along)
    if all(dim.is_fixed for dim in along):
        whole = fixed(whole.size, along[0].reason)
    return [*bare(first[:axis]), whole, *bare(first[axis + 1 :])]


@rule("stack")
def stack(call: Call) -> Labels:
    """Along a new dimension, whose order is fixed."""
    first, *rest = (call.label(tensor) for tensor in call["tensors"])
    for label in rest:
        for one, two in zip(first, label, strict=True):
            call.same(one, two)
    axis = call["dim"] % len(call.shape)
    return [*bare(first[:axis]), call.fixed(call.shape[axis]), *bare(first[axis:])]


@rule("constant_pad_nd")
def pad(call: Call) -> Labels:
    """Padding is a stretch of its own, all of whose entries are the same."""
    dims, given = list(call.dims), call["pad"]
    for i, (before, after) in enumerate(zip(given[::2], given[1::2], strict=True)):
        dim = dims[-1 - i]
        if min(before, after) < 0 or (dim.is_fixed and (before or after)):
            call.pin(dim)
            dims[-1 - i] = call.fixed(dim.size + before + after)
        elif before or after:
            ends = [[fresh(size)] if size else [] for size in (before, after)]
            dims[-1 - i] = joined([*ends[0], dim, *ends[1]])
    return bare(dims)


# ---- by index -----------------------------------------------------------------------------------


@rule("gather")
def gather(call: Call) -> Labels:
    """Taken by index: the order along that dimension is fixed, the others agree."""
    dims, index, (axis,) = call.label(call["self"]), call.label(call["index"]), call.axes("dim")
    for i, (one, two) in enumerate(zip(dims, index, strict=True)):
        if i != axis and one.size == two.size:
            call.same(one, two)
        else:
            call.pin(one, two)
    return bare(index)


@rule("index_add index_copy")
def add_at(call: Call) -> Labels:
    """Rows put where an index says: that dimension is fixed, the others agree."""
    dims, source, (axis,) = call.label(call["self"]), call.label(call["source"]), call.axes("dim")
    call.pin(dims[axis], source[axis], *call.label(call["index"]))
    for i, (one, two) in enumerate(zip(dims, source, strict=True)):
        if i != axis:
            call.same(one, two)
    return bare(dims)


@rule("index _unsafe_index")
def index(call: Call) -> Labels:
    """Taken by tensors of indices: dimensions that have one are fixed, the others stay."""
    dims, given = call.label(call["self"]), call["indices"]
    taken: list[int] = []
    place = 0
    for one in given:
        if one is not None:
            call.pin(*call.label(one))
        masks = one is not None and one.dtype in (torch.bool, torch.uint8)
        count = one.ndim if masks else 1  # a mask takes as many dimensions as it has
        taken += range(place, place + count) if one is not None else ()
        place += count
    if not taken:
        return bare(dims)
    call.pin(*(dims[axis] for axis in taken))
    kept = [dim for i, dim in enumerate(dims) if i not in taken]
    together = [i for i, one in enumerate(given) if one is not None]
    front = taken[0] if together == list(range(together[0], together[-1] + 1)) else 0
    new = [call.fixed(size) for size in call.shape[front : len(call.shape) - len(kept) + front]]
    return bare([*kept[:front], *new, *kept[front:]])


@rule("index_put _unsafe_index_put scatter scatter_add scatter_reduce index_fill nonzero")
@rule("masked_select masked_scatter slice_scatter select_scatter searchsorted bucketize bincount")
@rule("diagonal unfold")
def opaque(call: Call) -> Labels:
    """Arguments and results all keep their order."""
    for tensor in call.tensors:
        call.pin(*call.label(tensor))
    found = [fixed_label(leaf, call.reason) for leaf in tensors_in(call.out)]
    return found[0] if isinstance(call.out, Tensor) else found
