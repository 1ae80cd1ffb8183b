"""Penalties on the coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from gradmerge.errors import ConfigError
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
class Lp(AbstractRegulariser):
    """`mean over slots of (sum_k |c_k|^p)^(1/p)`: the norm over the sources (aTLAS, 2407.02880).

    A slot is what shares a coefficient. For p = 1 this is K times `L1`; for p = 2 it drives all
    sources of a slot to zero together. At zero the gradient is zero.
    """

    p: float = 1.0
    """Order of the norm, at least 1; aTLAS takes 1 or 2."""
    weight: float = 0.5

    def __post_init__(self) -> None:
        """Check the order."""
        if not self.p >= 1:
            raise ConfigError(f"Lp: p must be at least 1, came {self.p}.")

    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractRegulariser.penalty`."""
        slots = torch.cat([c.reshape(len(c), -1) for c in coefficients.values()], dim=1)
        norms: Tensor = torch.linalg.vector_norm(slots, self.p, dim=0)
        return norms.mean()


@dataclass(frozen=True)
class L2ToInit(AbstractRegulariser):
    """`mean (c - c_start)^2`: stay near the start (the prior of NP Merge, arXiv 2412.15467)."""

    weight: float = 1e-2

    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractRegulariser.penalty`."""
        moved = [(c - start[name].to(c)).square().flatten() for name, c in coefficients.items()]
        return torch.cat(moved).mean()


@dataclass(frozen=True)
class FisherToInit(AbstractRegulariser):
    """`mean F (c - c_start)^2`: stay near the start where the data care (EWC, arXiv 1612.00796).

    F is the squared gradient of the objective's terms in the coefficients at the start, averaged
    over training batches and divided by its mean, so that `weight` means what it means for
    `L2ToInit` (F = 1). Gradients are those of batches, not of single examples. Coefficients whose
    gradient is zero are free. F is measured when a fit starts, one float32 number a coefficient,
    and kept in its checkpoints.
    """

    weight: float = 1e-2
    batches: int = 16
    """Training batches that F is averaged over: the first of the fit."""

    def __post_init__(self) -> None:
        """Check the number of batches."""
        if self.batches < 1:
            raise ConfigError(f"FisherToInit: batches must be at least 1, came {self.batches}.")

    def penalty(
        self,
        coefficients: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        importance: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """See `AbstractRegulariser.penalty`.

        Args:
            coefficients: see there.
            start: see there.
            importance: F of each learned tensor by name, `[sources, *slot]`.

        Raises:
            ConfigError: F was not measured.
        """
        if importance is None:
            raise ConfigError(
                "FisherToInit: the importance of the coefficients was not measured; train with "
                "MergeModule, which measures it when a fit starts, or pass `importance`."
            )
        moved = [
            (importance[name].to(c) * (c - start[name].to(c)).square()).flatten()
            for name, c in coefficients.items()
        ]
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
    """`sum_j min(|c_a,j|, |c_b,j|)`, mean over tensors and pairs (DAM, arXiv 2410.08371).

    DAM's other form weighs column j by sin^2 of twice the angle between the two directions there.
    It is left out: regularisers see coefficients, and the angles would need all directions.
    """

    weight: float = 1e-5

    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        """See `AbstractRegulariser.penalty`."""
        return _over_pairs(coefficients, lambda a, b: torch.minimum(a.abs(), b.abs()).sum())
