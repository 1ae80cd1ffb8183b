"""OT fusion: units by entropic optimal transport."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.alignment.base import Needs, assign
from gradmerge.alignment.mixing import MixingOnData, kept_apart
from gradmerge.alignment.moments import Pairing, correlation, squared_distances
from gradmerge.alignment.symmetry.spec import LinearMap, Map, Maps
from gradmerge.common.errors import ConfigError, require


@dataclass(frozen=True)
class OptimalTransport(MixingOnData):
    """Units by entropic optimal transport (OT fusion, arXiv 1910.05653).

    With a cost C between the reference's units and the source's, uniform marginals, and r times the
    median of C as the weight of the entropy,

        P = argmin <P, C> + r median(C) sum_ij P_ij (log P_ij - 1),   P 1 = P^T 1 = 1/n

    and `Q = n P`, whose rows and columns sum to 1, tensors that write the units become `Q W`: each
    new unit is a mean of the source's. Those that read them become `W Q^T`, the paper's
    `W P diag(1/b)`: a mean with the same weights. `Q^T` is the inverse of Q only where Q is a
    permutation (r = 0: exact transport between as many units is one), and only then does the source
    compute the same function. Of BatchNorm, shifts and running means are mapped by Q, gains are
    means weighted with Q's squared entries, and running variances are mapped by these: have the
    statistics recomputed (`buffers: recompute`, the default), which also restores the variance that
    averaging units costs. Attention heads, units that are multiplied one by one with others (gated
    MLPs) and those of a residual stream with LayerNorm or RMSNorm gains keep the permutation of
    least cost; the report names them.

    With `ground: weights` no data is needed: units are compared by all that is written into them
    (rows of weights, biases, gains), group after group in the order of the network, each under the
    maps found before it.
    """

    ground: Literal["activations", "weights"] = "activations"
    """Compare units by their activations, or by the weights that write them."""
    regularisation: float = 0.05
    """r, in medians of the cost; 0 for the exact assignment. The larger, the more alike the mapped
    source's units become, until it adds nothing to a merge."""
    cost: Literal["euclidean", "squared", "correlation"] = "euclidean"
    """Root of the mean squared difference of two units over the rows (or weights), its square, or 1
    less their correlation (of activations alone)."""
    tolerance: float = 1e-9
    """Largest sum of absolute errors of the marginals."""
    iterations: int = 1000
    """Maximum number of updates of the transport; an error if they do not suffice."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        known = self.ground in ("activations", "weights")
        require(known, "OptimalTransport.ground", "activations or weights", repr(self.ground))
        known = self.cost in ("euclidean", "squared", "correlation")
        known = known and (self.cost, self.ground) != ("correlation", "weights")
        costs = "euclidean, squared or (of activations) correlation"
        require(known, "OptimalTransport.cost", costs, repr(self.cost))
        strength, tolerance = self.regularisation, self.tolerance
        require(strength >= 0, "OptimalTransport.regularisation", "0 or more", strength)
        require(tolerance > 0, "OptimalTransport.tolerance", "a number above 0", tolerance)
        require(self.iterations >= 1, "OptimalTransport.iterations", "at least 1", self.iterations)

    @property
    @override
    def needs(self) -> Needs | None:
        return "activations" if self.ground == "activations" else None

    @property
    @override
    def mixes_units(self) -> bool:
        return self.regularisation > 0  # an exact assignment permutes

    @override
    def match_group(self, units: Pairing) -> tuple[Map, float]:
        costs = self._costs(units)
        apart = kept_apart(units.context.spec, units.group.name) is not None
        level = 0.0 if apart else self.regularisation * float(costs.median())
        if level == 0:
            return assign(-costs)
        plan = len(costs) * sinkhorn(costs, level, self.tolerance, self.iterations)
        return LinearMap(plan, plan.mT), -float((plan * costs).sum())

    def _costs(self, units: Pairing) -> Tensor:
        if self.ground == "weights":
            every = [_written_into(units, target, maps) for target, maps in units.targets.items()]
            x, y = torch.stack(every).mean(dim=0), _written_into(units, units.source, units.maps)
            distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
            squares = distances.square() / max(1, x.shape[1])
        else:
            moments = units.moments_of_mean()
            if self.cost == "correlation":
                return 1 - correlation(moments)
            squares = squared_distances(moments)
        return squares if self.cost == "squared" else squares.sqrt()


def _written_into(units: Pairing, source: str, maps: Maps) -> Tensor:
    """All weights of a source, under its maps, that write the group's units: `[size, rest]`."""
    context = units.context
    parts = [torch.empty(units.group.size, 0, dtype=torch.float64)]
    for use in context.spec.uses[units.group.name]:
        if use.role in ("out", "along", "gain") and use.tensor in context.compared:
            tensor = context.read(source, use.tensor, maps).double()
            parts.append(context.spec.expose(use, tensor))
    return torch.cat(parts, dim=1)


def sinkhorn(
    cost: Tensor, regularisation: float, tolerance: float = 1e-9, iterations: int = 1000
) -> Tensor:
    """Return the plan between uniform marginals of least cost less entropy.

        P = argmin <P, C> + r sum_ij P_ij (log P_ij - 1)   where   P 1 = P^T 1 = 1/n

    has the form `P_ij = exp((f_i + g_j - C_ij) / r)`. The potentials are found in turns, in the log
    domain (arXiv 1306.0895; arXiv 1803.00567, section 4.4), from a large r down to the one asked
    for. Where the plan is nearly a permutation, turns hardly move any more: then Newton's method
    goes on, on the dual as a function of g alone (f meets the rows),

        F(g) = 1/n sum_j g_j + 1/n sum_i f_i(g)      grad F = 1/n - P^T 1
        hess F = -1/r (diag(P^T 1) - n P^T P)

    which is concave. A step that does not bring the marginals nearer is shortened.

    `cost` is float64, `regularisation` is r, and `tolerance` bounds the sum of absolute errors of
    the marginals, which at most so many iterations at the last r must meet.
    """
    potential = torch.zeros(len(cost), dtype=cost.dtype)
    levels = [regularisation]
    while levels[-1] * 4 < float(cost.max() - cost.min()):
        levels.append(levels[-1] * 4)
    for level in reversed(levels):
        goal, limit = (tolerance, iterations) if level == regularisation else (1e-3, _TURNS)
        state, count = _State(cost, level, potential), 0
        while not state.error <= goal and count < limit:
            state, count = state.turn() if count < _TURNS else state.newton(), count + 1
        potential = state.potential
    if not state.error <= tolerance:
        raise ConfigError(
            f"the transport of {len(cost)} units did not converge: after {iterations} iterations "
            f"its marginals are off by {state.error:.1e}, expected at most {tolerance:.1e}.\n"
            "Take a larger `regularisation` (or 0, an exact assignment), or more `iterations`."
        )
    return state.plan


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
            for length in (0.5**i for i in range(20)):
                found = _State(self.cost, self.level, self.potential + length * step)
                if found.error < self.error:
                    return found
        return self.turn()
