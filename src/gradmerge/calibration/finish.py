"""What a merged model gets on data once its coefficients are known: BatchNorm statistics, and
finalisers that need data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from gradmerge.calibration.observers import mask_of
from gradmerge.calibration.repair.correct import Renormalisation
from gradmerge.calibration.repair.layers import Run
from gradmerge.engine.autograd import checksums
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.predict import Batch, rows_of
from gradmerge.errors import ConfigError, shorten

Sample = Callable[[int], Iterable[tuple[str, Batch]]]
"""At most so many batches of each task's adaptation split, on the merge's device."""

# Batches a task, at most, that BatchNorm statistics are recomputed on.
_NORM_BATCHES = 16


class Finishing:
    """Keeps statistics and corrections up with the coefficients.

    What does not depend on coefficients (REPAIR's layers and targets) is found once for the same
    data.

    Args:
        warn: called with what a user should know.
    """

    def __init__(self, warn: Callable[[str], None] = warnings.warn) -> None:
        self._warn = warn
        self._state: object = None
        self._known: object = None
        self._renormalisation: Renormalisation | None = None

    def __reduce__(self) -> tuple[type[Finishing], tuple[Callable[[str], None]]]:
        """A copy knows nothing: what is known is of the original's network and data."""
        return Finishing, (self._warn,)

    def refresh(self, merged: MergedModel, data: object, sample: Sample | None) -> None:
        """Compute what the recipe asks for, unless it is of the current coefficients.

        Args:
            merged: the merge.
            data: what the sample is of; the same object means the same examples.
            sample: batches of it, if there is any.

        Raises:
            ConfigError: REPAIR has no data.
        """
        repair = merged.plan.finalisation.repair
        norms = merged.plan.recipe.buffers == "recompute" and merged.statistics.batch_norms
        if not norms and repair is None:
            return
        own = tuple(checksums(merged.raw.values()))
        state = own, frozenset(merged.plan.fixed)
        if self._state == state:
            return
        if sample is None:
            if repair is not None and _are_current(merged):
                self._state = state
                return
            if repair is not None:
                raise ConfigError(
                    "REPAIR takes the tasks' adaptation data, and there is no MergeDataModule to "
                    "give it. Train and evaluate with one, call `refresh_buffers(data)`, or leave "
                    "REPAIR out of `finalisers`."
                )
            self._warn(
                "BatchNorm statistics cannot be recomputed without a MergeDataModule; the mean of "
                "the sources' statistics is used."
            )
            self._state = state
            return
        with _evaluating(merged):
            runs = _runs(merged, sample(_NORM_BATCHES if repair is None else repair.batches))
            if repair is None:
                merged.statistics.recompute([run.call for run in runs])
            else:
                known = data, state[1]
                if self._renormalisation is None or self._known != known:
                    self._renormalisation = Renormalisation(merged, repair, runs)
                    self._known = known
                    self._say(self._renormalisation)
                self._renormalisation.correct(runs)
        self._state = state

    def _say(self, renormalisation: Renormalisation) -> None:
        left = renormalisation.survey.unusual
        if left:
            why = next(iter(left.values()))
            self._warn(f"REPAIR leaves {len(left)} layers alone: {shorten(list(left))} ({why}).")


def _are_current(merged: MergedModel) -> bool:
    """Whether the corrections at hand (a checkpoint's) are of the coefficients as they stand."""
    finalisation = merged.plan.finalisation
    own = checksums(merged.raw.values())
    return finalisation.corrections is not None and finalisation.coefficients == own


def _runs(merged: MergedModel, batches: Iterable[tuple[str, Batch]]) -> list[Run]:
    """Passes over batches of the tasks."""
    return [
        Run(partial(rows_of, merged, task, batch), mask_of(merged.skeleton, batch))
        for task, batch in batches
    ]


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
