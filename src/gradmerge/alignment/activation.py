"""Matching units by their activations on the same inputs."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from typing_extensions import override

from gradmerge.alignment.base import AlignmentContext, Matched, Matching, Needs, assign
from gradmerge.alignment.moments import Pairing, correlation, covariances
from gradmerge.alignment.symmetry.spec import Map, Maps
from gradmerge.common.errors import ConfigError, require, shorten


@dataclass(frozen=True)
class MatchingOnData(Matching):
    """A matching of one group after the other, by their moments on data."""

    @property
    @override
    def needs(self) -> Needs | None:
        return "activations"

    @abstractmethod
    def match_group(self, units: Pairing) -> tuple[Map, float]:
        """Return the map of one group and its gain."""

    def match(
        self, context: AlignmentContext, source: str, targets: Mapping[str, Maps], start: Maps
    ) -> Matched:
        """Match one group after the other; the objective is the sum of their gains.

        Raises:
            ConfigError: there are no statistics, or of no group at all.
        """
        kind = type(self).__name__
        if self.needs is not None and context.activations is None:
            raise ConfigError(
                f"{kind} needs the sources' activations on data, and the recipe names no "
                "statistics.\nGive `gradmerge merge` the tasks' data as well; or run `gradmerge "
                "collect` with this recipe and its data, and name the output: statistics of the "
                "recipe."
            )
        groups = context.spec.groups
        seen = {n: group for n, group in groups.items() if group.places or self.needs is None}
        unseen = [name for name in groups if name not in seen]
        if unseen and not seen:
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
        maps: dict[str, Map] = {}
        total = 0.0
        for name, group in seen.items():
            maps[name], gain = self.match_group(Pairing(context, group, source, targets, maps))
            total += gain
        return Matched(maps, [total])


@dataclass(frozen=True)
class ActivationMatching(MatchingOnData):
    """Each unit goes to the one that it is most like on the same inputs: a permutation.

    With x the reference's units and y the source's, for each group on its own

        C_ij = corr(x_i, y_j),     p = argmax sum_i C[i, p[i]]

    over all permutations p, by linear assignment (arXiv 2209.04836, section 3.1; arXiv 2211.08403).
    With several targets C is the mean of theirs, each under its own permutation, so that the sum
    over pairs of sources never falls from round to round. The permuted source computes the same
    function as before. Memory: a few matrices `[size, size]` of one group.
    """

    metric: Literal["correlation", "covariance"] = "correlation"
    """Sum correlations, or covariances (units that vary much count more)."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        known = self.metric in ("correlation", "covariance")
        require(known, "ActivationMatching.metric", "correlation or covariance", repr(self.metric))

    @override
    def match_group(self, units: Pairing) -> tuple[Map, float]:
        total = torch.zeros(units.group.size, units.group.size, dtype=torch.float64)
        for target in units.targets:
            moments = units.moments(target, units.source)
            gain = correlation(moments) if self.metric == "correlation" else covariances(moments)[2]
            total += units.mapped(target, gain) / len(units.targets)
        return assign(total)
