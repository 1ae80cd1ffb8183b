"""Adam that moves only the entries whose momentum is largest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradmerge.errors import ConfigError


class MoFO(torch.optim.Optimizer):
    """Momentum-filtered AdamW (arXiv 2407.20999), the optimiser of DAM (arXiv 2410.08371).

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        z = z - lr weight_decay z
        z = z - lr F (.) (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    with F = 1 on the `ceil(fraction n)` entries of largest |m| of a parameter of n entries, else 0.
    A parameter is a tensor's raw coefficients of all sources together (DAM filters each source's
    apart), or the table that coarser granularities share.

    Args:
        params: the raw coefficients.
        lr: learning rate.
        betas: b1 and b2.
        eps: added to the root.
        weight_decay: decoupled, on all entries.
        fraction: share of the entries that move, in (0, 1].

    Raises:
        ConfigError: a number is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fraction: float = 0.3,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ConfigError(f"MoFO: expected a fraction in (0, 1], came {fraction}.")
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                "MoFO: lr, eps and weight_decay must not be negative and betas lie in [0, 1), came "
                f"{lr}, {eps}, {weight_decay} and {tuple(betas)}."
            )
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "fraction": fraction,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        (b1, b2), rate = group["betas"], group["lr"]
        state["step"] += 1
        steps = float(state["step"])
        m = state["exp_avg"].lerp_(grad, 1 - b1)
        v = state["exp_avg_sq"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
        if group["weight_decay"]:
            parameter.mul_(1 - rate * group["weight_decay"])
        update = (m / (1 - b1**steps)).div_((v / (1 - b2**steps)).sqrt_().add_(group["eps"]))
        moved = max(1, math.ceil(group["fraction"] * m.numel())) if m.numel() else 0
        if moved < m.numel():
            chosen = m.abs().flatten().topk(moved, sorted=False).indices
            kept = torch.zeros_like(update).flatten().index_fill_(0, chosen, 1.0)
            update.mul_(kept.view_as(update))
        parameter.sub_(update, alpha=rate)
