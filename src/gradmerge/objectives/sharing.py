"""Means over the rows of all processes.

A process that trains alone divides a sum over rows by their number. Of several, each has its own
rows of one global batch: a mean of its own would weigh its rows by how few they are, and of a
non-linear function of the mean there is no sum over processes at all. So what the processes hold is
added up first, and each computes the whole batch's loss.

With `S = sum_r S_r` over W processes, `dL/dz = L'(S) sum_r dS_r/dz`. Data-parallel training
averages the gradients of its processes, so each contributes `W L'(S) dS_r/dz`. That factor is all
that backward adds, for `L'(S)` is the same in every process: no process waits for another there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


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
