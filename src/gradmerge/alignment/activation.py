"""Matching units by what they give on the same inputs."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gradmerge.alignment.base import (
    AlignmentContext,
    Matched,
    Matching,
    Moments,
    Needs,
)
from gradmerge.alignment.moments import correlation, covariances, with_mean
from gradmerge.alignment.sinkhorn import assign
from gradmerge.alignment.spec import Group, Map, Maps
from gradmerge.errors import ConfigError, shorten


@dataclass(frozen=True)
class MatchingOnData(Matching):
    """A matching that looks at each group's moments alone; groups do not depend on each other."""

    @property
    def needs(self) -> Needs | None:
        """Moments of the sources' units on data."""
        return "activations"

    @abstractmethod
    def match_group(
        self, context: AlignmentContext, group: Group, moments: Moments
    ) -> tuple[Map, float]:
        """The map of one group, and what it gains.

        Args:
            context: what may be looked at.
            group: whose units.
            moments: of the mean of the targets (first) and of the source (second).
        """

    def match(
        self, context: AlignmentContext, source: str, targets: Mapping[str, Maps], start: Maps
    ) -> Matched:
        """See `Matching.match`; the objective is the sum of the groups' gains."""
        maps: dict[str, Map] = {}
        gain = 0.0
        for group, moments in self._seen(context, source, targets):
            maps[group.name], own = self.match_group(context, group, moments)
            gain += own
        return Matched(maps, [gain])

    def _seen(
        self, context: AlignmentContext, source: str, targets: Mapping[str, Maps]
    ) -> Iterator[tuple[Group, Moments]]:
        kind = type(self).__name__
        if context.activations is None:
            raise ConfigError(
                f"{kind} needs statistics of the sources' activations, and none are given. Give "
                "`gradmerge merge` the tasks' data as well; or run `gradmerge collect` with the "
                "same files, and name its output: statistics of the recipe."
            )
        unseen = []
        for name, group in context.spec.groups.items():
            moments = with_mean(context.activations, name, source, targets)
            if moments is None:
                unseen.append(name)
            else:
                yield group, moments
        if len(unseen) == len(context.spec.groups):
            raise ConfigError(
                f"{kind}: no group of units was seen in any module's output, so nothing can be "
                f"matched; groups are {shorten(unseen)}. Use WeightMatching."
            )
        if unseen:
            warnings.warn(
                f"{kind}: {len(unseen)} groups are the output of no module and stay in their "
                f"order: {shorten(unseen)}.",
                stacklevel=2,
            )


@dataclass(frozen=True)
class ActivationMatching(MatchingOnData):
    """Each unit goes to the one that it is most like on the same inputs: a permutation.

    With x the reference's units and y the source's, for each group on its own

        C_ij = corr(x_i, y_j),     p = argmax sum_i C[i, p[i]]

    over all permutations p, by linear assignment (arXiv 2209.04836, section 3.1; arXiv 2211.08403).
    The permuted source computes what it computed. Memory: three matrices `[size, size]` of a group.
    """

    metric: Literal["correlation", "covariance"] = "correlation"
    """What is summed: correlations, or covariances (units that vary much count more)."""

    def __post_init__(self) -> None:
        """Check what can be checked without a source."""
        super().__post_init__()
        if self.metric not in ("correlation", "covariance"):
            raise ConfigError(
                "ActivationMatching.metric: expected correlation or covariance, came "
                f"{self.metric!r}."
            )

    def match_group(
        self, context: AlignmentContext, group: Group, moments: Moments
    ) -> tuple[Map, float]:
        """See `MatchingOnData.match_group`."""
        gain = correlation(moments) if self.metric == "correlation" else covariances(moments)[2]
        return _best(gain)


def _best(gain: Tensor) -> tuple[Tensor, float]:
    order = assign(gain)
    return order, float(gain.gather(1, order[:, None]).sum())
