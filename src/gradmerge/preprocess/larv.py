"""One factor per source and layer, from the spectra of base and task vector (LARV)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from gradmerge.common.errors import ConfigError, require
from gradmerge.common.typing import Origin
from gradmerge.preprocess.base import AbstractPreprocess, Passes, Site, Step
from gradmerge.preprocess.matrices import matrices_of
from gradmerge.sources.names import block_of


@dataclass(frozen=True)
class LARV(AbstractPreprocess):
    """Multiply the directions of each layer by a factor from their statistics (LARV, arXiv
    2602.09413).

        e = r(A) / r(B_k)                                   effective-rank contrast
        c = (|A B_k^T - B_k A^T| + |A^T B_k - B_k^T A|) / (2 |A| |B_k|)            conflict
        a = mean(e)^contrast (l / L)^depth / (1 + softplus(z(mean(c))))             score
        B'_k = s(a) B_k

    where `A` is the base's matrix, `r = exp(-sum_j p_j log p_j)` the effective rank by the shares
    `p_j` of the squared singular values, means are over the matrices of the l-th of L layers
    (blocks, by name), and z standardises over the layers of a source. A layer is scaled down where
    its change is diffuse, shallow or in conflict with the base. Tensors outside of blocks, and
    layers that a source has not changed, keep their directions.

    Another step or an operator then merges the directions (Iso-C in the paper's best results). All
    tensors are read once before the first one is merged. The paper's fixed values of `levels` could
    not be verified; those here are ours, to be chosen on the selection split.
    """

    kind: Literal["tiers", "continuous"] = "tiers"
    """tiers: s is one of `levels`, by quantiles of the score among a source's layers (of three
    levels, the lowest third of the layers has the first).
    continuous: s = 1 + amount tanh(slope (a - 1))."""
    levels: tuple[float, ...] = (0.75, 1.0, 1.25)
    """Factors of the tiers, for the lowest scores first."""
    amount: float = 0.5
    """Largest change of a continuous factor, below 1."""
    slope: float = 3.0
    """Slope of a continuous factor."""
    contrast: float = 1.0
    """Exponent of the effective-rank contrast."""
    depth: float = 0.5
    """Exponent of the depth; 0 for no preference."""

    def __post_init__(self) -> None:
        """Validate factors and exponents."""
        finite = all(math.isfinite(level) for level in self.levels)
        require(len(self.levels) >= 2 and finite, "LARV.levels", "two numbers or more", self.levels)
        require(0 < self.amount < 1, "LARV.amount", "a number in (0, 1)", self.amount)
        for name in ("slope", "contrast", "depth"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"LARV.{name}", "at least 0", value)

    @override
    def require(self, origin: Origin) -> None:
        if origin == "zero":
            raise ConfigError(
                "LARV: expected task vectors from a base, with which it compares them, got origin "
                "zero. Set recipe.base (and omit `origin`)."
            )

    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        """Process a single tensor as if it were the whole model."""
        return self.survey(lambda: iter([(site, directions)]))(directions, site)

    @override
    def survey(self, passes: Passes) -> Step:
        found: dict[int, list[list[tuple[float, float]]]] = {}
        for site, directions in passes():
            layer = block_of(site.name)
            matrices = None if layer is None else matrices_of(directions, site)
            if layer is None or matrices is None or not site.takes_part:
                continue
            base = None if site.origin is None else site.origin()
            assert base is not None  # by `require`
            base = base.to(directions).view(matrices.shape[1:])
            places = found.setdefault(layer, [[] for _ in site.sources])
            for place, matrix in zip(places, matrices, strict=True):
                if matrix.any() and base.any():
                    place.append(_statistics(base.double(), matrix.double()))
        depths = {layer: (i + 1) / len(found) for i, layer in enumerate(sorted(found))}
        sources = max((len(places) for places in found.values()), default=0)
        factors = [
            self._factors({layer: m for layer, places in found.items() if (m := places[k])}, depths)
            for k in range(sources)
        ]

        def rescale(directions: Tensor, site: Site) -> Tensor:
            layer = block_of(site.name)
            if layer is not None:
                for direction, own in zip(directions, factors, strict=False):
                    direction.mul_(own.get(layer, 1.0))
            return directions

        return rescale

    def _factors(
        self, found: Mapping[int, list[tuple[float, float]]], depths: Mapping[int, float]
    ) -> dict[int, float]:
        """Return the factor of each layer of a source, given the statistics of its matrices."""
        if not found:
            return {}
        means = torch.tensor(
            [
                torch.tensor(pairs, dtype=torch.float64).mean(dim=0).tolist()
                for pairs in found.values()
            ],
            dtype=torch.float64,
        )
        contrasts, conflicts = means.unbind(dim=1)
        spread = conflicts.std(correction=0)
        standard = (conflicts - conflicts.mean()) / (spread if spread > 1e-12 else 1.0)
        deep = torch.tensor([depths[layer] for layer in found], dtype=torch.float64)
        scores = contrasts**self.contrast * deep**self.depth / (1 + functional.softplus(standard))
        if self.kind == "continuous":
            values = 1 + self.amount * torch.tanh(self.slope * (scores - 1))
        else:
            shares = torch.arange(1, len(self.levels), dtype=torch.float64) / len(self.levels)
            tiers = torch.bucketize(scores, torch.quantile(scores, shares))
            values = torch.tensor(self.levels, dtype=torch.float64)[tiers]
        return dict(zip(found, values.tolist(), strict=True))


def _statistics(base: Tensor, matrix: Tensor) -> tuple[float, float]:
    """Return effective-rank contrast and conflict of a matrix and its base, in float64."""
    if matrix.shape[0] < matrix.shape[1]:
        base, matrix = base.T, matrix.T
    # Gram matrices of the smaller side give both spectra and both commutators
    of_base, of_matrix, cross = base.T @ base, matrix.T @ matrix, base.T @ matrix
    twice = 2 * (cross * cross.T).sum()
    left = 2 * (of_base * of_matrix).sum() - twice
    right = 2 * cross.square().sum() - twice
    norms = (of_base.trace() * of_matrix.trace()).sqrt()
    conflict = (left.clamp(min=0).sqrt() + right.clamp(min=0).sqrt()) / (2 * norms)
    return float(_effective_rank(of_base) / _effective_rank(of_matrix)), float(conflict)


def _effective_rank(gram: Tensor) -> Tensor:
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    return torch.special.entr(squares / squares.sum()).sum().exp()
