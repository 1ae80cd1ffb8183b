"""Matchings whose maps mix units: CCA and optimal transport.

Their maps are no symmetry of a network with element-wise functions between its layers, so a source
computes something near what it computed. Where a mixture makes no sense at all a group keeps a
permutation (`mixes`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from gradmerge.alignment.activation import MatchingOnData
from gradmerge.alignment.base import Aligned, AlignmentContext, Moments
from gradmerge.alignment.sinkhorn import assign
from gradmerge.alignment.spec import Group, Map, Maps, PermutationSpec


def mixes(spec: PermutationSpec, group: str) -> bool:
    """Whether a group's units may be mixed, and not only change places.

    They may not where

    - the units are blocks of an axis (attention heads, which a softmax keeps apart): a tensor that
      writes them has another factor along the same stretch;
    - something other than a layer's bias or BatchNorm runs along them: a norm over the units with a
      gain for each (LayerNorm and RMSNorm on a residual stream), or a layer scale.
    """
    owners: dict[str, set[int | str]] = {}
    for name, axes in spec.tensors.items():
        kinds = owners.setdefault(name.rpartition(".")[0], set())
        kinds.update([len(axes), *(axis.role for axis in axes)])
    for use in spec.uses[group]:
        axes = spec.tensors[use.tensor]
        segment = axes[use.axis].segments[use.segment]
        if use.role == "out" and segment.size > segment.sizes[use.position]:
            return False
        if len(axes) == 1:
            kinds = owners[use.tensor.rpartition(".")[0]]
            if "square" not in kinds and not any(isinstance(k, int) and k > 1 for k in kinds):
                return False
    return True


@dataclass(frozen=True)
class MixingOnData(MatchingOnData):
    """A matching by linear maps, with permutations where units must not be mixed.

    With `reference: mean` each source is matched to the mean of those before it, once, in their
    order: maps that mix would shrink the mean from round to round.
    """

    @abstractmethod
    def mix(self, group: Group, moments: Moments) -> tuple[Map, float]:
        """The map of a group whose units may be mixed, and what it gains."""

    @abstractmethod
    def permute(self, moments: Moments) -> Tensor:
        """`[size, size]`: what it gains to put unit j of the source in the place of unit i."""

    def match_group(
        self, context: AlignmentContext, group: Group, moments: Moments
    ) -> tuple[Map, float]:
        """See `MatchingOnData.match_group`."""
        if mixes(context.spec, group.name):
            return self.mix(group, moments)
        gain = self.permute(moments)
        order = assign(gain)
        return order, float(gain.gather(1, order[:, None]).sum())

    def _to_running_mean(self, context: AlignmentContext) -> Aligned:
        first, *rest = context.sources
        maps: dict[str, Maps] = {first: {}}
        objective: dict[str, list[float]] = {first: []}
        for name in rest:
            matched = self.match(context, name, dict(maps), {})
            maps[name], objective[name] = matched.maps, matched.objective
        return Aligned(maps, objective, {"reference": "mean", "rounds": 1})
