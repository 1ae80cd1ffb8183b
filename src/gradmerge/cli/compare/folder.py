"""Finished models among the methods: multi-task training, or merges of other tools."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradmerge.cli.arguments import MODEL
from gradmerge.cli.compare.opened import parse, recipe_of, scorer_of, shared_data
from gradmerge.cli.compare.work import Trial, Work
from gradmerge.cli.score import scored_recipe
from gradmerge.engine.merged import MergedModel
from gradmerge.training.module import MergeModule


def opened_folder(folder: Path, data: Any, tree: Mapping[str, Any]) -> tuple[MergeModule, Any]:
    """Return a module of a model folder, and data whose tasks have its heads.

    Args:
        folder: the folder; the heads of a merge with private ones are in `tasks/TASK`.
        data: the data module of the suite.
        tree: the suite as plain data.
    """
    given = (tree.get("model") or {}).get("recipe") or {}
    recipe = scored_recipe(str(folder), data.tasks, given.get("private") or [])
    trusted = bool(given.get("trust_remote_code"))
    merged = MergedModel(replace(recipe, trust_remote_code=trusted))
    own = copy.copy(data)
    heads = bool(recipe.heads)
    own.tasks = {
        name: replace(task, source=name if heads else MODEL) for name, task in data.tasks.items()
    }
    return MergeModule.around(merged, score_experts=False), own


class FolderRunner:
    """Scores of a finished model.

    Args:
        work: the model and its seed.
    """

    def __init__(self, work: Work) -> None:
        found = parse(work.options(None))
        data = shared_data(found.datamodule, recipe_of(found))
        tree = work.method.tree(work.suite)
        self._place = Path(work.method.folder).expanduser()
        self._tree = tree
        self._module, self._own = opened_folder(self._place, data, tree)
        self._scorer = scorer_of(self._module, self._own, tree)

    def prepare(self, value: Any) -> None:
        """Do nothing: there is one model."""

    def run(self, trial: Trial) -> None:
        """Score the selection split, by which nothing is chosen."""
        trial.selection = dict(self._scorer.score()["average"])
        trial.score = self._module.score.name
        trial.higher_is_better = self._module.score.higher_is_better
        trial.label = "finished model"

    def chosen(self, trial: Trial, data: Any = None) -> tuple[MergeModule, Any]:
        """Return the model, and the suite's data or others with its heads."""
        if data is None:
            return self._module, self._own
        return opened_folder(self._place, data, self._tree)
