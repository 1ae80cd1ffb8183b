"""Sources merged one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from gradmerge.drivers.fold import AbstractFold, Join, Order, in_order


@dataclass(frozen=True, kw_only=True)
class Pairwise(AbstractFold):
    """The first source with the second, the result with the third, and so on (NP Merge's fold,
    arXiv 2412.15467).

    The result depends on the order, and the later a source joins, the fewer steps can undo its
    weight; the provenance records the order and the coefficients of each step.
    """

    order: Order = "given"
    """Names of all sources in the order that they join; default: as in the recipe."""

    @override
    def joins(self, names: Sequence[str]) -> list[Join]:
        return chain_joins(in_order(self.order, names))


def chain_joins(names: Sequence[str]) -> list[Join]:
    """Return the steps that merge the first two, then each further one onto the result."""
    return [(n - 1 if n else names[0], name) for n, name in enumerate(names[1:])]
