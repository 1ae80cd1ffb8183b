"""Optimal transport between as many units: exact (an assignment) or entropic."""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gradmerge.errors import ConfigError


def assign(gain: Tensor) -> Tensor:
    """The permutation p of largest `sum_i gain[i, p[i]]`, int64 `[size]` (Jonker-Volgenant)."""
    _, columns = linear_sum_assignment(gain.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(torch.int64)


def sinkhorn(
    cost: Tensor, regularisation: float, tolerance: float = 1e-9, iterations: int = 20_000
) -> Tensor:
    """The plan between uniform marginals of least cost, less entropy.

        P = argmin <P, C> + r sum_ij P_ij (log P_ij - 1)   where   P 1 = P^T 1 = 1/n

    has the form `P_ij = exp((f_i + g_j - C_ij) / r)`. The potentials are found in turns, in the log
    domain (arXiv 1306.0895; arXiv 1803.00567, section 4.4), from a large r down to the one asked
    for, because a small one alone hardly moves.

    Args:
        cost: `[n, n]`, float64.
        regularisation: r, in units of the cost, above 0.
        tolerance: on the sum of absolute errors of the marginals.
        iterations: most updates of both potentials at the last r.

    Returns:
        P, `[n, n]`; its entries sum to 1.

    Raises:
        ConfigError: the marginals are not met in so many iterations.
    """
    size = len(cost)
    share = -math.log(size)
    potential = torch.zeros(size, dtype=cost.dtype)
    levels = [regularisation]
    while levels[-1] * 4 < float(cost.max() - cost.min()):
        levels.append(levels[-1] * 4)
    error = math.inf
    for level in reversed(levels):
        last = level == regularisation
        for _ in range(iterations if last else 100):
            other = level * (share - torch.logsumexp((potential[None, :] - cost) / level, dim=1))
            columns = torch.logsumexp((other[:, None] - cost) / level, dim=0)
            # the rows are met now, so the columns say how far the plan is off
            error = float(((columns + potential / level).exp() - 1 / size).abs().sum())
            if error <= (tolerance if last else 1e-3):
                break
            potential = level * (share - columns)
    if not error <= tolerance:
        raise ConfigError(
            f"the transport of {size} units did not converge: after {iterations} iterations its "
            f"marginals are off by {error:.1e}, expected at most {tolerance:.1e}. Take a larger "
            "`regularisation` (or 0, an exact assignment), or more `iterations`."
        )
    return torch.exp((other[:, None] + potential[None, :] - cost) / regularisation)
