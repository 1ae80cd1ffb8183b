"""Random dropping of entries: DARE and DELLA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.common.spec import Setting, require_setting, settle
from gradmerge.operators import MaskedDirections
from gradmerge.operators.masked import linear_in_rank, row_ranks
from gradmerge.preprocess.base import AbstractSelection, Site, rescaled
from gradmerge.preprocess.trim import require_density

# Entries that are ranked at a time: their 64-bit sort keys are the largest temporary.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class RandomDrop(AbstractSelection):
    """Keep each entry with probability `density`, zero the rest and rescale (DARE, arXiv
    2311.03099).

        B'_k = M_k (.) B_k / density,  M_k ~ Bernoulli(density)

    The expectation over draws is `B_k`. mergekit rescales by the ratio of L1 norms instead.
    """

    density: Setting = 0.5
    """Probability of keeping an entry, in [0, 1]; the paper's drop rate is 1 - density. One number,
    one per source, or by tensor."""
    rescale: Literal["density", "l1", "none"] = "density"
    """Rescale by 1 / density (the paper), to the L1 norm before dropping (mergekit), or not."""
    seed: int = 0
    """Seed; each tensor and source has its own draws."""

    def __post_init__(self) -> None:
        """Validate the density."""
        require_density("RandomDrop", self.density)

    @override
    def select(self, directions: MaskedDirections, site: Site) -> None:
        densities = settle("RandomDrop.density", self.density, site.name, site.sources)
        generators = [site.generator(self.seed, source) for source in site.sources]
        with rescaled(directions, self.rescale):
            directions.keep_at_random(densities, generators)
        for k, density in enumerate(densities if self.rescale == "density" else ()):
            if density:
                directions.factors[k] /= density


@dataclass(frozen=True)
class MagnitudeDrop(AbstractSelection):
    """Drop entries at random, small ones more often, and rescale the others (DELLA, arXiv
    2406.11617).

        p_i  = density - epsilon + 2 epsilon (r_i - 1) / (n - 1)
        B'_i = m_i B_i / p_i,  m_i ~ Bernoulli(p_i)

    where r_i is the rank of entry i by magnitude among the n entries of its row (1 for the
    smallest; among equal magnitudes, earlier entries rank lower). The expectation over draws is
    `B`. A row runs along axis 1, with all other indices fixed; a tensor with one axis is one row.
    In a row of one entry, p is the density. `epsilon` is mergekit's: probabilities span density +-
    epsilon, whereas the paper's epsilon is the whole width. mergekit rescales the whole tensor by
    the ratio of L1 norms instead.
    """

    density: Setting = 0.5
    """Mean probability of keeping an entry, in [0, 1]; 1 keeps all entries, 0 none. One number, one
    per source, or by tensor."""
    epsilon: Setting = 0.15
    """Distance from density down to the probability of the smallest entry and up to that of the
    largest; both must lie in (0, 1)."""
    rescale: Literal["probability", "l1", "none"] = "probability"
    """Rescale each entry by 1 / its probability (the paper), all entries to the L1 norm before
    dropping (mergekit), or not."""
    seed: int = 0
    """Seed; each tensor and source has its own draws."""

    def __post_init__(self) -> None:
        """Validate density and epsilon."""
        require_density("MagnitudeDrop", self.density)
        require_setting(
            "MagnitudeDrop.epsilon", self.epsilon, "a number in [0, 0.5)", lambda x: 0 <= x < 0.5
        )
        if isinstance(self.density, (int, float)) and isinstance(self.epsilon, (int, float)):
            _require_span(self.density, self.epsilon)

    @property
    @override
    def only_selects(self) -> bool:
        return self.rescale != "probability"

    def _settled(self, site: Site) -> list[tuple[float, float]]:
        """Return density and epsilon of each source."""
        densities = settle("MagnitudeDrop.density", self.density, site.name, site.sources)
        epsilons = settle("MagnitudeDrop.epsilon", self.epsilon, site.name, site.sources)
        pairs = list(zip(densities, epsilons, strict=True))
        for density, epsilon in pairs:
            _require_span(density, epsilon)
        return pairs

    @override
    def select(self, directions: MaskedDirections, site: Site) -> None:
        pairs = self._settled(site)
        bounds = [(p - e, p + e) if 0 < p < 1 else None for p, e in pairs]
        generators = [site.generator(self.seed, source) for source in site.sources]
        with rescaled(directions, self.rescale):
            directions.keep_by_row_rank(bounds, generators)
            for k, (density, _) in enumerate(pairs):
                if not density:
                    directions.keep_none(k)

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        if self.only_selects:
            return super().__call__(directions, site)
        for source, direction, (density, epsilon) in zip(
            site.sources, directions, self._settled(site), strict=True
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


def _require_span(density: float, epsilon: float) -> None:
    """Reject probabilities outside (0, 1)."""
    if density not in (0, 1) and not 0 < density - epsilon <= density + epsilon < 1:
        raise ConfigError(
            "MagnitudeDrop: density - epsilon and density + epsilon must lie in (0, 1), got "
            f"density {density} and epsilon {epsilon}. Choose a smaller epsilon."
        )


def _probabilities(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """Return the probability of keeping each entry, by its rank in its row."""
    return linear_in_rank(row_ranks(rows), rows.shape[1], density - epsilon, density + epsilon)
