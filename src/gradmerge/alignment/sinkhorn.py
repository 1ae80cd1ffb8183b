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
    cost: Tensor, regularisation: float, tolerance: float = 1e-9, iterations: int = 1000
) -> Tensor:
    """The plan between uniform marginals of least cost, less entropy.

        P = argmin <P, C> + r sum_ij P_ij (log P_ij - 1)   where   P 1 = P^T 1 = 1/n

    has the form `P_ij = exp((f_i + g_j - C_ij) / r)`. The potentials are found in turns, in the log
    domain (arXiv 1306.0895; arXiv 1803.00567, section 4.4), from a large r down to the one asked
    for. Where the plan is nearly a permutation, turns hardly move any more: then Newton's method
    goes on, on the dual as a function of g alone (f meets the rows),

        F(g) = 1/n sum_j g_j + 1/n sum_i f_i(g)      grad F = 1/n - P^T 1
        hess F = -1/r (diag(P^T 1) - n P^T P)

    which is concave. A step that does not raise F is shortened.

    Args:
        cost: `[n, n]`, float64.
        regularisation: r, in units of the cost, above 0.
        tolerance: on the sum of absolute errors of the marginals.
        iterations: most updates at the last r.

    Returns:
        P, `[n, n]`; its entries sum to 1.

    Raises:
        ConfigError: the marginals are not met in so many iterations.
    """
    size = len(cost)
    potential = torch.zeros(size, dtype=cost.dtype)
    levels = [regularisation]
    while levels[-1] * 4 < float(cost.max() - cost.min()):
        levels.append(levels[-1] * 4)
    for level in reversed(levels[1:]):
        state = _State(cost, level, potential)
        for _ in range(_TURNS):
            if state.error <= 1e-3:
                break
            state = state.turn()
        potential = state.potential
    state = _State(cost, regularisation, potential)
    for count in range(iterations):
        if state.error <= tolerance:
            return state.plan
        state = state.turn() if count < _TURNS else state.newton()
    if state.error <= tolerance:
        return state.plan
    raise ConfigError(
        f"the transport of {size} units did not converge: after {iterations} iterations its "
        f"marginals are off by {state.error:.1e}, expected at most {tolerance:.1e}. Take a larger "
        "`regularisation` (or 0, an exact assignment), or more `iterations`."
    )


# Updates in turns before Newton's method takes over.
_TURNS = 100


class _State:
    """The plan of a potential g, whose rows are met, and how far off its columns are."""

    def __init__(self, cost: Tensor, level: float, potential: Tensor) -> None:
        self.cost, self.level, self.potential = cost, level, potential
        share = -math.log(len(cost))
        rows = level * (share - torch.logsumexp((potential[None, :] - cost) / level, dim=1))
        self._logs = (rows[:, None] + potential[None, :] - cost) / level
        self.plan = self._logs.exp()
        self._gradient = 1 / len(cost) - self.plan.sum(dim=0)
        self.error = float(self._gradient.abs().sum())
        self.value = float((potential + rows).mean())

    def turn(self) -> _State:
        """After the update of g that meets the columns."""
        # from logarithms: a column far from every row may have no plan in float64
        change = -self.level * (math.log(len(self.cost)) + torch.logsumexp(self._logs, dim=0))
        return _State(self.cost, self.level, self.potential + change)

    def newton(self) -> _State:
        """After a step of Newton's method, shortened until it helps; after a turn if none does."""
        size = len(self.cost)
        # `diag(P^T 1) - n P^T P` has rows that sum to 0: its diagonal without cancellation
        shared = size * self.plan.mT @ self.plan
        shared.fill_diagonal_(0)
        # damped, for parts of the plan may hang together by less than rounding shows
        damping = 0.1 * float(self._gradient.abs().max())
        hessian = torch.diag(shared.sum(dim=1) + damping) - shared
        hessian += float(hessian.diagonal().mean()) / size  # a constant added to g changes nothing
        step, failed = torch.linalg.solve_ex(hessian, self.level * self._gradient)
        if not int(failed) and bool(step.isfinite().all()):
            # the quadratic model holds for a few r: parts of the plan hang together by `exp(-x/r)`
            step *= min(1.0, 3 * self.level / float(step.abs().max().clamp(min=1e-300)))
            slope = float(step @ self._gradient)
            for length in (0.5**i for i in range(20)):
                found = _State(self.cost, self.level, self.potential + length * step)
                if found.value > self.value + 1e-4 * length * slope > self.value:
                    return found
                if found.error < 0.5 * self.error:
                    return found
        return self.turn()
