"""Dropping entries of a direction at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradmerge.preprocess.base import AbstractPreprocess, Site
from gradmerge.preprocess.trim import require_density


@dataclass(frozen=True)
class RandomDrop(AbstractPreprocess):
    """Keep each entry with probability `density`, zero the rest and rescale (DARE, arXiv
    2311.03099).

        B'_k = M_k (.) B_k / density,  M ~ Bernoulli(density)

    so that the mean over draws is `B_k`. mergekit rescales by the ratio of L1 norms instead.
    """

    density: float = 0.5
    """Probability of being kept, in (0, 1]; the paper's drop rate is 1 - density."""
    rescale: Literal["density", "l1", "none"] = "density"
    """By 1 / density (the paper), by the L1 norm before over after (mergekit), or not."""
    seed: int = 0
    """Seed; each tensor and source has draws of its own."""

    def __post_init__(self) -> None:
        """Check the density."""
        require_density("RandomDrop", self.density)

    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        """See `AbstractPreprocess`."""
        for source, direction in zip(site.sources, directions, strict=True):
            before = float(direction.abs().sum(dtype=torch.float64))
            draws = torch.rand(direction.shape, generator=site.generator(self.seed, source))
            direction.mul_(draws < self.density)
            if self.rescale == "density":
                direction.div_(self.density)
            elif self.rescale == "l1":
                after = float(direction.abs().sum(dtype=torch.float64))
                if after:
                    direction.mul_(before / after)
        return directions
