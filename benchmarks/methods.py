"""All static methods on a quickstart suite, tuned alike on the selection split.

    python benchmarks/methods.py lm --seeds 0 1 2 --json static-lm.json

For each file in configs/static that merges the suite's sources, one factor on the merged direction
is tuned: twelve factors on what the file states, the same for every method, each scored on the
selection split; the best is scored on the test split, which nothing else reads. A method without
such a factor (a plain average, a mean on the sphere) has nothing to tune and is scored as it is.
Experts and data are built by benchmarks/suites, or found in the cache.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import jsonargparse
import torch
import yaml

import harness
from gradmerge import MergeDataModule, MergeModule, Recipe
from gradmerge.cli.main import register
from gradmerge.search import AbstractSearch, Scales
from gradmerge.training.collect import collect
from gradmerge.training.search import Selection

STATIC = harness.CONFIGS / "static"
FACTORS = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0]


@dataclass
class Result:
    """One method on one seed."""

    score: float
    selection: float
    factor: float | None
    seconds: float


def load(suite: Path, method: Path) -> tuple[Recipe, MergeDataModule, AbstractSearch | None]:
    """Return recipe, data and search of the two files."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Recipe, "recipe")
    parser.add_class_arguments(MergeDataModule, "data")
    parser.add_argument("--search", type=AbstractSearch | None, default=None)
    arguments = []
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate((suite, method)):
            given = yaml.safe_load(path.read_text())
            config = {key: given[key] for key in ("data", "search") if key in given}
            part = Path(folder) / f"{number}.yaml"
            config["recipe"] = given["model"]["recipe"]
            part.write_text(yaml.safe_dump(config, sort_keys=False))  # sources stay in order
            arguments += ["--config", str(part)]
        found = parser.instantiate_classes(parser.parse_args(arguments))
    return found.recipe, found.data, found.search


def merges_the_suite(method: Path) -> bool:
    """Check that a file is a merge of the suite's sources: it names none of its own, aligns none
    (they share an initialisation), and is not a part that follows another file.
    """
    recipe = (yaml.safe_load(method.read_text()).get("model") or {}).get("recipe")
    return recipe is not None and not {"sources", "alignment"} & recipe.keys()


def tuned(
    selection: Selection, recipe: Recipe, search: AbstractSearch | None
) -> tuple[Selection, float | None]:
    """Return the best merge, and the factor, where one was tuned."""
    if search is not None and not isinstance(search, Scales):
        selection.search(search)
        return selection, None
    operator = recipe.operator
    if search is None and "scale" in {field.name for field in fields(operator)}:

        def scaled(factor: float) -> Selection:
            own = replace(recipe, operator=replace(operator, scale=operator.scale * factor))
            return Selection(MergeModule(own, score_experts=False), selection.data)

        scores = {factor: scaled(factor).try_out(recipe.init, "score") for factor in FACTORS}
        best = max(scores, key=lambda factor: scores[factor])
        return scaled(best), best
    if search is None and (recipe.resolved_origin, type(operator).__name__) != ("base", "Linear"):
        return selection, None
    stated = 1.0 if search is None else 0.3  # coefficients of a file with scales of its own are 1
    chosen, _ = selection.search(Scales([stated * factor for factor in FACTORS]))
    return selection, chosen.factor / stated


def run(suite: str, path: Path, config: Path, prepared: dict[Path, MergeDataModule]) -> Result:
    """Score one method on one seed, whose data are prepared once."""
    metric = harness.SUITES[suite].metric
    recipe, data, search = load(config, path)
    data = prepared.setdefault(config, data)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if recipe.statistics is None and any(step.needs for step in recipe.preprocess):
            found = collect(recipe, data, Path(folder) / "statistics")
            recipe = replace(recipe, statistics=str(found))
        first = Selection(MergeModule(recipe, score_experts=False), data)
        selection, factor = tuned(first, recipe, search)
        chosen = selection.score()["average"][metric]
        score = harness.tested(selection.module, data)["average"][metric]
    return Result(score, chosen, factor, time.perf_counter() - start)


def render(suite: str, found: dict[str, dict[int, Result]]) -> str:
    """Return a markdown table, the best first."""
    own = harness.SUITES[suite]

    def mean(name: str) -> float:
        return statistics.mean(result.score for result in found[name].values())

    def cells(name: str) -> list[str]:
        results = list(found[name].values())
        score, _, deviation = harness.spread([r.score for r in results], own.digits).partition(
            " ± "
        )
        return [
            f"`{name}`",
            score,
            f"±{deviation or 'nan'}",
            f"{statistics.mean(r.selection for r in results):.{own.digits}f}",
            ", ".join("-" if r.factor is None else f"{r.factor:g}" for r in results),
            f"{statistics.mean(r.seconds for r in results):.0f}",
        ]

    head = ["method (`configs/static`)", own.metric, "spread", "selection", "factors", "seconds"]
    return harness.table(
        head, [cells(n) for n in sorted(found, key=mean, reverse=own.higher_is_better)]
    )


def main() -> None:
    parser = harness.make_parser(__doc__, "suites")
    parser.add_argument("suite", choices=harness.SUITES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="names of files in configs/static")
    args = parser.parse_args()
    register()
    harness.quieten()
    paths = [path for path in sorted(STATIC.glob("*.yaml")) if merges_the_suite(path)]
    paths = [path for path in paths if not args.methods or path.stem in args.methods]
    prepared: dict[Path, MergeDataModule] = {}
    found: dict[str, dict[int, Result]] = {path.stem: {} for path in paths}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            harness.build_suite(args.suite, seed, args.cache)
            config = harness.suite_file(args.suite, seed, args.cache.resolve(), Path(folder))
            for path in paths:
                torch.manual_seed(0)
                result = run(args.suite, path, config, prepared)
                found[path.stem][seed] = result
                print(f"seed {seed} {path.stem}: {result}", flush=True)
    print(render(args.suite, found))
    plain = {n: {seed: asdict(r) for seed, r in results.items()} for n, results in found.items()}
    harness.write_json(args.json, plain)


if __name__ == "__main__":
    main()
