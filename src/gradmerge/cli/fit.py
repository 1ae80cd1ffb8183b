"""`fit`, `validate` and `test`: LightningCLI with what a merge needs besides."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning
import yaml
from lightning.pytorch.callbacks import (
    Checkpoint,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_info

from gradmerge._version import __version__
from gradmerge.cli.commands import require_checkpoint
from gradmerge.cli.configs import later
from gradmerge.cli.defaults import with_coefficients, with_csv
from gradmerge.cli.score import NAME, require_scored, scored_recipe
from gradmerge.drivers import AbstractDriver, Job, Output
from gradmerge.drivers.base import require_no_checkpoint
from gradmerge.engine.recipe import Recipe
from gradmerge.errors import ConfigError
from gradmerge.optimisers import SAM
from gradmerge.search import AbstractSearch
from gradmerge.training.callbacks import ExportAtEnd, StepProgress
from gradmerge.training.data import MergeDataModule
from gradmerge.training.module import MergeModule
from gradmerge.training.search import SearchedStart

# Length of a fit that states none: coefficients are few, and a fit is a number of steps.
DEFAULT_STEPS = 200

COMMANDS = ("fit", "validate", "test")

# What of a trainer's configuration results do not depend on.
_FREE = (
    "default_root_dir",
    "enable_model_summary",
    "enable_progress_bar",
    "log_every_n_steps",
    "logger",
    "profiler",
)


class MergeCLI(LightningCLI):
    """The commands that learn; with `driver:` in the configuration, `fit` runs that."""

    stop: Callable[[str, Any], NoReturn]
    job: Job | None = None
    """What the driver is given, where there is one; then there is no model and no trainer."""
    driver: AbstractDriver | None = None
    _seeded = True

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of ours."""
        keep = LightningCLI.subcommands()
        return {name: keep[name] for name in COMMANDS}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that stops with the message alone."""
        stop = self.stop

        class Parser(LightningArgumentParser):
            def error(self, message: str, *args: Any, **kwargs: Any) -> Any:
                stop(message, self)

        kwargs.setdefault("dump_header", [f"gradmerge=={__version__}"])
        kwargs["allow_abbrev"] = False  # a typo must not pass as an abbreviation
        parser = Parser(**kwargs)
        parser.add_argument(
            "-c", "--config", action="config", help="YAML file with any of these options."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The driver, and a place for tasks."""
        # `--data.tasks.NAME.path` adds to a mapping, and there is none where no file has one
        parser.set_defaults({"data.tasks": {}})
        parser.add_argument(
            "--driver",
            type=AbstractDriver | None,
            default=None,
            help="How the optimum is sought, where it is not one fit of all sources (Pairwise, "
            "Tree, Continual, LayerWise). Run the same command again to go on with a job that was "
            "killed.",
        )
        parser.add_argument(
            "--search",
            type=AbstractSearch | None,
            default=None,
            help="Searches for the coefficients that a fit starts at, by scores on the selection "
            "split (GreedySoup, Scales, Draws).",
        )
        parser.add_argument(
            "--model_folder",
            type=str | None,
            default=None,
            help="validate and test: score this Hugging Face folder or hub id instead of a merge; "
            "`--model FOLDER` is short for it.",
        )

    def before_instantiate_classes(self) -> None:
        """Refuse what is cheap to see."""
        if not self._get(self.config, "data.tasks"):
            raise ConfigError(
                "data.tasks: expected at least one task, got none; write them in the YAML, or "
                "give --data.tasks.NAME.path and what else they need."
            )
        given = self._get(self.config, "ckpt_path")
        if self._get(self.config, "model_folder"):
            self._score_folder(given)
        if self._get(self.config, "driver"):
            self._require_driven(given)
        kind = str(getattr(self._get(self.config, "optimizer"), "class_path", ""))
        if kind.startswith("gradmerge.optimisers.") and kind.endswith(".SAM"):
            SAM.require(self._get(self.config, "trainer.accumulate_grad_batches") or 1, False)
        path = str(given or "best")
        # else a name that Lightning resolves, an address, or a folder of shards
        if path not in ("best", "last", "hpc") and ":" not in path and not os.path.isdir(path):
            require_checkpoint(path)

    def _score_folder(self, ckpt_path: str | None) -> None:
        """Put the model of a folder in the place of the merge."""
        require_scored(str(self.subcommand), ckpt_path)
        config = self.config[str(self.subcommand)]
        tasks, private = config["data"]["tasks"], config["model"]["recipe"].get("private")
        recipe = scored_recipe(config["model_folder"], tasks, private or [])
        for name, task in tasks.items():
            task["source"] = name if recipe.heads else NAME
        config["driver"] = config["search"] = None
        for option, value in (("objective", None), ("score_experts", False), ("logit_scale", None)):
            config["model"][option] = value

        def scored(class_type: type, *args: Any, **options: Any) -> Any:
            return recipe

        self.parser.add_instantiator(scored, Recipe, subclasses=False)

    def _require_driven(self, ckpt_path: str | None) -> None:
        """Refuse what a driver has no use for.

        Raises:
            ConfigError: what, and what to do instead.
        """
        if self.subcommand in ("validate", "test"):
            raise ConfigError(
                f"driver: `gradmerge {self.subcommand}` scores one merge, and a driver makes "
                "several. Score the folder that it wrote: add --model FOLDER."
            )
        require_no_checkpoint(ckpt_path)
        if self._get(self.config, "search"):
            raise ConfigError(
                "search and driver: a search chooses the start of one fit of all sources, and a "
                "driver states the start of each of its own. Leave one of them out."
            )
        if self._get(self.config, "trainer.fast_dev_run"):
            raise ConfigError(
                "trainer.fast_dev_run writes no checkpoints, from which a driver goes on. For a "
                "short trial: --trainer.max_steps 1 and a --trainer.default_root_dir of its own."
            )

    def _set_seed(self) -> None:
        self._seeded = self._get(self.config, "seed_everything") is not True
        super()._set_seed()

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; for a driver, the job alone: nothing is opened."""
        if not self._get(self.config, "driver"):
            super().instantiate_classes()
            return
        for kind in (MergeModule, Recipe):
            self.parser.add_instantiator(later, kind, subclasses=False)
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model: Any = None
        self.trainer: Any = None
        self.datamodule = self._get(self.config_init, "data")
        self.driver = self._get(self.config_init, "driver")
        self.job = self._job()

    def _job(self) -> Job:
        assert self.driver is not None
        given = self._get(self.config_init, "trainer")
        options = dict(self._get(self.config_init, "model").keywords)
        recipe = self.driver.recipe(**options.pop("recipe").keywords)
        exports = [c for c in _listed(given.get("callbacks")) if isinstance(c, ExportAtEnd)]
        outputs = [Output(e.output, e.dtype, e.overwrite, e.head, e.log_artifact) for e in exports]
        return Job(
            recipe,
            self.datamodule,
            Path(given.get("default_root_dir") or "outputs"),
            self._step_trainer,
            options,
            output=outputs[-1] if outputs else None,
            optimise=self._optimise,
            config=self._plain_config(),
        )

    def _plain_config(self) -> dict[str, Any]:
        """What results depend on, besides what a job holds itself."""
        dumped = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        found = dumped.get(self.subcommand, dumped)
        trainer = {k: v for k, v in found["trainer"].items() if k not in _FREE}
        kept = {key: found.get(key) for key in ("optimizer", "lr_scheduler")}
        seed = {"seed_everything": found["seed_everything"]} if self._seeded else {}
        return {"trainer": trainer, **kept, **seed}

    def _optimise(self, module: lightning.LightningModule) -> None:
        """Give a module the configured optimiser and schedule."""
        self.model = module
        self._add_configure_optimizers_method_to_model(self.subcommand)
        self.model = None

    def _step_trainer(
        self, folder: Path, callbacks: Sequence[lightning.Callback], overrides: Mapping[str, Any]
    ) -> lightning.Trainer:
        config = self.config.clone()
        self._get(config, "trainer")["default_root_dir"] = str(folder)
        self.config_init = self.parser.instantiate_classes(config)
        given = self._get(self.config_init, "trainer")
        own = [c for c in _listed(given.get("callbacks")) if not isinstance(c, ExportAtEnd)]
        for callback in own:
            if isinstance(callback, ModelCheckpoint):
                # of its own, and the same when it goes on, else it would forget its best
                given_path = callback.dirpath
                place = Path(given_path) / folder.name if given_path else folder / "checkpoints"
                callback.dirpath = str(place.expanduser().resolve())
        # the first that keeps checkpoints is the one whose best is restored
        first = [c for c in callbacks if not isinstance(c, Checkpoint)]
        rest = [c for c in callbacks if isinstance(c, Checkpoint)]
        given["callbacks"] = [*first, *own, *rest]
        if rest:
            given["enable_checkpointing"] = True
        for name, value in overrides.items():
            given[name] = value
        return self.instantiate_trainer()

    def _run_subcommand(self, subcommand: str) -> None:
        if self.driver is not None and self.job is not None:
            self.driver.run(self.job)
            return
        super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Search for the start, if a search is given and no checkpoint holds one."""
        search = self._get(self.config_init, "search")
        if search is None:
            return
        for callback in self.trainer.callbacks:
            if isinstance(callback, ExportAtEnd):  # before the trials, not after them
                callback.require_free()
                callback.require_tasks(self.datamodule.tasks)
        start = SearchedStart(search)
        self.trainer.callbacks.insert(0, start)
        if self._get(self.config, "ckpt_path") is None:
            start.run(self.model, self.datamodule)

    def before_validate(self) -> None:
        """Say that a search is left out."""
        if self._get(self.config_init, "search") is None:
            return
        checkpoint = self._get(self.config, "ckpt_path")
        start = "that model.recipe.init gives (--ckpt_path scores what a fit has learned)"
        rank_zero_info(
            f"search: not run by `gradmerge {self.subcommand}`, which scores the coefficients "
            + (f"of {checkpoint}" if checkpoint else start)
        )

    before_test = before_validate

    @staticmethod
    def configure_optimizers(
        lightning_module: Any, optimizer: Any, lr_scheduler: Any = None
    ) -> Any:
        """Schedulers move a step at a time: a fit is a number of steps, not of epochs."""
        if lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": lr_scheduler, "interval": "step"}
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            schedule.update(interval="epoch", monitor=lr_scheduler.monitor)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _parse_ckpt_path(self) -> None:
        """The configuration says what to build; the checkpoint holds coefficients for it.

        LightningCLI would parse the checkpoint's hyper-parameters, which are plain data here.
        """

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """A trainer with our loggers, our length and our bar where nothing is said of them."""
        given = self._get(self.config_init, "trainer") or {}
        kwargs["logger"] = loggers = with_csv(given.get("logger"), given.get("default_root_dir"))
        if loggers:
            kwargs["callbacks"] = with_coefficients(given.get("callbacks"))
        limits = [given.get(key) for key in ("max_epochs", "max_time")]
        if limits == [None, None] and given.get("max_steps") in (None, -1):
            kwargs["max_steps"] = DEFAULT_STEPS
        trainer: Any = super().instantiate_trainer(**kwargs)
        bar = trainer.progress_bar_callback
        if bar is not None and type(bar) in (TQDMProgressBar, RichProgressBar):
            trainer.callbacks[trainer.callbacks.index(bar)] = StepProgress()
        return trainer


def start(
    arguments: Sequence[str] | None, run: bool, stop: Callable[[str, Any], NoReturn]
) -> MergeCLI:
    """Build and run; see `gradmerge.cli.learn`.

    Args:
        arguments: as on the command line; None takes the command line's own.
        run: run the command that the arguments begin with.
        stop: leaves with a message of the parser.
    """
    MergeCLI.stop = staticmethod(stop)
    return MergeCLI(
        MergeModule,
        MergeDataModule,
        args=None if arguments is None else list(arguments),
        run=run,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"log_every_n_steps": 1},
        parser_kwargs={"prog": "gradmerge"},
    )


def _listed(callbacks: Any) -> list[Any]:
    if isinstance(callbacks, Iterable):
        return list(callbacks)
    return [] if callbacks is None else [callbacks]
