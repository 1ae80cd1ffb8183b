"""The changing half of a merge: coefficients, and what a fit finds out."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradmerge.common.errors import NonFiniteError, shorten
from gradmerge.common.finite import is_finite
from gradmerge.common.typing import Raw
from gradmerge.engine.plan import Plan
from gradmerge.engine.private import PrivateParts
from gradmerge.finalisers import Corrections


@dataclass
class FitState:
    """A plan's coefficients, and what a fit has found out about the merge.

    Args:
        plan: the opened recipe.
        raw: raw coefficients z by key.
        private: what is trained per task; None without a fit.
    """

    plan: Plan
    raw: Raw
    private: PrivateParts | None = None
    fixed: dict[str, float] = field(init=False)
    """Coefficients of tensors that are not learned: frozen ones, and those without a gradient."""
    corrections: Corrections | None = None
    """The corrections of REPAIR, once they are computed."""
    run: dict[str, Any] = field(default_factory=dict)
    """Record of the fit as plain data; empty before a fit."""
    slopes: dict[str, Tensor] | None = None
    """If set, `contract` accumulates `dL/dc` here, by tensor, `[sources, *slot]`."""

    def __post_init__(self) -> None:
        """Start with the recipe's frozen tensors."""
        self.fixed = dict(self.plan.fixed)

    @classmethod
    def start(cls, plan: Plan) -> FitState:
        """Return the state of a plan at the coefficients of its init."""
        return cls(plan, plan.initial_raw())

    def at(self, raw: Raw) -> FitState:
        """Return the same merge at other coefficients; the two share what the fit found out."""
        other = copy.copy(self)
        other.raw = raw
        return other

    @property
    def learned(self) -> list[str]:
        """Names of the tensors whose coefficients are learned."""
        return [name for name in self.plan.tensors if name not in self.fixed]

    def fix(self, names: Sequence[str], coefficient: float) -> None:
        """Fix tensors at a coefficient from now on."""
        self.fixed.update(dict.fromkeys(names, coefficient))

    def own(self, name: str) -> Tensor | float:
        """Return z of a tensor, `[rows, *slot]`, as a view of `raw`; of a fixed one its number."""
        return self.fixed[name] if name in self.fixed else self.plan.z(name, self.raw)

    def coefficient(self, name: str) -> Tensor:
        """Return `c = link(z)` of a tensor, `[sources, *slot]`, differentiable unless fixed."""
        return self.plan.coefficient(self.own(name))

    def contract(self, name: str, grad: Tensor, z: Tensor) -> Tensor:
        """Return `dL/dz` of a tensor for `grad = dL/dtheta`."""
        if grad.is_sparse:
            grad = grad.to_dense()  # of `nn.Embedding(sparse=True)`
        found, slope = self.plan.contract(name, grad, z, self.slopes is not None)
        if self.slopes is not None and slope is not None:
            before = self.slopes.get(name)
            self.slopes[name] = slope if before is None else before + slope
        return found

    def contract_into(self, grads: dict[str, Tensor], name: str, grad: Tensor) -> None:
        """Add `dL/draw` of a tensor for `grad = dL/dtheta` to gradients by key.

        Args:
            grads: gradients of raw parameters; a missing one is zero.
            name: the tensor.
            grad: its gradient.
        """
        slot = self.plan.layout.slots[name]
        found = self.contract(name, grad, slot.read(self.raw))
        if slot.key not in grads and slot.index is not None:
            grads[slot.key] = torch.zeros_like(self.raw[slot.key])
        if slot.key in grads:
            slot.read(grads).add_(found)
        else:
            grads[slot.key] = found  # not copied: it may be as large as the sources

    def finish(self, name: str, own: Tensor | float, out: Tensor) -> Tensor:
        """Write `theta_p(z)` after the recipe's finalisers into `out`; see `Plan.combine`.

        Fixed tensors stay as they are. Finalisers compute in float32 or wider.
        """
        if not self.plan.finalisation.active or not isinstance(own, Tensor):
            return self.plan.combine(name, own, out)
        wide = out.new_empty(out.shape, dtype=torch.promote_types(out.dtype, torch.float32))
        with torch.no_grad():
            theta = self.plan.combine(name, own, wide)
            return out.copy_(self.plan.finalisation(name, theta, self.corrections))

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return `theta - A` of a tensor as a product of two matrices; see `Plan.factors`."""
        own = self.own(name)
        if isinstance(own, Tensor):
            if self.plan.finalisation.active:
                return None
            own = own.detach().cpu()
        return self.plan.factors(name, own)

    def require_finite(self) -> None:
        """Reject coefficients that are NaN or infinite.

        Raises:
            NonFiniteError: the message names their tensors.
        """
        bad = {key for key, raw in self.raw.items() if not is_finite(raw.detach().reshape(-1))}
        names = [n for n, slot in self.plan.layout.slots.items() if slot.key in bad]
        names += [name for name, value in self.fixed.items() if not math.isfinite(value)]
        parts = self.private.named_parameters() if self.private is not None else ()
        names += [key for key, value in parts if not is_finite(value.detach().reshape(-1))]
        if names:
            raise NonFiniteError(
                f"coefficients: expected finite numbers, got NaN or infinity for {shorten(names)}."
                "\nEvery weight merged with them would be NaN. Check recipe.init and "
                "recipe.frozen, or learn them again from the last good checkpoint with a lower "
                "learning rate."
            )

    @torch.no_grad()
    def materialise(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a merged and finished tensor, by default in the reference's stored dtype."""
        info = self.plan.reference.infos[name]
        out = torch.empty(info.shape, dtype=dtype or info.dtype)
        return self.finish(name, self.own(name), out)
