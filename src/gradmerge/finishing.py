"""What a merged model gets on data once its coefficients are known: BatchNorm statistics, and
finalisers that need data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from gradmerge.differentiation import checksums
from gradmerge.errors import ConfigError, shorten
from gradmerge.loaders import sample_batches
from gradmerge.merged import MergedModel
from gradmerge.observation import mask_of
from gradmerge.renormalisation import Renormalisation
from gradmerge.survey import Run

if TYPE_CHECKING:
    from gradmerge.module import MergeModule

# Batches a task, at most, that BatchNorm statistics are recomputed on.
_NORM_BATCHES = 16


class Finishing:
    """Keeps statistics and corrections up with the coefficients.

    What does not depend on coefficients (REPAIR's layers and targets) is found once for each data
    module.
    """

    def __init__(self) -> None:
        self._state: object = None
        self._known: object = None
        self._renormalisation: Renormalisation | None = None

    def __reduce__(self) -> tuple[type[Finishing], tuple[()]]:
        """A copy knows nothing: what is known is of the original's network and data."""
        return Finishing, ()

    def refresh(self, module: MergeModule, data: Any = None) -> None:
        """Compute what the recipe asks for, unless it is of the current coefficients.

        Args:
            module: whose merged model it is.
            data: the data module; default: the trainer's.

        Raises:
            ConfigError: REPAIR has no data.
        """
        merged = module.merged
        repair = merged.plan.finalisation.repair
        norms = merged.plan.recipe.buffers == "recompute" and merged.statistics.batch_norms
        if not norms and repair is None:
            return
        own = tuple(checksums(merged.raw.values()))
        state = own, frozenset(merged.plan.fixed)
        if self._state == state:
            return
        data = data or getattr(module._trainer, "datamodule", None)
        if data is None or not hasattr(data, "evaluation_loaders"):
            if repair is not None and _are_current(merged):
                self._state = state
                return
            if repair is not None:
                raise ConfigError(
                    "REPAIR takes the tasks' adaptation data, and there is no MergeDataModule to "
                    "give it. Train and evaluate with one, call `refresh_buffers(data)`, or leave "
                    "REPAIR out of `finalisers`."
                )
            rank_zero_warn(
                "BatchNorm statistics cannot be recomputed without a MergeDataModule; the mean of "
                "the sources' statistics is used."
            )
            self._state = state
            return
        with _evaluating(merged):
            runs = _runs(module, data, _NORM_BATCHES if repair is None else repair.batches)
            if repair is None:
                merged.statistics.recompute([run.call for run in runs])
            else:
                known = data, state[1]
                if self._renormalisation is None or self._known != known:
                    self._renormalisation = Renormalisation(merged, repair, runs)
                    self._known = known
                    _say(self._renormalisation)
                self._renormalisation.correct(runs)
        self._state = state


def _are_current(merged: MergedModel) -> bool:
    """Whether the corrections at hand (a checkpoint's) are of the coefficients as they stand."""
    finalisation = merged.plan.finalisation
    own = checksums(merged.raw.values())
    return finalisation.corrections is not None and finalisation.coefficients == own


def _runs(module: MergeModule, data: Any, batches: int) -> list[Run]:
    """Passes over a sample of each task's adaptation split."""
    runs = []
    for task, loader in zip(module.tasks, data.evaluation_loaders("adaptation"), strict=True):
        for batch in sample_batches(loader, batches):
            moved = module.transfer_batch_to_device(batch, module.device, 0)
            mask = mask_of(module.merged.skeleton, moved)
            runs.append(Run(partial(module.rows, task, moved), mask))
    return runs


def _say(renormalisation: Renormalisation) -> None:
    left = renormalisation.survey.unusual
    if left:
        why = next(iter(left.values()))
        rank_zero_warn(f"REPAIR leaves {len(left)} layers alone: {shorten(list(left))} ({why}).")


@contextmanager
def _evaluating(merged: MergedModel) -> Iterator[None]:
    """Finalisers are off in training mode, and what is computed is of the finished network."""
    training = merged.training
    if not merged.plan.finalisation.active or not training:
        yield
        return
    merged.train(False)
    try:
        yield
    finally:
        merged.train(training)
