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

    from gradmerge.training.logs import CSVLogger

    if given is False:
        return False
    if given is None or given is True:
        return default_loggers(folder)
    loggers = [lasting(logger) for logger in listed(given)]
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


def lasting(logger: Any) -> Any:
    """Return a stock W&B logger as one that never stops a fit, and any other as it is."""
    from lightning.pytorch.loggers import WandbLogger

    from gradmerge.training.wandb import LastingWandbLogger

    return LastingWandbLogger.of(logger) if type(logger) is WandbLogger else logger


def default_loggers(folder: str | None) -> list[Any]:
    """Return a CSV and a W&B logger; W&B runs offline without a key, so that it never prompts."""
    from gradmerge.training.logs import CSVLogger
    from gradmerge.training.wandb import LastingWandbLogger

    root = folder or "outputs"
    csv = CSVLogger(root, name="logs")
    if os.environ.get("WANDB_MODE") == "disabled":
        return [csv]
    offline = os.environ.get("WANDB_MODE") == "offline"
    os.makedirs(root, exist_ok=True)
    return [csv, LastingWandbLogger(project="gradmerge", save_dir=root, offline=offline)]
