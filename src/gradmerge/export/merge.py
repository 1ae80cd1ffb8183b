"""Merging without training, from a recipe to a folder."""

from __future__ import annotations

import warnings
from pathlib import Path

from gradmerge.engine.opening import open_plan
from gradmerge.engine.recipe import Recipe
from gradmerge.engine.state import FitState
from gradmerge.export.atomic import refuse_existing
from gradmerge.export.folder import export_state, require_options


def merge(
    recipe: Recipe,
    output: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    head: str | None = None,
    provenance_paths: bool = False,
) -> Path:
    """Merge with the coefficients of a recipe's `init` and write a Hugging Face folder.

    BatchNorm statistics follow `Recipe.buffers` without recomputation. Searches, scores and
    finalisers on data need the command `gradmerge merge` or a `MergeModule`.

    Args:
        recipe: the merge.
        output: folder to write; it must not exist unless `overwrite`.
        dtype: float64, float32, bfloat16 or float16. Default: each tensor's stored dtype.
        overwrite: replace an existing folder, once the new one is complete.
        head: task whose head the model in the folder itself has. Default: the first.
        provenance_paths: keep local paths in the folder's records. Default: names and hub ids only.

    Returns:
        The folder.

    Raises:
        CompatibilityError: the checkpoints do not fit together; the message lists every problem.
        ConfigError: the folder exists, or an option has an invalid value.
        SourceError: a source cannot be opened.

    Examples:
        >>> import tempfile, torch
        >>> from gradmerge import Recipe, merge
        >>> from gradmerge.coefficients import Uniform
        >>> a, b = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     merged = merge(Recipe({"a": a, "b": b}, init=Uniform()), f"{folder}/merged")
        ...     (merged / "model.safetensors").is_file()
        True
    """
    refuse_existing(Path(output).expanduser(), overwrite, recipe.inputs)
    require_options(dtype, None, ())
    plan = open_plan(recipe, with_skeleton=False)
    for warning in plan.warnings:
        warnings.warn(str(warning), stacklevel=2)
    state = FitState.start(plan)
    return export_state(
        state,
        output,
        dtype=dtype,
        overwrite=overwrite,
        head=head,
        provenance_paths=provenance_paths,
    )
