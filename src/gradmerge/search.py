"""Searches for coefficients by scores on the selection split, without gradients."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from typing_extensions import override

from gradmerge.coefficients import AbstractInit, Constant, Mixup, Scaled
from gradmerge.coefficients.init import require_alpha
from gradmerge.common.errors import ConfigError

__all__ = ["AbstractSearch", "Draws", "GreedySoup", "Scales"]

Evaluate = Callable[[AbstractInit], float]

_WIDER = 4
"""Most factors that are tried beyond an edge."""


class AbstractSearch(ABC):
    """A choice among coefficients by their scores.

    All that it sees of a merge is a function from coefficients to a score; higher is better.
    """

    metric: Literal["score", "loss"]

    def count(self, num_sources: int) -> int:
        """Return the number of scores that it takes at most, for progress; 0 if not known."""
        return 0

    @abstractmethod
    def run(self, start: AbstractInit, sources: Sequence[str], score: Evaluate) -> AbstractInit:
        """Return the coefficients to merge with.

        Args:
            start: the recipe's own coefficients.
            sources: names of the sources, in order.
            score: returns the score of a merge on the selection split; higher is better.
        """


@dataclass(frozen=True)
class GreedySoup(AbstractSearch):
    """The average of the sources that help (greedy soup, arXiv 2203.05482).

    Sources are sorted by their own scores, best first (ties in their order). Each joins the average
    if the score does not get worse. Each of n members has the coefficient 1 / n.

    It takes 2 K - 1 scores for K sources: K for the order, the others for the choice.
    """

    metric: Literal["score", "loss"] = "score"
    """Criterion: the mean over tasks of their score (accuracy or bits per byte), or the loss."""

    @override
    def count(self, num_sources: int) -> int:
        return 2 * num_sources - 1

    @override
    def run(self, start: AbstractInit, sources: Sequence[str], score: Evaluate) -> AbstractInit:
        alone = [score(soup([k], len(sources))) for k in range(len(sources))]
        order = sorted(range(len(sources)), key=lambda k: -alone[k])
        members, best = order[:1], alone[order[0]]
        for k in order[1:]:
            got = score(soup([*members, k], len(sources)))
            if got >= best:
                members, best = [*members, k], got
        return soup(members, len(sources))


@dataclass(frozen=True)
class Scales(AbstractSearch):
    """The best of the given factors on all of the recipe's coefficients.

    This tunes the scale of task arithmetic (arXiv 2212.04089) for any static merge: with `init`
    Constant 1 the factors are the coefficients. It takes one score per factor, and up to four more
    if the best one is the smallest or the largest: then the grid goes on beyond it while scores
    improve, by its own ratio if that is constant, else by its last step. Factors stay positive:
    where a step down would reach zero, they are halved.
    """

    values: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    )
    """Factors to try; among equally good ones the first is chosen."""
    metric: Literal["score", "loss"] = "score"
    """Criterion: the mean over tasks of their score (accuracy or bits per byte), or the loss."""
    widen: bool = True
    """Try more factors beyond the smallest or largest one if that is the best."""

    def __post_init__(self) -> None:
        """Check that there is a factor to try."""
        if not self.values:
            raise ConfigError("Scales: expected at least one value, got none.")

    @override
    def count(self, num_sources: int) -> int:
        return len(self.values) + (_WIDER if self.widen else 0)

    @override
    def run(self, start: AbstractInit, sources: Sequence[str], score: Evaluate) -> AbstractInit:
        scores = [score(Scaled(start, value)) for value in self.values]
        if len(set(scores)) == 1 and len(set(self.values)) > 1:
            raise ConfigError(
                f"Scales: the factors {self.values} all have the same score: this merge depends "
                "only on the ratios of its coefficients (as a normalised DisjointMean, Slerp and "
                "spherical means do). Tune another number, e.g. --recipe.operator.scale of "
                "DisjointMean."
            )
        best = self.values[scores.index(max(scores))]
        if max(scores) > -math.inf and best in self._edges():
            best = self._beyond(best, max(scores), lambda value: score(Scaled(start, value)))
        return Scaled(start, best)

    def _edges(self) -> list[float]:
        """Return the smallest and the largest factor, as far as others lie beyond."""
        grid = sorted(set(self.values))
        return [] if len(grid) == 1 else [*(grid[:1] if grid[0] > 0 else []), grid[-1]]

    def _beyond(self, edge: float, reached: float, score: Callable[[float], float]) -> float:
        """Return the best factor from an edge of the grid outwards, and say what was tried."""
        grid = sorted(set(self.values), reverse=edge == min(self.values))
        best, tried = edge, list[float]()
        for value in _onwards(grid) if self.widen else ():
            try:
                got = score(value)
            except ConfigError:  # outside the range of the coefficients' link
                break
            tried.append(value)
            if not got > reached:
                break
            best, reached = value, got
        which = "smallest" if edge == min(self.values) else "largest"
        if tried:
            end = "did not improve" if best == edge else f"were tried, and {best:g} is the best"
            more = f"{', '.join(f'{value:g}' for value in tried)} beyond it {end}"
            if best == tried[-1]:
                more += ", again the last one; give such `values` to look further"
        else:
            more = "none beyond it was tried" + ("" if self.widen else " (widen: true tries some)")
        warnings.warn(
            f"Scales: the best factor of the grid is the {which}, {edge:g}; {more}.", stacklevel=3
        )
        return best


def _onwards(grid: Sequence[float]) -> list[float]:
    """Return the next factors after the last of a grid, in its direction, all positive."""
    last, step = grid[-1], grid[-1] - grid[-2]
    ratios = [b / a for a, b in pairwise(grid)] if min(grid) > 0 else []
    ratio = ratios[-1] if len(ratios) > 1 and max(ratios) - min(ratios) < 1e-3 else None
    found = []
    for _ in range(_WIDER):
        if ratio is not None:
            last *= ratio
        else:
            last = last + step if last + step > 1e-9 else last / 2
        found.append(float(f"{last:.10g}"))
    return found


@dataclass(frozen=True)
class Draws(AbstractSearch):
    """The best of several random mixing ratios (M3, arXiv 2502.15434).

    The recipe's own coefficients are not used: draw i is `Mixup` of seed `seed + i`, Beta(alpha,
    alpha) for two sources and Dirichlet for more. The choice is such a `Mixup`: its seed reproduces
    the merge, and a learned merge can start there. It takes one score per draw.
    """

    num_draws: int = 16
    """Number of draws; among equally good ones the first is chosen."""
    alpha: float = 1.0
    """Concentration of the draws; M3's code has a default of 0.5, its paper 0.4 to 2."""
    per: Literal["model", "tensor"] = "model"
    """One ratio per merge (as in the paper), or one per tensor or other unit of the granularity."""
    seed: int = 0
    """Seed of the first draw."""
    scale: float = 1.0
    """Factor on the ratios; M3 uses 1, also with task arithmetic."""
    metric: Literal["score", "loss"] = "score"
    """Criterion: the mean over tasks of their score (accuracy or bits per byte), or the loss."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.num_draws < 1:
            raise ConfigError(f"Draws: num_draws must be at least 1, got {self.num_draws}.")
        require_alpha("Draws", self.alpha)

    @override
    def count(self, num_sources: int) -> int:
        return self.num_draws

    @override
    def run(self, start: AbstractInit, sources: Sequence[str], score: Evaluate) -> AbstractInit:
        if len(sources) < 2:
            raise ConfigError(
                f"Draws: expected at least two sources to mix, got {', '.join(sources)}, whose "
                "ratio is always 1. Tune its coefficient with Scales."
            )
        draws = [
            Mixup(self.alpha, self.per, self.scale, self.seed + i) for i in range(self.num_draws)
        ]
        scores = [score(draw) for draw in draws]
        return draws[scores.index(max(scores))]


def soup(members: Sequence[int], num_sources: int) -> Constant:
    """Return coefficients `1 / |members|` for the members and 0 for the other sources."""
    return Constant([1 / len(members) if k in members else 0.0 for k in range(num_sources)])
