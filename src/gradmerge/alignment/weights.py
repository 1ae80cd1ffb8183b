"""Weight matching: permutations that bring the weights themselves close (Git Re-Basin).

    maximise over P   sum_p < theta_p^target , P(theta_p^source) >

over the tensors that use a group, which for permutations is the same as minimising the squared
distance. In one group at a time the sum is linear, `<A, P>` with

    A = sum over uses of the group   W^target [n, rest] @ W^source(other maps applied) [n, rest]^T

and its maximum is a linear assignment. Groups are visited in random order until no visit gains
anything (arXiv 2209.04836, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.alignment.base import AlignmentContext, Matched, Matching, assign
from gradmerge.alignment.symmetry.spec import Map, Maps, Use
from gradmerge.errors import ConfigError

_PART = 1 << 14


@dataclass(frozen=True)
class WeightMatching(Matching):
    """Permutations that maximise the inner product of the weights, by coordinate descent over the
    groups (Git Re-Basin, arXiv 2209.04836). Needs no data.

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
        if self.tolerance < 0 or self.restarts < 0:
            raise ConfigError(
                "WeightMatching: expected tolerance and restarts of at least 0, got "
                f"{self.tolerance} and {self.restarts}."
            )

    @override
    def match(
        self, context: AlignmentContext, source: str, targets: Mapping[str, Maps], start: Maps
    ) -> Matched:
        found = [
            _Descent(context, source, targets, start, self.seed + i).run(
                self.max_iter, self.tolerance
            )
            for i in range(self.restarts + 1)
        ]
        return max(found, key=lambda matched: matched.objective[-1])


class _Descent:
    """One coordinate descent. Tensors are read one at a time, and read again for each group."""

    def __init__(
        self,
        context: AlignmentContext,
        source: str,
        targets: Mapping[str, Maps],
        start: Maps,
        seed: int,
    ) -> None:
        self.context, self.source, self.targets = context, source, targets
        self.maps: dict[str, Map] = {**context.spec.identity(), **start}
        self.generator = torch.Generator().manual_seed(seed)
        compared = set(context.compared)
        self.uses = {
            group: [use for use in uses if use.tensor in compared and use.role != "square"]
            for group, uses in context.spec.uses.items()
        }
        self.groups = [group for group, uses in self.uses.items() if uses]
        self.names = [name for name in context.compared if context.spec.touched(name)]
        # a group's best permutation depends on others on its tensors, and on itself if crossed
        self.neighbours = {
            group: {other for use in self.uses[group] for other in context.spec.touched(use.tensor)}
            - (set() if _crossed(self.uses[group]) else {group})
            for group in self.groups
        }
        self.stale = set(self.groups)
        """Groups of which something changed since their last visit."""

    def run(self, max_iter: int, tolerance: float) -> Matched:
        """Sweep until no group gains."""
        value, scale = self._objective(self.names)
        objective = [value]
        gained, sweeps = True, 0
        while gained and sweeps < max_iter:
            gained, sweeps = False, sweeps + 1
            for i in torch.randperm(len(self.groups), generator=self.generator).tolist():
                group = self.groups[i]
                if group not in self.stale:
                    continue
                self.stale.discard(group)
                gain = self._improve(group, tolerance * scale)
                if gain > 0:
                    value, gained = value + gain, True
                    self.stale |= {g for g, near in self.neighbours.items() if group in near}
            objective.append(value)
        return Matched(dict(self.maps), objective)

    def _improve(self, group: str, least: float) -> float:
        """Give a group its best permutation, and return the gain: 0 where it keeps the old one."""
        uses = self.uses[group]
        crossed = _crossed(uses)
        scores = self._scores(uses, group)
        old = self.maps[group]
        assert isinstance(old, Tensor)
        new = assign(scores)
        if not crossed:
            rows = torch.arange(len(new))
            gain = float((scores[rows, new] - scores[rows, old]).sum())
            if gain > least:
                self.maps[group] = new
            return gain if gain > least else 0.0
        # not linear in this group: measure the gain of a permutation
        proposed = [new]
        once = [use for use in uses if use.tensor not in crossed]
        if once:
            proposed.append(assign(self._scores(once, group)))
        names = list(dict.fromkeys(use.tensor for use in uses))
        before = self._objective(names)[0]
        gains = []
        for permutation in proposed:
            self.maps[group] = permutation
            gains.append(self._objective(names)[0] - before)
        best = max(range(len(gains)), key=gains.__getitem__)
        self.maps[group] = proposed[best] if gains[best] > least else old
        return gains[best] if gains[best] > least else 0.0

    def _scores(self, uses: Sequence[Use], group: str) -> Tensor:
        """`A`: entry i, j is the gain of the sum if unit j of the source becomes unit i."""
        spec = self.context.spec
        total = torch.zeros((spec.groups[group].size,) * 2, dtype=torch.float64)
        for use in uses:
            target, mine = self._target(use.tensor), self._source(use.tensor)
            others = spec.apply(self.maps, use.tensor, mine, skip=use)
            one, two = spec.expose(use, target), spec.expose(use, others)
            for start in range(0, one.shape[1], _PART):  # in float64, a part at a time
                part = slice(start, start + _PART)
                total += one[:, part].double() @ two[:, part].double().T
        return total

    def _objective(self, names: list[str]) -> tuple[float, float]:
        """The sum of inner products, and of products of norms."""
        value = scale = 0.0
        for name in names:
            target, mine = self._target(name).double(), self._source(name).double()
            mapped = self.context.spec.apply(self.maps, name, mine)
            value += float((target * mapped).sum())
            scale += float(target.norm() * mine.norm())
        return value, scale

    def _source(self, name: str) -> Tensor:
        return _wide(self.context.read(self.source, name))

    def _target(self, name: str) -> Tensor:
        """The mean of the targets, each under its maps."""
        every = (_wide(self.context.read(t, name, maps)) for t, maps in self.targets.items())
        return reduce(torch.add, every) / len(self.targets)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _crossed(uses: Sequence[Use]) -> set[str]:
    """Tensors in which the group multiplies itself: on two axes, or twice in one product."""
    found = set()
    for i, one in enumerate(uses):
        for two in uses[:i]:
            same = (one.axis, one.segment) == (two.axis, two.segment)
            if one.tensor == two.tensor and (one.axis != two.axis or same):
                found.add(one.tensor)
    return found
