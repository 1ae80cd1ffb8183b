"""In which order all sources are merged, two at a time: one after another, or as a tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from typing_extensions import override

from gradmerge.drivers.fold import AbstractFold, Join
from gradmerge.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Pairwise(AbstractFold):
    """The first source with the second, the result with the third, and so on (NP Merge's fold,
    arXiv 2412.15467).

    The result depends on the order, and the later a source joins, the fewer steps can undo its
    weight; the order and each step's coefficients stand in the provenance.
    """

    order: list[str] | Literal["given"] = "given"
    """Names of all sources in the order that they join; default: as the recipe has them."""

    @override
    def joins(self, names: Sequence[str]) -> list[Join]:
        names = in_order(self.order, names)
        found: list[Join] = []
        for number, name in enumerate(names[1:]):
            found.append((number - 1 if number else names[0], name))
        return found


@dataclass(frozen=True, kw_only=True)
class Tree(AbstractFold):
    """A balanced binary tree: pairs first, then pairs of pairs; the odd one out advances.

    Each source passes through about `log2 K` merges, instead of up to K - 1.
    """

    order: list[str] | Literal["given"] = "given"
    """Names of all sources in the order of the leaves; default: as the recipe has them."""

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


def in_order(order: Sequence[str] | Literal["given"], names: Sequence[str]) -> list[str]:
    """The names as an order says.

    Raises:
        ConfigError: it does not name each exactly once.
    """
    if order == "given":
        return list(names)
    unknown = [name for name in order if name not in names]
    if unknown:
        raise ConfigError(
            f"order: {unknown[0]!r} is no source; there are {', '.join(names)}."
            f"{nearest(unknown[0], names)}"
        )
    if sorted(order) != sorted(names):
        raise ConfigError(
            f"order: expected each of {', '.join(names)} once, got {', '.join(order)}."
        )
    return list(order)
