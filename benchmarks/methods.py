"""All static methods on a quickstart suite, tuned alike on the selection split.

    python benchmarks/methods.py lm --seeds 0 1 2 --json static-lm.json

For each file in configs/static that merges the suite's sources, one factor on the merged direction
is tuned: twelve factors on what the file states, the same for every method, each scored on the
selection split; the best is scored on the test split, which nothing else reads. A method without
such a factor (a plain average, a mean on the sphere) has nothing to tune and is scored as it is.
Experts and data are built by benchmarks/suites, or found in the cache.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml

import harness
from gradmerge import MergeDataModule, MergeModule, Recipe
from gradmerge.cli.main import register
from gradmerge.search import AbstractSearch, Scales
from gradmerge.training.collect import collect
from gradmerge.training.search import Scorer
from harness import SUITES

STATIC = harness.CONFIGS / "static"
FACTORS = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0]


def load(suite: Path, method: Path) -> tuple[Recipe, MergeDataModule, AbstractSearch | None]:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, "recipe")
    parser.add_class_arguments(MergeDataModule, "data")
    parser.add_argument("--search", type=AbstractSearch | None, default=None)
    given, own = (yaml.safe_load(path.read_text()) for path in (suite, method))
    recipe = given["model"]["recipe"] | own["model"]["recipe"]
    config = {"recipe": recipe, "data": given["data"], "search": own.get("search")}
    found = parser.instantiate_classes(parser.parse_object(config))
    return found.recipe, found.data, found.search


def merges_the_suite(method: Path) -> bool:
    """Check that a file is a merge of the suite's sources: it names none of its own, aligns none
    (they share an initialisation), and is not a part that follows another file.
    """
    recipe = (yaml.safe_load(method.read_text()).get("model") or {}).get("recipe")
    return recipe is not None and not {"sources", "alignment"} & recipe.keys()


def tuned(
    selection: Scorer, recipe: Recipe, search: AbstractSearch | None
) -> tuple[Scorer, float | None]:
    """Return the best merge, and the factor, where one was tuned."""
    if search is not None and not isinstance(search, Scales):
        selection.search(search)
        return selection, None
    operator = recipe.operator
    if search is None and "scale" in {field.name for field in fields(operator)}:

        def scaled(factor: float) -> Scorer:
            own = replace(recipe, operator=replace(operator, scale=operator.scale * factor))
            return Scorer(MergeModule(own, score_experts=False), selection.data)

        scores = {factor: scaled(factor).try_out(recipe.init, "score") for factor in FACTORS}
        best = max(scores, key=lambda factor: scores[factor])
        return scaled(best), best
    if search is None and (recipe.resolved_origin, type(operator).__name__) != ("base", "Linear"):
        return selection, None
    stated = 1.0 if search is None else 0.3  # coefficients of a file with scales of its own are 1
    chosen, _ = selection.search(Scales([stated * factor for factor in FACTORS]))
    return selection, chosen.factor / stated


def run(metric: str, recipe: Recipe, data: MergeDataModule, search: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if recipe.statistics is None and any(step.needs for step in recipe.preprocess):
            found = collect(recipe, data, Path(folder) / "statistics")
            recipe = replace(recipe, statistics=str(found))
        first = Scorer(MergeModule(recipe, score_experts=False), data)
        selection, factor = tuned(first, recipe, search)
        chosen = selection.score()["average"][metric]
        score = harness.tested(selection.module, data)["average"][metric]
    seconds = time.perf_counter() - start
    return {"score": score, "selection": chosen, "factor": factor, "seconds": seconds}


def main() -> None:
    parser = harness.suite_parser(__doc__)
    parser.add_argument("--methods", nargs="+", help="names of files in configs/static")
    args = parser.parse_args()
    register()
    harness.quieten()
    suite, cache = SUITES[args.suite], args.cache.resolve()
    paths = {path.stem: path for path in sorted(STATIC.glob("*.yaml")) if merges_the_suite(path)}
    prepared: dict[int, MergeDataModule] = {}

    with tempfile.TemporaryDirectory() as folder:

        def score(method: str, seed: int) -> dict[str, Any]:
            config = harness.suite_file(args.suite, seed, cache, Path(folder))
            recipe, data, search = load(config, paths[method])
            return run(suite.metric, recipe, prepared.setdefault(seed, data), search)

        methods = [name for name in paths if name in (args.methods or paths)]
        found = harness.compare(args.suite, methods, args, score)
    columns = {
        "selection": lambda rs: harness.spread([r["selection"] for r in rs]),
        "factors": lambda rs: ", ".join(
            "-" if r["factor"] is None else f"{r['factor']:g}" for r in rs
        ),
        "seconds": lambda rs: harness.spread([r["seconds"] for r in rs], 0),
    }
    print(harness.ranking(args.suite, found, columns))


if __name__ == "__main__":
    main()
