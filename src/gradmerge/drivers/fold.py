"""Folds: merges of two models at a time.

Each step merges two models, sources or merges of earlier steps, as an ordinary fit: with the
recipe's own coefficients, link, operator and preprocess, on the tasks of the sources in it.
"""

from __future__ import annotations

import gc
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from typing_extensions import override

from gradmerge.coefficients import Constant
from gradmerge.common.checkpoints import load_checkpoint
from gradmerge.common.errors import ConfigError, nearest, require, shorten
from gradmerge.common.ranges import require_ranges
from gradmerge.common.spec import to_plain
from gradmerge.drivers.base import AbstractDriver, Job
from gradmerge.drivers.state import STATE, StepRecord
from gradmerge.drivers.steps import Finish, KeepLast
from gradmerge.drivers.summary import fold_table, start_and_end
from gradmerge.engine.recipe import Recipe
from gradmerge.export.folder import DTYPES, export_state
from gradmerge.export.provenance import mean_coefficients
from gradmerge.objectives import Objective
from gradmerge.sources import AbstractSource
from gradmerge.sources.resolve import as_source
from gradmerge.training.data import MergeDataModule
from gradmerge.training.module import MergeModule


@dataclass(frozen=True)
class FoldedRecipe(Recipe):
    """A recipe whose sources are merged two at a time, never all at once."""

    def _require_number(self) -> None:
        self.coefficients.num_rows(2)
        self.operator.require(2, self.resolved_origin)


@dataclass
class Node:
    """A model of a fold: a source, or the merge that a step makes."""

    name: str
    spec: str | AbstractSource
    members: tuple[str, ...]
    """Names of the sources in it."""
    weight: int
    """Number of sources in it (an earlier merge may not know their names)."""


@dataclass(frozen=True, kw_only=True)
class AbstractFold(AbstractDriver):
    """A merge of two models at a time."""

    # repeated, because the parser takes the docs of options from a class and its direct parent
    restart: bool = False
    """Start again instead of resuming; the earlier job's folder is moved aside, never deleted."""
    tasks: Literal["members", "all"] = "members"
    """Tasks of a step: those of the sources that are in it, or all."""
    start: Literal["average", "recipe"] = "average"
    """Start of a step's coefficients: the plain average of all sources in it (m / (m + n) and
    n / (m + n) for m and n sources), or the recipe's `init`."""
    keep_steps: bool = True
    """Keep the model folders of the steps (float32); false removes each once it is merged on."""
    every_n_steps: int = 50
    """Optimiser steps between two saved states of the running step."""
    order: list[str] | Literal["given"] = "given"
    """Names of all sources of the recipe in the order that they join. Default: as listed."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        require_ranges(type(self), vars(self))

    # ---- what a driver may change

    @abstractmethod
    def fold(self, models: list[Node], merge: Callable[[Node, Node], Node]) -> None:
        """Merge all models, two at a time; each call of `merge` is a step."""

    def nodes(self, job: Job) -> list[Node]:
        """Return the models to merge; by default the sources, in order."""
        sources = job.recipe.sources
        return [Node(name, sources[name], (name,), 1) for name in _ordered(self.order, sources)]

    def serving(self, job: Job) -> dict[str, str | AbstractSource]:
        """Return the models that serve as heads and teachers of tasks; by default the sources."""
        return dict(job.recipe.sources)

    def reads(self, job: Job) -> dict[str, Any]:
        """Return further plain data that the job depends on (see `Job.begin`)."""
        return {}

    def origins(self, job: Job) -> dict[str, dict[str, str]]:
        """Return origin and hash of the base and of all sources in the result."""
        return job.sources

    def shares(self, left: int, right: int) -> list[float]:
        """Return the starting coefficients of a step that merges so many sources."""
        return [left / (left + right), right / (left + right)]

    def prepared(self, recipe: Recipe, pair: Sequence[Node], before: Mapping[str, Any]) -> Recipe:
        """Return a step's recipe with the driver's own changes, given the result `before` it."""
        return recipe

    def found(self, module: MergeModule, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return further results of a step for the next one and for the provenance."""
        return {}

    # ---- the fold

    @override
    def recipe(self, **given: Any) -> Recipe:
        return FoldedRecipe(**given)

    @override
    def learn(self, job: Job) -> Path:
        kind = type(self).__name__
        _require_foldable(job.recipe)
        steps = self._steps(job)
        _require_terms(kind, job.objective, job.data, len(steps))
        for number, step in enumerate(steps, 1):
            step.require(number)
        job.begin(self, **self.reads(job))
        if job.exported is not None:
            job.say(f"this job is finished: {job.exported}")
            return job.exported
        history: list[dict[str, Any]] = []
        for number, step in enumerate(steps, 1):
            step.history = list(history)
            job.say(
                f"{kind}, step {number} of {len(steps)}: {step.title}"
                f"{', already finished' if step.is_finished else ''}"
            )
            history.append(step.result())
            if not step.is_last:
                gc.collect()  # module and trainer refer to each other: free this model first
            if not self.keep_steps:
                _remove(step.pair)
        return job.target.folder

    def _steps(self, job: Job) -> list[_Step]:
        models = self.nodes(job)
        expected = "at least two models to merge (a fit without a driver takes one source, too)"
        require(len(models) > 1, type(self).__name__, expected, models[0].name)
        prefix = "step"
        while any(model.name.startswith(prefix) for model in models):
            prefix = f"{prefix}_"
        steps: list[_Step] = []

        def merge(left: Node, right: Node) -> Node:
            steps.append(_Step(self, job, f"{prefix}-{len(steps) + 1}", (left, right)))
            return steps[-1]

        self.fold(models, merge)
        steps[-1].is_last = True
        return steps


class _Step(Node):
    """One step of a fold, and the merge that it makes of two models."""

    is_last = False
    history: Sequence[Mapping[str, Any]] = ()
    """Results of the steps before."""

    def __init__(self, fold: AbstractFold, job: Job, name: str, pair: tuple[Node, Node]) -> None:
        left, right = pair
        folder = str(job.folder / "steps" / name / "merged")
        members, weight = (*left.members, *right.members), left.weight + right.weight
        super().__init__(name, folder, members, weight)
        self.fold, self.job, self.pair = fold, job, pair
        self.shares = fold.shares(left.weight, right.weight)

    @cached_property
    def tasks(self) -> list[str]:
        """Names of the step's tasks."""
        serving, chosen = self.fold.serving(self.job), []
        for name, task in self.job.data.tasks.items():
            source = task.source or name
            if self.fold.tasks == "all" or source in self.members or source not in serving:
                chosen.append(name)
        if not chosen:
            raise ConfigError(
                f"no task belongs to {', '.join(self.members)}, which one step merges (tasks: "
                f"{', '.join(self.job.data.tasks)}). Set `source` of the tasks, or use all of them "
                "in each step: --driver.tasks all."
            )
        return chosen

    @cached_property
    def objective(self) -> Objective:
        """The objective on the tasks of the step."""
        whole = self.job.objective
        weights = {t: w for t, w in whole.task_weights.items() if t in self.tasks}
        return replace(whole, task_weights=weights)

    def require(self, number: int) -> None:
        """Reject tasks or a start that this step cannot have.

        Raises:
            ConfigError: no task of the step has a weight, or the link cannot be pulled back from
                the step's starting coefficients.
        """
        self.objective.require_tasks(self.tasks)
        if self.fold.start == "recipe":
            return
        link, shares = self.job.recipe.coefficients, self.shares
        try:
            link.pull_back(torch.tensor(shares, dtype=torch.float64)[:, None])
        except ConfigError as error:
            raise ConfigError(
                f"{type(self.fold).__name__}: start: average begins step {number} at "
                f"{shares[0]:.4g} and {shares[1]:.4g} whatever model.recipe.init says, and "
                f"{type(link).__name__} cannot begin there ({error}) Start each step at the "
                "recipe's init: --driver.start recipe; or use another link."
            ) from error

    @property
    def before(self) -> Mapping[str, Any]:
        """Result of the step before."""
        return self.history[-1] if self.history else {}

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of the step."""
        whole = self.job.recipe
        sources = {node.name: node.spec for node in self.pair}
        used = {self.job.data.tasks[name].source or name for name in self.tasks}
        used |= set(self.members) if whole.private else set()
        serving = self.fold.serving(self.job).items()
        heads = {name: spec for name, spec in serving if name in used and name not in sources}
        given = {field.name: getattr(whole, field.name) for field in fields(Recipe)}
        given |= {"sources": sources, "heads": {**whole.heads, **heads}}
        if not self.is_last:
            given["finalisers"] = []  # they apply once, in the end
        if self.fold.start == "average":
            given["init"] = Constant(self.shares)
        return self.fold.prepared(Recipe(**given), self.pair, self.before)

    @cached_property
    def record(self) -> StepRecord:
        """The record of the step."""
        return self.job.step(self.name, {"recipe": to_plain(self.recipe), "tasks": self.tasks})

    @property
    def is_finished(self) -> bool:
        """Return whether the step was learned and its model exists (an output may be moved)."""
        lost = self.is_last and self.job.exported is None
        return self.record.result is not None and not lost

    @property
    def title(self) -> str:
        """The two models and the tasks."""
        first, second = ("+".join(node.members) for node in self.pair)
        return f"{first} with {second}, on {', '.join(self.tasks)}"

    def result(self) -> dict[str, Any]:
        """Return the result of the step; learn it unless it is finished."""
        if not self.is_finished:
            self._learn()
        found = self.record.result
        assert found is not None
        return found

    def _learn(self) -> None:
        for node in self.pair:
            if isinstance(node, _Step) and not Path(str(node.spec)).is_dir():
                raise ConfigError(
                    f"{node.spec}: step {self.name} merges this model of an earlier step, which is "
                    "gone (keep_steps: false removes a model once it is merged on). Restore it or "
                    "the job's output, or start again: --driver.restart true (the folder is moved "
                    "aside, nothing is deleted)."
                )
        network = self.job.options.get("module") or _architecture(self.job.recipe)
        self.job.seed()
        module = self.job.module(self.recipe, objective=self.objective, module=network)
        folder = self.record.folder
        state = folder / STATE
        callbacks = [Finish(self._write), KeepLast(state, self.fold.every_n_steps)]
        last = state if state.is_file() else None
        resumed_at = 0 if folder.is_dir() else None
        if last is not None:
            self.job.say(f"resuming from {last}")
            resumed_at = int(load_checkpoint(last, mmap=True)["global_step"])
        trainer = self.job.trainer(folder, callbacks, resumed_at)
        trainer.fit(module, datamodule=self.job.data.restricted(self.tasks), ckpt_path=last)
        if trainer.interrupted:
            raise KeyboardInterrupt
        result = self.record.result
        if self.is_last and trainer.is_global_zero and result is not None:
            self.job.table = fold_table(self.job, [*self.history, result], trainer, module)

    def _write(self, module: MergeModule, fit: dict[str, Any]) -> None:
        """Write the step's model folder (for the last step, the job's output) and its record."""
        state = module.merged.state
        result = {
            "step": self.name,
            "merged": [list(node.members) for node in self.pair],
            "tasks": self.tasks,
            "coefficients": mean_coefficients(state),
            "fingerprints": state.plan.fingerprints,
            **fit,
            "results": module.results,
            **start_and_end(module.history, module.results),
            **self.fold.found(module, self.before),
        }
        export = partial(
            export_state,
            state,
            buffers=module.merged.network_buffers.values(),
            tasks={**module.merged.tasks, **self._tasks_without_data(module)},
            results=module.results,
            history=module.history,
        )
        stored = _stored_dtype(self.job.recipe)
        if self.is_last:
            said = {
                "class_path": type(self.fold).__name__,
                "members": self.members,
                "sources": self.fold.origins(self.job),
                "steps": [*self.history, result],
            }
            dtype = self.job.target.dtype or stored
            self.job.export(export, said, module.trainer.loggers, dtype=dtype, extra=fit)
        else:
            # at least float32: rounding to the sources' dtype in each step would add up
            dtype = "float64" if stored == "float64" else "float32"
            export(str(self.spec), dtype=dtype, overwrite=True, extra=fit)
        self.record.finish(result)

    def _tasks_without_data(self, module: MergeModule) -> dict[str, str]:
        """Return the members without a task in this step; their heads are kept by their names."""
        plan = module.merged.plan
        if not plan.private:
            return {}
        used = set(module.merged.tasks.values())
        return {m: m for m in self.members if m in plan.serving and m not in used}


def _architecture(recipe: Recipe) -> nn.Module | None:
    """Return the network of sources in memory, whose merges are files without a config."""
    for spec in (*recipe.sources.values(), recipe.base):
        inner = getattr(spec, "module", spec)
        if isinstance(inner, nn.Module) and not hasattr(inner, "config"):
            return inner
    return None


def _stored_dtype(recipe: Recipe) -> str | None:
    """Return the dtype of the first source's weights, or None if they have several."""
    base = None if recipe.base is None else as_source(recipe.base)
    infos = as_source(next(iter(recipe.sources.values())), base).open().infos.values()
    kinds = {info.dtype for info in infos if info.dtype.is_floating_point}
    return next((name for name, kind in DTYPES.items() if kinds == {kind}), None)


@rank_zero_only
def _remove(nodes: Sequence[Node]) -> None:
    """Remove the model folders of steps, as far as they exist."""
    for node in nodes:
        if isinstance(node, _Step) and Path(str(node.spec)).is_dir():
            shutil.rmtree(str(node.spec))


def _ordered(order: list[str] | Literal["given"], sources: Iterable[str]) -> list[str]:
    """Return the names of the sources in a given order, which must name each exactly once."""
    names = list(sources)
    if order == "given":
        return names
    unknown = [name for name in order if name not in names]
    if unknown:
        raise ConfigError(
            f"order: unknown source {unknown[0]!r} (choose from {', '.join(names)})."
            f"{nearest(unknown[0], names)}"
        )
    complete = sorted(order) == sorted(names)
    require(complete, "order", f"each of {', '.join(names)} once", ", ".join(order))
    return order


def _require_foldable(recipe: Recipe) -> None:
    """Reject parts of a recipe that need all sources at once."""
    needy: list[Any] = [*recipe.preprocess, recipe.alignment]
    needy = [type(part).__name__ for part in needy if getattr(part, "needs", None) is not None]
    if needy:
        raise ConfigError(
            f"{', '.join(needy)}: needs statistics of each source, and a merge of two has none. "
            "Leave it out (align by weights: WeightMatching), or learn without a driver (all "
            "sources at once)."
        )
    if recipe.tokenizer is not None:
        raise ConfigError(
            "tokenizer: merging two at a time needs sources with one tokenizer. Learn without a "
            "driver (all sources at once), which aligns all tokenizers."
        )
    alignment = recipe.alignment
    if alignment is None or alignment.is_identity:
        return
    reference = getattr(alignment, "reference", None)
    if reference is not None:
        raise ConfigError(
            f"{type(alignment).__name__}: reference: merging two at a time aligns each source to "
            f"the merge so far, got {reference}. Leave it out, and put that source first in the "
            "driver's order."
        )
    if recipe.private:
        raise ConfigError(
            "private tensors cannot be combined with alignment when merging two at a time: each "
            "step permutes a source's neurons anew, and its head would have to follow; got "
            f"{shorten(recipe.private)}. Merge the heads, too, or learn without a driver."
        )


def _require_terms(kind: str, objective: Objective, data: MergeDataModule, steps: int) -> None:
    """Reject weights of unknown tasks, and terms that average over all sources."""
    objective.require_tasks(data.tasks)
    terms = [type(term).__name__ for term in objective.terms if term.needs_ensemble]
    if terms and steps > 1:
        raise ConfigError(
            f"{kind}: {', '.join(terms)} averages the predictions of a step's sources, and in all "
            f"but the first of {steps} steps one of them is a merge already: sources would not "
            "count alike. Use KLToSource, whose teachers are the sources themselves, or learn "
            "without a driver (all sources at once)."
        )
