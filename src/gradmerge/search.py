"""Searches for coefficients: no gradient, only scores on the selection split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gradmerge.coefficients import AbstractInit, Constant, Scaled
from gradmerge.errors import ConfigError

__all__ = ["AbstractSearch", "GreedySoup", "Scales"]

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
            came = score(soup([*members, k], len(sources)))
            if came >= best:
                members, best = [*members, k], came
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
            raise ConfigError("Scales: expected at least one value, came none.")

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


def soup(members: Sequence[int], num_sources: int) -> Constant:
    """The average of some sources: `1 / |members|` on each, 0 on the others."""
    return Constant([1 / len(members) if k in members else 0.0 for k in range(num_sources)])
