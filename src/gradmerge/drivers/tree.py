"""Sources merged as a balanced binary tree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from typing_extensions import override

from gradmerge.drivers.fold import AbstractFold, Node


@dataclass(frozen=True, kw_only=True)
class Tree(AbstractFold):
    """A balanced binary tree: pairs first, then pairs of pairs; the odd one out advances.

    Each source passes through about `log2 K` merges instead of up to K - 1.
    """

    @override
    def fold(self, models: list[Node], merge: Callable[[Node, Node], Node]) -> None:
        while len(models) > 1:
            pairs = zip(models[::2], models[1::2], strict=False)
            odd = models[-1:] if len(models) % 2 else []
            models = [merge(left, right) for left, right in pairs] + odd
