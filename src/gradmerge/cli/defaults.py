"""What a fit from the command line logs to, where its configuration does not say."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any


def with_csv(given: Any, folder: str | None) -> Any:
    """The loggers of a configuration: ours if it names none, and always a CSV file.

    False stays false: nothing is logged.
    """
    from lightning.pytorch.loggers import CSVLogger

    if given is False:
        return False
    if given is None or given is True:
        return default_loggers(folder)
    loggers = list(given) if isinstance(given, Iterable) else [given]
    if not any(isinstance(logger, CSVLogger) for logger in loggers):
        loggers.append(CSVLogger(folder or "outputs", name="logs"))
    return loggers


def with_coefficients(given: Any) -> list[Any]:
    """The callbacks of a configuration, with one that logs coefficients."""
    from gradmerge.training.callbacks import CoefficientLogger

    callbacks = list(given) if isinstance(given, Iterable) else [given] if given else []
    if not any(isinstance(callback, CoefficientLogger) for callback in callbacks):
        # last: its picture is of the coefficients that an export has restored
        callbacks.append(CoefficientLogger())
    return callbacks


def default_loggers(folder: str | None) -> list[Any]:
    """CSV always; W&B too, offline unless a key is set: it never prompts or hangs."""
    from lightning.pytorch.loggers import CSVLogger, WandbLogger

    root = folder or "outputs"
    csv = CSVLogger(root, name="logs")
    if os.environ.get("WANDB_MODE") == "disabled":
        return [csv]
    offline = not has_wandb_key() or os.environ.get("WANDB_MODE") == "offline"
    os.makedirs(root, exist_ok=True)
    return [csv, WandbLogger(project="gradmerge", save_dir=root, offline=offline)]


def has_wandb_key() -> bool:
    """Whether W&B can log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
    try:
        with open(path, encoding="utf-8") as file:
            return "api.wandb.ai" in file.read()
    except OSError:
        return False
