"""Finishing a merge on data once its coefficients are known: BatchNorm statistics, REPAIR."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from gradmerge.calibration.observers import mask_of
from gradmerge.calibration.repair.correct import Renormalisation
from gradmerge.calibration.repair.measure import Run
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.engine.autograd import checksums
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.outputs import Batch, rows_of
from gradmerge.finalisers import REPAIR

Sample = Callable[[int], Iterable[tuple[str, Batch]]]
"""At most so many batches of each task's adaptation split, on the merge's device."""

NORM_BATCHES = 16
"""Most batches per task that BatchNorm statistics are recomputed on."""


class Finishing:
    """Keeps BatchNorm statistics and corrections current with the coefficients.

    REPAIR's layers and targets do not depend on coefficients and are found once for the same data.

    Args:
        warn: called with what a user should know.
    """

    def __init__(self, warn: Callable[[str], None] = warnings.warn) -> None:
        self._warn = warn
        self._state: object = None
        self._data: object = None
        self._known: object = None
        self._renormalisation: Renormalisation | None = None

    def __reduce__(self) -> tuple[type[Finishing], tuple[Callable[[str], None]]]:
        """Copy without what is known of this network and its data."""
        return Finishing, (self._warn,)

    def refresh(self, merged: MergedModel, data: object, sample: Sample | None) -> None:
        """Compute what the recipe asks for, unless it is current.

        Args:
            merged: the merge.
            data: identifies the data: the same object means the same examples.
            sample: batches of them; None if there are none.

        Raises:
            ConfigError: REPAIR has no data.
        """
        repair = merged.plan.finalisation.repair
        norms = merged.plan.recipe.buffers == "recompute" and merged.network_buffers.batch_norms
        if not norms and repair is None:
            return
        state = tuple(checksums(merged.parameters())), frozenset(merged.state.fixed)
        if self._state == state and (sample is None or self._data is data):
            return
        if sample is None:
            self._do_without(merged)
        else:
            # a tensor made in inference mode cannot take part in a graph, which REPAIR records
            with torch.inference_mode(False), _evaluating(merged):
                runs = [
                    Run(partial(rows_of, merged, task, batch), mask_of(merged.skeleton, batch))
                    for task, batch in sample(repair.batches if repair else NORM_BATCHES)
                ]
                if repair is None:
                    merged.network_buffers.recompute([run.call for run in runs])
                else:
                    self._known_for(merged, repair, runs, (data, state[1])).correct(runs)
        self._state, self._data = state, data

    def _known_for(
        self, merged: MergedModel, repair: REPAIR, runs: Sequence[Run], known: object
    ) -> Renormalisation:
        if self._renormalisation is None or self._known != known:
            self._renormalisation, self._known = Renormalisation(merged, repair, runs), known
            left = self._renormalisation.survey.unusual
            if left:
                why = next(iter(left.values()))
                self._warn(
                    f"REPAIR leaves {len(left)} layers alone: {shorten(list(left))} ({why})."
                )
        return self._renormalisation

    def _do_without(self, merged: MergedModel) -> None:
        """Accept corrections (a checkpoint's) of the current coefficients, or mean statistics."""
        known = merged.state.corrections
        if merged.plan.finalisation.repair is None:
            self._warn(
                "BatchNorm statistics cannot be recomputed without a MergeDataModule; the mean of "
                "the sources' statistics is used."
            )
        elif known is None or known.coefficients != checksums(merged.parameters()):
            raise ConfigError(
                "REPAIR takes the tasks' adaptation data, but there is no MergeDataModule. Train "
                "and evaluate with one, call `refresh_buffers(data)`, or leave REPAIR out of "
                "`finalisers`."
            )


@contextmanager
def _evaluating(merged: MergedModel) -> Iterator[None]:
    """Compute with finalisers, which training mode turns off."""
    training = merged.training
    merged.train(False)
    try:
        yield
    finally:
        merged.train(training)
