"""Merges of two at a time.

A step merges two checkpoints, sources or merges of earlier steps, as an ordinary fit: with the
recipe's own coefficients, link, operator and preprocess, on the tasks of the sources below it.
"""

from __future__ import annotations

import gc
import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from typing_extensions import override

from gradmerge.alignment import AbstractAlignment
from gradmerge.coefficients import Constant
from gradmerge.drivers.base import AbstractDriver, Job
from gradmerge.drivers.state import StepRecord
from gradmerge.drivers.steps import learn_step
from gradmerge.engine.recipe import Recipe
from gradmerge.errors import ConfigError, shorten
from gradmerge.export.folder import export_plan
from gradmerge.export.provenance import mean_coefficients
from gradmerge.objectives import Objective
from gradmerge.sources import AbstractSource
from gradmerge.sources.resolve import as_source
from gradmerge.spec import to_plain
from gradmerge.training.callbacks import log_artifact
from gradmerge.training.module import MergeModule


def require_foldable(recipe: Recipe) -> None:
    """Refuse factors of a recipe that are of all sources at once.

    Raises:
        ConfigError: what it is, and what to do.
    """
    needy = [type(step).__name__ for step in recipe.preprocess if step.needs is not None]
    if needy:
        raise ConfigError(
            f"{', '.join(needy)}: its statistics are of the sources, and the merge of two sources "
            "has none. Learn without this step, or without a driver (all sources at once)."
        )
    if recipe.tokenizer is not None:
        raise ConfigError(
            "tokenizer: a merge of two at a time takes sources with one tokenizer. Learn without a "
            "driver (all sources at once), which aligns all of them."
        )
    if recipe.alignment is not None and not recipe.alignment.is_identity:
        _require_alignment(recipe, recipe.alignment)


def _require_alignment(recipe: Recipe, alignment: AbstractAlignment) -> None:
    kind = type(alignment).__name__
    if alignment.needs is not None:
        raise ConfigError(
            f"{kind}: its statistics are of the sources, and the merge of two sources has none. "
            "Align by weights (WeightMatching), or learn without a driver (all sources at once)."
        )
    reference = getattr(alignment, "reference", None)
    if reference is not None:
        raise ConfigError(
            f"{kind}: reference: a merge of two at a time aligns the second to the first, which is "
            f"the merge so far; got {reference}. Leave it out, and name that source first in the "
            "driver's order."
        )
    if recipe.private:
        raise ConfigError(
            "private tensors and alignment do not go together in a merge of two at a time: an "
            "aligned source's neurons are in another order in every step, and its head would have "
            f"to follow. Came private: {shorten(recipe.private)}. Merge the heads, too, or learn "
            "without a driver."
        )


def require_objective(driver: str, objective: Objective, joins: int) -> None:
    """Refuse an ensemble of all sources where a step merges the merge so far with one of them.

    Raises:
        ConfigError: a term needs the ensemble, and there are several steps.
    """
    terms = [type(term).__name__ for term in objective.terms if term.needs_ensemble]
    if terms and joins > 1:
        raise ConfigError(
            f"{driver}: {', '.join(terms)} averages what the sources of a step predict; of {joins} "
            "steps all but the first have a merge among them, so that the sources would not count "
            "alike, and the teacher would be another one in each step. Use KLToSource, whose "
            "teachers are the sources themselves, or learn without a driver (all at once)."
        )


def require_start(driver: str, recipe: Recipe, number: int, shares: Sequence[float]) -> None:
    """Refuse a link that a step cannot start with.

    Args:
        driver: its name.
        recipe: of the job.
        number: of the step, from 1.
        shares: the coefficients that it starts at.

    Raises:
        ConfigError: the link cannot be pulled back from them.
    """
    try:
        recipe.coefficients.pull_back(torch.tensor(shares, dtype=torch.float64)[:, None])
    except ConfigError as error:
        raise ConfigError(
            f"{driver}: start: average begins step {number} at {shares[0]:.4g} and "
            f"{shares[1]:.4g}, whatever model.recipe.init says, and "
            f"{type(recipe.coefficients).__name__} cannot begin there ({error}) Take the recipe's "
            "init at each step: --driver.start recipe; or another link."
        ) from error


Join = tuple[str | int, str | int]
"""Two to merge: names of sources, or numbers of earlier joins."""


@dataclass(frozen=True)
class FoldedRecipe(Recipe):
    """A recipe whose sources are merged two at a time, never all at once."""

    def _require_number(self) -> None:
        self.coefficients.num_rows(2)
        self.operator.require(2, self.resolved_origin)


@dataclass(frozen=True)
class Node:
    """What a step merges: a source, or the merge of an earlier step."""

    name: str
    spec: str | AbstractSource
    members: tuple[str, ...]
    """The sources that are in it."""
    weight: int
    """How many sources are in it."""


@dataclass(frozen=True, kw_only=True)
class AbstractFold(AbstractDriver):
    """A merge of two at a time."""

    # said again: the parser reads what a class and its parent say of their options
    restart: bool = False
    """Begin anew where an earlier run left its states: its folder is moved aside, never deleted."""
    tasks: Literal["members", "all"] = "members"
    """Tasks of a step: those of the sources that are in it, or all."""
    start: Literal["average", "recipe"] = "average"
    """Where a step's coefficients start: at the plain average of all sources in it (m / (m + n) and
    n / (m + n) for m and n sources), or at the recipe's `init`."""
    keep_steps: bool = True
    """Keep the model folders of the steps (float32); false removes each once it is merged on."""
    every_n_steps: int = 50
    """Optimiser steps between two states of the running step."""

    def __post_init__(self) -> None:
        """Check the number of steps."""
        if self.every_n_steps < 1:
            raise ConfigError(f"every_n_steps: must be at least 1, got {self.every_n_steps}.")

    @override
    def recipe(self, **given: Any) -> Recipe:
        return FoldedRecipe(**given)

    @abstractmethod
    def joins(self, names: Sequence[str]) -> list[Join]:
        """The steps, in order.

        Args:
            names: of what there is to merge.
        """

    def nodes(self, job: Job) -> dict[str, Node]:
        """What there is to merge, by name; for most drivers the sources."""
        return {name: Node(name, spec, (name,), 1) for name, spec in job.recipe.sources.items()}

    def serving(self, job: Job) -> dict[str, str | AbstractSource]:
        """Who serves tasks, by name: heads and teachers; for most drivers the sources."""
        return dict(job.recipe.sources)

    def reads(self, job: Job) -> dict[str, Any]:
        """What else the job depends on, as plain data; see `Job.begin`."""
        return {}

    def origins(self, job: Job) -> dict[str, dict[str, str]]:
        """The base and all sources that are in the result: where they are from, and their hash."""
        return job.sources

    def shares(self, left: int, right: int) -> list[float]:
        """Coefficients that a step of so many sources starts at, unless at the recipe's init."""
        return [left / (left + right), right / (left + right)]

    def prepared(self, recipe: Recipe, nodes: Sequence[Node], before: Mapping[str, Any]) -> Recipe:
        """The recipe of a step, where a driver changes more than its sources and start.

        Args:
            recipe: with the step's sources and start.
            nodes: what is merged.
            before: what the step before gave.
        """
        return recipe

    def found(self, module: MergeModule, before: Mapping[str, Any]) -> dict[str, Any]:
        """What else a step gave, for the next one and for the provenance."""
        return {}

    @override
    def run(self, job: Job) -> Path:
        require_foldable(job.recipe)
        nodes = self.nodes(job)
        joins = self.joins(list(nodes))
        if not joins:
            raise ConfigError(
                f"{type(self).__name__}: expected at least two to merge, got "
                f"{', '.join(nodes)}; a fit without a driver learns one source's coefficients."
            )
        job.objective.require_tasks(job.data.tasks)
        require_objective(type(self).__name__, job.objective, len(joins))
        self._require_tasks(job, nodes, joins)
        self._require_start(job.recipe, nodes, joins)
        job.begin(self, **self.reads(job))
        if job.exported is not None:
            job.say(f"this job is finished: {job.exported}")
            return job.exported
        made: list[Node] = []
        history: list[dict[str, Any]] = []
        name = "step"
        while any(node.startswith(name) for node in nodes):
            name = f"{name}_"
        for number, join in enumerate(joins, 1):
            pair = [made[at] if isinstance(at, int) else nodes[at] for at in join]
            last = number == len(joins)
            step = _Step(self, job, f"{name}-{number}", pair, history, last)
            job.say(
                f"{type(self).__name__}, step {number} of {len(joins)}: {step.title}"
                f"{', finished before' if step.finished else ''}"
            )
            result = step.result()
            if not last:
                # module and trainer know each other: the next model would come on top of this one
                gc.collect()
            history.append(result)
            made.append(step.node)
            if not self.keep_steps:
                for node in pair:
                    _remove(node, job)
        return Path(job.target.path).expanduser()

    def _require_tasks(self, job: Job, nodes: Mapping[str, Node], joins: Sequence[Join]) -> None:
        """Refuse steps without tasks before the first one."""
        inside: list[tuple[str, ...]] = []
        for pair in joins:
            of = [inside[at] if isinstance(at, int) else nodes[at].members for at in pair]
            inside.append((*of[0], *of[1]))
            tasks = self.tasks_of(job, inside[-1])
            self.objective_of(job, tasks).require_tasks(tasks)

    def objective_of(self, job: Job, tasks: Sequence[str]) -> Objective:
        """The objective of a step on these tasks."""
        weights = {t: w for t, w in job.objective.task_weights.items() if t in tasks}
        return replace(job.objective, task_weights=weights)

    def _require_start(
        self, recipe: Recipe, nodes: Mapping[str, Node], joins: Sequence[Join]
    ) -> None:
        """Refuse a link that a step cannot start with before the first one."""
        made: list[int] = []
        for number, pair in enumerate(joins, 1):
            left, right = (made[at] if isinstance(at, int) else nodes[at].weight for at in pair)
            made.append(left + right)
            if self.start == "average":
                require_start(type(self).__name__, recipe, number, self.shares(left, right))

    def tasks_of(self, job: Job, members: Sequence[str]) -> list[str]:
        """The tasks of a step with these sources in it.

        Raises:
            ConfigError: there is none.
        """
        serving = self.serving(job)
        chosen = []
        for name, task in job.data.tasks.items():
            source = task.source or name
            if self.tasks == "all" or source in members or source not in serving:
                chosen.append(name)
        if not chosen:
            raise ConfigError(
                f"no task is of {', '.join(members)}, which one step merges; tasks are "
                f"{', '.join(job.data.tasks)}. Set `source` of the tasks, or take all of them at "
                "each step: --driver.tasks all."
            )
        return chosen


class _Step:
    """One join of a fold: its recipe, its tasks, and what it gives."""

    def __init__(
        self,
        fold: AbstractFold,
        job: Job,
        name: str,
        pair: Sequence[Node],
        history: Sequence[Mapping[str, Any]],
        last: bool,
    ) -> None:
        self.fold, self.job, self.pair, self.last = fold, job, pair, last
        self.history = list(history)
        self.before = history[-1] if history else {}
        self.members = tuple(member for node in pair for member in node.members)
        self.data = job.data.restricted(fold.tasks_of(job, self.members))
        self.recipe = self._recipe()
        content = {"recipe": to_plain(self.recipe), "tasks": list(self.data.tasks)}
        self.record: StepRecord = job.step(name, content)
        self.name = name
        self.node = Node(name, str(self._folder), self.members, sum(n.weight for n in pair))

    @property
    def finished(self) -> bool:
        """Whether it was learned, and what it wrote is there (an output may have been moved)."""
        lost = self.last and self.job.exported is None
        return self.record.result is not None and not lost

    @property
    def title(self) -> str:
        """What is merged with what, on which tasks."""
        parts = ["+".join(node.members) for node in self.pair]
        return f"{parts[0]} with {parts[1]}, on {', '.join(self.data.tasks)}"

    @property
    def _folder(self) -> Path:
        return self.record.folder / "merged"

    def _recipe(self) -> Recipe:
        whole, (left, right) = self.job.recipe, self.pair
        sources = {node.name: node.spec for node in self.pair}
        serving = self.fold.serving(self.job)
        used = {task.source or name for name, task in self.data.tasks.items()}
        used |= set(self.members) if whole.private else set()
        heads = {n: s for n, s in serving.items() if n in used and n not in sources}
        given = {field.name: getattr(whole, field.name) for field in fields(Recipe)}
        if not self.last:
            given["finalisers"] = []  # once, in the end
        if self.fold.start == "average":
            given["init"] = Constant(self.fold.shares(left.weight, right.weight))
        recipe = Recipe(**{**given, "sources": sources, "heads": {**whole.heads, **heads}})
        return self.fold.prepared(recipe, self.pair, self.before)

    def result(self) -> dict[str, Any]:
        """What the step gave; it is learned unless it is finished."""
        found = self.record.result
        if found is not None and self.finished:
            return found
        self._require_nodes()
        options = dict(self.job.options)
        options["objective"] = self.fold.objective_of(self.job, list(self.data.tasks))
        options["module"] = options.get("module") or _architecture(self.job.recipe)
        self.job.seed()
        module = self.job.module(self.recipe, **options)
        learn_step(self.job, module, self.data, self.record, self._write, self.fold.every_n_steps)
        found = self.record.result
        assert found is not None
        return found

    def _require_nodes(self) -> None:
        """Refuse to merge what an earlier step made and is gone.

        Raises:
            ConfigError: which.
        """
        for node in self.pair:
            folder = Path(str(node.spec))
            if len(node.members) > 1 and self.job.folder in folder.parents and not folder.is_dir():
                raise ConfigError(
                    f"{folder}: step {self.name} merges this model, which an earlier step made, "
                    "and it is gone (keep_steps: false removes a model once it is merged on). Put "
                    "it, or the job's output, back where it was; or begin anew: --driver.restart "
                    "true (the folder is moved aside, nothing is deleted)."
                )

    def _write(self, module: MergeModule, fit: dict[str, Any]) -> None:
        """The step's model folder and record; for the last step, the job's output."""
        plan = module.merged.plan
        result = {
            "step": self.name,
            "merged": [list(node.members) for node in self.pair],
            "tasks": list(self.data.tasks),
            "coefficients": mean_coefficients(plan, module.merged.raw),
            "fingerprints": plan.fingerprints,
            **fit,
            "results": module.results,
            **self.fold.found(module, self.before),
        }
        tasks = {**module.merged.tasks, **self._tasks_without_data(module)}
        write = partial(export_plan, plan, module.merged.raw)
        known: dict[str, Any] = {
            "buffers": module.merged.statistics.values(),
            "tasks": tasks,
            "results": module.results,
        }
        if self.last:
            path = [*self.history, result]
            said = {
                "class_path": type(self.fold).__name__,
                "members": self.members,
                "sources": self.fold.origins(self.job),
                "steps": path,
            }
            dtype = self.job.target.dtype or _stored(self.job.recipe)
            folder = self.job.export(write, said, dtype=dtype, extra=fit, **known)
            if self.job.target.log_artifact:
                log_artifact(module.trainer.loggers, folder)
        else:
            # float32: rounding to the sources' dtype at each step would add up
            dtype = "float64" if _stored(self.job.recipe) == "float64" else "float32"
            write(self._folder, dtype=dtype, overwrite=True, extra=fit, **known)
        self.record.finish(result)

    def _tasks_without_data(self, module: MergeModule) -> dict[str, str]:
        """Members whose heads no task of this step uses: their heads are kept by their names."""
        plan = module.merged.plan
        if not plan.private:
            return {}
        used = set(module.merged.tasks.values())
        return {m: m for m in self.members if m in plan.serving and m not in used}


def _architecture(recipe: Recipe) -> nn.Module | None:
    """The network of sources in memory: their merges are files without a config."""
    for spec in (*recipe.sources.values(), recipe.base):
        inner = getattr(spec, "module", spec)
        if isinstance(inner, nn.Module) and not hasattr(inner, "config"):
            return inner
    return None


def _stored(recipe: Recipe) -> str | None:
    """The dtype of the first source's weights, where it is one; else None."""
    base = None if recipe.base is None else as_source(recipe.base)
    infos = as_source(next(iter(recipe.sources.values())), base).open().infos.values()
    kinds = {info.dtype for info in infos if info.dtype.is_floating_point}
    known = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    kind = next(iter(kinds)) if len(kinds) == 1 else None
    return str(kind).removeprefix("torch.") if kind in known else None


@rank_zero_only
def _remove(node: Node, job: Job) -> None:
    """Remove the model folder of a step that has been merged on."""
    folder = Path(str(node.spec))
    if len(node.members) > 1 and job.folder in folder.parents and folder.is_dir():
        shutil.rmtree(folder)
