"""Matchings whose maps mix units, where units may be mixed: CCA and optimal transport."""

from __future__ import annotations

from dataclasses import dataclass, replace

from typing_extensions import override

from gradmerge.alignment.activation import MatchingOnData
from gradmerge.alignment.base import Aligned, AlignmentContext
from gradmerge.alignment.symmetry.spec import Maps, PermutationSpec


def kept_apart(spec: PermutationSpec, group: str) -> str | None:
    """Return the reason why a group's units may only change places; None where they may be mixed.

    They may not be mixed where

    - they are multiplied one by one with others: a gate and what it gates, cells of a recurrent
      layer, channels of a depthwise convolution, queries and keys (`trace.py`);
    - the units are blocks of an axis (attention heads, which a softmax keeps apart): a tensor that
      writes them has another factor along the same stretch;
    - a vector other than a layer's bias or BatchNorm runs along them: the gains of a norm over the
      units (LayerNorm and RMSNorm on a residual stream), or a layer scale.
    """
    if spec.groups[group].multiplied:
        return "its units are multiplied one by one with others"
    for use in spec.uses[group]:
        axes = spec.tensors[use.tensor]
        segment = axes[use.axis].segments[use.segment]
        if use.role == "out" and segment.size > segment.sizes[use.position]:
            return f"its units are blocks of {use.tensor}, or lie within some"
        if len(axes) == 1 and not _is_layer_or_batch_norm(spec, use.tensor.rpartition(".")[0]):
            return f"{use.tensor} runs along its units"
    return None


def _is_layer_or_batch_norm(spec: PermutationSpec, owner: str) -> bool:
    """True if a module has a matrix of weights, or running variances."""
    own = [axes for name, axes in spec.tensors.items() if name.rpartition(".")[0] == owner]
    return any(len(axes) > 1 or axes[0].role == "square" for axes in own)


@dataclass(frozen=True)
class MixingOnData(MatchingOnData):
    """A matching by linear maps, with permutations where units must not be mixed (`kept_apart`).

    Linear maps are no symmetry of a network with element-wise functions between its layers, so a
    source keeps its function only approximately.

    With `reference: mean` each source is matched to the mean of those before it, once, in their
    order: maps that mix would shrink the mean from round to round.
    """

    @property
    @override
    def mixes_units(self) -> bool:
        return True

    def align(self, context: AlignmentContext) -> Aligned:
        """Return maps for every source; the report names the groups that are not mixed."""
        found = super().align(context)
        reasons = {name: kept_apart(context.spec, name) for name in context.spec.groups}
        apart = {name: why for name, why in reasons.items() if why is not None}
        return replace(found, report={**found.report, "permuted only": apart}) if apart else found

    def _to_running_mean(self, context: AlignmentContext) -> Aligned:
        first, *rest = context.sources
        maps: dict[str, Maps] = {first: {}}
        objective: dict[str, list[float]] = {first: []}
        for name in rest:
            matched = self.match(context, name, dict(maps), {})
            maps[name], objective[name] = matched.maps, matched.objective
        return Aligned(maps, objective, {"reference": "mean", "rounds": 1})
