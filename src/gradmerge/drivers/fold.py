"""Folds: merges of two models at a time.

Each step merges two models, sources or merges of earlier steps, as an ordinary fit: with the
recipe's own coefficients, link, operator and preprocess, on the tasks of the sources in it.
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

from gradmerge.coefficients import Constant
from gradmerge.drivers.base import AbstractDriver, Job
from gradmerge.drivers.steps import learn_step
from gradmerge.engine.recipe import Recipe
from gradmerge.errors import ConfigError, nearest, shorten
from gradmerge.export.folder import export_state
from gradmerge.export.provenance import mean_coefficients
from gradmerge.objectives import Objective
from gradmerge.sources import AbstractSource
from gradmerge.sources.resolve import as_source
from gradmerge.spec import to_plain
from gradmerge.training.callbacks import log_artifact
from gradmerge.training.module import MergeModule

Join = tuple[str | int, str | int]
"""Two models to merge: names of sources, or numbers of earlier joins."""
Order = list[str] | Literal["given"]
"""Names of all sources in the order that they join, or the recipe's order."""


@dataclass(frozen=True)
class FoldedRecipe(Recipe):
    """A recipe whose sources are merged two at a time, never all at once."""

    def _require_number(self) -> None:
        self.coefficients.num_rows(2)
        self.operator.require(2, self.resolved_origin)


@dataclass(frozen=True)
class Node:
    """A model of a fold: a source, or the merge that a step makes."""

    name: str
    spec: str | AbstractSource
    members: tuple[str, ...]
    """Names of the sources in it."""
    weight: int
    """Number of sources in it (an earlier merge may not know their names)."""
    pair: tuple[Node, ...] = ()
    """The two models that a step merges into it; empty for a source."""


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

    def __post_init__(self) -> None:
        """Check the number of steps."""
        if self.every_n_steps < 1:
            raise ConfigError(f"every_n_steps: must be at least 1, got {self.every_n_steps}.")

    # ---- what a driver may change

    @abstractmethod
    def joins(self, names: Sequence[str]) -> list[Join]:
        """Return the steps in order.

        Args:
            names: of the models to merge.
        """

    def nodes(self, job: Job) -> dict[str, Node]:
        """Return the models to merge by name; by default the sources."""
        return {name: Node(name, spec, (name,), 1) for name, spec in job.recipe.sources.items()}

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

    def prepared(self, recipe: Recipe, nodes: Sequence[Node], before: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a step with the driver's own changes.

        Args:
            recipe: with the step's sources and start.
            nodes: the two models.
            before: result of the step before.
        """
        return recipe

    def found(self, module: MergeModule, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return further results of a step for the next one and for the provenance."""
        return {}

    # ---- the fold

    @override
    def recipe(self, **given: Any) -> Recipe:
        return FoldedRecipe(**given)

    @override
    def run(self, job: Job) -> Path:
        _require_foldable(job.recipe)
        nodes = self.nodes(job)
        steps = self._planned(job, nodes)
        if not steps:
            raise ConfigError(
                f"{type(self).__name__}: expected at least two models to merge, got "
                f"{', '.join(nodes)}. A fit without a driver learns the coefficients of one source."
            )
        self._require_steps(job, steps)
        job.begin(self, **self.reads(job))
        if job.exported is not None:
            job.say(f"this job is finished: {job.exported}")
            return job.exported
        history: list[dict[str, Any]] = []
        for number, node in enumerate(steps, 1):
            is_last = number == len(steps)
            step = _Step(self, job, node, history, is_last)
            job.say(
                f"{type(self).__name__}, step {number} of {len(steps)}: {step.title}"
                f"{', already finished' if step.is_finished else ''}"
            )
            history.append(step.result())
            if not is_last:
                gc.collect()  # module and trainer refer to each other: free this model first
            if not self.keep_steps:
                for merged in step.pair:
                    _remove(merged)
        return Path(job.target.path).expanduser()

    def tasks_of(self, job: Job, members: Sequence[str]) -> list[str]:
        """Return the tasks of a step with these sources in it.

        Raises:
            ConfigError: there are none.
        """
        serving = self.serving(job)
        chosen = []
        for name, task in job.data.tasks.items():
            source = task.source or name
            if self.tasks == "all" or source in members or source not in serving:
                chosen.append(name)
        if not chosen:
            raise ConfigError(
                f"no task belongs to {', '.join(members)}, which one step merges (tasks: "
                f"{', '.join(job.data.tasks)}). Set `source` of the tasks, or use all of them in "
                "each step: --driver.tasks all."
            )
        return chosen

    def objective_of(self, job: Job, tasks: Sequence[str]) -> Objective:
        """Return the objective of a step on these tasks."""
        weights = {t: w for t, w in job.objective.task_weights.items() if t in tasks}
        return replace(job.objective, task_weights=weights)

    def _planned(self, job: Job, nodes: Mapping[str, Node]) -> list[Node]:
        """Return the merges that the steps make."""
        prefix = "step"
        while any(name.startswith(prefix) for name in nodes):
            prefix = f"{prefix}_"
        made: list[Node] = []
        for join in self.joins(list(nodes)):
            left, right = (made[n] if isinstance(n, int) else nodes[n] for n in join)
            name = f"{prefix}-{len(made) + 1}"
            folder = str(job.folder / "steps" / name / "merged")
            members, weight = (*left.members, *right.members), left.weight + right.weight
            made.append(Node(name, folder, members, weight, (left, right)))
        return made

    def _require_steps(self, job: Job, steps: Sequence[Node]) -> None:
        """Reject an objective, tasks or a start that some step cannot have, before the first.

        Raises:
            ConfigError: see the message.
        """
        objective, kind = job.objective, type(self).__name__
        objective.require_tasks(job.data.tasks)
        terms = [type(term).__name__ for term in objective.terms if term.needs_ensemble]
        if terms and len(steps) > 1:
            raise ConfigError(
                f"{kind}: {', '.join(terms)} averages the predictions of a step's sources, and in "
                f"all but the first of {len(steps)} steps one of them is a merge already: sources "
                "would not count alike. Use KLToSource, whose teachers are the sources themselves, "
                "or learn without a driver (all sources at once)."
            )
        for number, step in enumerate(steps, 1):
            tasks = self.tasks_of(job, step.members)
            self.objective_of(job, tasks).require_tasks(tasks)
            if self.start == "average":
                shares = self.shares(*(node.weight for node in step.pair))
                _require_start(kind, job.recipe, number, shares)


class _Step:
    """One step of a fold: its recipe, its tasks and its result."""

    def __init__(
        self,
        fold: AbstractFold,
        job: Job,
        node: Node,
        history: Sequence[Mapping[str, Any]],
        is_last: bool,
    ) -> None:
        self.fold, self.job, self.node, self.pair = fold, job, node, node.pair
        self.history, self.is_last = history, is_last
        self.before = history[-1] if history else {}
        self.data = job.data.restricted(fold.tasks_of(job, node.members))
        self.recipe = self._recipe()
        content = {"recipe": to_plain(self.recipe), "tasks": list(self.data.tasks)}
        self.record = job.step(node.name, content)

    @property
    def is_finished(self) -> bool:
        """Return whether the step was learned and its model exists (an output may be moved)."""
        lost = self.is_last and self.job.exported is None
        return self.record.result is not None and not lost

    @property
    def title(self) -> str:
        """The two models and the tasks."""
        first, second = ("+".join(node.members) for node in self.pair)
        return f"{first} with {second}, on {', '.join(self.data.tasks)}"

    def _recipe(self) -> Recipe:
        whole = self.job.recipe
        sources = {node.name: node.spec for node in self.pair}
        used = {task.source or name for name, task in self.data.tasks.items()}
        used |= set(self.node.members) if whole.private else set()
        serving = self.fold.serving(self.job).items()
        heads = {name: spec for name, spec in serving if name in used and name not in sources}
        given = {field.name: getattr(whole, field.name) for field in fields(Recipe)}
        given |= {"sources": sources, "heads": {**whole.heads, **heads}}
        if not self.is_last:
            given["finalisers"] = []  # they apply once, in the end
        if self.fold.start == "average":
            given["init"] = Constant(self.fold.shares(*(node.weight for node in self.pair)))
        return self.fold.prepared(Recipe(**given), self.pair, self.before)

    def result(self) -> dict[str, Any]:
        """Return the result of the step; learn it unless it is finished."""
        found = self.record.result
        if found is not None and self.is_finished:
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
        """Reject a model of an earlier step that does not exist any more.

        Raises:
            ConfigError: its folder.
        """
        for node in self.pair:
            if node.pair and not Path(str(node.spec)).is_dir():
                raise ConfigError(
                    f"{node.spec}: step {self.node.name} merges this model of an earlier step, "
                    "which is gone (keep_steps: false removes a model once it is merged on). "
                    "Restore it or the job's output, or start again: --driver.restart true (the "
                    "folder is moved aside, nothing is deleted)."
                )

    def _write(self, module: MergeModule, fit: dict[str, Any]) -> None:
        """Write the step's model folder (for the last step, the job's output) and its record."""
        plan = module.merged.plan
        result = {
            "step": self.node.name,
            "merged": [list(node.members) for node in self.pair],
            "tasks": list(self.data.tasks),
            "coefficients": mean_coefficients(module.merged.state),
            "fingerprints": plan.fingerprints,
            **fit,
            "results": module.results,
            **self.fold.found(module, self.before),
        }
        tasks = {**module.merged.tasks, **self._tasks_without_data(module)}
        write = partial(export_state, module.merged.state)
        known: dict[str, Any] = {
            "buffers": module.merged.statistics.values(),
            "tasks": tasks,
            "results": module.results,
        }
        stored = _stored_dtype(self.job.recipe)
        if self.is_last:
            said = {
                "class_path": type(self.fold).__name__,
                "members": self.node.members,
                "sources": self.fold.origins(self.job),
                "steps": [*self.history, result],
            }
            dtype = self.job.target.dtype or stored
            folder = self.job.export(write, said, dtype=dtype, extra=fit, **known)
            if self.job.target.log_artifact:
                log_artifact(module.trainer.loggers, folder)
        else:
            # at least float32: rounding to the sources' dtype in each step would add up
            dtype = "float64" if stored == "float64" else "float32"
            write(str(self.node.spec), dtype=dtype, overwrite=True, extra=fit, **known)
        self.record.finish(result)

    def _tasks_without_data(self, module: MergeModule) -> dict[str, str]:
        """Return the members without a task in this step; their heads are kept by their names."""
        plan = module.merged.plan
        if not plan.private:
            return {}
        used = set(module.merged.tasks.values())
        return {m: m for m in self.node.members if m in plan.serving and m not in used}


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
    known = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    kind = next(iter(kinds)) if len(kinds) == 1 else None
    return str(kind).removeprefix("torch.") if kind in known else None


@rank_zero_only
def _remove(node: Node) -> None:
    """Remove the model folder of a step, if the model is that of a step and still exists."""
    if node.pair and Path(str(node.spec)).is_dir():
        shutil.rmtree(str(node.spec))


def in_order(order: Order, names: Sequence[str]) -> list[str]:
    """Return the names in a given order.

    Raises:
        ConfigError: it does not name each exactly once.
    """
    if order == "given":
        return list(names)
    unknown = [name for name in order if name not in names]
    if unknown:
        raise ConfigError(
            f"order: unknown source {unknown[0]!r} (choose from {', '.join(names)})."
            f"{nearest(unknown[0], names)}"
        )
    if sorted(order) != sorted(names):
        raise ConfigError(
            f"order: expected each of {', '.join(names)} once, got {', '.join(order)}."
        )
    return list(order)


def _require_foldable(recipe: Recipe) -> None:
    """Reject parts of a recipe that need all sources at once.

    Raises:
        ConfigError: the part, and what to do.
    """
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
    kind, reference = type(alignment).__name__, getattr(alignment, "reference", None)
    if reference is not None:
        raise ConfigError(
            f"{kind}: reference: merging two at a time aligns each source to the merge so far, got "
            f"{reference}. Leave it out, and put that source first in the driver's order."
        )
    if recipe.private:
        raise ConfigError(
            "private tensors cannot be combined with alignment when merging two at a time: each "
            "step permutes a source's neurons anew, and its head would have to follow; got "
            f"{shorten(recipe.private)}. Merge the heads, too, or learn without a driver."
        )


def _require_start(driver: str, recipe: Recipe, number: int, shares: Sequence[float]) -> None:
    """Reject a link that cannot start at the coefficients of a step.

    Raises:
        ConfigError: the link cannot be pulled back from them.
    """
    try:
        recipe.coefficients.pull_back(torch.tensor(shares, dtype=torch.float64)[:, None])
    except ConfigError as error:
        raise ConfigError(
            f"{driver}: start: average begins step {number} at {shares[0]:.4g} and "
            f"{shares[1]:.4g} whatever model.recipe.init says, and "
            f"{type(recipe.coefficients).__name__} cannot begin there ({error}) Start each step at "
            "the recipe's init: --driver.start recipe; or use another link."
        ) from error
