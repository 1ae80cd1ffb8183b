"""Collect statistics of the sources on the tasks' adaptation data.

The recipe's steps (`AbstractPreprocess.needs`, each source on its own tasks) and its alignment
(`AbstractAlignment.needs`, every source on every task) say which. They are written, completely or
not at all, to a folder that `gradmerge.sources.collected` reads. The alignment's come first,
because the steps' are of aligned sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import nn

from gradmerge.alignment.moments import ACTIVATIONS, pairs_of
from gradmerge.calibration.activations import UnitPasses
from gradmerge.calibration.fisher import Report
from gradmerge.calibration.sequential import Stages
from gradmerge.coefficients import Model, Uniform
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.common.spec import to_plain
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.opening import Opening
from gradmerge.engine.recipe import Recipe
from gradmerge.export.atomic import new_folder, refuse_existing
from gradmerge.export.provenance import versions
from gradmerge.operators import Linear
from gradmerge.preprocess import AbstractPreprocess
from gradmerge.sources.collected import INDEX, VERSION, Needs
from gradmerge.sources.files import write_json
from gradmerge.training.data import MergeDataModule
from gradmerge.training.module import MergeModule
from gradmerge.training.run import describe_data, read_by


def collect(
    recipe: Recipe,
    data: MergeDataModule,
    output: str | Path,
    overwrite: bool = False,
    module: nn.Module | None = None,
    report: Report = lambda line: None,
    opening: Opening | None = None,
) -> Path:
    """Collect the statistics that a recipe's alignment and steps need.

    Args:
        recipe: the sources, and the alignment and steps that need statistics.
        data: the tasks; each source runs on the adaptation splits of the tasks that name it.
        output: folder to write; it must not exist unless `overwrite`.
        overwrite: replace an existing folder, once the new one is complete.
        module: the architecture, where no source carries a config.
        report: called with a line for each source.
        opening: the recipe's, where it is opened already; its sources are aligned afterwards.

    Returns:
        The folder.

    Raises:
        ConfigError: nothing needs any, a source has no task, or the folder exists.
    """
    steps = needy(recipe)
    target = Path(output).expanduser()
    inputs = [*recipe.inputs, *read_by(data)]
    refuse_existing(target, overwrite, inputs)
    tasks = _tasks_of_sources(recipe, data) if steps else {}  # before anything runs
    opening = opening or Opening(recipe, module)
    with new_folder(target, overwrite, inputs) as work:
        index: dict[str, Any] = {
            "version": VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "collected": {},
        }

        def add(needs: Needs, found: Mapping[str, Any]) -> None:
            index["collected"][needs.kind] = found
            index["data"] = describe_data(data)
            write_json(work / INDEX, index)

        if recipe.aligns_on_data:
            add(ACTIVATIONS, _of_units(opening, data, work, report))
        opening.align(str(work) if recipe.aligns_on_data else recipe.statistics)
        method = recipe.alignment
        aligned = None if method is None or method.is_identity else to_plain(method)
        if steps:
            merged = engine_of(opening, data).merged
        for step in steps:
            assert step.needs is not None
            run = Stages(merged, _loaders(data), tasks, step.needs, work, report)
            run.collect(step)
            add(step.needs, {**run.record(step), "alignment": aligned})
    return target


def _of_units(
    opening: Opening, data: MergeDataModule, work: Path, report: Report
) -> dict[str, Any]:
    """Collect moments of units for the alignment; every source runs on every task's data."""
    merged, alignment = engine_of(opening, data).merged, opening.recipe.alignment
    assert alignment is not None
    everywhere = {source: list(data.tasks) for source in merged.plan.sources}
    pairs = pairs_of(alignment, merged.plan.source_names)
    run = UnitPasses(merged, _loaders(data), everywhere, ACTIVATIONS, work, report)
    groups = run.units(list(opening.spec.groups.values()), pairs)
    return {**run.record(alignment), "pairs": [list(pair) for pair in pairs], "groups": groups}


def needy(recipe: Recipe) -> list[AbstractPreprocess]:
    """Return the steps that need statistics, one per kind.

    Raises:
        ConfigError: neither a step nor the alignment needs any; two steps need one kind in
            different ways; or a step that needs merged layers is not the first, and would not know
            the directions of those before it.
    """
    steps: dict[str, AbstractPreprocess] = {}
    for position, step in enumerate(recipe.preprocess):
        if step.needs is None:
            continue
        if step.needs.activations == "merged" and position:
            raise ConfigError(
                f"{type(step).__name__} with activations: merged must be the first step, got as "
                f"number {position + 1}: its layers are merged from the sources themselves."
            )
        known = steps.setdefault(step.needs.kind, step)
        if known.needs != step.needs or (step.needs.activations == "merged" and known != step):
            raise ConfigError(
                f"two steps need {step.needs.kind} statistics collected in different ways: {known} "
                f"and {step}; merge with one of them."
            )
    if not recipe.needs_statistics:
        raise ConfigError(
            "no step of this recipe needs statistics: expected FisherScale, RegMean or MaTS in "
            f"recipe.preprocess, got {shorten([type(s).__name__ for s in recipe.preprocess])}; or "
            "an alignment on data (ActivationMatching, CCA, OptimalTransport), got "
            f"{type(recipe.alignment).__name__ if recipe.alignment else 'none'}."
        )
    return list(steps.values())


def engine_of(opening: Opening, data: MergeDataModule) -> MergeModule:
    """Return a merge of the same sources without any step or learning, to run them with."""
    recipe = replace(
        opening.recipe,
        preprocess=[],
        finalisers=[],
        statistics=None,
        coefficients=Model(),
        init=Uniform(),
        operator=Linear(),
    )
    plan = opening.plan(recipe, keep_network=True)
    engine = MergeModule.around(MergedModel(plan), score_experts=False).eval()
    data.attach(engine.merged)
    data.setup()
    engine.take_tasks(data.tasks)
    return engine


def _loaders(data: MergeDataModule) -> dict[str, Any]:
    return dict(zip(data.tasks, data.evaluation_loaders("adaptation"), strict=True))


def _tasks_of_sources(recipe: Recipe, data: MergeDataModule) -> dict[str, list[str]]:
    tasks = {
        source: [name for name, task in data.tasks.items() if (task.source or name) == source]
        for source in recipe.sources
    }
    lost = [source for source, own in tasks.items() if not own]
    if lost:
        raise ConfigError(
            f"no task belongs to the sources {shorten(lost)}, so their statistics cannot be "
            f"collected; tasks: {', '.join(data.tasks)}. Name a task like its source, or set its "
            "`source`."
        )
    return tasks
