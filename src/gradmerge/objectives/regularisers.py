"""Penalties on the coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from gradmerge.objectives.base import AbstractRegulariser


def _mean(values: list[Tensor], coefficients: Mapping[str, Tensor]) -> Tensor:
    if values:
        return torch.stack(values).mean()
    return next(iter(coefficients.values())).sum() * 0.0


def _over_pairs(
    coefficients: Mapping[str, Tensor], measure: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Mean over tensors and pairs of sources; coefficients of one number have no direction."""
    values = [
        measure(c[a].flatten(), c[b].flatten())
        for c in coefficients.values()
        if c[0].numel() > 1
        for a, b in combinations(range(len(c)), 2)
    ]
    return _mean(values, coefficients)


@dataclass(frozen=True)
class L1(AbstractRegulariser):
    """`mean |c|`: sparse coefficients."""

    weight: float = 1e-3

    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractRegulariser.penalty`."""
        return torch.cat([c.abs().flatten() for c in coefficients.values()]).mean()


@dataclass(frozen=True)
class L2ToInit(AbstractRegulariser):
    """`mean (c - c_start)^2`: stay near the start."""

    weight: float = 1e-2

    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractRegulariser.penalty`."""
        moved = [(c - start[name].to(c)).square().flatten() for name, c in coefficients.items()]
        return torch.cat(moved).mean()


@dataclass(frozen=True)
class Similarity(AbstractRegulariser):
    """Mean cosine between two sources' coefficients of a tensor (DAM, arXiv 2410.08371)."""

    weight: float = 1e-2

    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractRegulariser.penalty`."""
        return _over_pairs(coefficients, lambda a, b: torch.cosine_similarity(a, b, dim=0))


@dataclass(frozen=True)
class Overlap(AbstractRegulariser):
    """`sum_j min(|c_a,j|, |c_b,j|)`, mean over tensors and pairs (DAM, arXiv 2410.08371)."""

    weight: float = 1e-5

    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractRegulariser.penalty`."""
        return _over_pairs(coefficients, lambda a, b: torch.minimum(a.abs(), b.abs()).sum())
