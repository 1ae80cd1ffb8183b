"""`gradmerge test --model FOLDER`: score any Hugging Face folder on the data of a configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gradmerge.coefficients import Constant, Model
from gradmerge.engine.recipe import Recipe
from gradmerge.errors import ConfigError, shorten

COMMANDS = ("validate", "test")
NAME = "model"
"""Name of the scored folder among the sources of its recipe."""


def with_model_folder(arguments: Sequence[str]) -> list[str]:
    """Return arguments with `--model FOLDER` as the option that the parser has for it.

    `--model` itself takes a configuration of the whole model, as LightningCLI has it.
    """
    found = list(arguments)
    if not found or found[0] not in COMMANDS:
        return found
    for at, argument in enumerate(found):
        flag, equals, value = argument.partition("=")
        if flag != "--model":
            continue
        if not equals:
            value = found[at + 1] if at + 1 < len(found) else ""
        if _names_a_model(value):
            sources = f"--model.recipe.sources={json.dumps({NAME: value})}"
            found[at : at + (1 if equals else 2)] = [f"--model_folder={value}", sources]
            break
    return found


def _names_a_model(value: str) -> bool:
    """Return whether a value of `--model` is a folder, a file of weights or a hub id."""
    if not value or value.startswith(("{", "-")) or value.endswith((".yaml", ".yml", ".json")):
        return False
    return "\n" not in value


def scored_recipe(folder: str, tasks: Iterable[str], private: Sequence[str]) -> Recipe:
    """Return a recipe that is the model of one folder, unchanged.

    Args:
        folder: a path or hub id. An export of a merge with private heads keeps each task's head in
            `tasks/<task>`.
        tasks: names of the tasks to score.
        private: patterns of tensors that belong to a task alone, where the export's provenance does
            not name them.

    Raises:
        ConfigError: the folder has heads, but not one for every task.
    """
    path = Path(folder).expanduser()
    heads = {p.name: str(p) for p in sorted(path.glob("tasks/*")) if (p / "config.json").is_file()}
    if heads:
        lost = [task for task in tasks if task not in heads]
        if lost:
            raise ConfigError(
                f"--model {folder}: no head for the tasks {shorten(lost)}; the folder has heads "
                f"for {', '.join(heads)} (tasks/...).\nScore those alone, or name the task as the "
                "merge did."
            )
        private = _private_of(path) or private
    return Recipe(
        sources={NAME: folder},
        origin="zero",
        coefficients=Model(),
        init=Constant(1.0),
        heads=dict(heads),
        private=list(private) if heads else [],
        buffers="mean",
    )


def _private_of(folder: Path) -> list[str]:
    """Return the private patterns of the merge that wrote a folder."""
    try:
        found: Any = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        return [str(pattern) for pattern in found["recipe"]["init_args"]["private"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def require_scored(command: str, ckpt_path: str | None) -> None:
    """Reject options that do not go together with a folder to score.

    Raises:
        ConfigError: the command learns, or a checkpoint is given as well.
    """
    if command not in COMMANDS:
        raise ConfigError(
            f"model_folder: `gradmerge {command}` learns a merge, and a folder is only scored. Use "
            "`gradmerge test --model FOLDER` or `gradmerge validate --model FOLDER`."
        )
    if ckpt_path is not None:
        raise ConfigError(
            f"--model and --ckpt_path {ckpt_path}: expected one of them, got both; a folder holds "
            "its weights, a checkpoint coefficients of a merge. Leave one out."
        )
