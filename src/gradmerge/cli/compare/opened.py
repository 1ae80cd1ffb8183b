"""Shared parts of the trials of a method: parsed configuration, prepared data, and statistics."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gradmerge.cli.compare.methods import SUITE
from gradmerge.cli.compare.work import Other, Work, digest
from gradmerge.common.atomic import lock
from gradmerge.common.spec import to_plain
from gradmerge.drivers.state import write_json
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.recipe import Recipe
from gradmerge.export.folder import DTYPES
from gradmerge.training.collect import collect
from gradmerge.training.data import MergeDataModule
from gradmerge.training.module import MergeModule
from gradmerge.training.run import describe_data
from gradmerge.training.search import Scorer

_PASSED_ON = ("accelerator", "precision", "limit_val_batches", "limit_test_batches")
# The data modules that were prepared last in this process, by what they depend on.
_MOST = 4  # the suite's, and a few others of `--also`
_prepared: dict[str, MergeDataModule] = {}


def parse(arguments: Sequence[str]) -> Any:
    """Return recipe, data and search of a configuration, without opening the sources."""
    from gradmerge.cli.learning import learn

    return learn(arguments, run=False, opens=False)


def recipe_of(found: Any) -> Recipe:
    """Return the recipe of a parsed configuration."""
    recipe = found.model.keywords["recipe"]
    return recipe if isinstance(recipe, Recipe) else Recipe(**recipe.keywords)


def forget_data() -> None:
    """Free the prepared data of this process, which others need."""
    _prepared.clear()


def shared_data(data: MergeDataModule, recipe: Recipe) -> MergeDataModule:
    """Return a data module that is prepared once per process for methods of the same sources."""
    parts = (recipe.base, recipe.sources, recipe.heads, recipe.tokenizer)
    key = digest(describe_data(data), [to_plain(part) for part in parts])
    if key not in _prepared:
        while len(_prepared) >= _MOST:
            del _prepared[next(iter(_prepared))]
        _prepared[key] = data
    return _prepared[key]


def other_data(work: Work, other: Other) -> MergeDataModule:
    """Return the data module of other test data."""
    allowed = [word for name in work.allow_modules for word in ("--allow_modules+", name)]
    found = parse([*SUITE.arguments(other.suite), *allowed])
    return shared_data(found.datamodule, recipe_of(found))


def statistics_of(work: Work, recipe: Recipe, data: MergeDataModule) -> tuple[str | None, float]:
    """Return the folder of the statistics that a recipe needs, and how long collecting them took.

    They are collected once per seed. Methods that need the same share them; another process that
    collects them is waited for.
    """
    if recipe.statistics is not None or not recipe.needs_statistics:
        return recipe.statistics, 0.0
    steps = [step for step in recipe.preprocess if step.needs is not None]
    needs = [
        step if step.needs is None or step.needs.activations == "merged" else step.needs
        for step in steps
    ]
    key = digest(work.contents, [to_plain(part) for part in needs], to_plain(recipe.alignment))
    folder, cost = work.statistics / key, work.statistics / f"{key}.json"
    work.statistics.mkdir(parents=True, exist_ok=True)
    guard = work.statistics / f"{key}.lock"
    guard.touch()
    while not (folder.is_dir() and cost.is_file()):
        with lock(guard) as held:
            if held is not False:
                began = time.perf_counter()
                if not folder.is_dir():
                    collect(recipe, data, folder)
                write_json(cost, {"seconds": time.perf_counter() - began})
                break
        time.sleep(1)
    return str(folder), float(json.loads(cost.read_text(encoding="utf-8"))["seconds"])


def module_of(found: Any, recipe: Recipe) -> MergeModule:
    """Return a module that scores a merge as it is."""
    options = found.model.keywords
    dtype = DTYPES[options.get("dtype") or "float32"]
    merged = MergedModel(recipe, None, options.get("memory") or "resident", dtype)
    return MergeModule.around(merged, score_experts=False)


def scorer_of(module: MergeModule, data: MergeDataModule, tree: Mapping[str, Any]) -> Scorer:
    """Return a scorer on the device and with the limits of the suite's trainer."""
    given = tree.get("trainer") or {}
    options = {name: given[name] for name in _PASSED_ON if given.get(name) is not None}
    return Scorer(module, data, options={"accelerator": "auto", **options})
