"""Folders and W&B runs of fits: never shared by two, continued by a resumed one."""

from __future__ import annotations

import csv
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import loggers
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from gradmerge.common.atomic import whole_file, writing
from gradmerge.common.checkpoints import load_checkpoint

_KEPT = "The checkpoints of the fit are kept."
# What is in the folder of a fit that has not made a step.
_OF_START = ("config.yaml", "hparams.yaml", "metrics.csv", "coefficients.csv")


class CSVLogger(loggers.CSVLogger):
    """Lightning's logger in a folder of its own, which a resumed fit continues.

    The folder `version_N` is made when its number is chosen, so that no other fit chooses it, too.
    """

    resumed_at: int | None = None
    """Step from which on the rows of an earlier fit are replaced; None begins a new file."""
    claimed: Path | None = None
    """The folder that this logger has made, if it has."""

    @override
    def _get_next_version(self) -> int:
        number = int(super()._get_next_version())
        if rank_zero_only.rank != 0 or "://" in str(self.root_dir):  # type: ignore[attr-defined]
            return number
        root = Path(self.root_dir)
        while True:
            folder = root / f"version_{number}"
            with writing(folder, "Set trainer.default_root_dir to another folder."):
                root.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):  # another fit has begun just now
                    folder.mkdir()
                    self.claimed = folder
                    return number
            number += 1

    @property
    @override
    def experiment(self) -> Any:
        if self._experiment is None and rank_zero_only.rank == 0 and self.resumed_at is not None:  # type: ignore[attr-defined]
            cut(Path(self.log_dir), self.resumed_at)
            self._experiment = _Continued(self.log_dir)
        return super().experiment

    @override
    def save(self) -> None:
        with writing(Path(self.log_dir), _KEPT):
            super().save()


class _Continued(ExperimentWriter):
    """Writer that adds to the file of an earlier fit."""

    @override
    def _check_log_dir_exists(self) -> None:
        if Path(self.metrics_file_path).is_file():
            with open(self.metrics_file_path, newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])


def cut(folder: Path, step: int) -> None:
    """Remove the rows of logs that are of later steps than a checkpoint, before a fit resumes.

    Args:
        folder: the folder of the fit.
        step: optimiser steps that the checkpoint has behind it. Trainers log a step under the
            number of those before it.
    """
    for name, limit in (("metrics.csv", step), ("coefficients.csv", step + 1)):
        path = folder / name
        if not path.is_file():
            continue
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            rows = [row for row in reader if _number(row.get("step")) < limit]
        with whole_file(path) as work, work.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:  # a half-written row
        return float("inf")


def continue_logs(given: Sequence[Any], checkpoint: Path, fits: bool) -> None:
    """Make loggers go on where a checkpoint's fit stopped: in its folder, and in its W&B run.

    The folder is continued if it is one that the logger could choose (`ROOT/logs/version_N`); a fit
    that is resumed with another root has a folder of its own. Names and ids of the user are kept.

    Args:
        given: loggers that have not begun.
        checkpoint: the checkpoint.
        fits: the trainer will fit; scores of a checkpoint have a folder of their own.
    """
    found = load_checkpoint(checkpoint, mmap=True)
    run = found["gradmerge"].get("run", {}) if isinstance(found.get("gradmerge"), dict) else {}
    folder = checkpoint.resolve().parent.parent
    for logger in given:
        if isinstance(logger, CSVLogger) and logger._version is None and fits:
            number = folder.name.removeprefix("version_")
            if folder.parent == Path(logger.root_dir).resolve() and number.isdecimal():
                logger._version, logger.resumed_at = int(number), int(found.get("global_step", 0))
    continue_run(given, run)


def continue_run(given: Iterable[Any], run: Any) -> None:
    """Make W&B loggers that have not begun go on in the run that the record of a fit names."""
    known = run.get("wandb") if isinstance(run, dict) else None
    if not isinstance(known, dict):
        return
    for logger in given:
        if isinstance(logger, loggers.WandbLogger):
            own = logger._wandb_init.get("id") or os.environ.get("WANDB_RUN_ID")
            if not own and logger._wandb_init.get("project") == known.get("project"):
                resume(logger, str(known["id"]))


def resume(logger: loggers.WandbLogger, identity: str) -> None:
    """Give a W&B logger that has not begun the id of its run, which goes on if it exists."""
    logger._wandb_init.update(id=identity, resume="allow")
    logger._id = identity


def keep_folder(given: Iterable[Any], folder: Path, resumed_at: int | None) -> None:
    """Give loggers a folder that belongs to them alone (`FOLDER/logs/version_0`), and go on in it.

    Args:
        given: loggers that have not begun; those with another place of their own keep that.
        folder: the folder of one fit of a job.
        resumed_at: optimiser steps that are kept of an earlier run; None if there was none.
    """
    for logger in given:
        if isinstance(logger, CSVLogger) and Path(logger.root_dir).parent == folder:
            logger._version, logger.resumed_at = 0, resumed_at


def wandb_run(given: Iterable[Any]) -> dict[str, str] | None:
    """Return the id and project of the first W&B run among loggers, for `continue_logs`."""
    for logger in given:
        if isinstance(logger, loggers.WandbLogger) and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            project = logger._wandb_init.get("project")
            return {"id": str(logger.version), "project": str(project)} if logger.version else None
    return None


def remove_refused(given: Iterable[Any]) -> None:
    """Remove the folders and local W&B runs of a fit that was refused before its first step."""
    for logger in given:
        if isinstance(logger, CSVLogger) and logger.claimed is not None:
            _remove(logger.claimed)
        if isinstance(logger, loggers.WandbLogger):
            _remove_run(getattr(logger, "_experiment", None))


def _remove(folder: Path) -> None:
    """Remove a folder that holds nothing but the start of a fit, and those above it if empty."""
    with suppress(OSError):
        for place in (folder / "checkpoints", *(folder / name for name in _OF_START)):
            place.rmdir() if place.is_dir() else place.unlink(missing_ok=True)
        for place in (folder, folder.parent, folder.parent.parent):
            place.rmdir()


def _remove_run(run: Any) -> None:
    is_open = run is not None and run is getattr(sys.modules.get("wandb"), "run", None)
    if not is_open:
        return
    offline = getattr(run.settings, "_offline", False)
    with suppress(Exception):  # its service may have died
        folder = Path(run.dir).parent
        run.finish(exit_code=1)
        if not offline:
            return  # what was sent stays findable
        shutil.rmtree(folder, ignore_errors=True)
        for link in folder.parent.iterdir():
            if link.is_symlink() and not link.exists():
                link.unlink()
        folder.parent.rmdir()
        folder.parent.parent.rmdir()
