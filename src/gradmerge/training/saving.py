"""Saving of a fit: checkpoints that are whole or not there, and a last one when it is stopped.

A fit that gets SIGTERM saves its state as soon as it can be resumed from there, and ends with exit
status 143.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from gradmerge.common.atomic import whole_file
from gradmerge.common.output import require_apart, require_writable
from gradmerge.export.atomic import inputs_of
from gradmerge.training.run import read_by

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a command that SIGTERM has ended."""


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints that exist completely or not at all, whatever stops the writing."""

    @override
    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # a file object, because `torch.save` hides why it cannot write to a path
        with whole_file(Path(path)) as work, work.open("wb") as file:
            torch.save(checkpoint, file)


def save_whole(trainer: Any) -> None:
    """Make a trainer write whole checkpoints, unless it has a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFiles()


def require_places(trainer: Any, module: Any) -> None:
    """Reject folders of logs and checkpoints that cannot be written, or lie within an input.

    Raises:
        ConfigError: one is in a source, in the data or in another input.
        OutputError: one cannot be written.
    """
    places = [logger.save_dir for logger in trainer.loggers] or [trainer.default_root_dir]
    places += [getattr(callback, "dirpath", None) for callback in trainer.callbacks]
    merged = getattr(module, "merged", None)
    inputs = read_by(getattr(trainer, "datamodule", None))
    inputs = inputs if merged is None else [*inputs_of(merged.plan), *inputs]
    for place in dict.fromkeys(str(place) for place in places if place is not None):
        if "://" not in place:
            require_apart(Path(place), inputs, replaced=False)
            require_writable(Path(place) / "version_0")


class Saver(lightning.Callback):
    """Saves the state of a fit where it can be resumed bitwise, and at the latest when stopped.

    If a validation may be due it waits for that: a trainer resumed from between the two would skip
    the validation.

    Args:
        path: of the checkpoint. Default: `last.ckpt` beside the other checkpoints.
        every_n_steps: optimiser steps between two saves, besides one after every validation.
            Default: saves only when the process is told to end.
    """

    remedy: ClassVar = "resume with --ckpt_path {}"
    """How the fit is resumed, in words."""

    def __init__(self, path: Path | None = None, every_n_steps: int | None = None) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self._step = 0
        self._whole = True  # no accumulated gradient is waiting for its optimiser step
        self._asked = False  # to end
        self._before: Any = None  # handler of the signal

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Check where the fit writes, and make its checkpoints whole."""
        if stage == "fit":
            require_places(trainer, pl_module)
            save_whole(trainer)

    # ---- the signal

    def on_sanity_check_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Take over the signal from the trainer, which would lose the state."""
        environment = getattr(trainer._accelerator_connector, "cluster_environment", None)
        requeued = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        in_main = threading.current_thread() is threading.main_thread()
        if self._before is None and in_main and not requeued and sys.platform != "win32":
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Take over the signal, unless a sanity check was first."""
        self._step = trainer.global_step
        self.on_sanity_check_start(trainer, pl_module)

    def _ask(self, *_: Any) -> None:
        if self._asked:  # a second time
            raise SIGTERMException(TERMINATED)
        self._asked = True
        print("SIGTERM: saving a checkpoint before the end", file=sys.stderr)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Stop if the signal arrived during the last step, and give it back."""
        self._stop(trainer)
        self._give_back()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException
    ) -> None:
        """Give the signal back, and say which checkpoint is kept."""
        self._give_back()
        saved = [] if isinstance(exception, SIGTERMException) else self._kept(trainer)
        if saved:
            last = max(saved, key=lambda path: path.stat().st_mtime_ns)
            rank_zero_info(f"kept: {last}; {self.remedy.format(last)}")

    def _kept(self, trainer: lightning.Trainer) -> list[Path]:
        """Return the checkpoints that this fit has written."""
        folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
        found = [self.path] if self.path is not None else []
        found += [path for folder in folders if folder for path in Path(folder).glob("*.ckpt")]
        return [path for path in found if path.is_file()] if trainer.global_step else []

    def _give_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    # ---- the state

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every n steps, or if the process is to end, unless a validation may follow."""
        before, self._step = self._step, trainer.global_step
        self._whole = self._step != before
        if not self._whole or _may_validate(trainer, batch_idx):
            return
        if self.every_n_steps and self._step % self.every_n_steps == 0:
            self.save(trainer)
        self._stop(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Save, after other callbacks have acted on the scores."""
        if not trainer.sanity_checking and trainer.state.fn == "fit" and self._whole:
            if self.every_n_steps:
                self.save(trainer)
            self._stop(trainer)

    def _stop(self, trainer: Any) -> None:
        """End the fit if any process was told to, with a checkpoint."""
        if trainer.world_size > 1:
            self._asked = trainer.strategy.reduce_boolean_decision(self._asked, all=False)
        if not self._asked:
            return
        path = self.save(trainer)
        if path is not None:
            rank_zero_info(f"the state of the fit is in {path}; {self.remedy.format(path)}")
        # a launcher kills the first process as soon as another ends with an error
        raise SIGTERMException(TERMINATED if trainer.is_global_zero else 0)

    def save(self, trainer: Any) -> Path | None:
        """Save the state, and return the checkpoint."""
        if trainer.fast_dev_run:
            return None
        path = self.path or _beside_others(trainer)
        trainer.save_checkpoint(path)
        return path


def _beside_others(trainer: Any) -> Path:
    callback = trainer.checkpoint_callback
    if isinstance(callback, ModelCheckpoint) and callback.dirpath:
        return Path(callback.dirpath) / "last.ckpt"
    root = trainer.log_dir or trainer.default_root_dir  # a collective call
    return Path(root) / "checkpoints" / "last.ckpt"


def _may_validate(trainer: Any, batch_idx: int) -> bool:
    """Return False only if no validation follows this batch."""
    if not trainer.enable_validation:
        return False
    every = trainer.val_check_batch
    if every is None or trainer.should_stop:  # by the clock, or at the end
        return True
    if trainer.check_val_every_n_epoch is None:
        return bool((trainer.fit_loop.total_batch_idx + 1) % every == 0)
    return bool(trainer.is_last_batch or (batch_idx + 1) % every == 0)
