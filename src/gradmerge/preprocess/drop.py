"""Dropping entries of a direction at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradmerge.errors import ConfigError
from gradmerge.preprocess.base import AbstractPreprocess, Site
from gradmerge.preprocess.trim import l1, magnitude_bits, require_density, restore_l1
from gradmerge.settings import Setting, require_setting, settle

# Entries that are ranked at a time: their 64-bit keys are the largest temporary.
_BLOCK = 1 << 22


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


@dataclass(frozen=True)
class MagnitudeDrop(AbstractPreprocess):
    """Drop entries at random, small ones more often, and rescale the rest (DELLA, arXiv
    2406.11617).

        p_i  = density - epsilon + 2 epsilon (r_i - 1) / (n - 1)
        B'_i = m_i B_i / p_i,  m_i ~ Bernoulli(p_i)

    with r_i the rank of entry i by magnitude among the n of its row (1 the smallest, of equal ones
    the first), so that the mean over draws is `B`. A row runs along axis 1, at one place of all
    other axes; a tensor of one axis is one row. In a row of one entry p is the density. `epsilon`
    is mergekit's: probabilities span density +- epsilon, where the paper's epsilon is their whole
    width. mergekit rescales the whole tensor by the ratio of L1 norms instead.
    """

    density: Setting = 0.5
    """Mean probability of being kept, in [0, 1]; 1 keeps everything, 0 nothing. One number, one a
    source, or by tensor."""
    epsilon: Setting = 0.15
    """How far the smallest entry's probability lies below density and the largest one's above; both
    must stay within (0, 1)."""
    rescale: Literal["probability", "l1", "none"] = "probability"
    """Each entry by 1 / its probability (the paper), all by the L1 norm before over after
    (mergekit), or not."""
    seed: int = 0
    """Seed; each tensor and source has draws of its own."""

    def __post_init__(self) -> None:
        """Check the numbers that are known."""
        require_density("MagnitudeDrop", self.density)
        require_setting(
            "MagnitudeDrop.epsilon", self.epsilon, "a number in [0, 0.5)", lambda x: 0 <= x < 0.5
        )
        if isinstance(self.density, (int, float)) and isinstance(self.epsilon, (int, float)):
            _require_span(self.density, self.epsilon)

    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        """See `AbstractPreprocess`."""
        densities = settle("MagnitudeDrop.density", self.density, site.name, site.sources)
        epsilons = settle("MagnitudeDrop.epsilon", self.epsilon, site.name, site.sources)
        for source, direction, density, epsilon in zip(
            site.sources, directions, densities, epsilons, strict=True
        ):
            _require_span(density, epsilon)
            if density == 1 or not direction.numel():
                continue
            if density == 0:
                direction.zero_()
                continue
            before = l1(direction) if self.rescale == "l1" else 0.0
            generator = site.generator(self.seed, source)
            lines = direction.movedim(1, -1) if direction.dim() > 1 else direction
            rows = lines.reshape(-1, lines.shape[-1] if direction.dim() > 1 else lines.numel())
            for block in rows.split(max(1, _BLOCK // rows.shape[1])):
                probability = _probabilities(block, density, epsilon)
                block.mul_(torch.rand(block.shape, generator=generator) < probability)
                if self.rescale == "probability":
                    block.div_(probability)
            if direction.dim() > 2:  # the rows were a copy
                lines.copy_(rows.view(lines.shape))
            restore_l1(direction, before)
        return directions


def _require_span(density: float, epsilon: float) -> None:
    """Refuse probabilities outside (0, 1)."""
    if density not in (0, 1) and not 0 < density - epsilon <= density + epsilon < 1:
        raise ConfigError(
            "MagnitudeDrop: density - epsilon and density + epsilon must lie in (0, 1), came "
            f"density {density} and epsilon {epsilon}. Choose a smaller epsilon."
        )


def _probabilities(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """Probability of each entry being kept, by its rank in its row."""
    size = rows.shape[1]
    if size == 1:
        return torch.full_like(rows, density)
    by_rank = (torch.arange(size) / (size - 1)).mul_(2 * epsilon).add_(density - epsilon)
    # magnitude and place in one integer: numpy sorts those in a tenth of an argsort's time
    keys = magnitude_bits(rows).view(rows.shape).to(torch.int64).bitwise_left_shift_(32)
    keys.bitwise_or_(torch.arange(size)).numpy().sort(axis=1)
    order = keys.bitwise_and_(0xFFFFFFFF)
    return torch.empty_like(rows).scatter_(1, order, by_rank.expand_as(rows))
