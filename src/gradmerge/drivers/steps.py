"""Callbacks of a fit that is one step of a job: it saves its state and resumes after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from typing_extensions import override

from gradmerge.training.callbacks import finish_fit
from gradmerge.training.module import MergeModule
from gradmerge.training.saving import Saver


class KeepLast(Saver, Checkpoint):
    """Saves the state of a running fit in one file, from which it resumes bitwise.

    Args:
        path: of the checkpoint, which is written atomically.
        every_n_steps: optimiser steps between two saves.
    """

    remedy: ClassVar = "run the same command again to resume the job"

    def __init__(self, path: Path, every_n_steps: int) -> None:
        super().__init__(path, every_n_steps)
        self._stopped = False

    @override
    def state_dict(self) -> dict[str, Any]:
        # whether the fit was told to stop early, which a trainer's own state lacks
        return {"stopped": self._stopped}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stopped = bool(state_dict["stopped"])

    @override
    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Make callbacks that watch a score act at the end of the validation, before the save.

        By default they act at the end of the epoch, when a resumed fit has no score.
        """
        super().setup(trainer, pl_module, stage)
        for callback in trainer.callbacks if trainer.enable_validation else ():  # type: ignore
            if isinstance(callback, EarlyStopping):
                callback._check_on_train_epoch_end = False
            elif isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
                callback._save_on_train_epoch_end = False

    @override
    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Stop if the fit had been told to before it was killed."""
        trainer.should_stop = trainer.should_stop or self._stopped

    @override
    def save(self, trainer: lightning.Trainer) -> Path | None:
        self._stopped = trainer.should_stop
        return super().save(trainer)


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
