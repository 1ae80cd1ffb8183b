"""`fit`, `validate` and `test`: LightningCLI extended by drivers, searches and folder scores."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import (
    Checkpoint,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    ReduceLROnPlateau,
    SaveConfigCallback,
)
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from gradmerge.cli.arguments import MODEL
from gradmerge.cli.commands import require_checkpoint
from gradmerge.cli.configs import later
from gradmerge.cli.defaults import listed, with_coefficients, with_csv
from gradmerge.cli.early import require_monitors, require_options, require_seed
from gradmerge.cli.explain import Explained
from gradmerge.cli.imports import ALLOW_MODULES, require_allowed
from gradmerge.cli.method import describe_method
from gradmerge.cli.options import ABOUT
from gradmerge.cli.places import require_scored
from gradmerge.cli.resume import NAMES, find_checkpoint, move_sources
from gradmerge.cli.room import require_memory
from gradmerge.cli.score import keep_in_folder, run_of, scored_recipe
from gradmerge.common.errors import ConfigError
from gradmerge.common.failures import reading
from gradmerge.common.finite import require_finite_options
from gradmerge.common.progress import show_progress
from gradmerge.common.secrets import masked
from gradmerge.common.version import __version__
from gradmerge.drivers import AbstractDriver, Job
from gradmerge.engine.opening import Opening
from gradmerge.engine.recipe import Recipe
from gradmerge.export.atomic import inputs_of
from gradmerge.optimisers import SAM, CosineDecay, LogisticNoise
from gradmerge.search import AbstractSearch
from gradmerge.training.benchmarks import EvaluateEvery
from gradmerge.training.callbacks import ExportAtEnd, StepProgress
from gradmerge.training.checkpoint import keep_scores
from gradmerge.training.logs import continue_logs, continue_run, remove_refused
from gradmerge.training.module import MergeModule
from gradmerge.training.run import read_by
from gradmerge.training.saving import require_places
from gradmerge.training.search import SearchedStart
from gradmerge.training.summary import fit_table, score_table

# Default length of a fit. It is counted in steps, because coefficients are few.
DEFAULT_STEPS = 200

# Trainer options that do not affect results.
_FREE = (
    "default_root_dir",
    "enable_model_summary",
    "enable_progress_bar",
    "log_every_n_steps",
    "logger",
    "profiler",
)


def require_trusted_tasks(callbacks: Sequence[Any], allowed: Sequence[str]) -> None:
    """Reject task files of a configuration that the command line does not trust."""
    ours = [callback.harness for callback in callbacks if isinstance(callback, EvaluateEvery)]
    files = [file for harness in ours for file in harness.own_files]
    if files and "lm_eval" not in allowed:
        raise ConfigError(
            f"EvaluateEvery: expected tasks of lm-eval, got {', '.join(files)} in a configuration; "
            "task files can run code. If you trust them, add --allow_modules lm_eval."
        )


class SaveConfig(SaveConfigCallback):
    """Save the configuration beside a fit's logs, without secrets.

    Args:
        parser: the parser.
        config: the configuration.
        method: origin of the method, for the record of the run.
        **options: those of Lightning's callback.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, method: str = "", **options: Any
    ) -> None:
        super().__init__(parser, masked(config), **options)
        self.method = method

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Save it, unless its place is one that must not be written to."""
        require_places(trainer, pl_module)
        super().setup(trainer, pl_module, stage)


class _Parser(Explained, LightningArgumentParser):
    pass


class MergeCLI(LightningCLI):
    """Command line of `fit`, `validate` and `test`; with a driver, `fit` runs that."""

    job: Job | None = None
    """The driver's job, if there is a driver; model and trainer are None then."""
    driver: AbstractDriver | None = None
    allowed: tuple[str, ...] = ()
    """Modules that the command line allows to import."""
    method = ""
    """Origin of the method in words."""
    opens = True
    """False to make only recipe, data and search: `model` is then a call that opens the sources."""
    _seeded = True
    _verbose = True
    _began = 0.0

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands of gradmerge with the options that Lightning skips in each."""
        keep = LightningCLI.subcommands()
        return {name: keep[name] for name in ("fit", "validate", "test")}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that exits with a message but without the usage text."""
        kwargs.setdefault("dump_header", [f"gradmerge=={__version__}"])
        kwargs["allow_abbrev"] = False  # otherwise typos could pass as abbreviations
        parser = _Parser(**kwargs)
        parser.add_argument(
            "-c", "--config", action="config", help="YAML file with any of these options."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options for drivers, searches and scored folders."""
        # `--data.tasks.NAME.path` adds to a mapping, which must exist even if no file has tasks
        parser.set_defaults({"data.tasks": {}})
        parser.add_argument(
            "--driver",
            type=AbstractDriver | None,
            default=None,
            help=ABOUT["driver"],
        )
        parser.add_argument(
            "--search",
            type=AbstractSearch | None,
            default=None,
            help=ABOUT["search"],
        )
        parser.add_argument(
            "--model_folder",
            type=str | None,
            default=None,
            help=ABOUT["model_folder"],
        )
        parser.add_argument("--allow_modules", **ALLOW_MODULES)
        parser.add_argument(
            "--sources",
            type=dict[str, str] | None,
            default=None,
            help=ABOUT["sources"],
        )

    def before_instantiate_classes(self) -> None:
        """Reject invalid configurations before anything is opened."""
        require_finite_options(self.config.as_dict())
        if not self._get(self.config, "data.tasks"):
            raise ConfigError(
                "data.tasks: expected at least one task, got none; list them in the YAML, or give "
                "--data.tasks.NAME.path and the task's other options."
            )
        for option in ("allow_modules", "model.allow_modules"):
            require_allowed(option, self._get(self.config, option), self.allowed)
            self._set(option, list(self.allowed))
        require_options(partial(self._get, self.config), self.subcommand in (None, "fit"))
        given = self._get(self.config, "ckpt_path")
        if self._get(self.config, "model_folder"):
            self._score_folder(given)
        if self._get(self.config, "driver"):
            self._require_driven(given)
        optimiser = self._get(self.config, "optimizer")
        for kind in (SAM, LogisticNoise):
            if getattr(optimiser, "class_path", "") == f"gradmerge.optimisers.{kind.__name__}":
                kind.require(self._get(self.config, "trainer.accumulate_grad_batches") or 1, False)
        if self._get(self.config, "weights_only") is False:
            raise ConfigError(
                "weights_only: expected true, got false; a checkpoint is never unpickled, because "
                "that runs code in it. Leave the option out."
            )
        if given is not None:
            self._find_checkpoint(str(given))
        if self.subcommand in ("validate", "test"):  # the trainer would print a table per task
            self._verbose = bool(self._get(self.config, "verbose"))
            self._set("verbose", False)
        places = self._get(self.config, "sources")
        if places:
            move_sources(self._get(self.config, "model.recipe"), places)
            self._set("sources", None)

    def _find_checkpoint(self, given: str) -> None:
        """Replace the name of a checkpoint by its path, and check the file."""
        if given in NAMES:
            path = str(find_checkpoint(given, self._get(self.config, "trainer")))
            say = rank_zero_only(print)
            say(f"gradmerge {self.subcommand}: ckpt_path {given}: {path}", file=sys.stderr)
            self._set("ckpt_path", path)
            given = path
        require_checkpoint(given)

    def _set(self, option: str, value: Any) -> None:
        (self.config[self.subcommand] if self.subcommand else self.config)[option] = value

    def _score_folder(self, ckpt_path: str | None) -> None:
        """Replace the merge by the model of a folder."""
        require_scored(str(self.subcommand), ckpt_path)
        config = self.config[str(self.subcommand)]
        tasks, private = config["data"]["tasks"], config["model"]["recipe"].get("private")
        recipe = scored_recipe(config["model_folder"], tasks, private or [])
        for name, task in tasks.items():
            task["source"] = name if recipe.heads else MODEL
        config["driver"] = config["search"] = None
        for option, value in (("objective", None), ("score_experts", False), ("logit_scale", None)):
            config["model"][option] = value

        def scored(class_type: type, *args: Any, **options: Any) -> Any:
            return recipe

        self.parser.add_instantiator(scored, Recipe, subclasses=False)

    def _require_driven(self, ckpt_path: str | None) -> None:
        """Reject a command or options that do not combine with a driver."""
        if self.subcommand in ("validate", "test"):
            raise ConfigError(
                f"driver: `gradmerge {self.subcommand}` scores one merge, but a driver makes "
                "several. Score the folder that the driver wrote: add --model FOLDER."
            )
        if ckpt_path is not None:
            raise ConfigError(
                "ckpt_path: a driver resumes by itself when the same command runs again, got "
                f"{ckpt_path}. Leave the option out."
            )
        if self._get(self.config, "search"):
            raise ConfigError(
                "search and driver: expected one of them, got both. A search chooses the initial "
                "coefficients of a single fit; a driver sets those of each of its fits.\n"
                "Remove one of them."
            )
        if self._get(self.config, "trainer.fast_dev_run"):
            raise ConfigError(
                "trainer.fast_dev_run: expected false with a driver, which needs the checkpoints "
                "that fast_dev_run does not write.\n"
                "For a trial run use --trainer.max_steps 1 and another --trainer.default_root_dir."
            )

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        require_seed(seed)
        self._seeded = seed is not True
        super()._set_seed()

    def instantiate_classes(self) -> None:
        """Build model, data and trainer, or only the job of a driver, without opening sources."""
        driven = self._get(self.config, "driver")
        for kind in (MergeModule, Recipe) if driven else (MergeModule,):
            self.parser.add_instantiator(later, kind, subclasses=False)
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = self._get(self.config_init, "data")
        self.model: Any = self._get(self.config_init, "model")
        self.trainer: Any = None
        if not self.opens:
            return
        # before the sources are opened, so that what it refuses is said at once
        self.trainer = self.instantiate_trainer()
        if not driven:
            self.model = self._opened()
            # the optimiser takes the parameters of the tasks
            self.model.take_tasks(getattr(self.datamodule, "tasks", None))
            if self.subcommand in (None, "fit"):
                require_monitors(partial(self._get, self.config), self.model.possible_scores)
            self._add_configure_optimizers_method_to_model(self.subcommand)
            return
        self.model = self.trainer = None
        self.driver = self._get(self.config_init, "driver")
        self.job = self._job()

    def _opened(self) -> MergeModule:
        """Open the sources and build the module; a fit that cannot fit is refused before."""
        opening = Opening(self.model.keywords["recipe"])
        if self.subcommand in (None, "fit"):
            require_memory(self, opening)
        opening.align(opening.recipe.statistics)
        module: MergeModule = self.model(recipe=opening.plan())
        return module

    def _job(self) -> Job:
        assert self.driver is not None
        given = self._get(self.config_init, "trainer")
        options = dict(self._get(self.config_init, "model").keywords)
        recipe = self.driver.recipe(**options.pop("recipe").keywords)
        exports = [c for c in listed(given.get("callbacks")) if isinstance(c, ExportAtEnd)]
        return Job(
            recipe,
            self.datamodule,
            Path(given.get("default_root_dir") or "outputs"),
            self._step_trainer,
            options,
            output=exports[-1] if exports else None,
            optimise=self._optimise,
            config=self._plain_config(),
        )

    def _plain_config(self) -> dict[str, Any]:
        """Return the configuration that results depend on and that the job does not hold."""
        dumped = yaml.safe_load(self.parser.dump(masked(self.config), skip_none=False))
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
        own = [c for c in listed(given.get("callbacks")) if not isinstance(c, ExportAtEnd)]
        for callback in own:
            if isinstance(callback, ModelCheckpoint):
                # one folder per step, and the same on resume, or its best score would be lost
                given_path = callback.dirpath
                place = Path(given_path) / folder.name if given_path else folder / "checkpoints"
                callback.dirpath = str(place.expanduser().resolve())
        # Lightning restores the best checkpoint of the first checkpoint callback
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
            if self.job.table:
                print(f"\n{self.job.table}")
            return
        self._began = time.monotonic()
        try:
            super()._run_subcommand(subcommand)
        except Exception:
            if not self.trainer.global_step:
                remove_refused(self.trainer.loggers)
            raise

    def after_fit(self) -> None:
        """Print what the fit has reached, taken and written."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            print(f"\n{fit_table(self.trainer, self.model, time.monotonic() - self._began)}")

    def after_validate(self) -> None:
        """Print the scores as one table."""
        self._print_scores("selection")

    def after_test(self) -> None:
        """Print the scores as one table, and keep them.

        Those of a checkpoint are kept beside it for its export, those of a folder in its records.
        """
        self._print_scores("test")
        if not self.trainer.is_global_zero:
            return
        found, folder = self.model.results["test"], self._get(self.config, "model_folder")
        checkpoint = self._get(self.config, "ckpt_path")
        if checkpoint is not None:
            written = keep_scores(Path(checkpoint), {"test": found})
            if written is not None and self._verbose:
                print(f"scores kept in {written}")
        if folder and (done := keep_in_folder(folder, "test", found)) and self._verbose:
            print(done)

    def _print_scores(self, split: str) -> None:
        results, experts = self.model.results.get(split, {}), self.model.experts.get(split, {})
        if self._verbose and self.trainer.is_global_zero:
            print(score_table(split, results, experts))

    def before_fit(self) -> None:
        """Name the method; search for initial coefficients, unless a checkpoint has them."""
        if self.method:
            text = describe_method(self.model.recipe, self.model.objective)
            rank_zero_info(f"method: {self.method}: {text}")
        search = self._get(self.config_init, "search")
        if search is None:
            return
        inputs = [*inputs_of(self.model.merged.plan), *read_by(self.datamodule)]
        for callback in self.trainer.callbacks:
            if isinstance(callback, ExportAtEnd):  # fail before the trials, not after them
                callback.require_free(inputs)
                callback.require_tasks(self.datamodule.tasks)
        start = SearchedStart(search)
        self.trainer.callbacks.insert(0, start)
        if self._get(self.config, "ckpt_path") is None:
            start.run(self.model, self.datamodule)

    def before_validate(self) -> None:
        """Report that the search is ignored."""
        if self._get(self.config_init, "search") is None:
            return
        checkpoint = self._get(self.config, "ckpt_path")
        start = "model.recipe.init (add --ckpt_path to score those of a fit)"
        rank_zero_info(
            f"search: not run by `gradmerge {self.subcommand}`, which scores the coefficients of "
            f"{checkpoint or start}"
        )

    before_test = before_validate

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Give the optimiser the module's groups, which may have learning rates of their own."""
        if not isinstance(self.model, MergeModule):  # a block of a driver
            super()._add_configure_optimizers_method_to_model(subcommand)
            return
        model: Any = self.model
        groups = model.parameter_groups()
        model.parameters = lambda: groups
        try:
            super()._add_configure_optimizers_method_to_model(subcommand)
        finally:
            del model.parameters

    @staticmethod
    def configure_optimizers(
        lightning_module: Any, optimizer: Any, lr_scheduler: Any = None
    ) -> Any:
        """Configure schedulers to update per step, because a fit is counted in steps."""
        if lr_scheduler is None or isinstance(lr_scheduler, ReduceLROnPlateau):
            return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)
        if isinstance(lr_scheduler, CosineDecay):
            lr_scheduler.follow(lightning_module.trainer.estimated_stepping_batches)
        schedule = {"scheduler": lr_scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _parse_ckpt_path(self) -> None:
        """Ignore the hyper-parameters of a checkpoint: they are no options, but plain data."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build the trainer, with gradmerge's default loggers, length and progress bar."""
        given = self._get(self.config_init, "trainer") or {}
        kwargs["logger"] = loggers = with_csv(given.get("logger"), given.get("default_root_dir"))
        checkpoint = self._get(self.config, "ckpt_path")
        if loggers and checkpoint:
            continue_logs(loggers, Path(checkpoint), self.subcommand in (None, "fit"))
        elif loggers and self._get(self.config, "model_folder"):
            continue_run(loggers, run_of(self._get(self.config, "model_folder")))
        require_trusted_tasks(listed(given.get("callbacks")), self.allowed)
        if loggers:
            kwargs["callbacks"] = with_coefficients(given.get("callbacks"))
        limits = [given.get(key) for key in ("max_epochs", "max_time")]
        if limits == [None, None] and given.get("max_steps") in (None, -1):
            kwargs["max_steps"] = DEFAULT_STEPS
        with reading("trainer", "it cannot be set up", kind=ConfigError):
            trainer: Any = super().instantiate_trainer(**kwargs)
        bar = trainer.progress_bar_callback
        if bar is not None and type(bar) in (TQDMProgressBar, RichProgressBar):
            trainer.callbacks[trainer.callbacks.index(bar)] = StepProgress()
        show_progress(bar is not None and trainer.is_global_zero)
        return trainer
