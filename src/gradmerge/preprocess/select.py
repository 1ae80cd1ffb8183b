"""Choosing entries by what all sources say of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.errors import ConfigError
from gradmerge.operators.masked import rank_mask
from gradmerge.preprocess.base import AbstractPreprocess, Site
from gradmerge.preprocess.trim import require_density
from gradmerge.spec import Setting, require_setting, settle

# Sums below these count as nothing (mergekit's bounds).
_NO_SQUARES, _NO_WEIGHT = 1e-6, 1e-6


@dataclass(frozen=True)
class SelectTop(AbstractPreprocess):
    """Keep the entries that the sources disagree on most, zero the rest (SCE, arXiv 2408.07990).

    Of a tensor's entries whose variance over the sources is not zero, the `density` share with the
    largest variance is kept (rounded down), the same ones in every source. One source has no
    variance, so that less than all of it is nothing.
    """

    density: Setting = 0.1
    """Share of the entries that is kept, in [0, 1]; 1 keeps all. One number, or by tensor: the mask
    is common to the sources."""

    def __post_init__(self) -> None:
        """Check the density."""
        require_density("SelectTop", self.density)
        values = self.density.values() if isinstance(self.density, dict) else [self.density]
        if any(isinstance(value, list) for value in values):
            raise ConfigError(
                "SelectTop: expected one density for all sources, got a list; the entries are "
                "chosen for all of them together."
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
    """Weigh directions by their share of a tensor's squares, and average what has the elected sign
    (the C and E of SCE, arXiv 2408.07990).

        w_k  = mean(B_k^2) / sum_j mean(B_j^2)            (1 / K where the sum is below 1e-6)
        e_k  = [sign(B_k) = s],  s = + where sum_j B_j >= 0, else -
        B'_k = e_k w_k B_k / max(sum_j e_j w_j, 1e-6)

    so that the sum of the directions is the weighted mean of the entries that agree. After
    `SelectTop`, under coefficients of 1, this is mergekit's `sce`. The weights are those of the
    directions before any entry is erased.
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
    """Keep the entries that several tasks use, zero the rest in all (Consensus merging with TALL
    masks, arXiv 2405.07813).

        M_k  = [ |B_k| >= threshold |sum_j B_j - B_k| ]
        B'_k = [ sum_j M_j >= least ] (.) B_k

    `least` 2 removes entries that no task uses ("catastrophic") and those of one alone ("selfish");
    1 removes the first alone. With fewer sources than `least` nothing is left.
    """

    threshold: Setting = 0.4
    """The paper's lambda: how much larger than the rest of the sum an entry must be for its task to
    use it. Larger masks out more; the paper selects among 0.2 to 0.6, for each task. One number,
    one per source, or by tensor."""
    least: int = 2
    """How many tasks must use an entry."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        require_setting(
            "Consensus.threshold", self.threshold, "a number of at least 0", lambda x: x >= 0
        )
        if self.least < 0:
            raise ConfigError(f"Consensus.least: expected at least 0, got {self.least}.")

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        thresholds = settle("Consensus.threshold", self.threshold, site.name, site.sources)
        total = directions.sum(dim=0)
        users = torch.zeros(total.shape, dtype=torch.int32)
        for direction, threshold in zip(directions, thresholds, strict=True):
            users += direction.abs() >= (total - direction).abs_().mul_(threshold)
        return directions.mul_(users >= self.least)
