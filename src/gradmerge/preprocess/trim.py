"""Selection of entries by magnitude: TIES trimming and Model Breadcrumbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.common.spec import Setting, require_setting, settle
from gradmerge.operators import MaskedDirections
from gradmerge.preprocess.base import AbstractSelection, Passes, Site, Step, rescaled

# Threshold that no magnitude reaches.
_NONE = 0x7FFFFFFF


@dataclass(frozen=True)
class Trim(AbstractSelection):
    """Keep the share `density` of entries with the largest magnitude in each direction, zero the
    rest (TIES, arXiv 2306.01708).

    Each tensor keeps `max(1, floor(density * entries))` entries (none at density 0). With scope
    model (as in the paper), every entry at least as large as the `floor(density * entries)`th
    largest of the model is kept; tensors that the recipe freezes at the origin do not count.
    """

    density: Setting = 0.2
    """Share of entries to keep, in [0, 1]; one number, one per source, or by tensor."""
    scope: Literal["tensor", "model"] = "tensor"
    """Keep a share of each tensor, or of the whole model."""
    rescale: Literal["none", "l1"] = "none"
    """Rescale the kept entries to the L1 norm before trimming (mergekit's `rescale`), or not."""

    def __post_init__(self) -> None:
        """Validate the density."""
        require_density("Trim", self.density)
        if self.scope == "model" and isinstance(self.density, dict):
            raise ConfigError(
                "Trim: a density by tensor has no meaning with scope model, which keeps a share of "
                "the whole model. Use scope tensor."
            )

    @override
    def select(self, directions: MaskedDirections, site: Site) -> None:
        densities = settle("Trim.density", self.density, site.name, site.sources)
        size = directions.size
        with rescaled(directions, self.rescale):
            for k, density in enumerate(densities):
                count = min(size, max(1, int(density * size))) if density else 0
                directions.keep_ranks(k, size - count, size)

    @override
    def survey(self, passes: Passes) -> Step:
        if self.scope == "tensor":
            return self
        return _TrimFrom(tuple(_model_thresholds(passes, self.density)), self.rescale)


@dataclass(frozen=True)
class _TrimFrom(AbstractSelection):
    """Keep the magnitudes that reach the threshold of their source, as bits of a float32."""

    thresholds: tuple[int, ...]
    rescale: Literal["none", "l1"]

    @override
    def select(self, directions: MaskedDirections, site: Site) -> None:
        with rescaled(directions, self.rescale):
            for k, threshold in enumerate(self.thresholds):
                directions.keep_from(k, threshold)


@dataclass(frozen=True)
class Breadcrumbs(AbstractSelection):
    """Zero the largest and the smallest entries of each tensor of a direction (Model Breadcrumbs,
    arXiv 2312.06795).

    The share `gamma` of largest entries is zeroed, and as many of the smallest as leave the share
    `density`. If `density + gamma` exceeds 1, fewer of the largest are zeroed.
    """

    density: Setting = 0.9
    """Share of entries to keep, in [0, 1]; one number, one per source, or by tensor."""
    gamma: Setting = 0.01
    """Share of largest entries to zero, in [0, 1); one number, one per source, or by tensor."""
    rescale: Literal["none", "l1"] = "none"
    """Rescale the kept entries to the L1 norm before zeroing (mergekit's `rescale`), or not."""

    def __post_init__(self) -> None:
        """Validate density and gamma."""
        require_density("Breadcrumbs", self.density)
        require_setting("Breadcrumbs.gamma", self.gamma, "a share in [0, 1)", lambda x: 0 <= x < 1)

    @override
    def select(self, directions: MaskedDirections, site: Site) -> None:
        densities = settle("Breadcrumbs.density", self.density, site.name, site.sources)
        gammas = settle("Breadcrumbs.gamma", self.gamma, site.name, site.sources)
        size = directions.size
        with rescaled(directions, self.rescale):
            for k, (density, gamma) in enumerate(zip(densities, gammas, strict=True)):
                kept = int(density * size)
                first = max(0, size - kept - int(gamma * size))
                directions.keep_ranks(k, first, first + kept)


def require_density(who: str, density: Setting) -> None:
    """Reject a density outside [0, 1]."""
    require_setting(f"{who}.density", density, "a share in [0, 1]", lambda x: 0 <= x <= 1)


def _model_thresholds(passes: Passes, density: Setting) -> list[int]:
    """Return the smallest kept magnitude (as bits) of each source, from two histogram passes."""
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
    """Count the upper 16 bits per source or, given `bins`, the lower 16 within each bin."""
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
    """Return the bin of the `wanted`th largest value, and the number wanted of that bin."""
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top < wanted).sum())
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - above
