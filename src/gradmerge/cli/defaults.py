"""Default loggers and callbacks of a fit from the command line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any


def listed(given: Any) -> list[Any]:
    """Return callbacks or loggers as a list, from a list, a single one or None."""
    if isinstance(given, Iterable):
        return list(given)
    return [] if given is None else [given]


def with_csv(given: Any, folder: str | None) -> Any:
    """Return a configuration's loggers with a CSV logger added, or the defaults if it has none.

    False turns logging off.
    """
    from lightning.pytorch import loggers as lightning_loggers

    from gradmerge.training.saving import CSVLogger

    if given is False:
        return False
    if given is None or given is True:
        return default_loggers(folder)
    loggers = listed(given)
    if not any(isinstance(logger, lightning_loggers.CSVLogger) for logger in loggers):
        loggers.append(CSVLogger(folder or "outputs", name="logs"))
    return loggers


def with_coefficients(given: Any) -> list[Any]:
    """Return a configuration's callbacks with a `CoefficientLogger` added."""
    from gradmerge.training.callbacks import CoefficientLogger

    callbacks = listed(given)
    if not any(isinstance(callback, CoefficientLogger) for callback in callbacks):
        # last, so that its picture shows the coefficients that an export has restored
        callbacks.append(CoefficientLogger())
    return callbacks


def default_loggers(folder: str | None) -> list[Any]:
    """Return a CSV and a W&B logger; W&B runs offline without a key, so that it never prompts."""
    from lightning.pytorch.loggers import WandbLogger

    from gradmerge.training.saving import CSVLogger

    root = folder or "outputs"
    csv = CSVLogger(root, name="logs")
    if os.environ.get("WANDB_MODE") == "disabled":
        return [csv]
    offline = not has_wandb_key() or os.environ.get("WANDB_MODE") == "offline"
    os.makedirs(root, exist_ok=True)
    return [csv, WandbLogger(project="gradmerge", save_dir=root, offline=offline)]


def has_wandb_key() -> bool:
    """Return True if W&B can log in without a prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
    try:
        with open(path, encoding="utf-8") as file:
            return "api.wandb.ai" in file.read()
    except OSError:
        return False
