"""Weight matching: permutations that bring the weights themselves close (Git Re-Basin)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from operator import itemgetter

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.alignment.base import AlignmentContext, Matched, Matching, assign
from gradmerge.alignment.symmetry.spec import Map, Maps, Use
from gradmerge.common.errors import require

# Columns that are multiplied in float64 at a time.
_PART = 1 << 14


@dataclass(frozen=True)
class WeightMatching(Matching):
    """Permutations that maximise the inner product of the weights (Git Re-Basin). Needs no data.

        maximise over P   sum_p < theta_p^target , P(theta_p^source) >

    over the tensors that use a group, which for permutations is the same as minimising the squared
    distance. In one group at a time the sum is linear, `<A, P>` with

        A = sum over uses of the group   W^target [n, rest] @ W^source(other maps applied)^T

    and its maximum is a linear assignment. Groups are visited in random order until no visit gains
    anything (arXiv 2209.04836, algorithm 1).

    The objective kept for the provenance is the sum of inner products with the target after every
    sweep; it never falls. A group on rows and columns of one tensor is not linear: of the best
    permutations for the linearised sum and for the tensors that use it once, the better one is
    taken, and only if the objective itself rises.
    """

    tolerance: float = 1e-12
    """Smallest gain, relative to the sum of the tensors' norms, that counts as a gain."""
    restarts: int = 0
    """Further descents with groups in other orders; the best objective is kept."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(self.tolerance >= 0, "WeightMatching.tolerance", "at least 0", self.tolerance)
        require(self.restarts >= 0, "WeightMatching.restarts", "at least 0", self.restarts)

    @override
    def match(
        self, context: AlignmentContext, source: str, targets: Mapping[str, Maps], start: Maps
    ) -> Matched:
        found = []
        for seed in range(self.seed, self.seed + self.restarts + 1):
            descent = _Descent(context, source, targets, start)
            found.append(descent.run(seed, self.max_iter, self.tolerance))
        return max(found, key=lambda matched: matched.objective[-1])


class _Descent:
    """One coordinate descent. Tensors are read one at a time, and read again for each group."""

    def __init__(
        self, context: AlignmentContext, source: str, targets: Mapping[str, Maps], start: Maps
    ) -> None:
        self.context, self.source, self.targets = context, source, targets
        self.maps: dict[str, Map] = {**context.spec.identity(), **start}
        compared = set(context.compared)
        self.uses = {
            group: [use for use in uses if use.tensor in compared and use.role != "square"]
            for group, uses in context.spec.uses.items()
        }

    def run(self, seed: int, max_iter: int, tolerance: float) -> Matched:
        """Sweep until no group gains."""
        spec, generator = self.context.spec, torch.Generator().manual_seed(seed)
        value, scale = self._objective([n for n in self.context.compared if spec.touched(n)])
        objective = [value]
        groups = [group for group, uses in self.uses.items() if uses]
        stale, sweeps = set(groups), 0
        while stale and sweeps < max_iter:
            sweeps += 1
            for i in torch.randperm(len(groups), generator=generator).tolist():
                group = groups[i]
                if group not in stale:  # nothing changed since its last visit
                    continue
                stale.discard(group)
                gain = self._improve(group, tolerance * scale)
                value += gain
                if gain > 0:
                    stale |= {g for use in self.uses[group] for g in spec.touched(use.tensor)}
                    if not _crossed(self.uses[group]):  # linear, so this is its best
                        stale.discard(group)
            objective.append(value)
        return Matched(self.maps, objective)

    def _improve(self, group: str, least: float) -> float:
        """Give a group its best permutation, and return the gain: 0 where it keeps the old one."""
        uses, old = self.uses[group], self.maps[group]
        scores = self._scores(uses, group)
        proposed = [assign(scores)[0]]
        crossed = _crossed(uses)
        if crossed:  # not linear in this group: measure the gain of each permutation
            once = [use for use in uses if use.tensor not in crossed]
            if once:
                proposed.append(assign(self._scores(once, group))[0])
            names = list(dict.fromkeys(use.tensor for use in uses))
            before, gains = self._objective(names)[0], []
            for permutation in proposed:
                self.maps[group] = permutation
                gains.append(self._objective(names)[0] - before)
        else:
            rows = torch.arange(len(scores))
            gains = [float((scores[rows, proposed[0]] - scores[rows, old]).sum())]
        gain, best = max(zip(gains, proposed, strict=True), key=itemgetter(0))
        self.maps[group] = best if gain > least else old
        return gain if gain > least else 0.0

    def _scores(self, uses: Sequence[Use], group: str) -> Tensor:
        """`A`: entry i, j is the gain of the sum if unit j of the source becomes unit i."""
        spec = self.context.spec
        total = torch.zeros((spec.groups[group].size,) * 2, dtype=torch.float64)
        for use in uses:
            target, mine = self._read(use.tensor)
            mine = spec.apply(self.maps, use.tensor, mine, skip=use)
            one, two = spec.expose(use, target), spec.expose(use, mine)
            for x, y in zip(one.split(_PART, dim=1), two.split(_PART, dim=1), strict=True):
                total += x.double() @ y.double().T
        return total

    def _objective(self, names: Sequence[str]) -> tuple[float, float]:
        """The sum of inner products, and of products of norms."""
        value = scale = 0.0
        for name in names:
            target, mine = (tensor.double() for tensor in self._read(name))
            value += float((target * self.context.spec.apply(self.maps, name, mine)).sum())
            scale += float(target.norm() * mine.norm())
        return value, scale

    def _read(self, name: str) -> tuple[Tensor, Tensor]:
        """The mean of the targets, each under its maps, and the source as it is."""
        every = (_wide(self.context.read(t, name, maps)) for t, maps in self.targets.items())
        target = reduce(torch.add, every) / len(self.targets)
        return target, _wide(self.context.read(self.source, name))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _crossed(uses: Sequence[Use]) -> set[str]:
    """Tensors in which the group multiplies itself: on two axes, or twice in one product."""
    return {
        one.tensor
        for one, two in combinations(uses, 2)
        if one.tensor == two.tensor and (one.axis != two.axis or one.segment == two.segment)
    }
