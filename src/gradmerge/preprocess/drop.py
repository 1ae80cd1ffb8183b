"""Dropping entries of a direction at random."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.errors import ConfigError
from gradmerge.operators._native.kernels import run_each
from gradmerge.preprocess.base import AbstractPreprocess, Passes, Site, Step
from gradmerge.preprocess.sparsity import AbstractSelection, Selection, between, row_ranks
from gradmerge.preprocess.trim import require_density
from gradmerge.spec import Setting, require_setting, settle

# Entries that are ranked at a time: their 64-bit keys are the largest temporary.
_BLOCK = 1 << 22


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

    @override
    def select(self, directions: Selection, site: Site) -> None:
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

    def survey(self, passes: Passes) -> Step:
        """See `AbstractPreprocess.survey`: but for each entry's own factor it only selects."""
        return self if self.rescale == "probability" else _Selecting(self)

    def settled(self, site: Site) -> list[tuple[float, float]]:
        """Density and epsilon of each source."""
        densities = settle("MagnitudeDrop.density", self.density, site.name, site.sources)
        epsilons = settle("MagnitudeDrop.epsilon", self.epsilon, site.name, site.sources)
        pairs = list(zip(densities, epsilons, strict=True))
        for density, epsilon in pairs:
            _require_span(density, epsilon)
        return pairs

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        if self.rescale != "probability":
            return _Selecting(self)(directions, site)
        for source, direction, (density, epsilon) in zip(
            site.sources, directions, self.settled(site), strict=True
        ):
            if density == 1 or not direction.numel():
                continue
            if density == 0:
                direction.zero_()
                continue
            generator = site.generator(self.seed, source)
            lines = direction.movedim(1, -1) if direction.dim() > 1 else direction
            rows = lines.reshape(-1, lines.shape[-1] if direction.dim() > 1 else lines.numel())
            for block in rows.split(max(1, _BLOCK // rows.shape[1])):
                probability = _probabilities(block, density, epsilon)
                block.mul_(
                    torch.rand(block.shape, generator=generator, dtype=torch.float32) < probability
                )
                block.div_(probability)
            if direction.dim() > 2:  # the rows were a copy
                lines.copy_(rows.view(lines.shape))
        return directions


@dataclass(frozen=True)
class _Selecting(AbstractSelection):
    """`MagnitudeDrop` where one factor scales a whole direction."""

    step: MagnitudeDrop

    @override
    def select(self, directions: Selection, site: Site) -> None:
        pairs = self.step.settled(site)
        dropped = [k for k, (density, _) in enumerate(pairs) if density < 1]
        rescaled = self.step.rescale == "l1"
        before = {k: directions.sum_magnitudes(k) for k in dropped if rescaled}
        run_each(
            [
                partial(
                    directions.keep_by_row_rank,
                    k,
                    pairs[k][0] - pairs[k][1],
                    pairs[k][0] + pairs[k][1],
                    site.generator(self.step.seed, site.sources[k]),
                )
                for k in dropped
                if pairs[k][0]
            ]
        )
        for k in dropped:
            if pairs[k][0]:
                directions.restore(k, before.get(k, 0.0))
            else:
                directions.keep_none(k)


def _require_span(density: float, epsilon: float) -> None:
    """Refuse probabilities outside (0, 1)."""
    if density not in (0, 1) and not 0 < density - epsilon <= density + epsilon < 1:
        raise ConfigError(
            "MagnitudeDrop: density - epsilon and density + epsilon must lie in (0, 1), got "
            f"density {density} and epsilon {epsilon}. Choose a smaller epsilon."
        )


def _probabilities(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """Probability of each entry being kept, by its rank in its row."""
    return between(row_ranks(rows), rows.shape[1], density - epsilon, density + epsilon)
