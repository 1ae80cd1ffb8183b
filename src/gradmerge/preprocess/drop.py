"""Dropping entries of a direction at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradmerge.preprocess.base import Site
from gradmerge.preprocess.selection import AbstractSelection, Selection
from gradmerge.preprocess.trim import require_density
from gradmerge.settings import Setting, settle


@dataclass(frozen=True)
class RandomDrop(AbstractSelection):
    """Keep each entry with probability `density`, zero the rest and rescale (DARE, arXiv
    2311.03099).

        B'_k = M_k (.) B_k / density,  M ~ Bernoulli(density)

    so that the mean over draws is `B_k`. mergekit rescales by the ratio of L1 norms instead.
    """

    density: Setting = 0.5
    """Probability of being kept, in [0, 1]; the paper's drop rate is 1 - density. One number, one a
    source, or by tensor."""
    rescale: Literal["density", "l1", "none"] = "density"
    """By 1 / density (the paper), by the L1 norm before over after (mergekit), or not."""
    seed: int = 0
    """Seed; each tensor and source has draws of its own."""

    def __post_init__(self) -> None:
        """Check the density."""
        require_density("RandomDrop", self.density)

    def select(self, directions: Selection, site: Site) -> None:
        """See `AbstractSelection`."""
        densities = settle("RandomDrop.density", self.density, site.name, site.sources)
        dropped = [k for k, density in enumerate(densities) if density < 1]
        before = {k: directions.sum_magnitudes(k) for k in dropped if self.rescale == "l1"}
        directions.keep_at_random(
            densities, [site.generator(self.seed, source) for source in site.sources]
        )
        for k in dropped:
            if self.rescale == "density" and densities[k]:
                directions.factors[k] /= densities[k]
            directions.restore(k, before.get(k, 0.0))
