"""Collecting the sources' statistics: each runs on its own tasks' adaptation data.

Which statistics is up to the recipe's steps (`AbstractPreprocess.needs`). They are written to a
folder that `gradmerge.statistics` reads, complete or not at all.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import nn

from gradmerge.coefficients import Model, Uniform
from gradmerge.data import MergeDataModule
from gradmerge.errors import ConfigError, shorten
from gradmerge.folders import discard, refuse_existing, start_beside, take_name
from gradmerge.module import MergeModule
from gradmerge.operators import Linear
from gradmerge.passes import Report
from gradmerge.plan import Plan
from gradmerge.preprocess import AbstractPreprocess
from gradmerge.provenance import describe_data, versions
from gradmerge.recipe import Recipe
from gradmerge.spec import to_plain
from gradmerge.stages import Stages
from gradmerge.statistics import INDEX, VERSION


def collect(
    recipe: Recipe,
    data: MergeDataModule,
    output: str | Path,
    overwrite: bool = False,
    module: nn.Module | None = None,
    report: Report = lambda line: None,
) -> Path:
    """Write the statistics that a recipe's steps need.

    Args:
        recipe: whose sources run, and whose steps say what they need.
        data: the tasks; each source runs on the adaptation splits of the tasks that name it.
        output: folder to write; it must not exist unless `overwrite`.
        overwrite: replace an existing folder, once the new one is complete.
        module: the architecture, where no source carries a config.
        report: called with a line for each source.

    Returns:
        The folder.

    Raises:
        ConfigError: no step needs any, a source has no task, or the folder exists.
    """
    steps = needy(recipe)
    target = Path(output).expanduser()
    refuse_existing(target, overwrite)
    engine = _engine(recipe, data, module)
    plan = engine.merged.plan
    tasks = _tasks_of_sources(plan, data)
    work = start_beside(target)
    try:
        index: dict[str, Any] = {
            "version": VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "data": describe_data(data),
            "collected": {},
        }
        for step in steps:
            needs = step.needs
            assert needs is not None
            run = Stages(engine, data, tasks, needs, work, report)
            if needs.kind == "fisher":
                run.fisher()
            elif needs.activations == "merged":
                run.grams_through_merged_layers(step)
            else:
                run.grams()
            sources = {
                name: {"fingerprint": plan.fingerprints[name], **asdict(found)}
                for name, found in run.found.items()
            }
            index["collected"][needs.kind] = {
                "needs": asdict(needs),
                "step": to_plain(step),
                "sources": sources,
            }
        (work / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        take_name(work, target, overwrite)
    finally:
        discard(work, target)
    return target


def needy(recipe: Recipe) -> list[AbstractPreprocess]:
    """The steps that need statistics, one a kind.

    Raises:
        ConfigError: there is none; two want one kind in different ways; or one that wants merged
            layers comes after another step, whose directions it would not know.
    """
    steps: dict[str, AbstractPreprocess] = {}
    for position, step in enumerate(recipe.preprocess):
        if step.needs is None:
            continue
        if step.needs.activations == "merged" and position:
            raise ConfigError(
                f"{type(step).__name__} with activations: merged must be the first step, came as "
                f"number {position + 1}: its layers are merged from the sources themselves."
            )
        known = steps.setdefault(step.needs.kind, step)
        if known.needs != step.needs or (step.needs.activations == "merged" and known != step):
            raise ConfigError(
                f"two steps want {step.needs.kind} statistics collected in different ways: {known} "
                f"and {step}; merge with one of them."
            )
    if not steps:
        raise ConfigError(
            "no step of this recipe needs statistics: expected FisherScale, RegMean or MaTS in "
            f"recipe.preprocess, came {shorten([type(s).__name__ for s in recipe.preprocess])}."
        )
    return list(steps.values())


def _engine(recipe: Recipe, data: MergeDataModule, module: nn.Module | None) -> MergeModule:
    """A merge of the same sources without any step, to run them with."""
    plain = replace(
        recipe,
        preprocess=[],
        finalisers=[],
        statistics=None,
        coefficients=Model(),
        init=Uniform(),
        operator=Linear(),
    )
    engine = MergeModule(plain, score_experts=False, module=module).eval()
    data.attach(engine.merged)
    data.setup()
    engine.take_tasks(data.tasks)
    return engine


def _tasks_of_sources(plan: Plan, data: MergeDataModule) -> dict[str, list[str]]:
    tasks: dict[str, list[str]] = {source: [] for source in plan.sources}
    for name, task in data.tasks.items():
        tasks.get(task.source or name, []).append(name)
    lost = [source for source, own in tasks.items() if not own]
    if lost:
        raise ConfigError(
            f"no task is of the sources {shorten(lost)}, so their statistics cannot be collected; "
            f"tasks are {', '.join(data.tasks)}. Name a task like its source, or set its `source`."
        )
    return tasks
