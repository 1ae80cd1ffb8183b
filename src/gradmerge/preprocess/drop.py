"""Dropping entries of a direction at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradmerge.preprocess.base import AbstractPreprocess, Site
from gradmerge.preprocess.trim import l1, require_density, restore_l1
from gradmerge.settings import Setting, settle


@dataclass(frozen=True)
class RandomDrop(AbstractPreprocess):
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

    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        """See `AbstractPreprocess`."""
        densities = settle("RandomDrop.density", self.density, site.name, site.sources)
        for source, direction, density in zip(site.sources, directions, densities, strict=True):
            if density == 1:
                continue
            before = l1(direction) if self.rescale == "l1" else 0.0
            draws = torch.rand(direction.shape, generator=site.generator(self.seed, source))
            direction.mul_(draws < density)
            if self.rescale == "density" and density:
                direction.div_(density)
            restore_l1(direction, before)
        return directions
