"""The merged parameters of resident memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Building:
    """The parameters of a model, and functions that build them."""

    learned: Sequence[str]
    """Keys of the parameters with learned tensors (see `Parameters`)."""
    fixed: Sequence[str]
    """Keys of the other merged ones."""
    make: Callable[[str, Tensor | None], Tensor]
    """Build a parameter, in the given tensor if there is one."""
    differentiable: Callable[[str], Tensor]
    """Build a parameter with a gradient."""


class ResidentTensors:
    """The merged parameters of resident memory."""

    def __init__(self) -> None:
        self.theta: dict[str, Tensor] = {}
        """Current `theta` of every parameter, by key; `accumulate` replaces them by leaves."""
        self._storage: dict[str, Tensor] = {}
        self._fixed: dict[str, Tensor] = {}
        self._known: object = None
        self._has_graph = False

    def __reduce__(self) -> tuple[type[ResidentTensors], tuple[()]]:
        """Copy as empty: the tensors belong to the original's coefficients and graph."""
        return ResidentTensors, ()

    def forget(self, fixed: bool = False) -> None:
        """Discard learned tensors, and with `fixed` also the fixed ones."""
        self.theta, self._storage = {}, {}
        self._known, self._has_graph = None, False
        if fixed:
            self._fixed.clear()

    def is_current(self, known: object, graph: bool) -> bool:
        """Return True if the parameters are those of what they depend on, with a graph if asked."""
        return self._known == known and (self._has_graph or not graph)

    def refresh(self, known: object, graph: bool, how: Building) -> None:
        """Merge all parameters.

        Args:
            known: what they depend on.
            graph: record a gradient.
            how: how they are built.
        """
        for key in how.fixed:
            if key not in self._fixed:
                self._fixed[key] = how.make(key, None)
        # Release the previous tensors first, or two models would live at once.
        self.theta = dict(self._fixed)
        if graph:
            self._storage = {}
            for key in how.learned:
                self.theta[key] = how.differentiable(key)
        else:
            for key in how.learned:
                # Overwrite in place: newly allocated pages would fault at every step.
                self._storage[key] = how.make(key, self._storage.get(key))
                self.theta[key] = self._storage[key]
        self._known, self._has_graph = known, graph
