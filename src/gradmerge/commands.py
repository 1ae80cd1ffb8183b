"""The commands that need no trainer, as functions: their signatures are their options."""

from __future__ import annotations

import dataclasses
import sys
from json import dumps
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from gradmerge.errors import CompatibilityError, ConfigError
from gradmerge.export import export_merged, export_plan, require_options
from gradmerge.folders import refuse_existing
from gradmerge.inspection import inspect_sources, render
from gradmerge.mergekit_writer import require_file, write_mergekit
from gradmerge.recipe import Recipe, named


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


def merge(recipe: Recipe, mergekit: bool = False, **options: Any) -> None:
    """Merge with the recipe's starting coefficients, without any training.

    Args:
        recipe: what is merged; `init` gives the coefficients (Constant, Uniform, MetaGPT, ...).
        mergekit: write no folder but a mergekit YAML (OUTPUT ends in .yaml) that gives the same.
        **options: those of `output_options`.
    """
    checked = _file_options(**options) if mergekit else output_options(**options)
    plan = recipe.open(with_skeleton=False)
    for warning in plan.warnings:
        print(f"gradmerge merge: warning {warning}", file=sys.stderr)
    if mergekit:
        print(f"mergekit file written to {write_mergekit(plan, plan.initial_raw(), **checked)}")
        return
    folder = export_plan(plan, plan.initial_raw(), **checked)
    print(f"merged {len(plan.sources)} sources, {len(plan.tensors)} tensors: {folder}")


def export(checkpoint: str, mergekit: bool = False, **options: Any) -> None:
    """Write a trained merge as a Hugging Face folder, or its coefficients as a mergekit YAML.

    Args:
        checkpoint: checkpoint that `gradmerge fit` wrote.
        mergekit: write no folder but a mergekit YAML (OUTPUT ends in .yaml) that gives the same.
        **options: those of `output_options`.
    """
    checked = _file_options(**options) if mergekit else output_options(**options)
    path = require_checkpoint(checkpoint)

    from gradmerge.module import MergeModule

    module = MergeModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
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
) -> None:
    """Report whether sources fit, their sizes, and how their directions lie to one another.

    Args:
        sources: paths or hub ids of the checkpoints.
        base: the checkpoint that they were fine-tuned from.
        private: regular expressions of tensors that stay with their task.
        allow: kinds of problems taken as warnings.
        statistics: read the weights for norms, cosines and sign conflicts.
        json: print JSON.
    """
    found = inspect_sources(named(sources), base, private or [], allow or [], statistics)
    if json:
        found["problems"] = [dataclasses.asdict(problem) for problem in found["problems"]]
        print(dumps(found, indent=2))
    else:
        print(render(found))
    if not found["compatible"]:
        fatal = sum(1 for p in found["problems"] if (p["fatal"] if json else p.fatal))
        raise CompatibilityError(f"{fatal} problem(s) keep these sources from being merged.")
