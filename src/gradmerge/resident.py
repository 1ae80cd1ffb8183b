"""Resident memory: all merged tensors, built once for each state of the coefficients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gradmerge.differentiation import Combine, checksums

if TYPE_CHECKING:
    from gradmerge.merged import MergedModel


class ResidentTensors:
    """`theta` of every tensor, by name."""

    def __init__(self) -> None:
        self.theta: dict[str, Tensor] = {}
        """As they stand; a step puts leaves of its own in their place."""
        self._storage: dict[str, Tensor] = {}
        self._fixed: dict[str, Tensor] = {}
        self._state: object = None
        self._has_graph = False

    def __reduce__(self) -> tuple[type[ResidentTensors], tuple[()]]:
        """A copy merges anew: the tensors are of the original's coefficients and graph."""
        return ResidentTensors, ()

    def forget(self, fixed: bool = False) -> None:
        """Build anew next time; of fixed tensors only where asked for."""
        self.theta, self._storage = {}, {}
        self._state, self._has_graph = None, False
        if fixed:
            self._fixed.clear()

    def refresh(self, engine: MergedModel, graph: bool, finished: bool) -> None:
        """Merge all tensors, unless they still stand for the current coefficients.

        Args:
            engine: whose tensors they are.
            graph: whether a gradient is recorded.
            finished: whether the recipe's finalisers are applied.
        """
        plan = engine.plan
        corrections = plan.finalisation.version if finished else None
        state = engine.version, checksums(engine.raw.values()), corrections
        if self._state == state and (self._has_graph or not graph):
            return
        for key in plan.fixed:
            if key in plan.binding.parameters and key not in self._fixed:  # type: ignore[union-attr]
                self._fixed[key] = engine.build(key, None, engine.dtype)
        # Merged tensors of before are let go first: two models would live otherwise.
        self.theta = dict(self._fixed)
        if graph:
            self._storage = {}
            for key in plan.learned:
                raw = plan.raw(key, engine.raw)
                self.theta[key] = Combine.apply(raw, engine, key, engine.dtype)
        else:
            for key in plan.learned:
                raw = plan.raw(key, engine.raw).detach()
                # Written over in place: fresh pages would fault in at every step.
                kept = self._storage.get(key)
                self._storage[key] = engine.build(key, raw, engine.dtype, kept, finished)
                self.theta[key] = self._storage[key]
        self._state, self._has_graph = state, graph
