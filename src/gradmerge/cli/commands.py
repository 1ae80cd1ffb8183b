"""The commands that need no trainer, as functions: their signatures are their options."""

from __future__ import annotations

import dataclasses
import re
import sys
from json import dumps
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch

from gradmerge._typing import Raw
from gradmerge.cli.inspect import inspect_sources, render
from gradmerge.engine.opening import open_plan
from gradmerge.engine.plan import Plan
from gradmerge.engine.recipe import Recipe, named
from gradmerge.errors import CompatibilityError, ConfigError, nearest
from gradmerge.export.atomic import refuse_existing
from gradmerge.export.emr import export_compact, export_tasks, refuse_finalisers, task_checkpoints
from gradmerge.export.folder import export_merged, export_plan, read_as, require_options
from gradmerge.mergekit.writer import require_file, write_mergekit
from gradmerge.sources import as_source
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
    outputs: Outputs = "merged",
    mergekit: bool = False,
    **options: Any,
) -> None:
    """Merge with the recipe's starting coefficients, without any training.

    Args:
        recipe: what is merged; `init` gives the coefficients (Constant, Uniform, MetaGPT, ...).
        outputs: one merged model; one model folder a task, of its own direction alone, whatever the
            coefficients (EMR-Merging); or their compact form, one vector with a mask and a scale a
            task, for recipes whose last preprocess is Unify.
        mergekit: write no folder but a mergekit YAML (OUTPUT ends in .yaml) that gives the same.
        **options: those of `output_options`.
    """
    checked = merge_options(outputs, mergekit, **options)
    require_finalisers(recipe, outputs, mergekit)
    if any(finaliser.needs_data for finaliser in recipe.finalisers):
        raise ConfigError(
            "REPAIR takes the tasks' adaptation data, got none: give a file with `data`, too (the "
            "suite's that `gradmerge fit` takes), or leave REPAIR out of recipe.finalisers."
        )
    plan = open_plan(recipe, with_skeleton=False)
    write_merge(plan, plan.initial_raw(), outputs, mergekit, checked)


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


def require_finalisers(recipe: Recipe, outputs: Outputs, mergekit: bool) -> None:
    """Refuse finalisers in outputs that cannot hold them, before any work.

    Raises:
        ConfigError: they are of one merged model, and this output is not, or is made elsewhere.
    """
    if outputs != "merged":
        refuse_finalisers(recipe)
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
            raise ConfigError(f"tasks: {task!r} is no task.{nearest(task, described['scales'])}")
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
