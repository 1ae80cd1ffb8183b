"""`gradmerge test --model FOLDER`: scores of any Hugging Face folder on a configuration's data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradmerge.cli.arguments import MODEL
from gradmerge.coefficients import Constant, Model
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.common.files import read_json
from gradmerge.common.schema import require_shape
from gradmerge.engine.recipe import Recipe
from gradmerge.export.evaluated import is_recorded, record

_PROVENANCE = {
    "recipe?": {"init_args?": {"private?": [str]}},
    "trained?": {"adapters?": {str: int}},
    "run?": {"wandb?": {"id": str, "project": str}},
}


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
    """Return expressions of what differs by task in a folder, if gradmerge wrote it."""
    found = _provenance(folder)
    adapted = [f"^{re.escape(name)}$" for name in found.get("trained", {}).get("adapters", {})]
    return [*found.get("recipe", {}).get("init_args", {}).get("private", []), *adapted]


def run_of(folder: str) -> dict[str, Any]:
    """Return what is known of the fit that made the model of a folder, empty if nothing is."""
    return dict(_provenance(Path(folder).expanduser()).get("run", {}))


def _provenance(folder: Path) -> dict[str, Any]:
    path = folder / "provenance.json"
    found: dict[str, Any] = read_json(path, ConfigError) or {}
    require_shape(path, found, _PROVENANCE, "Restore it, or remove it.", ConfigError)
    return found


def keep_in_folder(folder: str, split: str, scores: Mapping[str, Any]) -> str:
    """Add scores to card and provenance of a folder that gradmerge wrote.

    Returns:
        What was done in words; empty for another folder or a hub id.
    """
    local = Path(folder).expanduser()
    if not is_recorded(local):
        return ""
    record(local, split, scores, {})
    return f"scores added to the card and provenance of {local}"
