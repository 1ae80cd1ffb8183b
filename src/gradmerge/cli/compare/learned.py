"""Fits with several learning rates, each kept at its best step on the selection split."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint

from gradmerge.cli.compare.folder import opened_folder
from gradmerge.cli.compare.opened import (
    parse,
    recipe_of,
    scorer_of,
    shared_data,
    statistics_of,
)
from gradmerge.cli.compare.work import Select, Trial, Work
from gradmerge.common.checkpoints import load_checkpoint
from gradmerge.drivers import LayerWise
from gradmerge.engine.recipe import Recipe
from gradmerge.training.callbacks import CoefficientLogger, ExportAtEnd
from gradmerge.training.module import MergeModule

_QUIET = (
    "--trainer.devices=1",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--model.score_experts=false",
)


class KeepBest(Checkpoint):
    """Keeps the step whose selection score is best; 0 is the start.

    Args:
        path: checkpoint of that step.
        select: the score by which tasks are judged, or the loss.
    """

    def __init__(self, path: Path, select: Select) -> None:
        self.path, self._select = path, select
        self.step: int | None = None
        self.rank = -math.inf
        self.averages: dict[str, float] = {}
        self._start: dict[str, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Remember the start, which may stay the best."""
        self._start = {k: v.detach().clone() for k, v in pl_module.state_dict().items()}

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Save the state if its score is the best so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        averages = dict(pl_module.results["selection"]["average"])
        if self._takes(trainer.global_step, averages, pl_module):
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Save the start if no step was better, and the end if nothing was scored."""
        history = pl_module.history
        scores = {"loss": "selection/loss", history.score: f"selection/average/{history.score}"}
        found = {name: dict(history.points(at)).get(0) for name, at in scores.items() if name}
        start = {name: value for name, value in found.items() if value is not None}
        if start and self._takes(0, start, pl_module):
            pl_module.load_state_dict(self._start)
            trainer.save_checkpoint(self.path)
        if self.step is None:
            trainer.save_checkpoint(self.path)

    def _takes(self, step: int, averages: dict[str, float], module: Any) -> bool:
        score = module.score
        name = "loss" if self._select == "loss" else score.name
        value = averages.get(name, math.nan)
        rank = value if name != "loss" and score.higher_is_better else -value
        if math.isnan(rank) or (self.step is not None and rank <= self.rank and step):
            return False
        if not step and self.step is not None and rank < self.rank:
            return False
        self.step, self.rank, self.averages = step, rank, averages
        return True


class LearnedRunner:
    """Trials of a method that learns, by `trainer.fit` or by a driver.

    Args:
        work: the method and its seed.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._tree = work.method.tree(work.suite)
        self._known: tuple[Recipe, Any] | None = None
        self._last: tuple[str, Any] = ("", None)  # opening a merge again can take minutes

    def prepare(self, value: Any) -> None:
        """Do nothing: a fit opens its sources itself."""

    def run(self, trial: Trial) -> None:
        """Fit, and score what is kept on the selection split."""
        from gradmerge.cli.learning import learn

        self._last = ("", None)  # before the next one takes memory
        work = self._work
        folder = work.place / f"fit-{trial.key}"
        shutil.rmtree(folder, ignore_errors=True)
        options = work.options(trial.value)
        given = (self._tree.get("model") or {}).get("recipe") or {}
        statistics = None
        if given.get("preprocess") or given.get("alignment"):  # which may need some
            statistics, trial.opening = statistics_of(work, *self._shared())
        if statistics is not None:
            options.append(f"--model.recipe.statistics={statistics}")
        cli = learn([*options, *_QUIET, f"--trainer.default_root_dir={folder}"], run=False)
        if cli.driver is not None:
            self._drive(cli, trial, self._shared(cli.job.recipe, cli.datamodule)[1], folder)
            return
        _, data = self._shared(cli.model.recipe, cli.datamodule)
        if trial.examples is not None:
            data.attach(cli.model.merged)
            data.setup()
            data = data.limited("adaptation", trial.examples)
        cli.datamodule = data
        kept = KeepBest(work.place / f"fit-{trial.key}.ckpt", work.select)
        dropped = (Checkpoint, CoefficientLogger, ExportAtEnd)
        own = [c for c in cli.trainer.callbacks if not isinstance(c, dropped)]
        cli.trainer.callbacks[:] = own
        cli.before_fit()  # a search for the start
        cli.trainer.callbacks.append(kept)
        cli.trainer.fit(cli.model, datamodule=data)
        trial.checkpoint, trial.step = kept.path.name, kept.step
        trial.selection = kept.averages
        if kept.step is None:
            trial.selection = dict(scorer_of(cli.model, data, self._tree).score()["average"])
        score = cli.model.score
        trial.score, trial.higher_is_better = score.name, score.higher_is_better
        trial.trainable = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
        trial.labels = cli.model.objective.needs_labels
        drawn = cli.trainer.global_step * cli.trainer.accumulate_grad_batches * data.batch_size
        trial.adaptation = _drawn(data, drawn)
        self._last = (trial.key, cli.model)
        shutil.rmtree(folder, ignore_errors=True)

    def _shared(self, *opened: Any) -> tuple[Recipe, Any]:
        """Return the recipe and the prepared data of the method; parsed unless they are given."""
        if self._known is None:
            if not opened:
                found = parse(self._work.options(None))
                opened = recipe_of(found), found.datamodule
            recipe, data = opened
            self._known = recipe, shared_data(data, recipe)
        return self._known

    def _drive(self, cli: Any, trial: Trial, data: Any, folder: Path) -> None:
        """Run a driver, which writes its merge to a folder."""
        if trial.examples is not None:  # a driver prepares its data by itself
            data = data.restricted(list(data.tasks))
            data.tasks = {
                name: replace(task, limit={**(task.limit or {}), "adaptation": trial.examples})
                for name, task in data.tasks.items()
            }
        cli.job.data = data
        merged: Path = cli.driver.run(cli.job)
        target = self._work.place / f"fit-{trial.key}.merged"
        shutil.rmtree(target, ignore_errors=True)
        merged.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
        trial.checkpoint = target.name
        module, own = opened_folder(target, data, self._tree)
        trial.selection = dict(scorer_of(module, own, self._tree).score()["average"])
        trial.score, trial.higher_is_better = module.score.name, module.score.higher_is_better
        trial.trainable = coefficients_in(target)
        own.attach(module.merged)
        trial.adaptation = _drawn(own, None)
        in_blocks = isinstance(cli.driver, LayerWise)  # which matches hidden states
        trial.labels = not in_blocks and cli.job.objective.needs_labels

    def chosen(self, trial: Trial, data: Any = None) -> tuple[MergeModule, Any]:
        """Return a module of what was kept, and the suite's data or others."""
        work, place = self._work, self._work.place / trial.checkpoint
        recipe, own = self._shared()
        data = own if data is None else data
        if place.is_dir():
            return opened_folder(place, data, self._tree)
        key, module = self._last
        if key == trial.key:
            kept = load_checkpoint(place)
            module.on_load_checkpoint(kept)
            module.load_state_dict(kept["state_dict"])
        else:
            module = MergeModule.load_from_checkpoint(
                place,
                allow_modules=work.allow_modules,
                trust_remote_code=recipe.trust_remote_code,
            )
            self._last = (trial.key, module)
        return module, data


def _drawn(data: Any, drawn: int | None) -> int:
    """Return the number of different adaptation examples of all tasks that a fit has seen."""
    sizes = [len(rows) for rows in data.examples("adaptation").values()]
    return sum(size if drawn is None else min(size, drawn) for size in sizes)


def coefficients_in(folder: Path) -> int:
    """Return the number of coefficients that are stored with a merge."""
    from safetensors import safe_open

    if not (folder / "coefficients.st").is_file():
        return 0
    with safe_open(folder / "coefficients.st", framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes)
