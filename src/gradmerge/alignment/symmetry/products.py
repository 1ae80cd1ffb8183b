"""Which units are multiplied one by one with other units: those may only change places.

`y = a b`, entry by entry, follows any permutation of the units of a and b, `y' = P y`, but no map
that mixes them: `(T a) (T b)` is not `T (a b)`. So it is with a gate and what it gates, with the
cells of a recurrent layer, and, in a product of two activations that sums over the units, with
queries and keys: `(T q) . (T k)` is `q . k` for orthogonal maps alone. A function of one tensor,
`x sigmoid(x)`, is no such product: all element-wise functions are followed approximately.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import count

from torch import Tensor

from gradmerge.alignment.symmetry.rules import Call
from gradmerge.alignment.symmetry.units import Dim


def _aten(*names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names)


_PRODUCTS = _aten("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv", "_addmm_activation")
_PRODUCTS |= _aten("linear", "_grouped_mm")
_WRITE = _PRODUCTS | _aten("convolution", "_convolution", "embedding")
_PARTS = _aten("slice", "narrow", "select", "unbind", "split", "split_with_sizes", "chunk")
_PARTS |= _aten("unsafe_split", "unsafe_chunk", "tensor_split")
_PARTS |= _aten("index", "_unsafe_index", "index_select", "gather")
_ONE_BY_ONE = _aten("mul", "div", "addcmul", "addcdiv")
_ALONG = _aten("prod", "cumprod")
_ATTENTION = "aten::_scaled_dot_product"


class Multiplied:
    """Follows which products wrote what each activation holds.

    What is read out of one by its place (a stretch, a part, an index) counts as another's, so that
    the halves of a gated linear unit are two.

    Args:
        weights: identities of the parameters and buffers.
    """

    def __init__(self, weights: Collection[int]) -> None:
        self.dims: list[Dim] = []
        """Dimensions along which units are multiplied."""
        self._weights = set(weights)
        """What is made of these alone is a weight, too."""
        self._writers: dict[int, frozenset[int]] = {}
        self._held: list[Tensor] = []  # identities stay unique
        self._numbers = count()

    def follow(self, call: Call, made: Sequence[Tensor]) -> None:
        """One operator, once the dimensions of its arguments are unified."""
        given = call.tensors
        self._held += made
        if given and all(id(tensor) in self._weights for tensor in given):
            self._weights.update(id(tensor) for tensor in made)
            return
        self._note(call)
        written = frozenset[int]().union(*(self._of(tensor) for tensor in given))
        for tensor in made:
            fresh = call.name in _WRITE or call.name.startswith(_ATTENTION)
            if fresh or (written and call.name in _PARTS):
                self._writers[id(tensor)] = frozenset({next(self._numbers)})
            else:
                self._writers[id(tensor)] = written

    def _of(self, tensor: Tensor) -> frozenset[int]:
        return self._writers.get(id(tensor), frozenset())

    def _note(self, call: Call) -> None:
        if call.name.startswith(_ATTENTION):
            self.dims.append(call.label(call["query"])[-1])
        elif call.name in _PRODUCTS:
            one = call.get("mat1", "batch1", "mat", "self", "input")
            two = call.get("mat2", "batch2", "vec", "weight", "tensor")
            if self._of(one) and self._of(two):
                self.dims.append(call.label(one)[-1])
        elif call.name in ("aten::convolution", "aten::_convolution") and call["groups"] > 1:
            self.dims.append(call.label(call["input"])[-len(call["stride"]) - 1])
        elif call.name in _ONE_BY_ONE:
            found = [tensor for tensor in call.tensors if self._of(tensor)]
            for i, one in enumerate(found):
                for two in found[:i]:
                    self._note_pair(call, one, two)
        elif call.name == "aten::lerp" and isinstance(call["weight"], Tensor):
            for name in ("self", "end"):
                self._note_pair(call, call["weight"], call[name])
        elif call.name in _ALONG and self._of(call.first):
            # of what was stacked, or of the units themselves
            self.dims += [dim for dim in call.label(call.first) if dim.size != 1]

    def _note_pair(self, call: Call, one: Tensor, two: Tensor) -> None:
        """A product, entry by entry, of what different products wrote."""
        if self._of(one) and self._of(two) and self._of(one) != self._of(two):
            dims = zip(call.label(one)[::-1], call.label(two)[::-1], strict=False)
            self.dims += [a for a, b in dims if a.size == b.size != 1]
