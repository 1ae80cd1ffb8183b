"""What a driver is, and what it is given: a job."""

from __future__ import annotations

import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import lightning
from lightning.pytorch.utilities import rank_zero_info

from gradmerge.drivers.state import (
    JOB,
    StepRecord,
    describe_contents,
    has_states,
    plain,
    read_json,
    require_same,
    set_aside,
)
from gradmerge.drivers.state import write_json as write_record
from gradmerge.drivers.wandb import finish_wandb_run, name_wandb_runs
from gradmerge.engine.recipe import Recipe
from gradmerge.errors import ConfigError
from gradmerge.export.atomic import refuse_existing
from gradmerge.export.folder import require_options
from gradmerge.objectives import AbstractTerm, Objective
from gradmerge.sources import as_source
from gradmerge.sources.base import fingerprints_of
from gradmerge.spec import from_plain, to_plain
from gradmerge.training.callbacks import OVERWRITE
from gradmerge.training.data import MergeDataModule
from gradmerge.training.module import MergeModule
from gradmerge.training.run import describe_data


class MakeTrainer(Protocol):
    """Makes a fresh trainer, configured as the job says."""

    def __call__(
        self, folder: Path, callbacks: Sequence[lightning.Callback], overrides: Mapping[str, Any]
    ) -> lightning.Trainer:
        """A trainer with fresh loggers and callbacks.

        Args:
            folder: its default_root_dir.
            callbacks: more callbacks, after the configured ones.
            overrides: arguments of the trainer that replace configured ones.
        """


@dataclass(frozen=True)
class Output:
    """The model folder that a job ends in: `ExportAtEnd`'s options."""

    path: str
    dtype: str | None = None
    overwrite: bool = False
    head: str | None = None
    log_artifact: bool = False


@dataclass
class Job:
    """A merge that a driver is to learn, and all it needs for that.

    A driver makes its own modules and trainers from this; nothing of the merge is opened before.
    """

    recipe: Recipe
    """What is merged and how."""
    data: MergeDataModule
    """The tasks."""
    root: Path
    """The trainer's default_root_dir."""
    make_trainer: MakeTrainer
    """Makes a trainer for a step (use `trainer`)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The other arguments of `MergeModule`: objective, memory, dtype, learning_rate and so on."""
    output: Output | None = None
    """Where the merged model goes; default: `<root>/merged`."""
    optimise: Callable[[lightning.LightningModule], None] | None = None
    """Gives a module the configured optimiser and schedule, if there are any."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The whole configuration as plain data, as far as results depend on it."""
    say: Callable[[str], None] = rank_zero_info
    """Tells the user a line."""
    _job: str = field(default="", init=False)
    _seed: int | None = field(default=None, init=False)

    @property
    def folder(self) -> Path:
        """Where states are kept."""
        return self.root / "driver"

    @property
    def target(self) -> Output:
        """The output, with its default."""
        return self.output or Output(str(self.root / "merged"))

    @cached_property
    def sources(self) -> dict[str, dict[str, str]]:
        """Where the base and each source are from, and the hash of their weights, which are read
        once.
        """
        base = None if self.recipe.base is None else as_source(self.recipe.base)
        specs = {name: as_source(spec, base) for name, spec in self.recipe.sources.items()}
        everything = {**({} if base is None else {"base": base}), **specs}
        opened = {name: spec.open() for name, spec in everything.items()}
        hashes = fingerprints_of(opened)
        return {name: {"from": c.label, "sha256": hashes[name]} for name, c in opened.items()}

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hash of the base and of each source."""
        return {name: entry["sha256"] for name, entry in self.sources.items()}

    def require_free(self, driver: AbstractDriver) -> dict[str, Any] | None:
        """Refuse what takes no reading of weights and data to see; what was kept of the job.

        Args:
            driver: the driver.

        Raises:
            ConfigError: options of the output that do not exist, a damaged record, or the output
                exists and is not of this job.
        """
        require_options(self.target.dtype, self.target.head, self.data.tasks)
        kept = None
        if not driver.restart:
            kept = read_json(self.folder / JOB, job=str, seed=(int, type(None)), content=dict)
        if kept is None or not self._is_own_output(kept["job"]):
            target = Path(self.target.path).expanduser()
            refuse_existing(target, self.target.overwrite, OVERWRITE)
        return kept

    def begin(self, driver: AbstractDriver, **more: Any) -> str:
        """Start the job, or go on with it; the first thing that a driver does.

        Args:
            driver: the driver.
            **more: what else the job depends on, as plain data.

        Returns:
            The job's number, which is drawn once and stays the same when it goes on. It belongs
            into the export's provenance (`export` puts it there).

        Raises:
            ConfigError: the folder holds another job (what differs is listed) or a damaged record,
                or the output exists and is not of this job.
        """
        kept = self.require_free(driver)
        own = dict(to_plain(driver)["init_args"])
        own.pop("restart", None)
        content = {
            "driver": {"class_path": to_plain(driver)["class_path"], "init_args": own},
            "recipe": to_plain(self.recipe),
            "options": to_plain({k: v for k, v in self.options.items() if k != "allow_modules"}),
            "data": describe_data(self.data),
            "examples": describe_contents(self.data),
            "config": dict(self.config),
            "fingerprints": self.fingerprints,
            **more,
        }
        path = self.folder / JOB
        if driver.restart:
            aside = set_aside(self.folder) if is_first_process() else None
            if aside is not None:
                self.say(f"the earlier job's folder is now {aside}")
            kept = read_json(path, job=str, seed=(int, type(None)), content=dict)
        if kept is not None and has_states(self.folder):
            require_same(path, kept["content"], content)
        elif kept is None or kept["content"] != plain(content):
            # of a job that was stopped before it learned anything nothing is lost
            number = uuid.uuid4().hex if kept is None else kept["job"]
            kept = {"job": number, "seed": _global_seed(), "content": plain(content)}
            if is_first_process():
                write_record(path, kept)
        self._job, self._seed = str(kept["job"]), kept["seed"]
        return self._job

    def _is_own_output(self, job: str) -> bool:
        path = Path(self.target.path).expanduser() / "provenance.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["driver"]["job"]
        except (OSError, ValueError, LookupError, TypeError):
            return False  # made otherwise, whatever it is
        return bool(found == job)

    @property
    def exported(self) -> Path | None:
        """The output, where this job has written it already."""
        path = Path(self.target.path).expanduser()
        return path if self._is_own_output(self._job) else None

    def step(self, name: str, content: Mapping[str, Any]) -> StepRecord:
        """A step by name; `result` says whether it is finished, and refuses another of the name.

        Args:
            name: of the folder below `driver/steps`.
            content: what the step is, as plain data: its recipe, what it reads.
        """
        return StepRecord(self.folder / "steps" / name, plain(content))

    def trainer(
        self, folder: Path, callbacks: Sequence[lightning.Callback] = (), **overrides: Any
    ) -> lightning.Trainer:
        """A fresh trainer as the configuration says, without its ExportAtEnd.

        Args:
            folder: its default_root_dir; loggers and checkpoints write below it.
            callbacks: more callbacks, after the configured ones.
            **overrides: arguments of the trainer that replace configured ones.
        """
        own = "logger" not in overrides  # others go on with the run that they have
        if own:
            finish_wandb_run()
        folder.mkdir(parents=True, exist_ok=True)
        trainer = self.make_trainer(folder, callbacks, overrides)
        if own:
            group = f"{self.root.name}-{self._job[:8]}" if self._job else self.root.name
            step = None if folder == self.root else folder.name
            name_wandb_runs(trainer.loggers, group, step, self.root.name)
        return trainer

    @property
    def objective(self) -> Objective:
        """The module's, whatever form it was given in."""
        given = self.options.get("objective")
        if isinstance(given, Mapping):
            given = from_plain(given)
        return Objective([given]) if isinstance(given, AbstractTerm) else given or Objective()

    def configure(self, module: lightning.LightningModule) -> None:
        """Give a module the configured optimiser and schedule (else it keeps its own)."""
        if self.optimise is not None:
            self.optimise(module)

    def module(self, recipe: Recipe, **changes: Any) -> MergeModule:
        """A module of a recipe with the job's options, optimiser and schedule.

        Args:
            recipe: of the step.
            **changes: options that differ.
        """
        module = MergeModule(recipe, **{**self.options, **changes})
        self.configure(module)
        return module

    def seed(self) -> None:
        """Seed as the job was when it began, so that a step does not depend on whether those before
        it ran in this process.
        """
        if self._seed is not None:
            lightning.seed_everything(self._seed, workers=True, verbose=False)

    def export(self, write: Callable[..., Path], said: Mapping[str, Any], **known: Any) -> Path:
        """Write the merged model where the job ends, and say where.

        Args:
            write: `export_merged` or `export_plan` with its first arguments bound
                (`partial(export_plan, plan, raw)`).
            said: what the driver has to say for the provenance, as plain data; it stands there
                under `driver`, with the job's number.
            **known: more arguments of `write` (results, tasks, buffers, extra), or others than the
                output's (dtype).

        Returns:
            The folder.
        """
        target = self.target
        options = {"dtype": target.dtype, "head": target.head, **known}
        overwrite = target.overwrite or self.exported is not None
        more = {**options.pop("extra", {}), "driver": {"job": self._job, **said}}
        folder = write(target.path, overwrite=overwrite, extra=more, **options)
        self.say(f"merged model written to {folder}")
        return folder


@dataclass(frozen=True, kw_only=True)
class AbstractDriver(ABC):
    """How the optimum is sought, where it is not one `trainer.fit`."""

    restart: bool = False
    """Begin anew where an earlier run left its states: its folder is moved aside, never deleted."""

    def recipe(self, **given: Any) -> Recipe:
        """The recipe of a job from its fields; a driver that merges some of the sources at a time
        checks other things of them.
        """
        return Recipe(**given)

    @abstractmethod
    def run(self, job: Job) -> Path:
        """Learn the merge and write it; a job that was killed goes on where it stood.

        Returns:
            The model folder.
        """


def is_first_process() -> bool:
    """Whether this process writes what all share; others are started with their numbers set."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def _global_seed() -> int | None:
    seed = os.environ.get("PL_GLOBAL_SEED")  # where `seed_everything` leaves it
    return int(seed) if seed and seed.isdigit() else None


def require_no_checkpoint(ckpt_path: str | None) -> None:
    """Refuse a checkpoint to resume from: a driver finds its own.

    Raises:
        ConfigError: one is given.
    """
    if ckpt_path is not None:
        raise ConfigError(
            f"ckpt_path: a driver resumes by itself when the same command runs again, got "
            f"{ckpt_path}. Leave it out."
        )
