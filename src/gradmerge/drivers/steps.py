"""Callbacks of a fit that is one step of a job: it saves its state and resumes after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from typing_extensions import override

from gradmerge.training.callbacks import finish_fit
from gradmerge.training.module import MergeModule


class KeepLast(Checkpoint):
    """Saves the state of a running fit in one file, from which it resumes bitwise.

    It saves after every validation and every n steps. If a validation may be due it waits for that:
    a trainer resumed from between the two would skip the validation.

    Args:
        path: of the checkpoint, which is written atomically.
        every_n_steps: optimiser steps between two saves.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self._step = 0
        self._whole = True  # no accumulated gradient is waiting for its optimiser step
        self._stopped = False

    @override
    def state_dict(self) -> dict[str, Any]:
        # whether the fit was told to stop early, which a trainer's own state lacks
        return {"stopped": self._stopped}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stopped = bool(state_dict["stopped"])

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Make callbacks that watch a score act at the end of the validation, before the save.

        By default they act at the end of the epoch, when a resumed fit has no score.
        """
        for callback in trainer.callbacks if trainer.enable_validation else ():  # type: ignore
            if isinstance(callback, EarlyStopping):
                callback._check_on_train_epoch_end = False
            elif isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
                callback._save_on_train_epoch_end = False

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Stop if the fit had been told to before it was killed."""
        self._step = trainer.global_step
        trainer.should_stop = trainer.should_stop or self._stopped

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every n steps, unless a validation may follow."""
        before, self._step = self._step, trainer.global_step
        self._whole = self._step != before
        due = self._whole and self._step % self.every_n_steps == 0
        if due and not _may_validate(trainer, batch_idx):
            self._save(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Save, after other callbacks have acted on the scores."""
        if not trainer.sanity_checking and trainer.state.fn == "fit" and self._whole:
            self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        self._stopped = trainer.should_stop
        work = self.path.with_name(f".{self.path.name}.partial")
        trainer.save_checkpoint(work)
        if trainer.is_global_zero:
            work.replace(self.path)
        trainer.strategy.barrier()


def _may_validate(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Return False only if no validation follows this batch."""
    if not trainer.enable_validation:
        return False
    every = trainer.val_check_batch
    if every is None or trainer.should_stop:  # by the clock, or at the end
        return True
    if trainer.check_val_every_n_epoch is None:
        return (trainer.fit_loop.total_batch_idx + 1) % every == 0
    return trainer.is_last_batch or (batch_idx + 1) % every == 0


class Finish(lightning.Callback):
    """Restores the best coefficients when the fit ends, and has one process write them.

    Args:
        write: takes the module with its best coefficients, and facts about the fit.
    """

    def __init__(self, write: Callable[[MergeModule, dict[str, Any]], None]) -> None:
        self.write = write

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Restore, write, and wait for the process that writes."""
        facts = finish_fit(trainer, pl_module)
        if trainer.is_global_zero:
            self.write(pl_module, facts)
        trainer.strategy.barrier()
