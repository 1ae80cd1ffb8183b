"""Entries that compete for their place, within a source and between sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.errors import ConfigError
from gradmerge.preprocess.base import AbstractPreprocess, Passes, Site, Step

_HALF = 1 << 16
_NOTHING = 1e-12
_BLOCK = 1 << 20

Keys = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ParameterCompetition(AbstractPreprocess):
    """Weigh entries by how large they are in their source and how far the sources agree on them,
    and keep the best (PCB-Merging, arXiv 2410.02396, as in duguodong7/pcb-merging).

        a_k  = |B_k| clipped to its `clip` and 1 - `clip` quantiles,  n_k = minmax(a_k)
        p_k  = exp(K n_k^2) tanh(B_k (.) sum_j B_j)
        s_k  = minmax(p_k clipped from below at its 1 - `density` quantile)
        B'_k = s_k sign(B_k) a_k / max(sum_j s_j, 1e-12)

    Quantiles and minmax (x -> (x - min) / (max - min), 0 where all are equal) are over the whole
    model, so that all tensors are read four times before the first is made. Under coefficients
    `lambda_k` (1 in the paper's average form, searched in 0.8 to 1.3) the sum is PCB-Merging's.
    """

    density: float = 0.1
    """Share of a source's entries that is kept, in (0, 1]; the paper's r, 0.05 to 0.1."""
    clip: float = 0.0001
    """Share of a source's magnitudes that is clipped at either end, in [0, 0.5)."""

    def __post_init__(self) -> None:
        """Check the shares."""
        if not 0 < self.density <= 1:
            raise ConfigError(
                f"ParameterCompetition.density: expected a share in (0, 1], got {self.density}."
            )
        if not 0 <= self.clip < 0.5:
            raise ConfigError(
                f"ParameterCompetition.clip: expected a share in [0, 0.5), got {self.clip}."
            )

    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        """One tensor as if it were the whole model."""
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
    """All entries, `[sources, entries]` at a time, as views: the scores of a whole tensor would
    take as much memory again.
    """
    if directions.numel():
        yield from directions.view(len(directions), -1).split(_BLOCK, dim=1)


def _competed(directions: Tensor, bounds: list[tuple[float, float]]) -> Tensor:
    """`p_k` times exp(-K), which minmax takes out again and no number of sources overflows."""
    scores = directions.mul(directions.sum(dim=0)).tanh_()
    for score, direction, (low, high) in zip(scores, directions, bounds, strict=True):
        size = _minmax(direction.abs(), low, high)
        score.mul_(size.square_().sub_(1).mul_(len(directions)).exp_())
    return scores


def _minmax(values: Tensor, low: float, high: float) -> Tensor:
    """Values clipped to [low, high], and that range mapped to [0, 1], in place."""
    values.clamp_(low, high)
    return values.sub_(low).div_(high - low) if high > low else values.zero_()


def _order_statistics(
    passes: Passes, of: Keys, ranks: Callable[[int], tuple[int, int]]
) -> list[tuple[float, float]]:
    """Two order statistics of each source's values over the whole model, exactly.

    Two passes of histograms: the upper 16 bits of each value say in which bin a rank lies, the
    lower ones where in it.

    Args:
        passes: see `AbstractPreprocess.survey`.
        of: values of directions, both `[sources, entries]`.
        ranks: from the number of entries, two ranks, 0 the smallest.
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
    """float32 values as integers in [0, 2^32) of the same order, flat."""
    bits = values.reshape(-1).view(torch.int32)
    # of negative numbers those with the larger bits are smaller
    ordered = torch.where(bits < 0, ~(bits & 0x7FFFFFFF), bits)
    return ordered.to(torch.int64).add_(1 << 31)


def _value(key: int) -> float:
    """The value that an integer of `_ordered` stands for."""
    bits = key - (1 << 31)
    sign = bits < 0
    magnitude = torch.tensor(~bits if sign else bits, dtype=torch.int32).view(torch.float32)
    return -float(magnitude) if sign else float(magnitude)


def _place(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin in which the value of a rank (0 the smallest) lies, and its rank within the bin."""
    below = counts.cumsum(0)
    place = int((below <= rank).sum())
    return place, rank - (int(below[place - 1]) if place else 0)
