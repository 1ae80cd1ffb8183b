"""W&B runs of a job: one for each trainer with loggers of its own, all in one group."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.loggers import WandbLogger


def name_wandb_runs(loggers: Iterable[Any], group: str, step: str | None, job: str) -> None:
    """Name the runs that a trainer's loggers will begin.

    What the user has set is kept, in the configuration of a logger or in the environment: the name
    of a step begins with theirs (`WANDB_NAME`), and their group (`WANDB_RUN_GROUP`) is taken. The
    environment itself is not written to: W&B reads it once a process.

    Args:
        loggers: of a trainer that has not begun.
        group: of the job's runs, where the user has set none.
        step: of the job; None where the whole job is one run.
        job: its name, where the user has set none.
    """
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        options = logger._wandb_init
        name = options.get("name") or os.environ.get("WANDB_NAME")
        options["name"] = (name or job) if step is None else f"{name}-{step}" if name else step
        options["group"] = options.get("group") or os.environ.get("WANDB_RUN_GROUP") or group


def finish_wandb_run() -> None:
    """Close the run that a logger of an earlier trainer left open; the next would log to it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()
