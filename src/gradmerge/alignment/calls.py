"""One call of an ATen operator as the rules see it, and the registry of rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradmerge.alignment.units import Dim, unify

Label = list[Dim]
"""The dimensions of a tensor."""
Labels = Label | Sequence[Label | None]
"""Of one output, or of several; None for one whose units are not known, which nothing may read."""


@dataclass(frozen=True)
class Call:
    """An operator, what it was called with and what came out."""

    name: str
    """Without overload and trailing underscore, e.g. `aten::addmm`."""
    arguments: dict[str, Any]
    """By the schema's names; what was left out has its default."""
    out: Any
    label: Callable[[Tensor], Label]
    """The dimensions of an argument."""
    contract: Callable[[Dim], None]
    """Notes that a dimension was summed over in a product: its parameter reads these units."""
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
