"""Keeping the entries of a direction by their magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradmerge.errors import ConfigError
from gradmerge.preprocess.base import AbstractPreprocess, Passes, Site, Step
from gradmerge.settings import Setting, require_setting, settle

_BINS = 1 << 16
# Sums of magnitudes below this are not scaled up to (mergekit's bound).
_NOTHING = 1e-7


@dataclass(frozen=True)
class Trim(AbstractPreprocess):
    """Keep the `density` share of each direction's entries with the largest magnitude, zero the
    rest (TIES, arXiv 2306.01708).

    A tensor keeps `max(1, floor(density * entries))` entries (none at density 0). Over the whole
    model (the paper's way) every entry as large as the model's `floor(density * entries)`th largest
    is kept.
    """

    density: Setting = 0.2
    """Share of entries that is kept, in [0, 1]; one number, one a source, or by tensor."""
    scope: Literal["tensor", "model"] = "tensor"
    """Whether a share of each tensor is kept, or of the whole model."""
    rescale: Literal["none", "l1"] = "none"
    """Whether what is left is scaled to the L1 norm of before (mergekit's `rescale`)."""

    def __post_init__(self) -> None:
        """Check the density."""
        require_density("Trim", self.density)
        if self.scope == "model" and isinstance(self.density, dict):
            raise ConfigError(
                "Trim: a density by tensor has no meaning with scope model, which takes a share of "
                "the whole; use scope tensor."
            )

    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        """See `AbstractPreprocess`."""
        densities = settle("Trim.density", self.density, site.name, site.sources)
        for direction, density in zip(directions, densities, strict=True):
            size = direction.numel()
            count = min(size, max(1, int(density * size))) if density else 0
            keep_ranks(direction, size - count, size, self.rescale)
        return directions

    def survey(self, passes: Passes) -> Step:
        """See `AbstractPreprocess.survey`."""
        if self.scope == "tensor":
            return self
        thresholds = _model_thresholds(passes, self.density)

        def trim(directions: Tensor, site: Site) -> Tensor:
            for direction, threshold in zip(directions, thresholds, strict=True):
                before = l1(direction) if self.rescale == "l1" else 0.0
                direction.mul_(magnitude_bits(direction).view(direction.shape) >= threshold)
                restore_l1(direction, before)
            return directions

        return trim


@dataclass(frozen=True)
class Breadcrumbs(AbstractPreprocess):
    """Zero the largest `gamma` share of each direction's entries and the smallest, so that a
    `density` share remains (Model Breadcrumbs, arXiv 2312.06795), a tensor at a time.

    Where `density + gamma` is more than 1, fewer of the largest are zeroed.
    """

    density: Setting = 0.9
    """Share of entries that is kept, in [0, 1]; one number, one a source, or by tensor."""
    gamma: Setting = 0.01
    """Share of entries, the largest, that is zeroed, in [0, 1)."""
    rescale: Literal["none", "l1"] = "none"
    """Whether what is left is scaled to the L1 norm of before (mergekit's `rescale`)."""

    def __post_init__(self) -> None:
        """Check the shares."""
        require_density("Breadcrumbs", self.density)
        require_setting("Breadcrumbs.gamma", self.gamma, "a share in [0, 1)", lambda x: 0 <= x < 1)

    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        """See `AbstractPreprocess`."""
        densities = settle("Breadcrumbs.density", self.density, site.name, site.sources)
        gammas = settle("Breadcrumbs.gamma", self.gamma, site.name, site.sources)
        for direction, density, gamma in zip(directions, densities, gammas, strict=True):
            size = direction.numel()
            kept = int(density * size)
            first = max(0, size - kept - int(gamma * size))
            keep_ranks(direction, first, first + kept, self.rescale)
        return directions


def keep_ranks(
    direction: Tensor, first: int, last: int, rescale: Literal["none", "l1"] = "none"
) -> None:
    """Zero all entries but those whose rank by magnitude, smallest first, is in [first, last)."""
    before = l1(direction) if rescale == "l1" else 0.0
    direction.mul_(by_rank(direction, first, last))
    restore_l1(direction, before)


def l1(direction: Tensor) -> float:
    """The sum of magnitudes."""
    return float(direction.abs().sum(dtype=torch.float64))


def restore_l1(direction: Tensor, before: float) -> None:
    """Scale a direction to a sum of magnitudes, unless either is (nearly) nothing."""
    if before < _NOTHING:
        return
    after = l1(direction)
    if after >= _NOTHING:
        direction.mul_(before / after)


def by_rank(values: Tensor, first: int, last: int) -> Tensor:
    """A mask of the entries whose rank by magnitude, smallest first, is in [first, last).

    Exactly `last - first` entries; of equal ones those that stand first have the lower rank.
    Two selections, no sort.
    """
    bits = magnitude_bits(values)
    mask = torch.ones_like(bits, dtype=torch.bool)
    if first >= last:
        return mask.zero_().view(values.shape)
    for rank, above in ((first, True), (last, False)):
        if rank in (0, len(bits)):
            continue
        threshold = bits.kthvalue(rank).values  # the largest of the `rank` smallest
        below = bits < threshold
        equal = (bits == threshold).nonzero().flatten()[: rank - int(below.sum())]
        below[equal] = True
        mask &= ~below if above else below
    return mask.view(values.shape)


def require_density(who: str, density: Setting) -> None:
    """Refuse a share outside [0, 1]."""
    require_setting(f"{who}.density", density, "a share in [0, 1]", lambda x: 0 <= x <= 1)


def magnitude_bits(values: Tensor) -> Tensor:
    """Magnitudes as integers of the same order, flat: the bits of a float32 without its sign."""
    return values.reshape(-1).view(torch.int32) & 0x7FFFFFFF


def _model_thresholds(passes: Passes, density: Setting) -> list[int]:
    """The kept entries' least magnitude (as bits) of each source, in two passes of histograms."""
    high = _histograms(passes, None)
    densities = settle("Trim.density", density, "", [str(k) for k in range(len(high))])
    wanted = [
        max(1, int(density * int(counts.sum())))
        for counts, density in zip(high, densities, strict=True)
    ]
    bins, left = zip(*(_reach(c, w) for c, w in zip(high, wanted, strict=True)), strict=True)
    low = _histograms(passes, bins)
    return [
        (chosen << 16) + _reach(counts, rest)[0]
        for chosen, counts, rest in zip(bins, low, left, strict=True)
    ]


def _histograms(passes: Passes, bins: tuple[int, ...] | None) -> list[Tensor]:
    """Counts of the upper 16 bits of each source; with `bins`, of the lower ones within its bin."""
    counts: list[Tensor] = []
    for _, directions in passes():
        for k, direction in enumerate(directions):
            bits = magnitude_bits(direction)
            upper = bits >> 16
            counted = upper if bins is None else bits[upper == bins[k]] & 0xFFFF
            found = torch.bincount(counted, minlength=_BINS)
            if k == len(counts):
                counts.append(found)
            else:
                counts[k] += found
    return counts


def _reach(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin in which the `wanted`th largest lies, and how many of this bin are wanted."""
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top < wanted).sum())
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - above
