"""Keeping the entries of a direction by their magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from typing_extensions import override

from gradmerge.errors import ConfigError
from gradmerge.operators import MaskedDirections
from gradmerge.preprocess.base import AbstractSelection, Passes, Site, Step
from gradmerge.spec import Setting, require_setting, settle

# No magnitude has these bits.
_NONE = 0x7FFFFFFF


@dataclass(frozen=True)
class Trim(AbstractSelection):
    """Keep the `density` share of each direction's entries with the largest magnitude, zero the
    rest (TIES, arXiv 2306.01708).

    A tensor keeps `max(1, floor(density * entries))` entries (none at density 0). Over the whole
    model (the paper's way) every entry as large as the model's `floor(density * entries)`th largest
    is kept; tensors that the recipe freezes at the origin do not count.
    """

    density: Setting = 0.2
    """Share of entries that is kept, in [0, 1]; one number, one per source, or by tensor."""
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

    @override
    def select(self, directions: MaskedDirections, site: Site) -> None:
        densities = settle("Trim.density", self.density, site.name, site.sources)
        for k, density in enumerate(densities):
            size = directions.size
            count = min(size, max(1, int(density * size))) if density else 0
            keep_ranks(directions, k, size - count, size, self.rescale)

    @override
    def survey(self, passes: Passes) -> Step:
        if self.scope == "tensor":
            return self
        return _TrimFrom(tuple(_model_thresholds(passes, self.density)), self.rescale)


@dataclass(frozen=True)
class _TrimFrom(AbstractSelection):
    """Keep the magnitudes that reach a threshold a source, given as the bits of a float32."""

    thresholds: tuple[int, ...]
    rescale: Literal["none", "l1"]

    @override
    def select(self, directions: MaskedDirections, site: Site) -> None:
        for k, threshold in enumerate(self.thresholds):
            before = directions.sum_magnitudes(k) if self.rescale == "l1" else 0.0
            directions.keep_from(k, threshold)
            directions.restore(k, before)


@dataclass(frozen=True)
class Breadcrumbs(AbstractSelection):
    """Zero the largest `gamma` share of each direction's entries and the smallest, so that a
    `density` share remains (Model Breadcrumbs, arXiv 2312.06795), a tensor at a time.

    Where `density + gamma` is more than 1, fewer of the largest are zeroed.
    """

    density: Setting = 0.9
    """Share of entries that is kept, in [0, 1]; one number, one per source, or by tensor."""
    gamma: Setting = 0.01
    """Share of entries, the largest, that is zeroed, in [0, 1)."""
    rescale: Literal["none", "l1"] = "none"
    """Whether what is left is scaled to the L1 norm of before (mergekit's `rescale`)."""

    def __post_init__(self) -> None:
        """Check the shares."""
        require_density("Breadcrumbs", self.density)
        require_setting("Breadcrumbs.gamma", self.gamma, "a share in [0, 1)", lambda x: 0 <= x < 1)

    @override
    def select(self, directions: MaskedDirections, site: Site) -> None:
        densities = settle("Breadcrumbs.density", self.density, site.name, site.sources)
        gammas = settle("Breadcrumbs.gamma", self.gamma, site.name, site.sources)
        size = directions.size
        for k, (density, gamma) in enumerate(zip(densities, gammas, strict=True)):
            kept = int(density * size)
            first = max(0, size - kept - int(gamma * size))
            keep_ranks(directions, k, first, first + kept, self.rescale)


def keep_ranks(
    directions: MaskedDirections, k: int, first: int, last: int, rescale: Literal["none", "l1"]
) -> None:
    """Keep ranks [first, last) of a direction, and its L1 norm where that is wanted."""
    before = directions.sum_magnitudes(k) if rescale == "l1" else 0.0
    directions.keep_ranks(k, first, last)
    directions.restore(k, before)


def require_density(who: str, density: Setting) -> None:
    """Refuse a share outside [0, 1]."""
    require_setting(f"{who}.density", density, "a share in [0, 1]", lambda x: 0 <= x <= 1)


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
    found = [
        (chosen << 16) + _reach(counts, rest)[0]
        for chosen, counts, rest in zip(bins, low, left, strict=True)
    ]
    return [f if density else _NONE for f, density in zip(found, densities, strict=True)]


def _histograms(passes: Passes, bins: tuple[int, ...] | None) -> list[Tensor]:
    """Counts of the upper 16 bits of each source; with `bins`, of the lower ones within its bin."""
    counts: list[Tensor] = []
    for site, directions in passes():
        if not site.takes_part:
            continue
        given = MaskedDirections(list(directions), None)
        for k in range(len(given)):
            found = given.count_magnitudes(k, None if bins is None else bins[k])
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
