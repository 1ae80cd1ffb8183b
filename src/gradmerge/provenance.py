"""How coefficients were learned, as plain data: for the checkpoint and the exported folder."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from gradmerge._typing import Raw
from gradmerge._version import __version__
from gradmerge.plan import Plan
from gradmerge.spec import to_plain

_PACKAGES = ("lightning", "transformers", "datasets", "safetensors")
_LIMITS = ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "precision")


def versions() -> dict[str, str]:
    """Of this package and of those whose results depend on theirs."""
    packages = {name: version(name) for name in _PACKAGES}
    torch_version = str(torch.__version__)  # a class of its own, which no checkpoint may hold
    python = platform.python_version()
    return {"gradmerge": __version__, "torch": torch_version, **packages, "python": python}


def start_run(trainer: Any, module: Any) -> None:
    """Write into the plan how this fit learns, and log what the coefficients start at.

    What an earlier fit wrote (a resumed run) is kept below `before`; the coefficients started
    there.
    """
    plan = module.merged.plan
    before = plan.run
    start = before.get("initial_coefficients") or mean_coefficients(plan, module.merged.raw)
    plan.run = {**describe(trainer, module), "initial_coefficients": start}
    if before:
        plan.run["before"] = before
    for logger in trainer.loggers:
        logger.log_metrics({f"init/{source}": value for source, value in start.items()}, step=0)


def mean_coefficients(plan: Plan, raw: Raw) -> dict[str, float]:
    """Mean coefficient of each source: over the entries of a tensor, then over learned tensors."""
    num = len(plan.sources)
    with torch.no_grad():
        rows = [
            plan.coefficient(name, raw).double().reshape(num, -1).mean(dim=1)
            for name in plan.learned
        ]
    return dict(zip(plan.sources, torch.stack(rows).mean(dim=0).tolist(), strict=True))


def describe(trainer: Any, module: Any) -> dict[str, Any]:
    """The run of a trainer: seeds, versions, optimisers, limits, data, and its YAML if it has one.

    The YAML is the whole configuration as LightningCLI saves it.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")  # where `seed_everything` leaves it
    limits = {name: to_plain(getattr(trainer, name, None)) for name in _LIMITS}
    options = {name: value for name, value in module.hparams.items() if name != "recipe"}
    run: dict[str, Any] = {
        "seed": int(seed) if seed and seed.isdigit() else None,
        "versions": versions(),
        "optimizers": [_described(o, o.defaults) for o in trainer.optimizers],
        "lr_schedulers": [_scheduler(config) for config in trainer.lr_scheduler_configs],
        "trainer": {**limits, "processes": trainer.world_size},
        "model": to_plain(options),
    }
    data = getattr(trainer, "datamodule", None)
    if data is not None:
        run["data"] = describe_data(data)
    yaml = _yaml(trainer.callbacks)
    return {**run, "yaml": yaml} if yaml else run


def _described(value: Any, options: dict[str, Any]) -> dict[str, Any]:
    kind = type(value)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": to_plain(options)}


def _scheduler(config: Any) -> dict[str, Any]:
    state: dict[str, Any] = getattr(config.scheduler, "state_dict", dict)()
    own = {name: value for name, value in state.items() if not name.startswith("_")}
    return {**_described(config.scheduler, own), "interval": str(config.interval)}


def describe_data(data: Any) -> dict[str, Any]:
    """Seed, batch sizes and tasks, as far as a data module has them; never the examples."""
    names = ("seed", "batch_size", "eval_batch_size", "processor_path")
    found = {name: to_plain(getattr(data, name)) for name in names if hasattr(data, name)}
    found["class_path"] = f"{type(data).__module__}.{type(data).__qualname__}"
    tasks = getattr(data, "tasks", None)
    if isinstance(tasks, dict):
        found["tasks"] = {str(name): _task(task) for name, task in tasks.items()}
    return found


def _task(task: Any) -> Any:
    if not dataclasses.is_dataclass(task) or isinstance(task, type):
        return type(task).__qualname__
    if not isinstance(getattr(task, "path", ""), str):
        task = dataclasses.replace(task, path="in memory")
    return to_plain(task)


def _yaml(callbacks: Sequence[Any]) -> str:
    """The configuration that the command line came with."""
    from lightning.pytorch.cli import SaveConfigCallback

    for callback in callbacks:
        if isinstance(callback, SaveConfigCallback):
            return str(callback.parser.dump(callback.config, skip_none=False))
    return ""
