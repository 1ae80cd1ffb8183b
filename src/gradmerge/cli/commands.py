"""The commands that need no trainer, as functions: their signatures are their options."""

from __future__ import annotations

import dataclasses
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch

from gradmerge._typing import Raw
from gradmerge.cli.inspect import inspect_sources, render
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.opening import Opening
from gradmerge.engine.plan import Plan
from gradmerge.engine.recipe import Recipe, named
from gradmerge.errors import CompatibilityError, ConfigError, nearest, shorten
from gradmerge.export.atomic import refuse_existing
from gradmerge.export.emr import export_compact, export_tasks, require_outputs, task_checkpoints
from gradmerge.export.folder import export_merged, export_plan, require_options
from gradmerge.export.provenance import read_as
from gradmerge.mergekit.writer import require_file, require_plain, write_mergekit
from gradmerge.search import AbstractSearch
from gradmerge.sources import Checkpoint, as_source
from gradmerge.sources.emr import EMRCheckpoint, read_description
from gradmerge.sources.tokenizers.report import summarise, token_report
from gradmerge.spec import to_plain

Outputs = Literal["merged", "tasks", "compact"]


def output_options(
    output: str, dtype: str | None = None, overwrite: bool = False, head: str | None = None
) -> dict[str, Any]:
    """The options of every command that writes a model folder, refused before any work.

    The parser follows `**options` of a command to here, so they are defined and described once.

    Args:
        output: folder to write.
        dtype: float32, bfloat16 or float16; default: as the reference stores each tensor.
        overwrite: replace an existing folder.
        head: task whose head the folder itself carries.

    Returns:
        The same, as arguments of the export.
    """
    refuse_existing(Path(output).expanduser(), overwrite)
    return {"output": output, "dtype": dtype, "overwrite": overwrite, "head": head}


def merge(
    recipe: Recipe,
    data: Any = None,
    search: AbstractSearch | None = None,
    score: bool = False,
    outputs: Outputs = "merged",
    mergekit: bool = False,
    opened: Mapping[str, Checkpoint] | None = None,
    **options: Any,
) -> None:
    """Merge without any training; with data, also by statistics of the sources or a search.

    Args:
        recipe: what is merged; `init` gives the coefficients (Constant, Uniform, MetaGPT, ...).
        data: the tasks (a MergeDataModule), for steps that need statistics, searches and scores.
        search: chooses the coefficients by scores on the selection split (GreedySoup, Scales,
            Draws).
        score: print the merge's scores on the selection split.
        outputs: one merged model; one model folder per task, of its own direction alone, whatever
            the coefficients (EMR-Merging); or their compact form, one vector with a mask and a
            scale per task, for recipes whose last preprocess is Unify.
        mergekit: write no folder but a mergekit YAML (OUTPUT ends in .yaml) that gives the same.
        opened: the recipe's checkpoints, where they are open already (Python only).
        **options: those of `output_options`.
    """
    if outputs != "merged" and (search is not None or score):
        raise ConfigError(
            f"outputs: a search and scores are of one merged model, got {outputs}, which writes "
            "each task's own; leave them out."
        )
    checked = merge_options(outputs, mergekit, **options)
    if mergekit and data is not None:
        require_plain(recipe)
    require_form(recipe, outputs, mergekit)
    if data is None and any(finaliser.needs_data for finaliser in recipe.finalisers):
        raise ConfigError(
            "REPAIR takes the tasks' adaptation data, got none: give a file with `data`, too (the "
            "suite's that `gradmerge fit` takes), or leave REPAIR out of recipe.finalisers."
        )
    opening = Opening(recipe, opened=opened)
    with tempfile.TemporaryDirectory(prefix="gradmerge-statistics-") as folder:
        statistics = recipe.statistics
        if data is not None and statistics is None and _is_on_data(recipe):
            statistics = str(_collected(recipe, data, Path(folder) / "found", opening=opening))
        opening.align(statistics)
        plan = opening.plan(with_skeleton=False, statistics=statistics)
        on_data = plan.finalisation.repair is not None or _has_batch_norms(plan)
        if search is None and not score and not (data is not None and on_data):
            raw: Raw = plan.initial_raw()
            write_merge(plan, raw, outputs, mergekit, checked)
            return
        merged = MergedModel(opening.plan(statistics=statistics))
        known = _measured(merged, data, search, score)
        write_merge(merged.plan, merged.raw, outputs, mergekit, checked, **known)


def _measured(
    merged: MergedModel, data: Any, search: AbstractSearch | None, score: bool
) -> dict[str, Any]:
    """Search, score, and recompute on data what the recipe asks for; return what is known now."""
    from gradmerge.training.module import MergeModule
    from gradmerge.training.search import Selection

    module = MergeModule.around(merged, score_experts=False)
    extra = {}
    if search is not None or score:
        selection = Selection(module, data)
        if search is not None:
            chosen, extra["search"] = selection.search(search)
            module.start_at(chosen)
            _print_search(selection.trials, chosen)
        _print_scores(selection.score())
    else:
        data.attach(merged)
        data.setup()
        module.take_tasks(data.tasks)
        module.refresh_buffers(data)
    return {
        "buffers": merged.statistics.values(),
        "tasks": merged.tasks,
        "results": module.results,
        "extra": extra,
    }


def collect(recipe: Recipe, data: Any, output: str, overwrite: bool = False) -> None:
    """Collect the statistics of the sources that a recipe needs, to keep and reuse.

    Args:
        recipe: whose sources run on their tasks' adaptation data; its steps (FisherScale, RegMean,
            MaTS) and its alignment (ActivationMatching, CCA, OptimalTransport: every source on all
            tasks' data) say what is collected. Name the output in it afterwards: `statistics`.
        data: the tasks.
        output: folder to write.
        overwrite: replace an existing folder.
    """
    folder = _collected(recipe, data, Path(output), overwrite=overwrite)
    print(f"statistics written to {folder}")


def _collected(recipe: Recipe, data: Any, target: Path, **options: Any) -> Path:
    from gradmerge.training.collect import collect

    def say(line: str) -> None:
        print(f"gradmerge: {line}", file=sys.stderr)

    return collect(recipe, data, target, report=say, **options)


def _is_on_data(recipe: Recipe) -> bool:
    """Return whether the alignment or a step of a recipe reads the sources' statistics on data."""
    aligned = recipe.alignment is not None and recipe.alignment.needs is not None
    return aligned or any(step.needs is not None for step in recipe.preprocess)


def _has_batch_norms(plan: Plan) -> bool:
    recomputed = plan.recipe.buffers == "recompute"
    return recomputed and any(name.endswith("running_mean") for name in plan.buffers)


def _print_search(trials: Sequence[Any], chosen: Any) -> None:
    for trial in trials:
        mark = "*" if trial.init == chosen else " "
        scores = ", ".join(f"{name} {value:.4f}" for name, value in trial.average.items())
        print(f"{mark} {_short(trial.init)}: {scores}")


def _short(init: Any) -> str:
    name = next((n for n in ("factor", "value", "seed") if hasattr(init, n)), "")
    return f"{type(init).__name__} {getattr(init, name, '')}"


def _print_scores(found: Mapping[str, Mapping[str, float]]) -> None:
    for task, values in found.items():
        scores = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"selection, {task}: {scores}")


def merge_options(outputs: Outputs, mergekit: bool, **options: Any) -> dict[str, Any]:
    """Options of a merge, refused before any work where they do not go together.

    Raises:
        ConfigError: they do not, or the output exists.
    """
    if mergekit and outputs != "merged":
        raise ConfigError(f"outputs: a mergekit file is of one merged model, got {outputs}.")
    checked = _file_options(**options) if mergekit else output_options(**options)
    if outputs != "merged" and checked["head"] is not None:
        raise ConfigError(f"head: with outputs {outputs} every task has its own; leave it out.")
    if outputs == "compact" and checked["dtype"] is not None:
        raise ConfigError("dtype: the compact form has none; give it to `gradmerge unpack`.")
    require_options(checked["dtype"], None, ())
    return checked


def require_form(recipe: Recipe, outputs: Outputs, mergekit: bool) -> None:
    """Reject recipes whose merges cannot be written in this form, before any work.

    Raises:
        ConfigError: an option of the recipe has no meaning there.
    """
    if outputs != "merged":
        require_outputs(recipe, outputs)
    if mergekit and any(finaliser.needs_data for finaliser in recipe.finalisers):
        raise ConfigError(
            "finalisers: REPAIR corrects channels, and mergekit has one weight a tensor; export "
            "the merged model as a folder instead (without `mergekit`)."
        )


def write_merge(
    plan: Plan,
    raw: Raw,
    outputs: Outputs,
    mergekit: bool,
    checked: dict[str, Any],
    **known: Any,
) -> None:
    """Write a merge in the form that is asked for, with warnings before and the place after.

    Args:
        plan: the opened recipe.
        raw: its raw coefficients.
        outputs: see `merge`.
        mergekit: see `merge`.
        checked: what `merge_options` gave.
        **known: what is known of a merged model besides: buffers, tasks, results, extra.
    """
    for warning in plan.warnings:
        print(f"gradmerge merge: warning {warning}", file=sys.stderr)
    if mergekit:
        buffers = known.get("buffers")
        print(f"mergekit file written to {write_mergekit(plan, raw, **checked, buffers=buffers)}")
        return
    if plan.alignment is not None:
        print(summarise(token_report(plan.alignment)))
    if outputs == "merged":
        folder = export_plan(plan, raw, **checked, **known)
    elif outputs == "compact":
        folder = export_compact(plan, checked["output"], overwrite=checked["overwrite"])
    else:
        extra = {"merge": to_plain(plan.recipe), **read_as(plan), **(known.get("extra") or {})}
        own = {key: value for key, value in checked.items() if key != "head"}
        folder = export_tasks(task_checkpoints(plan), **own, extra=extra)
    print(f"merged {len(plan.sources)} sources, {len(plan.tensors)} tensors: {folder}")


def export(
    checkpoint: str,
    mergekit: bool = False,
    allow_modules: list[str] | str | None = None,
    **options: Any,
) -> None:
    """Write a trained merge as a Hugging Face folder, or its coefficients as a mergekit YAML.

    Args:
        checkpoint: checkpoint that `gradmerge fit` wrote.
        mergekit: write no folder but a mergekit YAML (OUTPUT ends in .yaml) that gives the same.
        allow_modules: modules outside of gradmerge that the checkpoint may import components from
            (a name, or a list of names). Importing a module runs its code.
        **options: those of `output_options`.
    """
    checked = _file_options(**options) if mergekit else output_options(**options)
    path = require_checkpoint(checkpoint)
    allowed = [allow_modules] if isinstance(allow_modules, str) else allow_modules or ()

    from gradmerge.training.module import MergeModule

    module = MergeModule.load_from_checkpoint(
        path, map_location="cpu", weights_only=True, allow_modules=allowed
    )
    if mergekit:
        merged, buffers = module.merged, module.merged.statistics.values()
        print(
            "mergekit file written to "
            f"{write_mergekit(merged.plan, merged.raw, **checked, buffers=buffers)}"
        )
        return
    extra = {"checkpoint": path.name}
    folder = export_merged(module.merged, **checked, results=module.results, extra=extra)
    print(f"merged model written to {folder}")


def _file_options(
    output: str, dtype: str | None = None, overwrite: bool = False, head: str | None = None
) -> dict[str, Any]:
    """Those options for a mergekit file, refused before any work."""
    if head is not None:
        raise ConfigError("head: a mergekit file describes one model; leave it out.")
    require_options(dtype, None, ())
    require_file(Path(output).expanduser(), overwrite)
    return {"output": output, "dtype": dtype, "overwrite": overwrite}


def unpack(
    folder: str,
    output: str,
    base: str | None = None,
    tasks: list[str] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write one Hugging Face folder a task from the compact form of an EMR-Merging.

    Args:
        folder: what `gradmerge merge --outputs compact` wrote.
        output: folder to write; each task is a folder in it.
        base: path or hub id of the base; default: where it was when merging.
        tasks: the tasks to write; default: all.
        dtype: float32, bfloat16 or float16; default: as the base stores each tensor.
        overwrite: replace an existing folder.
    """
    refuse_existing(Path(output).expanduser(), overwrite)
    require_options(dtype, None, ())
    path = Path(folder).expanduser()
    described = read_description(path)
    for task in tasks or ():
        if task not in described["scales"]:
            known = described["scales"]
            raise ConfigError(
                f"tasks: unknown task {task!r} (choose from {shorten(list(known))})."
                f"{nearest(task, known)}"
            )
    opened = as_source(base or described["base"]["from"]).open()
    found = {task: EMRCheckpoint(path, task, opened) for task in tasks or described["scales"]}
    next(iter(found.values())).require_base()
    written = export_tasks(
        found, output, dtype=dtype, overwrite=overwrite, extra={"unpacked": described}
    )
    print(f"{len(found)} tasks: {written}")


def require_checkpoint(checkpoint: str) -> Path:
    """The path of a checkpoint of ours; its tensors are not read.

    Raises:
        ConfigError: there is no such file, or it is something else.
    """
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise ConfigError(f"{checkpoint}: no such checkpoint.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        # an optimiser of another package may keep its state in a class of its own
        foreign = re.search(r"Unsupported global: GLOBAL ((?!torch\.|__main__)\S+)", str(error))
        if foreign:
            raise ConfigError(
                f"{checkpoint} holds an object of {foreign[1]}, which is not loaded, for that "
                "would take unpickling. If it is of an optimiser: export when the fit ends "
                "(ExportAtEnd), or keep checkpoints without it (ModelCheckpoint with "
                "save_weights_only: true)."
            ) from error
        raise ConfigError(
            f"{checkpoint} cannot be read as a checkpoint: it is cut short, or something else than "
            "what `gradmerge fit` writes (*.ckpt)."
        ) from error
    if not isinstance(found, dict) or not {"gradmerge", "hyper_parameters"} <= found.keys():
        raise ConfigError(
            f"{checkpoint} holds no gradmerge coefficients; expected a checkpoint that "
            "`gradmerge fit` wrote."
        )
    return path


def inspect(
    sources: list[str],
    base: str | None = None,
    private: list[str] | None = None,
    allow: list[str] | None = None,
    statistics: bool = True,
    json: bool = False,
    tokenizer: str | None = None,
) -> None:
    """Report whether sources fit, their sizes, and how their directions lie to one another.

    Args:
        sources: paths or hub ids of the checkpoints.
        base: the checkpoint that they were fine-tuned from.
        private: regular expressions of tensors that stay with their task.
        allow: kinds of problems taken as warnings.
        statistics: read the weights for norms, cosines and sign conflicts.
        json: print JSON.
        tokenizer: whose tokens a merge would have, where tokenizers differ (union, base, or the
            name of a source: the last part of its path).
    """
    found = inspect_sources(named(sources), base, private or [], allow or [], statistics, tokenizer)
    if json:
        found["problems"] = [dataclasses.asdict(problem) for problem in found["problems"]]
        print(dumps(found, indent=2))
    else:
        print(render(found))
    if not found["compatible"]:
        fatal = sum(1 for p in found["problems"] if (p["fatal"] if json else p.fatal))
        raise CompatibilityError(f"{fatal} problem(s) keep these sources from being merged.")
