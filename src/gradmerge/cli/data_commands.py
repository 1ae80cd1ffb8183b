"""Commands that need data but no training: `merge` with searches and statistics, and `collect`."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradmerge._typing import Raw
from gradmerge.cli.commands import Outputs, merge_options, require_finalisers, write_merge
from gradmerge.engine.opening import open_plan
from gradmerge.engine.plan import Plan
from gradmerge.engine.recipe import Recipe
from gradmerge.errors import ConfigError
from gradmerge.mergekit.writer import require_plain
from gradmerge.search import AbstractSearch
from gradmerge.training import collect as collection
from gradmerge.training.data import MergeDataModule
from gradmerge.training.module import MergeModule
from gradmerge.training.search import Selection


def merge(
    recipe: Recipe,
    data: MergeDataModule,
    search: AbstractSearch | None = None,
    score: bool = False,
    outputs: Outputs = "merged",
    mergekit: bool = False,
    **options: Any,
) -> None:
    """Merge without any training; with data, also by statistics of the sources or a search.

    Args:
        recipe: what is merged; `init` gives the coefficients (Constant, Uniform, MetaGPT, ...).
        data: the tasks, for steps that need statistics, for a search, and for scores.
        search: chooses the coefficients by scores on the selection split (GreedySoup, Scales,
            Draws).
        score: print the merge's scores on the selection split.
        outputs: one merged model; one model folder a task, of its own direction alone, whatever the
            coefficients (EMR-Merging); or their compact form, one vector with a mask and a scale a
            task, for recipes whose last preprocess is Unify.
        mergekit: write no folder but a mergekit YAML (OUTPUT ends in .yaml) that gives the same.
        **options: those of `output_options`.
    """
    if outputs != "merged" and (search is not None or score):
        raise ConfigError(
            f"outputs: a search and scores are of one merged model, got {outputs}, which writes "
            "each task's own; leave them out."
        )
    checked = merge_options(outputs, mergekit, **options)
    if mergekit:
        require_plain(recipe)
    require_finalisers(recipe, outputs, mergekit)
    extra: dict[str, Any] = {}
    raw: Raw
    known: dict[str, Any]
    with tempfile.TemporaryDirectory(prefix="gradmerge-statistics-") as folder:
        opened = recipe
        if recipe.statistics is None and collection.is_needed(recipe):
            found = collection.collect(recipe, data, Path(folder) / "found", report=_say)
            opened = replace(recipe, statistics=str(found))
        plan = open_plan(opened, with_skeleton=False)
        needs_data = plan.finalisation.repair is not None
        if search is not None or score or needs_data or _has_batch_norms(plan):
            module = MergeModule(opened, score_experts=False)
            selection = Selection(module, data)
            if search is not None:
                chosen, extra["search"] = selection.search(search)
                recipe = replace(recipe, init=chosen)
                _print_search(selection, chosen)
            if score or search is not None:
                _print_scores(selection.score())
            else:
                data.attach(module.merged)
                data.setup()
                module.take_tasks(data.tasks)
                module.refresh_buffers(data)
            plan, raw = module.merged.plan, module.merged.raw
            known = {
                "buffers": module.merged.statistics.values(),
                "tasks": module.merged.tasks,
                "results": module.results,
            }
        else:
            raw, known = plan.initial_raw(), {}
        plan.recipe = recipe  # a folder for temporary files is not part of it
        write_merge(plan, raw, outputs, mergekit, checked, **known, extra=extra)


def collect(recipe: Recipe, data: MergeDataModule, output: str, overwrite: bool = False) -> None:
    """Collect the statistics of the sources that a recipe needs, to keep and reuse.

    Args:
        recipe: whose sources run on their tasks' adaptation data; its steps (FisherScale, RegMean,
            MaTS) and its alignment (ActivationMatching, CCA, OptimalTransport: every source on all
            tasks' data) say what is collected. Name the output in it afterwards: `statistics`.
        data: the tasks.
        output: folder to write.
        overwrite: replace an existing folder.
    """
    folder = collection.collect(recipe, data, output, overwrite, report=_say)
    print(f"statistics written to {folder}")


def _has_batch_norms(plan: Plan) -> bool:
    recomputed = plan.recipe.buffers == "recompute"
    return recomputed and any(name.endswith("running_mean") for name in plan.buffers)


def _say(line: str) -> None:
    print(f"gradmerge: {line}", file=sys.stderr)


def _print_search(selection: Selection, chosen: Any) -> None:
    for trial in selection.trials:
        mark = "*" if trial.init == chosen else " "
        scores = ", ".join(f"{name} {value:.4f}" for name, value in trial.average.items())
        print(f"{mark} {_short(trial.init)}: {scores}")


def _short(init: Any) -> str:
    name = next((n for n in ("factor", "value", "seed") if hasattr(init, n)), "")
    return f"{type(init).__name__} {getattr(init, name, '')}"


def _print_scores(found: dict[str, dict[str, float]]) -> None:
    for task, values in found.items():
        scores = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"selection, {task}: {scores}")
