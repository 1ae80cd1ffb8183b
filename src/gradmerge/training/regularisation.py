"""Regularisers of a fit, with the starting coefficients and their importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, distributed

from gradmerge.common.errors import ConfigError
from gradmerge.common.typing import Raw
from gradmerge.engine.merged import MergedModel
from gradmerge.objectives import Objective

Runs = Sequence[Callable[[], Tensor]]


class Regularisation:
    """Penalties of an objective's regularisers on a merged model.

    Args:
        objective: the objective with the regularisers.
        merged: the model at its starting coefficients, which are stored if there is a regulariser.
    """

    def __init__(self, objective: Objective, merged: MergedModel) -> None:
        self._objective, self._merged = objective, merged
        self.start: dict[str, Tensor] = {}
        """Starting coefficients by tensor."""
        self.start_at(merged.raw)
        self.importance: dict[str, Tensor] = {}
        """Importance F of `FisherToInit` by key of the raw parameters, `[sources, *shape]`."""

    def start_at(self, raw: Raw) -> None:
        """Set the starting coefficients from raw ones, if there is a regulariser."""
        if self._objective.regularisers:
            state = self._merged.state.at(raw)
            self.start = {n: state.coefficient(n).detach().clone() for n in state.learned}

    def penalty(self) -> Tensor:
        """Return the weighted sum of all penalties, differentiable."""
        slots = self._merged.plan.layout.slots
        importance = {
            name: slots[name].read(self.importance)
            for name in self._merged.state.learned
            if self.importance
        }
        coefficients = self._merged.coefficients()
        known = importance if self.importance else None
        return self._objective.penalty(coefficients, self.start, known)

    @property
    def wants_batches(self) -> bool:
        """True if F is required but not measured yet."""
        return bool(self._objective.importance_batches) and not self.importance

    def measure(self, batches: Iterable[Runs], scale: float) -> None:
        """Measure F on the first batches with `measure_importance`."""
        first = islice(batches, self._objective.importance_batches)
        self.importance = measure_importance(self._merged, first, scale)

    def to_save(self) -> dict[str, Tensor]:
        """Return F for a checkpoint; empty if not measured."""
        return {key: value.cpu() for key, value in self.importance.items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Restore F from the result of `to_save`."""
        device = self._merged.device
        self.importance = {key: value.to(device) for key, value in saved.items()}


def measure_importance(
    merged: MergedModel, batches: Iterable[Runs], scale: float = 1.0
) -> dict[str, Tensor]:
    """Measure `F = mean over batches of (dL/dc)^2`, divided by its own mean.

    F is the diagonal Fisher information of EWC (arXiv 1612.00796). `L` is the sum of a batch's
    losses, and c is a coefficient, not its raw parameter. Gradients of tensors that share a
    coefficient are summed, and gradients of several processes averaged, before squaring.

    Args:
        merged: the model at its starting coefficients.
        batches: the losses of each batch, as `MergedModel.accumulate` takes them.
        scale: factor on the losses in the backward pass (of a gradient scaler), taken out again.

    Returns:
        F by key of the raw parameters, `[sources, *shape]`, float32.

    Raises:
        ConfigError: all gradients are zero.
    """
    plan, layout = merged.plan, merged.plan.layout
    num = len(plan.sources)
    # shapes of coefficients, since raw parameters may hold a scale beside them
    own = {slot.key: slot.shape for slot in layout.slots.values() if slot.index is None}
    total = {
        key: torch.zeros(num, *shape, device=merged.device)
        for key, shape in {**layout.shapes, **own}.items()
    }
    count, reached = 0, set[str]()
    for runs in batches:
        slopes = _slopes(merged, runs, scale)
        found = {key: torch.zeros_like(value) for key, value in total.items()}
        for name, slope in slopes.items():
            layout.slots[name].read(found).add_(slope.to(merged.device) / scale)
        reached |= slopes.keys()
        for key, value in found.items():
            total[key] += _mean_over_processes(value).square_()
        count += 1
    reached = _of_all_processes(reached)
    learned = [name for name in merged.state.learned if name in reached]
    whole = [layout.slots[name].read(total).flatten() for name in learned]
    mean = float(torch.cat(whole).mean(dtype=torch.float64)) if whole else 0.0
    if not mean > 0:
        raise ConfigError(
            f"FisherToInit: expected a non-zero gradient to measure importance by, got zero in all "
            f"coefficients over {count} batches. Use L2ToInit or another init."
        )
    return {key: value.div_(mean) for key, value in total.items()}


def _slopes(merged: MergedModel, runs: Runs, scale: float) -> dict[str, Tensor]:
    """Return the gradients of one batch by tensor, `[sources, *shape]`, times `scale`."""
    slopes = merged.state.slopes = {}
    try:
        merged.accumulate(runs, scale)
    finally:
        merged.state.slopes = None
    return slopes


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
