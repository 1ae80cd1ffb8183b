"""The regularisers of a fit, and what they remember of its start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, distributed

from gradmerge._typing import Raw
from gradmerge.engine.merged import MergedModel
from gradmerge.errors import ConfigError
from gradmerge.objectives import Objective

Runs = Sequence[Callable[[], Tensor]]


class Regularisation:
    """An objective's regularisers over a merged model.

    Args:
        objective: whose regularisers they are.
        merged: at its starting coefficients, which are kept if there is any regulariser.
    """

    def __init__(self, objective: Objective, merged: MergedModel) -> None:
        self._objective, self._merged = objective, merged
        self.start: dict[str, Tensor] = {}
        """Coefficients at the start, by tensor."""
        self.start_at(merged.raw)
        self.importance: dict[str, Tensor] = {}
        """F of `FisherToInit` by key of the raw parameters, `[sources, *shape]`."""

    def start_at(self, raw: Raw) -> None:
        """Measure from these raw coefficients on, where there is any regulariser."""
        if self._objective.regularisers:
            plan = self._merged.plan
            self.start = {n: plan.coefficient(n, raw).detach().clone() for n in plan.learned}

    def penalty(self) -> Tensor:
        """The weighted sum of all penalties, differentiable."""
        slots = self._merged.plan.layout.slots
        importance = {
            name: slots[name].read(self.importance)
            for name in self._merged.plan.learned
            if self.importance
        }
        coefficients = self._merged.coefficients()
        known = importance if self.importance else None
        return self._objective.penalty(coefficients, self.start, known)

    @property
    def wants_batches(self) -> bool:
        """Whether F is asked for and not known yet."""
        return bool(self._objective.importance_batches) and not self.importance

    def measure(self, batches: Iterable[Runs], scale: float) -> None:
        """Measure F on the first batches; see `measure_importance`."""
        first = islice(batches, self._objective.importance_batches)
        self.importance = measure_importance(self._merged, first, scale)

    def to_save(self) -> dict[str, Tensor]:
        """F, for a checkpoint; empty where it is not asked for."""
        return {key: value.cpu() for key, value in self.importance.items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `to_save` gave."""
        device = self._merged.device
        self.importance = {key: value.to(device) for key, value in saved.items()}


def measure_importance(
    merged: MergedModel, batches: Iterable[Runs], scale: float = 1.0
) -> dict[str, Tensor]:
    """`F = mean over batches of (dL/dc)^2`, divided by its own mean (the diagonal Fisher of EWC).

    `L` is a batch's sum of losses and c a coefficient, not its raw number; tensors that share a
    coefficient add up in `dL/dc` before it is squared. Several processes average their gradients
    first, as a step does.

    Args:
        merged: the model, at its starting coefficients.
        batches: the losses of each batch, as `MergedModel.accumulate` takes them.
        scale: factor on the losses inside (a gradient scaler's).

    Returns:
        F by key of the raw parameters, `[sources, *shape]`, float32.

    Raises:
        ConfigError: no gradient is other than zero.
    """
    plan, layout = merged.plan, merged.plan.layout
    num = len(plan.sources)
    # of coefficients, not of raw numbers: these may have a scale beside them
    own = {slot.key: slot.shape for slot in layout.slots.values() if slot.index is None}
    total = {
        key: torch.zeros(num, *shape, device=merged.device)
        for key, shape in {**layout.shapes, **own}.items()
    }
    count, reached = 0, set[str]()
    for runs in batches:
        plan.slopes = {}
        try:
            merged.accumulate(runs, scale)
            slopes = plan.slopes
        finally:
            plan.slopes = None
        found = {key: torch.zeros_like(value) for key, value in total.items()}
        for name, slope in slopes.items():
            layout.slots[name].read(found).add_(slope.to(merged.device) / scale)
        reached |= slopes.keys()
        for key, value in found.items():
            total[key] += _mean_over_processes(value).square_()
        count += 1
    reached = _of_all_processes(reached)
    learned = [name for name in plan.learned if name in reached]
    whole = [layout.slots[name].read(total).flatten() for name in learned]
    mean = float(torch.cat(whole).mean(dtype=torch.float64)) if whole else 0.0
    if not mean > 0:
        raise ConfigError(
            f"FisherToInit: the gradient of the objective is zero in all coefficients over {count} "
            "batches, so that none matters more than another. Use L2ToInit, or another start."
        )
    return {key: value.div_(mean) for key, value in total.items()}


def _of_all_processes(names: set[str]) -> set[str]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return names
    found: list[set[str]] = [set()] * distributed.get_world_size()
    distributed.all_gather_object(found, names)
    return set().union(*found)


def _mean_over_processes(value: Tensor) -> Tensor:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(value)
        value.div_(distributed.get_world_size())
    return value
