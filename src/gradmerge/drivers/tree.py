"""Sources merged as a balanced binary tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from gradmerge.drivers.fold import AbstractFold, Join, Order, in_order


@dataclass(frozen=True, kw_only=True)
class Tree(AbstractFold):
    """A balanced binary tree: pairs first, then pairs of pairs; the odd one out advances.

    Each source passes through about `log2 K` merges instead of up to K - 1.
    """

    order: Order = "given"
    """Names of all sources in the order of the leaves; default: as in the recipe."""

    @override
    def joins(self, names: Sequence[str]) -> list[Join]:
        level: list[str | int] = list(in_order(self.order, names))
        found: list[Join] = []
        while len(level) > 1:
            above: list[str | int] = []
            for left, right in zip(level[::2], level[1::2], strict=False):
                found.append((left, right))
                above.append(len(found) - 1)
            level = above + level[len(level) - len(level) % 2 :]
        return found
