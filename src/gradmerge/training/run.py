"""Description of a training run as plain data, for checkpoints and exported folders."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from gradmerge.common.output import paths_in
from gradmerge.common.secrets import masked
from gradmerge.common.spec import public_path, to_plain
from gradmerge.export.provenance import mean_coefficients, versions
from gradmerge.training.logs import wandb_run

_LIMITS = ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "precision")


@contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Silence a trainer's greetings within the context."""
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)


def start_run(trainer: Any, module: Any) -> None:
    """Record the run, and log the mean initial coefficients.

    In a resumed run, the record of the earlier fit is kept under `before`, and its initial
    coefficients are those of the run.
    """
    state = module.merged.state
    before = state.run
    start = before.get("initial_coefficients") or mean_coefficients(state)
    state.run = {**describe(trainer, module), "initial_coefficients": start}
    if before:
        state.run["before"] = before
    if note := state.plan.unchanged_note:
        state.run["unchanged"] = note
        rank_zero_info(f"{note}, and stay as they are")
    if run := wandb_run(trainer.loggers):
        state.run["wandb"] = run
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(whole_config(state.run))
    for logger in trainer.loggers:
        logger.log_metrics({f"init/{source}": value for source, value in start.items()}, step=0)


def describe(trainer: Any, module: Any) -> dict[str, Any]:
    """Return the seed, versions, optimisers, limits, data and YAML of a trainer's run.

    From the command line, there are also the whole configuration as LightningCLI saves it, and the
    origin of the method.
    """
    limits = {name: to_plain(getattr(trainer, name, None)) for name in _LIMITS}
    options = {name: value for name, value in module.hparams.items() if name != "recipe"}
    run: dict[str, Any] = {
        "seed": global_seed(),
        "versions": versions(),
        "optimizers": [_described(o, o.defaults) for o in trainer.optimizers],
        "lr_schedulers": [_scheduler(config) for config in trainer.lr_scheduler_configs],
        "trainer": {**limits, "processes": trainer.world_size},
        "model": to_plain(options),
    }
    data = getattr(trainer, "datamodule", None)
    if data is not None:
        run["data"] = describe_data(data)
    for callback in trainer.callbacks:
        if isinstance(callback, SaveConfigCallback):
            run["yaml"] = str(callback.parser.dump(callback.config, skip_none=False))
            if method := getattr(callback, "method", ""):
                run["method"] = method
            break
    return run


def whole_config(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that a run depends on as plain data without secrets, for a logger.

    From the command line it is the whole configuration: recipe, objective, data, optimiser,
    schedule, trainer and seed; from Python what `describe` found.
    """
    left = ("yaml", "before", "initial_coefficients", "search", "wandb")
    given = yaml.safe_load(run["yaml"]) if run.get("yaml") else {}
    described = {name: value for name, value in run.items() if name not in left}
    return masked({**described, **(given if isinstance(given, dict) else {})})


def global_seed() -> int | None:
    """Return the seed that `seed_everything` has set, if any."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return int(seed) if seed and seed.isdigit() else None


def _described(value: Any, options: dict[str, Any]) -> dict[str, Any]:
    kind = type(value)
    return {"class_path": public_path(kind), "init_args": to_plain(options)}


def _scheduler(config: Any) -> dict[str, Any]:
    state: dict[str, Any] = getattr(config.scheduler, "state_dict", dict)()
    own = {name: value for name, value in state.items() if not name.startswith("_")}
    return {**_described(config.scheduler, own), "interval": str(config.interval)}


def describe_data(data: Any) -> dict[str, Any]:
    """Return the seed, batch sizes and tasks of a data module, if it has them, without examples."""
    names = ["seed", "batch_size", "eval_batch_size", "processor_path"]
    if getattr(data, "labels_per_task", None) is not None:
        names += ["labels_per_task", "labelled_share"]
    found = {name: to_plain(getattr(data, name)) for name in names if hasattr(data, name)}
    found["class_path"] = public_path(type(data))
    tasks = getattr(data, "tasks", None)
    if isinstance(tasks, dict):
        found["tasks"] = {str(name): _task(task) for name, task in tasks.items()}
    return found


def read_by(data: Any) -> list[Path]:
    """Return the files and folders that a data module reads."""
    return [] if data is None else paths_in(describe_data(data), patterns=True)


def _task(task: Any) -> Any:
    if not dataclasses.is_dataclass(task) or isinstance(task, type):
        return type(task).__qualname__
    if not isinstance(getattr(task, "path", ""), str):
        task = dataclasses.replace(task, path="in memory")
    return to_plain(task)
