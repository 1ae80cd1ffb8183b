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
from gradmerge.export import export_merged, export_plan
from gradmerge.folders import refuse_existing
from gradmerge.inspection import inspect_sources, render
from gradmerge.recipe import Recipe, named
from gradmerge.sources.token_report import summarise, token_report


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


def merge(recipe: Recipe, **options: Any) -> None:
    """Merge with the recipe's starting coefficients, without any training.

    Args:
        recipe: what is merged; `init` gives the coefficients (Constant, Uniform, MetaGPT, ...).
        **options: those of `output_options`.
    """
    checked = output_options(**options)
    plan = recipe.open(with_skeleton=False)
    for warning in plan.warnings:
        print(f"gradmerge merge: warning {warning}", file=sys.stderr)
    if plan.alignment is not None:
        print(summarise(token_report(plan.alignment)))
    folder = export_plan(plan, plan.initial_raw(), **checked)
    print(f"merged {len(plan.sources)} sources, {len(plan.tensors)} tensors: {folder}")


def export(checkpoint: str, **options: Any) -> None:
    """Write a trained merge as a Hugging Face folder.

    Args:
        checkpoint: checkpoint that `gradmerge fit` wrote.
        **options: those of `output_options`.
    """
    checked = output_options(**options)
    path = require_checkpoint(checkpoint)

    from gradmerge.module import MergeModule

    module = MergeModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    extra = {"checkpoint": path.name}
    folder = export_merged(module.merged, **checked, results=module.results, extra=extra)
    print(f"merged model written to {folder}")


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
