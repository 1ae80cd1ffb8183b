"""Searches for coefficients: no gradient, only scores on the selection split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gradmerge.coefficients import AbstractInit, Constant, Mixup, Scaled
from gradmerge.coefficients.init import require_alpha
from gradmerge.errors import ConfigError

__all__ = ["AbstractSearch", "Draws", "GreedySoup", "Scales"]

Evaluate = Callable[[AbstractInit], float]


class AbstractSearch(ABC):
    """A choice among coefficients by their scores.

    It sees nothing of a merge but numbers: coefficients in, a score out, higher being better.
    """

    metric: Literal["score", "loss"]

    @abstractmethod
    def run(self, start: AbstractInit, sources: Sequence[str], score: Evaluate) -> AbstractInit:
        """The coefficients to merge with.

        Args:
            start: the recipe's own.
            sources: names of the sources, in order.
            score: of the merge with these coefficients, on the selection split; higher is better.
        """


@dataclass(frozen=True)
class GreedySoup(AbstractSearch):
    """The average of those sources that help (greedy soup, arXiv 2203.05482).

    Sources are sorted by their own scores, best first (equal ones in their order). Each joins the
    average if the score does not get worse. Of n members each has the coefficient 1 / n.
    """

    metric: Literal["score", "loss"] = "score"
    """What decides: the mean over tasks of the score that tasks are judged by (accuracy, bits a
    byte), or the loss."""

    def run(self, start: AbstractInit, sources: Sequence[str], score: Evaluate) -> AbstractInit:
        """See `AbstractSearch.run`; K scores for the order, K - 1 more for the choice."""
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
    """One factor on all of the recipe's coefficients, the best of those given.

    The tuning of task arithmetic's scale (arXiv 2212.04089), for every static merge: with `init`
    Constant 1 the factors are the coefficients.
    """

    values: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    )
    """Factors to try; of equally good ones the first is taken."""
    metric: Literal["score", "loss"] = "score"
    """What decides: the mean over tasks of the score that tasks are judged by (accuracy, bits a
    byte), or the loss."""

    def __post_init__(self) -> None:
        """There must be something to try."""
        if not self.values:
            raise ConfigError("Scales: expected at least one value, got none.")

    def run(self, start: AbstractInit, sources: Sequence[str], score: Evaluate) -> AbstractInit:
        """See `AbstractSearch.run`; one score a value.

        Raises:
            ConfigError: all scores are the same.
        """
        scaled = [Scaled(start, value) for value in self.values]
        scores = [score(init) for init in scaled]
        if len(set(scores)) == 1 and len(set(self.values)) > 1:
            raise ConfigError(
                f"Scales: the factors {self.values} give one and the same score, so this merge "
                "does not depend on the size of its coefficients (a normalised DisjointMean, Slerp "
                "and means on the sphere take only their ratios). Tune another number instead, "
                "e.g. --recipe.operator.scale of DisjointMean."
            )
        return scaled[scores.index(max(scores))]


@dataclass(frozen=True)
class Draws(AbstractSearch):
    """The best of several random mixing ratios (M3, arXiv 2502.15434).

    The recipe's own coefficients are not used: draw i is `Mixup` of seed `seed + i`, Beta(alpha,
    alpha) for two sources and Dirichlet for more. What is chosen is such a `Mixup`, so that its
    seed gives the same merge again, and a learned merge can start there.
    """

    num_draws: int = 16
    """How many are scored; of equally good ones the first is taken."""
    alpha: float = 1.0
    """Concentration of the draws; M3's code takes 0.5 by default, its paper 0.4 to 2."""
    per: Literal["model", "tensor"] = "model"
    """One ratio a merge (the paper's), or one per tensor (or what else shares a coefficient)."""
    seed: int = 0
    """Seed of the first draw."""
    scale: float = 1.0
    """Factor on the ratios; M3 takes 1, also with task arithmetic."""
    metric: Literal["score", "loss"] = "score"
    """What decides: the mean over tasks of the score that tasks are judged by (accuracy, bits a
    byte), or the loss."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.num_draws < 1:
            raise ConfigError(f"Draws: num_draws must be at least 1, got {self.num_draws}.")
        require_alpha("Draws", self.alpha)

    def run(self, start: AbstractInit, sources: Sequence[str], score: Evaluate) -> AbstractInit:
        """See `AbstractSearch.run`; one score a draw.

        Raises:
            ConfigError: there is one source, whose ratio is always 1.
        """
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
    """The average of some sources: `1 / |members|` on each, 0 on the others."""
    return Constant([1 / len(members) if k in members else 0.0 for k in range(num_sources)])
