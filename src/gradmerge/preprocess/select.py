"""Selection of entries by comparing all sources."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError, require
from gradmerge.common.spec import Setting, require_setting, settle
from gradmerge.operators.masked import rank_mask
from gradmerge.preprocess.base import AbstractPreprocess, Site
from gradmerge.preprocess.trim import require_density

# Sums below these count as zero (mergekit's bounds).
_NO_SQUARES, _NO_WEIGHT = 1e-6, 1e-6


@dataclass(frozen=True)
class SelectTop(AbstractPreprocess):
    """Keep the entries with the largest variance over the sources, zero the rest (SCE, arXiv
    2408.07990).

    Among the entries of a tensor with nonzero variance, the share `density` with the largest
    variance is kept (rounded down), the same entries in every source. A single source has no
    variance, so any density below 1 zeroes it entirely.
    """

    density: Setting = 0.1
    """Share of entries to keep, in [0, 1]; 1 keeps all. One number, or by tensor; the mask is the
    same for all sources."""

    def __post_init__(self) -> None:
        """Validate the density."""
        require_density("SelectTop", self.density)
        values = self.density.values() if isinstance(self.density, dict) else [self.density]
        if any(isinstance(value, list) for value in values):
            raise ConfigError(
                "SelectTop: expected one density for all sources, got a list; entries are chosen "
                "for all sources together."
            )

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        density = settle("SelectTop.density", self.density, site.name, site.sources)[0]
        if density < 1 and directions.numel():
            variance = directions.var(dim=0, unbiased=False)
            count = int(variance.count_nonzero() * density)
            directions.mul_(rank_mask(variance, variance.numel() - count, variance.numel()))
        return directions


@dataclass(frozen=True)
class ShareOfSquares(AbstractPreprocess):
    """Weigh directions by their share of the squares of a tensor, and average the values with the
    elected sign (steps C and E of SCE, arXiv 2408.07990).

        w_k  = mean(B_k^2) / sum_j mean(B_j^2)            (1 / K if the sum is below 1e-6)
        e_k  = [sign(B_k) = s],  s = + where sum_j B_j >= 0, else -
        B'_k = e_k w_k B_k / max(sum_j e_j w_j, 1e-6)

    The sum of the directions is the weighted mean of the values that agree. After `SelectTop`, with
    coefficients of 1, this is mergekit's `sce`. Weights are computed before any value is zeroed by
    the election.
    """

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        if not directions.numel():
            return directions
        squares = [float(direction.square().mean(dtype=torch.float64)) for direction in directions]
        even = sum(squares) < _NO_SQUARES
        weights = [1 / len(squares) if even else square / sum(squares) for square in squares]
        elected = torch.where(directions.sum(dim=0) >= 0, 1.0, -1.0)
        present = torch.zeros_like(elected)
        for direction, weight in zip(directions, weights, strict=True):
            agrees = direction.sign() == elected
            present.add_(agrees, alpha=weight)
            direction.mul_(agrees).mul_(weight)
        return directions.div_(present.clamp_(min=_NO_WEIGHT))


@dataclass(frozen=True)
class Consensus(AbstractPreprocess):
    """Keep the entries that several tasks use, zero the others in all directions (Consensus merging
    with TALL masks, arXiv 2405.07813).

        M_k  = [ |B_k| >= threshold |sum_j B_j - B_k| ]
        B'_k = [ sum_j M_j >= least ] (.) B_k

    `least: 2` removes entries that no task uses ("catastrophic") or only one ("selfish");
    `least: 1` removes only the former. With fewer sources than `least`, all entries are zeroed.
    """

    threshold: Setting = 0.4
    """Ratio of an entry to the rest of the sum from which its task uses it (the paper's lambda).
    Larger values mask more; the paper selects from 0.2 to 0.6 per task. One number, one per source,
    or by tensor."""
    least: int = 2
    """Minimum number of tasks that use an entry."""

    def __post_init__(self) -> None:
        """Validate threshold and least."""
        require_setting(
            "Consensus.threshold", self.threshold, "a number of at least 0", lambda x: x >= 0
        )
        require(self.least >= 0, "Consensus.least", "at least 0", self.least)

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        thresholds = settle("Consensus.threshold", self.threshold, site.name, site.sources)
        total = directions.sum(dim=0)
        users = torch.zeros(total.shape, dtype=torch.int32)
        for direction, threshold in zip(directions, thresholds, strict=True):
            users += direction.abs() >= (total - direction).abs_().mul_(threshold)
        return directions.mul_(users >= self.least)
