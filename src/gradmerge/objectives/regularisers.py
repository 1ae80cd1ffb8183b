"""Penalties on the coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from typing_extensions import override

from gradmerge.errors import ConfigError
from gradmerge.objectives.base import AbstractRegulariser


class _Total(torch.autograd.Function):
    """Forward: the sum over processes. Backward: the gradient times their number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """`sum_r value_r`, the same in every process."""
        total = value.detach().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """`W` times the gradient of the total, which the average over processes divides again."""
        return grads[0] * distributed.get_world_size()


def mean_over_rows(total: Tensor, rows: int | Tensor, shared: bool) -> Tensor:
    """`sum_r total_r / max(1, sum_r rows_r)`, over this process alone unless `shared`.

    Args:
        total: a sum over this process's rows, a scalar.
        rows: how many they are; it may be none.
        shared: every process calls this at the same point with rows of one global batch.
    """
    count = torch.as_tensor(rows, device=total.device).to(total.dtype)
    if shared:
        total, count = _Total.apply(torch.stack([total, count])).unbind()
    return total / count.detach().clamp_min(1)


def log_mean_over_rows(log_p: Tensor, shared: bool) -> Tensor | None:
    """`log( sum_r sum_i p_i / sum_r rows_r )` a class, over this process alone unless `shared`.

    Args:
        log_p: log-probabilities `[rows, classes]` of this process; finite.
        shared: every process calls this at the same point with rows of one global batch.

    Returns:
        `[classes]`, or None where no process has a row.
    """
    rows = torch.tensor(len(log_p), dtype=log_p.dtype, device=log_p.device)
    log_sum = torch.logsumexp(log_p, dim=0)
    if shared:
        distributed.all_reduce(rows)
        # Sums of exp are taken relative to the largest, as logsumexp does within a process.
        largest = log_sum.detach().clone()
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        if rows:
            log_sum = largest + _Total.apply((log_sum - largest).exp()).log()
    return log_sum - rows.log() if rows else None


@dataclass(frozen=True)
class _Reduced(AbstractRegulariser):
    """A penalty of many numbers, of which the mean or the sum is taken."""

    reduce: Literal["mean", "sum"] = field(default="mean", kw_only=True)
    """What is taken of a penalty's numbers: `mean`, so that `weight` means the same in any network,
    or `sum`, as papers often write it (DAM over layers, EWC over coefficients)."""

    def __post_init__(self) -> None:
        """Check the reduction."""
        if self.reduce not in ("mean", "sum"):
            raise ConfigError(
                f"{type(self).__name__}: reduce: expected mean or sum, got {self.reduce!r}."
            )

    def _reduced(self, values: Tensor) -> Tensor:
        return values.mean() if self.reduce == "mean" else values.sum()

    def _over_pairs(
        self, coefficients: Mapping[str, Tensor], measure: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Of each tensor the mean over pairs of sources; numbers alone have no direction."""
        values = [
            torch.stack(
                [measure(c[a].flatten(), c[b].flatten()) for a, b in combinations(range(len(c)), 2)]
            ).mean()
            for c in coefficients.values()
            if c[0].numel() > 1 and len(c) > 1
        ]
        if values:
            return self._reduced(torch.stack(values))
        return next(iter(coefficients.values())).sum() * 0.0


@dataclass(frozen=True)
class L1(_Reduced):
    """`mean |c|`: sparse coefficients."""

    weight: float = 1e-3

    @override
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        return self._reduced(torch.cat([c.abs().flatten() for c in coefficients.values()]))


@dataclass(frozen=True)
class Lp(_Reduced):
    """`mean over slots of (sum_k |c_k|^p)^(1/p)`: the norm over the sources (aTLAS, 2407.02880).

    A slot is what shares a coefficient. For p = 1 this is K times `L1`; for p = 2 it drives all
    sources of a slot to zero together. At zero the gradient is zero.
    """

    p: float = 1.0
    """Order of the norm, at least 1; aTLAS takes 1 or 2."""
    weight: float = 0.5

    def __post_init__(self) -> None:
        """Check the order."""
        super().__post_init__()
        if not self.p >= 1:
            raise ConfigError(f"Lp: p must be at least 1, got {self.p}.")

    @override
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        slots = torch.cat([c.reshape(len(c), -1) for c in coefficients.values()], dim=1)
        norms: Tensor = torch.linalg.vector_norm(slots, self.p, dim=0)
        return self._reduced(norms)


@dataclass(frozen=True)
class L2ToInit(_Reduced):
    """`mean (c - c_start)^2`: stay near the start (the prior of NP Merge, arXiv 2412.15467)."""

    weight: float = 1e-2

    @override
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        moved = [(c - start[name].to(c)).square().flatten() for name, c in coefficients.items()]
        return self._reduced(torch.cat(moved))


@dataclass(frozen=True)
class FisherToInit(_Reduced):
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
        super().__post_init__()
        if self.batches < 1:
            raise ConfigError(f"FisherToInit: batches must be at least 1, got {self.batches}.")

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
        return self._reduced(torch.cat(moved))


@dataclass(frozen=True)
class Similarity(_Reduced):
    """Cosine between two sources' coefficients of a tensor (DAM, arXiv 2410.08371).

    `mean over tensors of mean over pairs of cos(c_a, c_b)`. DAM takes the sum over tensors
    (`reduce: sum`), beside a divergence that is a sum over K tasks where `Objective` takes the
    mean: its 0.01 is a weight of 0.01 / K here.
    """

    weight: float = 1e-2

    @override
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        return self._over_pairs(coefficients, lambda a, b: torch.cosine_similarity(a, b, dim=0))


@dataclass(frozen=True)
class Overlap(_Reduced):
    """`sum_j min(|c_a,j|, |c_b,j|)`, mean over tensors and pairs (DAM, arXiv 2410.08371).

    DAM takes the sum over tensors (`reduce: sum`); see `Similarity` for its weight.
    DAM's other form weighs column j by sin^2 of twice the angle between the two directions there.
    It is left out: regularisers see coefficients, and the angles would need all directions.
    """

    weight: float = 1e-5

    @override
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        return self._over_pairs(coefficients, lambda a, b: torch.minimum(a.abs(), b.abs()).sum())
