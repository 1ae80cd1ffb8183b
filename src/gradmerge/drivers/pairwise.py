"""Sources merged one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from typing_extensions import override

from gradmerge.drivers.fold import AbstractFold, Node


@dataclass(frozen=True, kw_only=True)
class Pairwise(AbstractFold):
    """The first source with the second, the result with the third, and so on (NP Merge's fold,
    arXiv 2412.15467).

    The result depends on the order, and the later a source joins, the fewer steps can undo its
    weight; the provenance records the order and the coefficients of each step.
    """

    @override
    def fold(self, models: list[Node], merge: Callable[[Node, Node], Node]) -> None:
        reduce(merge, models)
