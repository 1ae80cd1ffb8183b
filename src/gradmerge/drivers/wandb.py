"""W&B runs of a job: one for each trainer with loggers of its own, all in one group."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.loggers import WandbLogger

# Loggers of the latest trainer, where they open runs of their own.
_opening: list[WandbLogger] = []


def name_wandb_runs(loggers: Iterable[Any], group: str, step: str | None, job: str) -> None:
    """Name the runs that a trainer's loggers will begin.

    What the user has set is kept, in the configuration of a logger or in the environment: the name
    and the id of a step begin with theirs (`WANDB_NAME`, `WANDB_RUN_ID`), and their group
    (`WANDB_RUN_GROUP`) is taken. A step that goes on after a kill has its id again. The environment
    itself is not written to: W&B reads it once a process.

    In a sweep W&B takes no other id than the agent's, so a job there is one run, and its name is
    the job's.

    Args:
        loggers: of a trainer that has not begun.
        group: of the job's runs, where the user has set none.
        step: of the job; None where the whole job is one run.
        job: its name, where the user has set none.
    """
    open_before = _open_run() is not None
    if _is_one_run():
        step = None
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        options = logger._wandb_init
        name = options.get("name") or os.environ.get("WANDB_NAME")
        options["name"] = (name or job) if step is None else f"{name}-{step}" if name else step
        options["group"] = options.get("group") or os.environ.get("WANDB_RUN_GROUP") or group
        own = options.get("id") or os.environ.get("WANDB_RUN_ID")
        if own and step is not None:
            options["id"] = logger._id = f"{own}-{step}"
        if not open_before and not _is_one_run():
            _opening.append(logger)


def finish_wandb_run() -> None:
    """Close the run that a logger of an earlier trainer opened; the next would log to it.

    A run that was open before that trainer was made is the user's, and all steps log to it; a
    sweep's stays open, too.
    """
    run = _open_run()
    if run is not None and any(logger._experiment is run for logger in _opening):
        run.finish()
    _opening.clear()


def _open_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


def _is_one_run() -> bool:
    """Whether W&B says which run this process is: its agents of sweeps and of launch do."""
    return any(os.environ.get(f"WANDB_{name}") for name in ("SWEEP_ID", "LAUNCH"))
