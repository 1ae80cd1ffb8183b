"""Competition of entries within and between sources (PCB-Merging)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import require
from gradmerge.preprocess.base import AbstractPreprocess, Passes, Site, Step

_HALF = 1 << 16
_NOTHING = 1e-12
_BLOCK = 1 << 20

Keys = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ParameterCompetition(AbstractPreprocess):
    """Weigh entries by their magnitude within the source and by the agreement of the sources, and
    keep the best (PCB-Merging, arXiv 2410.02396, as in duguodong7/pcb-merging).

        a_k  = |B_k| clipped to its `clip` and 1 - `clip` quantiles,  n_k = minmax(a_k)
        p_k  = exp(K n_k^2) tanh(B_k (.) sum_j B_j)
        s_k  = minmax(p_k clipped from below at its 1 - `density` quantile)
        B'_k = s_k sign(B_k) a_k / max(sum_j s_j, 1e-12)

    Quantiles and minmax (x -> (x - min) / (max - min), 0 if all are equal) are taken over the whole
    model, so all tensors are read four times before the first one is merged. With coefficients
    `lambda_k` (1 in the paper's average form, searched in 0.8 to 1.3) the sum is PCB-Merging's.
    """

    density: float = 0.1
    """Share of a source's entries to keep, in (0, 1]; the paper's r, 0.05 to 0.1."""
    clip: float = 0.0001
    """Share of a source's magnitudes to clip at each end, in [0, 0.5)."""

    def __post_init__(self) -> None:
        """Validate density and clip."""
        who = "ParameterCompetition"
        require(0 < self.density <= 1, f"{who}.density", "a share in (0, 1]", self.density)
        require(0 <= self.clip < 0.5, f"{who}.clip", "a share in [0, 0.5)", self.clip)

    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        """Process a single tensor as if it were the whole model."""
        return self.survey(lambda: iter([(site, directions.clone())]))(directions, site)

    @override
    def survey(self, passes: Passes) -> Step:
        shares = (self.clip, 1 - self.clip)

        def ends(size: int) -> tuple[int, int]:
            return int(size * shares[0]), max(0, int(size * shares[1] - 1))

        bounds = _order_statistics(passes, torch.abs, ends)

        def kept(size: int) -> tuple[int, int]:
            return min(size - 1, int(size * (1 - self.density))), size - 1

        best = _order_statistics(passes, lambda d: _competed(d, bounds), kept)

        def compete(directions: Tensor, site: Site) -> Tensor:
            for block in _blocks(directions):
                scores = _competed(block, bounds)
                for score, (low, high) in zip(scores, best, strict=True):
                    _minmax(score, low, high)
                for part, (low, high) in zip(block, bounds, strict=True):
                    clipped = part.abs().clamp_(low, high)
                    part.sign_().mul_(clipped)
                block.mul_(scores).div_(scores.sum(dim=0).clamp_(min=_NOTHING))
            return directions

        return compete


def _blocks(directions: Tensor) -> Iterator[Tensor]:
    """Iterate over all entries in views `[sources, entries]`, to save memory for their scores."""
    if directions.numel():
        yield from directions.view(len(directions), -1).split(_BLOCK, dim=1)


def _competed(directions: Tensor, bounds: list[tuple[float, float]]) -> Tensor:
    """Return `p_k` times exp(-K): minmax cancels the factor, which prevents overflow."""
    scores = directions.mul(directions.sum(dim=0)).tanh_()
    for score, direction, (low, high) in zip(scores, directions, bounds, strict=True):
        size = _minmax(direction.abs(), low, high)
        score.mul_(size.square_().sub_(1).mul_(len(directions)).exp_())
    return scores


def _minmax(values: Tensor, low: float, high: float) -> Tensor:
    """Clip values to [low, high] and map that range to [0, 1], in place."""
    values.clamp_(low, high)
    return values.sub_(low).div_(high - low) if high > low else values.zero_()


def _order_statistics(
    passes: Passes, of: Keys, ranks: Callable[[int], tuple[int, int]]
) -> list[tuple[float, float]]:
    """Return two exact order statistics of each source's values over the whole model.

    Two passes of histograms are used: the upper 16 bits of the values determine the bin of a rank,
    the lower 16 bits the position in it.

    Args:
        passes: iterates over the directions of all tensors.
        of: maps directions to values, both `[sources, entries]`.
        ranks: maps the number of entries to two ranks, 0 for the smallest.
    """
    upper = torch.zeros(0, _HALF, dtype=torch.int64)
    for _, directions in passes():
        if not len(upper):
            upper = torch.zeros(len(directions), _HALF, dtype=torch.int64)
        for block in _blocks(directions):
            for values, counts in zip(of(block), upper, strict=True):
                counts += torch.bincount(_ordered(values) >> 16, minlength=_HALF)
    size = int(upper[:1].sum())
    if not size:
        return [(0.0, 0.0)] * len(upper)
    places = [[_place(counts, rank) for rank in ranks(size)] for counts in upper]
    lower = [[torch.zeros(_HALF, dtype=torch.int64) for _ in own] for own in places]
    for _, directions in passes():
        for block in _blocks(directions):
            for values, own, counts in zip(of(block), places, lower, strict=True):
                keys = _ordered(values)
                for (chosen, _), count in zip(own, counts, strict=True):
                    count += torch.bincount(keys[keys >> 16 == chosen] & 0xFFFF, minlength=_HALF)
    found = [
        [
            _value((chosen << 16) + _place(count, rest)[0])
            for (chosen, rest), count in zip(own, counts, strict=True)
        ]
        for own, counts in zip(places, lower, strict=True)
    ]
    return [(first, second) for first, second in found]


def _ordered(values: Tensor) -> Tensor:
    """Return float32 values as integers in [0, 2^32) of the same order, flat."""
    bits = values.reshape(-1).view(torch.int32)
    # negative numbers are in the reverse order of their bits
    ordered = torch.where(bits < 0, ~(bits & 0x7FFFFFFF), bits)
    return ordered.to(torch.int64).add_(1 << 31)


def _value(key: int) -> float:
    """Return the value of an integer of `_ordered`."""
    bits = key - (1 << 31)
    sign = bits < 0
    magnitude = torch.tensor(~bits if sign else bits, dtype=torch.int32).view(torch.float32)
    return -float(magnitude) if sign else float(magnitude)


def _place(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin of the value with a rank (0 for the smallest), and its rank in the bin."""
    below = counts.cumsum(0)
    place = int((below <= rank).sum())
    return place, rank - (int(below[place - 1]) if place else 0)
