"""Checks of a fit's options before anything is opened, loaded or learned."""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from gradmerge.cli.defaults import listed
from gradmerge.common.errors import ConfigError, require
from gradmerge.common.failures import reading
from gradmerge.common.ranges import RANGES, require_ranges
from gradmerge.training.monitors import require_monitor, score_names

Get = Callable[[str], Any]
"""Returns an option by its dotted name, or None."""

_SEEDS = 2**32 - 1
# Options of the trainer that are a number of batches, or a share of them.
_PARTS = tuple(f"limit_{part}_batches" for part in ("train", "val", "test", "predict"))
# Steps of a schedule that are tried.
_TRIED = 10_000
# Whose classes do in a trial what they do in a fit.
_KNOWN = ("torch.optim", "lightning.pytorch", "gradmerge")


def require_seed(seed: Any) -> None:
    """Reject a seed that numpy does not take.

    Raises:
        ConfigError: it is out of range.
    """
    if not isinstance(seed, bool) and seed is not None:
        require(0 <= seed <= _SEEDS, "seed_everything", f"0 to {_SEEDS}, true or false", seed)


def require_options(get: Get, fits: bool) -> None:
    """Reject options of which a fit would fail only after it was opened.

    Args:
        get: returns an option by its dotted name, or None.
        fits: True for `fit`; the other commands have no optimiser and no monitors.

    Raises:
        ConfigError: an option has an invalid value.
    """
    require_numbers(get, fits)
    if fits:
        require_optimiser(get)
        require_monitors(get)


def require_numbers(get: Get, fits: bool) -> None:
    """Reject numbers that the trainer would misread (see `require_options`)."""
    given = {name: get(f"trainer.{name}") for name in RANGES["Trainer"]}
    require_ranges("Trainer", given, "trainer.")
    for name in _PARTS:
        value = get(f"trainer.{name}")
        if isinstance(value, (int, float)):
            sound = value >= 0 if isinstance(value, int) else 0 <= value <= 1
            expected = "a number of batches, or a share of them from 0.0 to 1.0"
            require(sound, f"trainer.{name}", expected, value)
    most = max(16, 2 * (os.cpu_count() or 1))
    devices = get("trainer.devices")
    if str(devices).isdigit() and get("trainer.accelerator") == "cpu":
        require(int(devices) <= most, "trainer.devices", f"at most {most} processes", devices)
    if not fits:
        return
    interval = get("trainer.val_check_interval")
    if isinstance(interval, (int, float)):
        sound = interval >= 1 if isinstance(interval, int) else 0 < interval <= 1
        expected = "a number of steps, or a share of an epoch above 0"
        require(sound, "trainer.val_check_interval", expected, interval)
    if get("trainer.limit_train_batches") == 0:
        raise ConfigError(
            "trainer.limit_train_batches: expected at least one batch, got 0, so nothing would be "
            "learned. To score without learning: `gradmerge validate`."
        )


def require_monitors(get: Get, scores: Collection[str] | None = None) -> None:
    """Reject callbacks and schedules that watch a score which the fit does not log.

    Args:
        get: returns an option by its dotted name, or None.
        scores: names of the scores that the network's predictions may have; None if that is not
            known yet.

    Raises:
        ConfigError: a score is unknown.
    """
    callbacks = listed(get("trainer.callbacks"))
    if any(map(_is_foreign, callbacks)):
        return  # it may log what the others watch
    evaluates = any(_name(callback) == "EvaluateEvery" for callback in callbacks)
    known = score_names(get("data.tasks") or {}, scores, several=bool(get("driver")))
    for owner, monitor in _monitors(get):
        if evaluates and str(monitor).startswith("eval/"):
            continue  # the metrics of a benchmark are known to lm-eval
        require_monitor(owner, monitor, known)


def require_optimiser(get: Get) -> None:
    """Try the optimiser and its schedule on a parameter of no importance."""
    import torch

    optimiser, schedule = get("optimizer"), get("lr_scheduler")
    if optimiser is None:
        if schedule is not None:
            raise ConfigError(
                f"lr_scheduler: expected an `optimizer` beside it, got only {_name(schedule)}, "
                "which would not be used. Configure both."
            )
        return
    if _is_foreign(optimiser):
        return
    rate = (optimiser.get("init_args") or {}).get("lr")
    if isinstance(rate, float):
        require(math.isfinite(rate), "optimizer: lr", "a finite number", rate)
    todo = "Correct its init_args."
    with reading("optimizer", f"{_name(optimiser)} rejects its options", todo, ConfigError):
        tried = made(optimiser, [torch.nn.Parameter(torch.zeros(2, 2))])
    if schedule is None or _is_foreign(schedule):
        return
    # a schedule may end before a fit does, if nothing else ends the fit
    ends = (get("trainer.max_epochs"), get("trainer.max_time"), get("driver"))
    steps = get("trainer.max_steps") if not any(ends) else None
    with reading("lr_scheduler", f"{_name(schedule)} rejects its options", todo, ConfigError):
        tried = made(schedule, tried)
        if not isinstance(tried, torch.optim.lr_scheduler.ReduceLROnPlateau):
            _take_steps(tried, max(1, min(steps or 1, _TRIED)))


def _take_steps(schedule: Any, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would miss the optimiser's steps
        for _ in range(steps):
            schedule.step()


def made(given: Any, first: Any) -> Any:
    """Return an instance of a configured class, such as an optimiser of given parameters."""
    module, _, name = given["class_path"].rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    return kind(first, **dict(given.get("init_args") or {}))


def _name(given: Any) -> str:
    return str(given["class_path"]).rpartition(".")[2]


def _is_foreign(given: Any) -> bool:
    return not str(given.get("class_path", "")).startswith(_KNOWN)


def _monitors(get: Get) -> Iterator[tuple[str, str]]:
    """Yield what watches a score, and the score."""
    watchers: Iterable[Any] = [*listed(get("trainer.callbacks")), get("lr_scheduler")]
    if get("driver") and _name(get("driver")) == "LayerWise":
        return  # it uses none of them, and checks its schedule itself
    for watcher in watchers:
        monitor = ((watcher or {}).get("init_args") or {}).get("monitor")
        if isinstance(monitor, str):
            yield _name(watcher), monitor
