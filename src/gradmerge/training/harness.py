"""Benchmarks of lm-evaluation-harness: on folders, on checkpoints, and during a fit."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng

from gradmerge.common.errors import ConfigError, nearest, require
from gradmerge.common.failures import reading
from gradmerge.common.ranges import require_ranges
from gradmerge.export.evaluated import STAGE
from gradmerge.training.summary import to_wandb

Scores = dict[str, dict[str, float]]
_DATA = (
    "Data of stock tasks come from the hub or its cache; paths in task files of your own start at "
    "the current folder."
)


@dataclass(frozen=True)
class Evaluation:
    """Scores of lm-evaluation-harness."""

    stage: str
    """`lm-eval`, with the number of shots and the limit, if they were set."""
    scores: Scores
    """By task (or group of tasks) and metric."""
    errors: Scores
    """Standard errors in the same form, where they are known."""
    settings: dict[str, Any]
    """Versions of the packages and the tasks, shots and examples by task."""

    @property
    def logged(self) -> dict[str, float]:
        """The scores as `eval/TASK/METRIC`."""
        return {
            f"eval/{task}/{metric}": value
            for task, values in self.scores.items()
            for metric, value in values.items()
        }


@dataclass(frozen=True)
class Harness:
    """Benchmarks of lm-evaluation-harness, and how they are run."""

    tasks: str | list[str]
    """Tasks or groups of tasks, separated by commas."""
    include_path: str | None = None
    """Folder of task files (YAML) of one's own. Such files can run code."""
    num_fewshot: int | None = None
    """Number of solved examples in each prompt. Default: as the task says."""
    limit: int | None = None
    """Maximum number of examples per task. Scores on a part are no benchmark results."""
    batch_size: int = 8
    """Number of examples per batch."""
    apply_chat_template: bool = False
    """Ask through the tokenizer's chat template."""
    confirm_run_unsafe_code: bool = False
    """Allow tasks that run code which the model has written."""

    def __post_init__(self) -> None:
        """Check the options."""
        require(bool(self.names), "tasks", "names of tasks", "none")
        require_ranges(Harness, vars(self), "")
        if self.include_path is not None and not Path(self.include_path).expanduser().is_dir():
            raise ConfigError(
                f"include_path: expected a folder of task files, got {self.include_path}, which "
                "is none."
            )

    @property
    def names(self) -> list[str]:
        """The tasks."""
        given = self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks
        return [name.strip() for name in given if name.strip()]

    @property
    def own_files(self) -> list[str]:
        """Task files and folders of one's own, which can run code."""
        files = [name for name in self.names if Path(name).is_file()]
        return [*([self.include_path] if self.include_path else []), *files]

    @property
    def stage(self) -> str:
        """Name under which the scores are kept."""
        shots = None if self.num_fewshot is None else f"{self.num_fewshot}-shot"
        limit = None if self.limit is None else f"first {self.limit}"
        chat = "chat" if self.apply_chat_template else None
        return ", ".join(part for part in (STAGE, shots, chat, limit) if part)

    @cached_property
    def manager(self) -> Any:
        """The index of tasks.

        Raises:
            ConfigError: lm-eval is not installed, or does not know a task.
        """
        require_installed()
        from lm_eval.tasks import TaskManager

        given = self.include_path
        folder = None if given is None else str(Path(given).expanduser())
        if folder is not None:  # the index of the stock tasks takes seconds
            own = TaskManager(include_path=folder, include_defaults=False)
            if not self._unknown(own.all_tasks):
                return own
        found = TaskManager(include_path=folder)
        known = found.all_tasks
        if lost := self._unknown(known):
            raise ConfigError(
                f"tasks: unknown {', '.join(lost)}; lm-eval {version('lm-eval')} has {len(known)} "
                f"tasks (`lm-eval ls tasks`).{nearest(lost[0], known)} Task files of your own need "
                "`include_path`."
            )
        return found

    def _unknown(self, known: Sequence[str]) -> list[str]:
        names = set(known)
        return [
            name
            for name in self.names
            if name not in names
            and not any(fnmatch(task, name) for task in known)
            and not Path(name).is_file()
        ]

    @cached_property
    def loaded(self) -> dict[str, Any]:
        """The tasks with their data, loaded once.

        Raises:
            ConfigError: lm-eval cannot read a task or its data.
        """
        manager, shots = self.manager, self.num_fewshot
        with _quiet(), reading("tasks", "lm-eval does not load them", _DATA, ConfigError):
            found: dict[str, Any] = manager.load(self.names)
        for task in found["tasks"].values():
            own = task.get_config("num_fewshot")
            if own != 0:  # which says that the task has no shots
                task.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
        return found

    def run(self, model: Any) -> Evaluation:
        """Evaluate a model as lm-eval's `simple_evaluate` does, without its survey of the system.

        The global random state is left as it was.

        Raises:
            ConfigError: lm-eval cannot evaluate a task.
        """
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.evaluator import evaluate

        loaded = self.loaded
        with (
            isolate_rng(),
            _quiet(),
            _one_process(),
            reading("tasks", "lm-eval stopped", kind=ConfigError),
        ):
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.manual_seed(DEFAULT_OTHER_SEED)
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            found = evaluate(
                model,
                loaded,
                limit=self.limit,
                log_samples=False,
                apply_chat_template=self.apply_chat_template,
                fewshot_as_multiturn=True,
                confirm_run_unsafe_code=self.confirm_run_unsafe_code,
            )
        return self._read(found)

    def _read(self, found: Mapping[str, Any]) -> Evaluation:
        scores: Scores = {}
        errors: Scores = {}
        for task, row in found["results"].items():
            for key, value in row.items():
                metric, comma, by = key.partition(",")
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not (comma and is_number):
                    continue
                suffix = "" if by == "none" else f",{by}"
                kind = errors if metric.endswith("_stderr") else scores
                name = metric.removesuffix("_stderr") + suffix
                kind.setdefault(task, {})[name] = float(value)
        described = {
            task: {
                "version": found["versions"].get(task),
                "num_fewshot": found["n-shot"].get(task),
                "examples": found["n-samples"].get(task, {}).get("effective"),
                "stderr": {k: v for k, v in errors.get(task, {}).items() if math.isfinite(v)},
            }
            for task in scores
        }
        settings = {"lm_eval": version("lm-eval"), "tasks": described}
        return Evaluation(self.stage, scores, errors, settings)


@contextmanager
def _one_process() -> Iterator[None]:
    """Keep lm-eval from forking this process, whose threads (W&B's, torch's) may then hang."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's notes on tasks and models."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def require_installed() -> None:
    """Reject evaluations without the package.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is not installed: pip install 'gradmerge[eval]'")


def require_language_model(architecture: str | None, where: object) -> None:
    """Reject networks that generate no text, which transformers would give a random head.

    Raises:
        ConfigError: the class is another.
    """
    from transformers.models.auto import modeling_auto

    known = {
        name
        for mapping in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
        for name in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
    }
    if architecture not in known:
        raise ConfigError(
            f"{where}: expected a language model (...ForCausalLM or an encoder-decoder), got "
            f"{architecture or 'no architecture'}; lm-evaluation-harness scores text only. "
            "`gradmerge test --model FOLDER` scores others on your data."
        )


def require_folder(model: str, trust_remote_code: bool) -> str:
    """Return the place of a folder or hub id after a check of its config.

    Raises:
        ConfigError: it is no language model.
        SourceError: transformers does not read it.
    """
    from transformers import AutoConfig

    path = Path(model).expanduser()
    place = str(path) if path.is_dir() else model
    with reading(model, "transformers does not open it"):
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    if not (trust_remote_code and getattr(config, "auto_map", None)):
        require_language_model(next(iter(config.architectures or ()), None), model)
    return place


def open_folder(
    place: str, dtype: str | None, device: str | None, trust_remote_code: bool, batch_size: int
) -> Any:
    """Open a folder or hub id as lm-eval's model `hf`.

    Raises:
        SourceError: it cannot be opened.
    """
    from lm_eval.models.huggingface import HFLM

    with reading(place, "lm-eval does not open it"):
        return HFLM(
            place,
            dtype=dtype or "auto",
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
        )


def log_to_wandb(
    project: str, name: str, found: Evaluation, checkpoint: Path | None = None
) -> None:
    """Log scores to a W&B run: that of a checkpoint's fit, if it is in this project, or a new one.

    Without a network or a key the run is kept offline, as in a fit.
    """
    from gradmerge.training.logs import continue_logs
    from gradmerge.training.wandb import LastingWandbLogger

    logger = LastingWandbLogger(project=project, name=name, save_dir=Path.cwd())
    if checkpoint is not None:
        continue_logs([logger], checkpoint, fits=False)
    runs: list[WandbLogger] = [logger]
    to_wandb(runs, found.logged)
    logger.finalize("success")
    with suppress(Exception):  # the client raises many kinds, and the scores are printed
        logger.experiment.finish()
