"""`gradmerge test --model FOLDER`: scores of any Hugging Face folder on a configuration's data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gradmerge.cli.arguments import MODEL, SCORING
from gradmerge.coefficients import Constant, Model
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.common.files import read_json
from gradmerge.common.schema import require_shape
from gradmerge.engine.recipe import Recipe

_PROVENANCE = {"recipe?": {"init_args?": {"private?": [str]}}}


def scored_recipe(folder: str, tasks: Iterable[str], private: Sequence[str]) -> Recipe:
    """Return a recipe that reproduces the model of a folder.

    Args:
        folder: path or hub id. Exports of merges with private heads have each task's head in
            `tasks/<task>`.
        tasks: names of the tasks to score.
        private: patterns of private tensors, if the export's provenance does not list them.

    Raises:
        ConfigError: the folder has heads, but not for every task.
    """
    path = Path(folder).expanduser()
    heads = {p.name: str(p) for p in sorted(path.glob("tasks/*")) if (p / "config.json").is_file()}
    if heads:
        lost = [task for task in tasks if task not in heads]
        if lost:
            raise ConfigError(
                f"--model {folder}: no head for the tasks {shorten(lost)}; the folder has heads "
                f"for {', '.join(heads)} (tasks/...).\nScore only those tasks, or use the merge's "
                "task names."
            )
        private = _private_of(path) or private
    return Recipe(
        sources={MODEL: folder},
        origin="zero",
        coefficients=Model(),
        init=Constant(1.0),
        heads=dict(heads),
        private=list(private) if heads else [],
        buffers="mean",
    )


def _private_of(folder: Path) -> list[str]:
    """Return the private patterns of the merge that wrote a folder, if it was gradmerge."""
    path = folder / "provenance.json"
    found: Any = read_json(path, ConfigError) or {}
    require_shape(path, found, _PROVENANCE, "Restore it, or remove it.", ConfigError)
    return list(found.get("recipe", {}).get("init_args", {}).get("private", []))


def require_scored(command: str, ckpt_path: str | None) -> None:
    """Reject a command or options that do not combine with a folder to score."""
    if command not in SCORING:
        raise ConfigError(
            f"model_folder: `gradmerge {command}` learns a merge, but a folder can only be scored; "
            "use `gradmerge test --model FOLDER` or `gradmerge validate --model FOLDER`."
        )
    if ckpt_path is not None:
        raise ConfigError(
            f"--model and --ckpt_path {ckpt_path}: expected one of them, got both; a folder holds "
            "weights, a checkpoint coefficients of a merge. Remove one."
        )
