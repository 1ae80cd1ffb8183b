"""How operators that move entries about carry units: views, slices, concatenation, creation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradmerge.alignment.symmetry.rules import Call, Label, Labels, bare, rule
from gradmerge.alignment.symmetry.units import Dim, fixed, fresh, joined, pin_all, regroup, sliced
from gradmerge.errors import ConfigError


@rule(
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten"),
    *("unflatten", "view_as", "reshape_as"),
)
def view(call: Call) -> Labels:
    """Row-major: factors stay in order."""
    return regroup(call.label(call.first), call.out.shape, call.reason)


@rule("permute", "transpose", "t", "numpy_T", "movedim")
def permute(call: Call) -> Labels:
    """Dimensions change places."""
    dims = call.label(call.first)
    if call.name == "aten::permute":
        return [dims[axis] for axis in call["dims"]]
    if call.name == "aten::transpose" and dims:
        one, two = call.axis(call["dim0"]), call.axis(call["dim1"])
        order = list(range(len(dims)))
        order[one], order[two] = two, one
        return [dims[axis] for axis in order]
    return dims[::-1]


@rule("as_strided")
def strided(call: Call) -> Labels:
    """Another layout of the same entries, as pools write it; any other use is refused."""
    dims = call.label(call.first)
    length, plain = 1, True
    for size, stride in zip(call["size"][::-1], call["stride"][::-1], strict=True):
        plain &= size == 1 or stride == length
        length *= size
    if [dim.size for dim in dims] != list(call["size"]) or not plain or call["storage_offset"]:
        raise ConfigError(
            f"alignment: the trace has no rule for {call.reason} where it takes other entries "
            "than those of its argument, in order. Give a hand-written specification instead "
            "(`spec:` of the alignment)."
        )
    return dims


@rule("expand")
def expand(call: Call) -> Labels:
    """What is repeated is the same for every repetition, so these may change places."""
    dims = call.label(call.first)
    shape = call.out.shape
    lead = len(shape) - len(dims)
    return [
        dims[i - lead] if i >= lead and dims[i - lead].size == size else fresh(size)
        for i, size in enumerate(shape)
    ]


@rule("repeat")
def repeat(call: Call) -> Labels:
    """Repetitions of a whole dimension are its slower factor."""
    dims = call.label(call.first)
    shape = call.out.shape
    found: Label = []
    for i, size in enumerate(shape):
        back = i - len(shape)
        own = dims[back] if len(dims) >= -back else Dim(((),))
        if own.size == size:
            found.append(own)
        else:
            times = fresh(size // max(own.size, 1))
            found += bare(regroup([times, own], [size], call.reason))
    return found


@rule("select", "unbind")
def select(call: Call) -> Labels:
    """Taken by its place: the order along that dimension is fixed."""
    dims = call.label(call.first)
    axis = call.axis(call["dim"])
    dims[axis].pin(call.reason)
    left = [*dims[:axis], *dims[axis + 1 :]]
    return left if isinstance(call.out, Tensor) else [left] * len(call.out)


@rule("slice", "narrow")
def take_slice(call: Call) -> Labels:
    """A stretch; units within it may still change places."""
    dims = call.label(call.first)
    axis = call.axis(call["dim"])
    size, length = dims[axis].size, call.out.shape[axis]
    if length == size:
        return dims
    start = call["start"] or 0
    start = max(0, min(size, start + size if start < 0 else start))
    if (call.get("step") or 1) != 1:
        dims[axis].pin(call.reason)
        cut = fixed(length, call.reason)
    else:
        stop = start + length
        cut = sliced(dims[axis], start, stop, call.reason)
        ends = [(a, b) for a, b in ((0, start), (stop, size)) if a < b]
        call.leave(cut, [sliced(dims[axis], a, b, call.reason) for a, b in ends])
    return [*dims[:axis], cut, *dims[axis + 1 :]]


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split")
def split(call: Call) -> Labels:
    """Stretches, one after the other."""
    dims = call.label(call.first)
    axis = call.axis(call["dim"])
    found: list[Label | None] = []
    start = 0
    for part in call.out:
        stop = start + part.shape[axis]
        cut = sliced(dims[axis], start, stop, call.reason)
        found.append([*dims[:axis], cut, *dims[axis + 1 :]])
        start = stop
    return found


@rule("cat", "concat", "concatenate")
def concatenate(call: Call) -> Labels:
    """One after the other along a dimension; the others are the same."""
    out: Tensor = call.out
    labels = [call.label(t) for t in call["tensors"] if t.ndim == out.ndim]
    axis = call.axis(call["dim"], out.ndim)
    for label in labels[1:]:
        for i in range(out.ndim):
            if i != axis:
                call.same(labels[0][i], label[i])
    along = [label[axis] for label in labels]
    whole = joined(along)
    if all(dim.is_fixed for dim in along):
        whole = fixed(whole.size, along[0].reason)
    return [*bare(labels[0][:axis]), whole, *bare(labels[0][axis + 1 :])]


@rule("stack")
def stack(call: Call) -> Labels:
    """Along a new dimension, whose order is fixed."""
    labels = [call.label(tensor) for tensor in call["tensors"]]
    for label in labels[1:]:
        for one, two in zip(labels[0], label, strict=True):
            call.same(one, two)
    axis = call.axis(call["dim"], call.out.ndim)
    new = fixed(call.out.shape[axis], call.reason)
    return [*bare(labels[0][:axis]), new, *bare(labels[0][axis:])]


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> Labels:
    """The padding is a stretch of its own, all of whose entries are the same."""
    dims = list(call.label(call.first))
    given: Sequence[int] = call["pad"]
    for i in range(len(given) // 2):
        axis = len(dims) - 1 - i
        before, after = given[2 * i], given[2 * i + 1]
        if before == after == 0:
            continue
        if min(before, after) < 0 or dims[axis].is_fixed:
            dims[axis].pin(call.reason)
            dims[axis] = fixed(dims[axis].size + before + after, call.reason)
        else:
            parts = [fresh(before)] * (before > 0) + [dims[axis]] + [fresh(after)] * (after > 0)
            dims[axis] = joined(parts)
    return bare(dims)


@rule(
    "cumsum", "cumprod", "flip", "roll", "logcumsumexp", "sort", "argsort", "topk", "tril", "triu"
)
def ordered(call: Call) -> Labels:
    """The order along a dimension matters."""
    dims = call.label(call.first)
    given = call.get("dim", "dims")
    if call.name in ("aten::tril", "aten::triu"):
        given = [-2, -1]
    elif call.name == "aten::roll" and not given:
        given = list(range(len(dims)))
    axes = [call.axis(axis) for axis in ([given] if isinstance(given, int) else given)]
    pin_all([dims[axis] for axis in axes if dims], call.reason)
    several = not isinstance(call.out, Tensor)
    shape = call.out[0].shape if several else call.out.shape
    found = [
        fixed(shape[i], call.reason) if i in axes else Dim(dim.expression)
        for i, dim in enumerate(dims)
    ]
    return [found] * len(call.out) if several else found


@rule("index_select", "gather")
def by_index(call: Call) -> Labels:
    """Taken by index: the order along that dimension is fixed."""
    dims, axis = call.label(call["self"]), call.axis(call["dim"])
    index = call.label(call["index"])
    dims[axis].pin(call.reason)
    out = call.out.shape
    if call.name == "aten::gather":
        for i, (one, two) in enumerate(zip(dims, index, strict=True)):
            if i != axis and one.size == two.size:
                call.same(one, two)
            else:
                pin_all([one, two], call.reason)
        return bare(index)
    pin_all(index, call.reason)
    return bare([*dims[:axis], fixed(out[axis], call.reason), *dims[axis + 1 :]])


@rule("index_add", "index_copy")
def add_at(call: Call) -> Labels:
    """Rows put where an index says: that dimension is fixed, the others agree."""
    dims, source = call.label(call["self"]), call.label(call["source"])
    axis = call.axis(call["dim"])
    pin_all([dims[axis], source[axis], *call.label(call["index"])], call.reason)
    for i, (one, two) in enumerate(zip(dims, source, strict=True)):
        if i != axis:
            call.same(one, two)
    return bare(dims)


@rule("index", "_unsafe_index")
def index(call: Call) -> Labels:
    """Taken by tensors of indices: dimensions that have one are fixed, the others stay."""
    dims = call.label(call["self"])
    given = call["indices"]
    taken: list[int] = []
    place = 0
    for one in given:
        if one is None:
            place += 1
            continue
        pin_all(call.label(one), call.reason)
        count = one.ndim if one.dtype.is_floating_point is False and one.dtype.itemsize == 1 else 1
        taken += range(place, place + count)  # a mask takes as many dimensions as it has
        place += count
    pin_all([dims[axis] for axis in taken], call.reason)
    kept = [i for i in range(len(dims)) if i not in taken]
    shape = call.out.shape
    new = [fixed(size, call.reason) for size in shape]
    if not taken:
        return bare(dims)
    count = len(shape) - len(kept)
    together = [i for i, one in enumerate(given) if one is not None]
    joint = together == list(range(together[0], together[-1] + 1))
    front = taken[0] if joint else 0
    before = [dims[i] for i in kept[:front]]
    return bare([*before, *new[front : front + count], *(dims[i] for i in kept[front:])])


@rule(
    *("index_put", "_unsafe_index_put", "scatter", "scatter_add", "scatter_reduce"),
    *("index_fill", "one_hot", "nonzero", "masked_select", "masked_scatter"),
    *("slice_scatter", "select_scatter", "searchsorted", "bucketize", "bincount", "diagonal"),
    *("eye", "arange", "linspace", "tril_indices", "triu_indices", "scalar_tensor", "unfold"),
)
def opaque(call: Call) -> Labels:
    """Everything that goes in keeps its order, and so does what comes out."""
    for tensor in call.tensors:
        pin_all(call.label(tensor), call.reason)
    found = [fixed_label(leaf, call.reason) for leaf in _outputs(call.out)]
    return found[0] if isinstance(call.out, Tensor) else [*found]


def _outputs(out: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def fixed_label(tensor: Tensor, reason: str) -> Label:
    """Dimensions whose order is fixed."""
    return [fixed(size, reason) for size in tensor.shape]


@rule(
    *("zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "empty_strided"),
    *("empty_permuted",),
)
def uniform(call: Call) -> Labels:
    """The same everywhere, so that any units may run along it."""
    return [fresh(size) for size in call.out.shape]
