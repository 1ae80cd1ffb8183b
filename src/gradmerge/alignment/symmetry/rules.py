"""How operators that compute carry units from their inputs to their outputs.

A rule states what permuted inputs do to the output. Element-wise operators need the same units on
both sides; products sum over units that must agree; reductions do not depend on their order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradmerge.alignment.symmetry.units import Dim, fixed, pin_all, regroup, unify

Label = list[Dim]
"""The dimensions of a tensor."""
Labels = Label | Sequence[Label | None]
"""Of one output, or of several; None for one whose units are not known, which nothing may read."""


@dataclass(frozen=True)
class Call:
    """An operator with the arguments and results of one call."""

    name: str
    """Without overload and trailing underscore, e.g. `aten::addmm`."""
    arguments: dict[str, Any]
    """By the schema's names; what was left out has its default."""
    out: Any
    label: Callable[[Tensor], Label]
    """The dimensions of an argument."""
    contract: Callable[[Dim], None]
    """Notes that a dimension was summed over in a product: its parameter reads these units."""
    leave: Callable[[Dim, Sequence[Dim]], None]
    """Notes what a slice took and what it left: another input may take more."""
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
        return [leaf for leaf in tree_leaves(self.arguments) if isinstance(leaf, Tensor)]

    @property
    def first(self) -> Tensor:
        """The first tensor among the arguments."""
        return self.tensors[0]

    def same(self, one: Dim, two: Dim) -> None:
        """Two dimensions run over the same units."""
        unify(one, two, self.reason)

    def axis(self, axis: int, ndim: int | None = None) -> int:
        """An axis counted from the front."""
        count = self.first.ndim if ndim is None else ndim
        return axis % count if count else 0


Rule = Callable[[Call], Labels]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of ATen."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[f"aten::{name}"] = function
        return function

    return register


def bare(dims: Sequence[Dim]) -> Label:
    """The dimensions as those of an activation: no parameter owns them."""
    return [Dim(dim.expression) for dim in dims]


def broadcast(call: Call, tensors: Sequence[Tensor], shape: Sequence[int]) -> Label:
    """Dimensions of an element-wise result: axes are aligned at the right and unified."""
    labels = [call.label(tensor) for tensor in tensors]
    weights = all(any(dim.owners for dim in label) for label in labels if label)
    found: Label = []
    for i, size in enumerate(shape):
        own = Dim(((),))
        back = i - len(shape)
        for label in labels:
            if len(label) >= -back and label[back].size == size:
                other = label[back]
                if size != 1 and own.size == size:
                    call.same(own, other)
                owners = own.owners | other.owners if weights else frozenset[tuple[str, int]]()
                own = Dim(other.expression, owners)
        found.append(own)
    return found


@rule(
    *("clone", "_to_copy", "to", "detach", "alias", "contiguous", "lift_fresh", "lift_fresh_copy"),
    *("where", "masked_fill", "fill", "copy", "zero", "dropout", "_conj", "resolve_conj"),
    *("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "native_dropout"),
    *("clamp", "clamp_min", "clamp_max", "hardtanh", "addcmul", "addcdiv", "lerp", "nan_to_num"),
)
def pointwise(call: Call) -> Labels:
    """Entry by entry; a softmax, too, gives each entry a value that no order changes."""
    out = call.out if isinstance(call.out, Tensor) else call.out[0]
    dims = broadcast(call, call.tensors, out.shape)
    return dims if isinstance(call.out, Tensor) else [dims, *[dims] * (len(call.out) - 1)]


# ---- products -----------------------------------------------------------------------------------


def _product(call: Call, one: Label, two: Label, batch: int) -> Label:
    """`[*batch, n, k] @ [*batch, k, m]`."""
    for i in range(batch):
        call.same(one[i], two[i])
    call.same(one[-1], two[batch])
    call.contract(one[-1])
    call.contract(two[batch])
    return bare([*one[:-1], *two[batch + 1 :]])


def _plus(call: Call, dims: Label, term: Tensor | None) -> Label:
    if term is None:
        return dims
    label = call.label(term)
    for back in range(-min(len(dims), len(label)), 0):
        if dims[back].size == label[back].size and dims[back].size != 1:
            call.same(dims[back], label[back])
    return dims


@rule("mm", "bmm", "mv", "dot")
def product(call: Call) -> Labels:
    """A product of matrices."""
    one = call.get("self")
    two = call.get("mat2", "vec", "tensor", "other")
    batch = 1 if call.name == "aten::bmm" else 0
    return _product(call, call.label(one), call.label(two), batch)


@rule("addmm", "baddbmm", "addmv", "_addmm_activation")
def product_plus(call: Call) -> Labels:
    """A product of matrices and a term."""
    one, two = call.get("mat1", "batch1", "mat"), call.get("mat2", "batch2", "vec")
    batch = 1 if call.name == "aten::baddbmm" else 0
    dims = _product(call, call.label(one), call.label(two), batch)
    return _plus(call, dims, call["self"])


@rule("_grouped_mm")
def experts(call: Call) -> Labels:
    """Rows by expert: `[rows, k] @ [experts, k, n]`; which expert takes which rows is fixed."""
    rows, weights = call.label(call["self"]), call.label(call["mat2"])
    if len(rows) != 2 or len(weights) != 3:
        for tensor in call.tensors:
            pin_all(call.label(tensor), call.reason)
        return [fixed(size, call.reason) for size in call.out.shape]
    pin_all([rows[0], weights[0]], call.reason)
    if call["bias"] is not None:
        call.same(weights[2], call.label(call["bias"])[-1])
        call.label(call["bias"])[0].pin(call.reason)
    return _product(call, rows, weights[1:], 0)


@rule("linear")
def linear(call: Call) -> Labels:
    """`x W^T + b`."""
    one, two = call.label(call["input"]), call.label(call["weight"])
    return _plus(call, _product(call, one, two[::-1], 0), call["bias"])


@rule("convolution", "_convolution")
def convolution(call: Call) -> Labels:
    """Channels are units, in groups or not; where a kernel looks is fixed."""
    inputs, weight = call.label(call["input"]), call.label(call["weight"])
    spatial = len(weight) - 2
    batched = len(inputs) == len(weight)
    groups: int = call["groups"]
    channels = inputs[1 if batched else 0]
    pin_all([*inputs[-spatial:], *weight[2:]], call.reason)
    outer, inner = weight[0], weight[1]
    if call["transposed"]:
        outer, inner = inner, outer  # [in, out / groups, ...]
    if groups == 1:
        call.same(channels, inner)
        call.contract(inner)
        out = Dim(outer.expression)
    else:
        # [groups x out, in]: the input's channels are groups x in
        owned = weight[0]
        group, per = regroup([owned], [groups, owned.size // groups], call.reason)
        shared = weight[1]
        first, second = regroup([channels], [groups, channels.size // groups], call.reason)
        call.same(group, first)
        read, written = (per, shared) if call["transposed"] else (shared, per)
        call.same(read, second)
        call.contract(weight[0] if call["transposed"] else shared)
        (out,) = bare(regroup([group, written], [group.size * written.size], call.reason))
    dims = [out, *[fixed(size, call.reason) for size in call.out.shape[-spatial:]]]
    if call["bias"] is not None:
        call.same(out, call.label(call["bias"])[0])
    return [*bare(inputs[:1]), *dims] if batched else dims


@rule("embedding")
def embedding(call: Call) -> Labels:
    """A row a token: the tokens are fixed, the columns are units."""
    weight = call.label(call["weight"])
    weight[0].pin(call.reason)
    return bare([*call.label(call["indices"]), weight[1]])


def attention(call: Call) -> Labels:
    """`softmax(q k^T) v`, one query head or several to a head of keys and values."""
    query, key, value = (call.label(call[name]) for name in ("query", "key", "value"))
    for one, two in ((query, key), (query, value)):
        for i in range(len(query) - 2):
            if one[i].size == two[i].size:
                call.same(one[i], two[i])
            else:
                sizes = [two[i].size, one[i].size // two[i].size]
                heads, _ = regroup([one[i]], sizes, call.reason)
                call.same(heads, two[i])
    call.same(query[-1], key[-1])
    call.same(key[-2], value[-2])
    if call.get("is_causal"):
        pin_all([query[-2], key[-2]], call.reason)
    mask = call.get("attn_mask", "attn_bias")
    if mask is not None:
        _plus(call, [*query[:-1], key[-2]], mask)
    dims = bare([*query[:-1], value[-1]])
    return dims if isinstance(call.out, Tensor) else [dims, *[None] * (len(call.out) - 1)]


# ---- norms --------------------------------------------------------------------------------------


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(call: Call) -> Labels:
    """The mean and spread over units do not depend on their order."""
    dims = call.label(call["input"])
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            _plus(call, dims, call[name])
    if isinstance(call.out, Tensor):
        return bare(dims)
    count = len(call["normalized_shape"])
    reduced = [*dims[:-count], *[Dim(((),))] * count]
    return [bare(dims), *[bare(reduced)] * (len(call.out) - 1)]


@rule("native_group_norm", "group_norm")
def group_norm(call: Call) -> Labels:
    """Groups of channels may change places as a whole, and channels within them."""
    dims = call.label(call.get("input"))
    groups: int = call.get("group", "num_groups")
    regroup([dims[1]], [groups, dims[1].size // groups], call.reason)
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            call.same(dims[1], call.label(call[name])[0])
    return bare(dims) if isinstance(call.out, Tensor) else [bare(dims), None, None]


@rule(
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    *("cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "batch_norm"),
    *("_batch_norm_no_update", "_batch_norm_impl_index"),
)
def batch_norm(call: Call) -> Labels:
    """One gain, shift, mean and variance a channel."""
    dims = call.label(call["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.get(name) is not None:
            call.same(dims[1], call.label(call[name])[0])
    return bare(dims) if isinstance(call.out, Tensor) else [bare(dims), *[None] * _rest(call)]


def _rest(call: Call) -> int:
    return len(call.out) - 1


# ---- reductions ---------------------------------------------------------------------------------


def _axes(call: Call, ndim: int) -> list[int]:
    given = call.get("dim")
    if given is None or given == []:
        return list(range(ndim))
    return [axis % ndim if ndim else 0 for axis in ([given] if isinstance(given, int) else given)]


def _reduced(call: Call, dims: Sequence[Dim]) -> Label:
    axes = _axes(call, len(dims))
    if call.get("keepdim"):
        return [Dim(((),)) if i in axes else dim for i, dim in enumerate(dims)]
    return [dim for i, dim in enumerate(dims) if i not in axes]


@rule(
    *("sum", "mean", "amax", "amin", "var", "std", "prod", "logsumexp", "any", "all", "norm"),
    *("linalg_vector_norm", "nansum", "nanmean", "var_mean", "std_mean", "count_nonzero"),
)
def reduction(call: Call) -> Labels:
    """What no order changes."""
    dims = _reduced(call, call.label(call.first))
    return dims if isinstance(call.out, Tensor) else [dims] * len(call.out)


@rule("max", "min", "argmax", "argmin", "median", "mode", "kthvalue")
def extremum(call: Call) -> Labels:
    """Like a reduction; an index of a unit fixes the units' order. Of two tensors: entry-wise."""
    if len(call.tensors) == 2:
        return pointwise(call)
    dims = call.label(call.first)
    if not isinstance(call.out, Tensor) or call.name.startswith("aten::arg"):
        pin_all([dims[axis] for axis in _axes(call, len(dims)) if dims], call.reason)
    reduced = _reduced(call, dims)
    return reduced if isinstance(call.out, Tensor) else [reduced] * len(call.out)


# ---- places of a picture ------------------------------------------------------------------------


@rule(
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d", "max_pool2d"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "mkldnn_max_pool2d"),
    *(
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "_upsample_nearest_exact2d",
    ),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d"),
    *("reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d"),
)
def spatial(call: Call) -> Labels:
    """Each channel by itself; places are fixed."""
    found = re.search(r"([123])d", call.name)
    count = int(found.group(1)) if found else 2
    dims = call.label(call.first)
    pin_all(dims[-count:], call.reason)
    out = call.out if isinstance(call.out, Tensor) else call.out[0]
    kept = bare(dims[:-count]) + [fixed(size, call.reason) for size in out.shape[-count:]]
    return kept if isinstance(call.out, Tensor) else [kept] * len(call.out)


@rule("im2col")
def patches(call: Call) -> Labels:
    """Each channel with the places below a kernel; `[batch, channels x kernel, places]`."""
    dims = call.label(call.first)
    pin_all(dims[-2:], call.reason)
    channels, out = dims[-3], call.out.shape
    kernel = fixed(out[-2] // channels.size, call.reason)
    both = regroup([channels, kernel], [out[-2]], call.reason)
    return [*bare(dims[:-3]), *bare(both), fixed(out[-1], call.reason)]
