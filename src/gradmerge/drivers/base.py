"""Drivers and their jobs."""

from __future__ import annotations

import os
import shutil
import time
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_info

from gradmerge.common import files
from gradmerge.common.atomic import lock, writing
from gradmerge.common.errors import ConfigError, SourceError, shorten
from gradmerge.common.secrets import masked
from gradmerge.common.spec import from_plain, to_plain
from gradmerge.drivers.state import (
    JOB,
    StepRecord,
    describe_contents,
    has_states,
    plain,
    read_json,
    require_same_job,
    set_aside,
    write_json,
)
from gradmerge.drivers.wandb import finish_wandb_run, name_wandb_runs
from gradmerge.engine.recipe import Recipe
from gradmerge.objectives import AbstractTerm, Objective
from gradmerge.sources import as_source
from gradmerge.sources.base import fingerprints_of, watched_files
from gradmerge.sources.identity import FileState, require_unchanged
from gradmerge.training.callbacks import ExportAtEnd
from gradmerge.training.data import MergeDataModule
from gradmerge.training.logs import keep_folder, remove_refused
from gradmerge.training.module import MergeModule
from gradmerge.training.run import describe_data, global_seed, read_by

_FREE = (
    "allow_modules",
    "placement",
    "score_start",
    "source_shards",
    "tasks_at_once",
    "teacher_cache",
    "teacher_cache_folder",
)
"""Options that results do not depend on."""

MakeTrainer = Callable[[Path, Sequence[lightning.Callback], Mapping[str, Any]], lightning.Trainer]
"""Makes a fresh trainer from its default_root_dir, more callbacks (they come after the configured
ones) and arguments that replace configured ones."""


@dataclass
class Job:
    """A merge for a driver to learn, and everything that this takes.

    The driver makes its own modules and trainers from it; nothing is opened before.
    """

    recipe: Recipe
    """Sources of the merge, and how they are merged."""
    data: MergeDataModule
    """The tasks."""
    root: Path
    """The trainer's default_root_dir."""
    make_trainer: MakeTrainer
    """Makes the trainer of a step (use `trainer`)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The other arguments of `MergeModule`: objective, memory, dtype, learning_rate and so on."""
    output: ExportAtEnd | None = None
    """The model folder to write. Default: `<root>/merged`."""
    optimise: Callable[[lightning.LightningModule], None] | None = None
    """Gives a module the configured optimiser and schedule. Default: it keeps its own."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The rest of the configuration as plain data, as far as results depend on it."""
    say: Callable[[str], None] = rank_zero_info
    """Prints a line for the user."""
    table: str = field(default="", init=False)
    """What the job has reached, taken and written, once a run has ended it."""
    _job: str = field(default="", init=False)
    _seed: int | None = field(default=None, init=False)
    _watched: tuple[FileState, ...] = field(default=(), init=False)
    _began: float = field(default_factory=time.monotonic, init=False)
    _latest: Callable[[], Any] | None = field(default=None, init=False)
    """Returns the latest trainer, while it is alive."""

    @property
    def folder(self) -> Path:
        """The folder of records and states."""
        return self.root / "driver"

    @property
    def target(self) -> ExportAtEnd:
        """The output, or its default."""
        return self.output or ExportAtEnd(str(self.root / "merged"))

    @cached_property
    def sources(self) -> dict[str, dict[str, str]]:
        """Origin and content hash of the base and each source; their weights are read once."""
        base = None if self.recipe.base is None else as_source(self.recipe.base)
        specs = {} if base is None else {"base": base}
        specs |= {name: as_source(spec, base) for name, spec in self.recipe.sources.items()}
        opened = {name: spec.open() for name, spec in specs.items()}
        self._watched = watched_files(opened.values())
        hashes = fingerprints_of(opened)
        return {name: {"from": c.label, "sha256": hashes[name]} for name, c in opened.items()}

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hash of the base and each source."""
        return {name: entry["sha256"] for name, entry in self.sources.items()}

    @property
    def objective(self) -> Objective:
        """The objective of the options, in whatever form they state it."""
        given = self.options.get("objective")
        if isinstance(given, Mapping):
            given = from_plain(given)
        return Objective([given]) if isinstance(given, AbstractTerm) else given or Objective()

    @property
    def exported(self) -> Path | None:
        """The output folder if this job has written it already."""
        return self.target.folder if self._has_written(self._job) else None

    @property
    def inputs(self) -> list[Path]:
        """Files and folders that the job reads."""
        return [*self.recipe.inputs, *read_by(self.data)]

    @property
    def seconds(self) -> float:
        """Time since the job, or this run of it, began."""
        return time.monotonic() - self._began

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from running a job in this root, and leave nothing of a refused one.

        Raises:
            ConfigError: another process runs one.
        """
        if not _is_first():
            yield
            return
        new = [place for place in (self.root, *self.root.parents) if not place.exists()]
        is_new = not self.folder.exists()
        with writing(self.root, "Set trainer.default_root_dir to another folder."):
            self.root.mkdir(parents=True, exist_ok=True)
        try:
            with lock(self.root) as held:
                if held is False:
                    raise ConfigError(
                        f"{self.root}: expected no other job at work in this folder, but another "
                        "process runs one. Wait for it, or give another folder "
                        "(--trainer.default_root_dir)."
                    )
                try:
                    yield
                except Exception:
                    trainer = self._latest() if self._latest is not None else None
                    if not (has_states(self.folder) or (trainer and trainer.global_step)):
                        remove_refused(trainer.loggers if trainer else ())
                        if is_new:
                            shutil.rmtree(self.folder, ignore_errors=True)
                    raise
        finally:
            with suppress(OSError):  # it is not empty
                for place in new:
                    place.rmdir()

    def _has_written(self, job: str) -> bool:
        try:
            found = files.read_json(self.target.folder / "provenance.json") or {}
        except SourceError:
            return False  # not the output of a job
        driver = found.get("driver")
        return isinstance(driver, dict) and driver.get("job") == job

    def _kept(self) -> dict[str, Any] | None:
        return read_json(self.folder / JOB, job=str, seed=(int, None), content=dict)

    def require_free(self, driver: AbstractDriver) -> dict[str, Any] | None:
        """Return the job to resume, if any, without reading weights or data.

        Raises:
            ConfigError: the output has invalid options, or exists and is not of this job; or the
                record is damaged.
        """
        self.target.require_tasks(self.data.tasks)
        kept = None if driver.restart else self._kept()
        if kept is None or not self._has_written(kept["job"]):
            self.target.require_free(self.inputs)
        self._job = uuid.uuid4().hex if kept is None else str(kept["job"])
        return kept

    def begin(self, driver: AbstractDriver, **more: Any) -> None:
        """Start or resume the job; the first thing that a driver does.

        Args:
            driver: the driver.
            **more: further plain data that the job depends on.

        Raises:
            ConfigError: the folder holds another job (the differences are listed) or a damaged
                record, or the output exists and is not of this job.
        """
        kept = self.require_free(driver)
        content = plain({**self._content(driver), **more})
        path = self.folder / JOB
        is_first = _is_first()
        if driver.restart:
            aside = set_aside(self.folder) if is_first else None
            if aside is not None:
                self.say(f"the earlier job's folder is now {aside}")
            kept = self._kept()  # another process may have moved the folder, and begun
        if kept is not None and has_states(self.folder):
            require_same_job(path, masked(kept["content"]), masked(content), self.say)
        elif kept is None or kept["content"] != content:
            # a job that was stopped before its first state has nothing to lose
            number = self._job if kept is None else kept["job"]
            kept = {"job": number, "seed": global_seed(), "content": content}
            if is_first:
                write_json(path, kept)
        self._job, self._seed = str(kept["job"]), kept["seed"]

    def _content(self, driver: AbstractDriver) -> dict[str, Any]:
        """Return everything that the result depends on, as plain data."""
        described = to_plain(driver)
        described["init_args"].pop("restart", None)
        return {
            "driver": described,
            "recipe": to_plain(self.recipe),
            "options": to_plain({k: v for k, v in self.options.items() if k not in _FREE}),
            "data": describe_data(self.data),
            "examples": describe_contents(self.data),
            "config": dict(self.config),
            "fingerprints": self.fingerprints,
        }

    def step(self, name: str, content: Mapping[str, Any]) -> StepRecord:
        """Return the record of a step, given its definition as plain data.

        Raises:
            SourceError: a file of a source has changed since the job began.
        """
        require_unchanged(self._watched)
        return StepRecord(self.folder / "steps" / name, plain(content))

    def trainer(
        self,
        folder: Path,
        callbacks: Sequence[lightning.Callback] = (),
        resumed_at: int | None = None,
        **overrides: Any,
    ) -> lightning.Trainer:
        """Return a fresh trainer as configured, without its ExportAtEnd (see `MakeTrainer`).

        Args:
            folder: its default_root_dir: the job's folder, or that of a step.
            callbacks: more callbacks.
            resumed_at: steps that are kept of an earlier run in this folder, whose logs and W&B run
                go on; None if there was none.
            **overrides: arguments that replace configured ones.
        """
        require_unchanged(self._watched)
        has_loggers = "logger" not in overrides  # else it logs to those of an earlier trainer
        if has_loggers:
            finish_wandb_run()
        folder.mkdir(parents=True, exist_ok=True)
        trainer = self.make_trainer(folder, callbacks, overrides)
        self._latest = weakref.ref(trainer)
        if has_loggers:
            keep_folder(trainer.loggers, folder, resumed_at)
            step = None if folder == self.folder else folder.name
            name_wandb_runs(
                trainer.loggers, self.root.name, self._job[:8], step, resumed_at is not None
            )
        return trainer

    def module(self, recipe: Recipe, **changes: Any) -> MergeModule:
        """Return a module with the job's options, optimiser and schedule, but for `changes`."""
        module = MergeModule(recipe, **{**self.options, **changes})
        self.configure(module)
        return module

    def configure(self, module: lightning.LightningModule) -> None:
        """Give a module the configured optimiser and schedule, if there are any."""
        if self.optimise is not None:
            self.optimise(module)

    def seed(self) -> None:
        """Seed as when the job began, so that a step learns the same in a process of its own."""
        if self._seed is not None:
            lightning.seed_everything(self._seed, workers=True, verbose=False)

    def export(
        self,
        export: Callable[..., Path],
        said: Mapping[str, Any],
        loggers: Iterable[Any],
        **options: Any,
    ) -> Path:
        """Write the job's output, and return its folder.

        Args:
            export: `export_merged` or `export_state` with its first argument bound.
            said: the driver's entry in the provenance; the job's identifier is added.
            loggers: loggers to log the folder to, if the output asks for that.
            **options: more arguments of `export`, or others than the output's.
        """
        require_unchanged(self._watched)
        extra = {**options.pop("extra", {}), "driver": {"job": self._job, **said}}
        overwrite = self.target.overwrite or self.exported is not None
        own = {"overwrite": overwrite, "extra": extra, "inputs": self.inputs}
        return self.target.write(export, loggers, **own, **options)


def _is_first() -> bool:
    """Return whether this process writes what several share; the others have their ranks set."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


@dataclass(frozen=True, kw_only=True)
class AbstractDriver(ABC):
    """A way to learn a merge that is not one fit of all sources."""

    restart: bool = False
    """Start again instead of resuming; the earlier job's folder is moved aside, never deleted."""

    def recipe(self, **given: Any) -> Recipe:
        """Return a job's recipe from its fields; drivers differ in the sources that they allow."""
        return Recipe(**given)

    def run(self, job: Job) -> Path:
        """Learn the merge and return its folder; a killed job resumes where it stopped.

        Raises:
            ConfigError: another process runs a job in the same root, or the driver rejects the job.
        """
        recipe, kind = job.recipe, type(self).__name__
        if own := [*recipe.trained, *recipe.adapters]:
            raise ConfigError(
                f"{kind}: expected a recipe that trains coefficients alone, got private parts "
                f"(trained, adapters): {shorten(own)}. Learn them without a driver, with all "
                "sources at once."
            )
        with job.alone():
            return self.learn(job)

    @abstractmethod
    def learn(self, job: Job) -> Path:
        """Learn the merge and return its folder, as `run` does, which alone calls it."""
