"""Penalties on the coefficients, and means over the rows of several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from typing_extensions import override

from gradmerge.common.errors import ConfigError, require
from gradmerge.objectives.base import AbstractRegulariser


class _Total(torch.autograd.Function):
    """Sum over processes in forward; backward multiplies the gradient by their number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Return `sum_r value_r`, the same in every process."""
        total = value.detach().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Return W times the gradient; averaging gradients over processes divides by W again."""
        return grads[0] * distributed.get_world_size()


def mean_over_rows(total: Tensor, rows: int | Tensor, shared: bool) -> Tensor:
    """Return `sum_r total_r / max(1, sum_r rows_r)`, over this process alone unless `shared`.

    Args:
        total: sum over the rows of this process, a scalar.
        rows: number of rows of this process; it may be 0.
        shared: True if all processes call this at the same point with rows of one global batch.
    """
    count = torch.as_tensor(rows, device=total.device).to(total.dtype)
    if shared:
        total, count = _Total.apply(torch.stack([total, count])).unbind()
    return total / count.detach().clamp_min(1)


def log_mean_over_rows(log_p: Tensor, shared: bool) -> Tensor | None:
    """Return `log( sum_r sum_i p_i / sum_r rows_r )` of each class.

    Args:
        log_p: finite log-probabilities `[rows, classes]` of this process.
        shared: True if all processes call this at the same point with rows of one global batch;
            the mean is then over their rows, too.

    Returns:
        `[classes]`, or None if no process has a row.
    """
    rows = torch.tensor(len(log_p), dtype=log_p.dtype, device=log_p.device)
    log_sum = torch.logsumexp(log_p, dim=0)
    if shared:
        distributed.all_reduce(rows)
        # subtract the largest before exp, as logsumexp does within a process
        largest = log_sum.detach().clone()
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        if rows:
            log_sum = largest + _Total.apply((log_sum - largest).exp()).log()
    return log_sum - rows.log() if rows else None


@dataclass(frozen=True)
class _Reduced(AbstractRegulariser):
    """Penalty that reduces many numbers to their mean or sum."""

    reduce: Literal["mean", "sum"] = field(default="mean", kw_only=True)
    """Reduction: `mean`, for which `weight` does not depend on the size of the network, or `sum`,
    as in many papers (DAM over layers, EWC over coefficients)."""

    def __post_init__(self) -> None:
        """Validate the reduction."""
        known = self.reduce in ("mean", "sum")
        require(known, f"{type(self).__name__}.reduce", "mean or sum", repr(self.reduce))

    def _reduced(self, values: Tensor) -> Tensor:
        return values.mean() if self.reduce == "mean" else values.sum()

    def _over_pairs(
        self, coefficients: Mapping[str, Tensor], measure: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Reduce the mean over pairs of sources of each tensor; skip single coefficients."""
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
    """L1 norm for sparse coefficients: `mean |c|`."""

    weight: float = 1e-3
    """Weight in the objective."""

    @override
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        return self._reduced(torch.cat([c.abs().flatten() for c in coefficients.values()]))


@dataclass(frozen=True)
class Lp(_Reduced):
    """Norm over the sources, `mean over slots of (sum_k |c_k|^p)^(1/p)` (aTLAS, arXiv 2407.02880).

    A slot is a set of entries that share a coefficient. For p = 1 this is K times `L1`; p = 2
    drives the coefficients of all sources in a slot to zero together. At zero the gradient is zero.
    """

    p: float = 1.0
    """Order of the norm, at least 1; aTLAS uses 1 or 2."""
    weight: float = 0.5
    """Weight in the objective."""

    def __post_init__(self) -> None:
        """Validate the order."""
        super().__post_init__()
        require(self.p >= 1, "Lp.p", "at least 1", self.p)

    @override
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        slots = torch.cat([c.reshape(len(c), -1) for c in coefficients.values()], dim=1)
        norms: Tensor = torch.linalg.vector_norm(slots, self.p, dim=0)
        return self._reduced(norms)


@dataclass(frozen=True)
class L1ToInit(_Reduced):
    """Distance from the start: `mean |c - c_start|` (Expert Merging, arXiv 2509.25712).

    Unlike `L2ToInit` it holds coefficients at the start unless the gradient there is
    larger than the penalty's.
    """

    weight: float = 0.1
    """Weight in the objective."""

    @override
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        moved = [(c - start[name].to(c)).abs().flatten() for name, c in coefficients.items()]
        return self._reduced(torch.cat(moved))


@dataclass(frozen=True)
class L2ToInit(_Reduced):
    """Squared distance from the start: `mean (c - c_start)^2` (the prior of NP Merge, arXiv
    2412.15467).
    """

    weight: float = 1e-2
    """Weight in the objective."""

    @override
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        moved = [(c - start[name].to(c)).square().flatten() for name, c in coefficients.items()]
        return self._reduced(torch.cat(moved))


@dataclass(frozen=True)
class FisherToInit(_Reduced):
    """Squared distance from the start, weighted by importance: `mean F (c - c_start)^2` (EWC, arXiv
    1612.00796).

    F is the squared gradient of the objective's terms in the coefficients at the start, averaged
    over training batches and divided by its mean, so that `weight` has the same meaning as in
    `L2ToInit` (F = 1). Gradients are those of batches, not of single examples. Coefficients with
    zero gradient are unconstrained. F is measured at the start of a fit and saved in its
    checkpoints, one float32 number per coefficient.
    """

    weight: float = 1e-2
    """Weight in the objective."""
    batches: int = 16
    """Number of training batches, the first of the fit, over which F is averaged."""

    def __post_init__(self) -> None:
        """Validate the number of batches."""
        super().__post_init__()
        require(self.batches >= 1, "FisherToInit.batches", "at least 1", self.batches)

    def penalty(
        self,
        coefficients: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        importance: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return a scalar, before `weight`.

        Args:
            coefficients: `c` of each learned tensor by name, `[sources, *slot]`.
            start: coefficients at the start of training.
            importance: F of each learned tensor by name, `[sources, *slot]`.

        Raises:
            ConfigError: `importance` is missing.
        """
        if importance is None:
            raise ConfigError(
                "FisherToInit: the importance of the coefficients was not measured. Train with "
                "MergeModule, which measures it at the start of a fit, or pass `importance`."
            )
        moved = [
            (importance[name].to(c) * (c - start[name].to(c)).square()).flatten()
            for name, c in coefficients.items()
        ]
        return self._reduced(torch.cat(moved))


@dataclass(frozen=True)
class Similarity(_Reduced):
    """Cosine similarity of the coefficients of pairs of sources (DAM, arXiv 2410.08371).

        mean over tensors of (mean over pairs of cos(c_a, c_b))

    DAM sums over tensors (`reduce: sum`) and adds this to a divergence summed over K tasks, where
    `Objective` takes the mean: DAM's 0.01 corresponds to a weight of 0.01 / K.
    """

    weight: float = 1e-2
    """Weight in the objective."""

    @override
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        return self._over_pairs(coefficients, lambda a, b: torch.cosine_similarity(a, b, dim=0))


@dataclass(frozen=True)
class Overlap(_Reduced):
    """Overlap of the coefficients of pairs of sources (DAM, arXiv 2410.08371).

        mean over tensors of (mean over pairs of sum_j min(|c_a,j|, |c_b,j|))

    DAM sums over tensors (`reduce: sum`); its weight converts as for `Similarity`. DAM's variant
    with column weights (sin^2 of twice the angle between the directions) is not implemented:
    regularisers see coefficients only, and the angles would need all directions.
    """

    weight: float = 1e-5
    """Weight in the objective."""

    @override
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        return self._over_pairs(coefficients, lambda a, b: torch.minimum(a.abs(), b.abs()).sum())
