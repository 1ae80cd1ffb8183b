"""W&B runs of a job: one per trainer with its own loggers, all in one group."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from lightning.pytorch.loggers import WandbLogger

# Loggers of the latest trainer that open their own runs.
_opening: list[WandbLogger] = []


def name_wandb_runs(
    loggers: Iterable[Any], root: str, job: str, step: str | None, resumes: bool
) -> None:
    """Name the runs that a trainer's loggers will open, and go on in those of an earlier process.

    The user's settings, in a logger or in the environment, are kept: a step's name and id begin
    with theirs (`WANDB_NAME`, `WANDB_RUN_ID`), and their group (`WANDB_RUN_GROUP`) is used. A step
    that resumes has the same id. The environment itself is not written to: W&B reads it once per
    process.

    Args:
        loggers: loggers of a trainer that has not started.
        root: name of the job's root, which names job and group if the user does not.
        job: identifier of the job, or a part of it.
        step: name of the step; None if the whole job is one run.
        resumes: an earlier process has begun the step.
    """
    # a sweep (or a launch) allows only the id of its agent, which has set the run of this process
    is_one_run = any(os.environ.get(f"WANDB_{name}") for name in ("SWEEP_ID", "LAUNCH"))
    is_ours = _open_run() is None and not is_one_run
    if is_one_run:
        step = None
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        options = logger._wandb_init
        name = options.get("name") or os.environ.get("WANDB_NAME")
        options["name"] = (name or root) if step is None else f"{name}-{step}" if name else step
        group = options.get("group") or os.environ.get("WANDB_RUN_GROUP")
        options["group"] = group or f"{root}-{job}".rstrip("-")
        given = options.get("id") or os.environ.get("WANDB_RUN_ID")
        if (given or job) and not is_one_run and (step is not None or not given):
            own = "-".join(part for part in (given or job, step) if part)
            options["id"] = logger._id = own
        if resumes and options.get("id"):
            options["resume"] = "allow"
        if is_ours:
            _opening.append(logger)


def finish_wandb_run() -> None:
    """Close the run that a logger of an earlier trainer opened, so that the next opens its own.

    A run that was open before, the user's or a sweep's, stays open, and all steps log to it.
    """
    run = _open_run()
    if run is not None and any(logger._experiment is run for logger in _opening):
        with suppress(Exception):  # its service may have died
            run.finish()
    _opening.clear()


def _open_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)
