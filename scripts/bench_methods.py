"""All static methods on a quickstart suite, tuned alike on the selection split.

    python scripts/bench_methods.py lm --seeds 0 1 2 --json static-lm.json

For each file in configs/static that merges the suite's sources, one factor on the merged direction
is tuned: twelve factors on what the file states, the same for every method, each scored on the
selection split; the best is scored on the test split, which nothing else reads. A method without
such a factor (a plain average, a mean on the sphere) has nothing to tune and is scored as it is.
Experts and data are built by scripts/suites, or found in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jsonargparse
import torch
import yaml

from gradmerge import MergeDataModule, MergeModule, Recipe
from gradmerge.cli.configs import for_merge
from gradmerge.cli.main import quieten, register
from gradmerge.coefficients import Scaled
from gradmerge.search import AbstractSearch, Scales
from gradmerge.training import collect
from gradmerge.training.search import Selection
from suite_files import suite_file

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "configs" / "static"
FACTORS = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0]
METRICS = {"lm": ("bits_per_byte", False, 3), "vision": ("accuracy", True, 3)}


@dataclass
class Result:
    """One method on one seed."""

    score: float
    selection: float
    factor: float | None
    seconds: float


def load(suite: Path, method: Path) -> tuple[Recipe, MergeDataModule, AbstractSearch | None]:
    """What the two files say."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Recipe, "recipe")
    parser.add_class_arguments(MergeDataModule, "data")
    parser.add_argument("--search", type=AbstractSearch | None, default=None)
    with tempfile.TemporaryDirectory() as folder:
        given = ["--config", str(suite), "--config", str(method)]
        arguments, _ = for_merge(given, folder, with_data=True)  # which leaves searches out
        search = Path(folder) / "search.yaml"
        own = yaml.safe_load(method.read_text()).get("search")
        search.write_text(yaml.safe_dump({"search": own}))
        arguments += ["--config", str(search)]
        found = parser.instantiate_classes(parser.parse_args(arguments))
    return found.recipe, found.data, found.search


def merges_the_suite(method: Path) -> bool:
    """Whether a file is a merge of the suite's sources: it names none of its own, aligns none (they
    share an initialisation), and is no part that goes after another file.
    """
    recipe = (yaml.safe_load(method.read_text()).get("model") or {}).get("recipe")
    return recipe is not None and not {"sources", "alignment"} & recipe.keys()


def tuned(selection: Selection, recipe: Recipe, search: AbstractSearch | None) -> float | None:
    """Leave the best coefficients in the model; returns the factor, where one was tuned."""
    if search is not None and not isinstance(search, Scales):
        selection.search(search)
        return None
    if search is not None:  # the factors of its own file, whose coefficients are 1
        start = recipe.init
        values = [0.3 * factor for factor in FACTORS]
        chosen, _ = selection.search(Scales(values))
        assert isinstance(chosen, Scaled)
        assert chosen.inner == start
        return chosen.factor / 0.3
    operator = recipe.operator
    if "scale" in {field.name for field in fields(operator)}:  # type: ignore[arg-type]
        merged = selection.module.merged
        scores = {}
        for factor in FACTORS:
            scaled: Any = replace(operator, scale=operator.scale * factor)  # type: ignore
            merged.plan.recipe = replace(recipe, operator=scaled)
            merged._resident.forget()
            scores[factor] = selection.try_out(recipe.init, "score")
        best = max(scores, key=lambda factor: scores[factor])
        scaled = replace(operator, scale=operator.scale * best)  # type: ignore
        merged.plan.recipe = replace(recipe, operator=scaled)
        merged._resident.forget()
        selection.score()
        return best
    if recipe.resolved_origin != "base" or type(operator).__name__ != "Linear":
        selection.score()
        return None
    chosen, _ = selection.search(Scales(FACTORS))
    assert isinstance(chosen, Scaled)
    return chosen.factor


def run(suite: str, path: Path, config: Path, prepared: dict[Path, MergeDataModule]) -> Result:
    """One method on one seed, whose data are prepared once."""
    metric = METRICS[suite][0]
    recipe, data, search = load(config, path)
    data = prepared.setdefault(config, data)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if recipe.statistics is None and any(step.needs for step in recipe.preprocess):
            found = collect.collect(recipe, data, Path(folder) / "statistics")
            recipe = replace(recipe, statistics=str(found))
        module = MergeModule(recipe, score_experts=False)
        selection = Selection(module, data)
        factor = tuned(selection, recipe, search)
        chosen = selection.score()["average"][metric]
        selection._trainer.test(module, datamodule=data, verbose=False)
        score = module.results["test"]["average"][metric]
    return Result(score, chosen, factor, time.perf_counter() - start)


def render(suite: str, found: dict[str, dict[int, Result]]) -> str:
    """A markdown table, the best first."""
    metric, higher, digits = METRICS[suite]
    lines = [
        f"| method (`configs/static`) | {metric} | spread | selection | factors | seconds |",
        "|---|---|---|---|---|---|",
    ]

    def mean(name: str) -> float:
        return statistics.mean(result.score for result in found[name].values())

    for name in sorted(found, key=mean, reverse=higher):
        results = list(found[name].values())
        scores = [result.score for result in results]
        spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
        factors = ", ".join("-" if r.factor is None else f"{r.factor:g}" for r in results)
        lines.append(
            f"| `{name}` | {mean(name):.{digits}f} | ±{spread:.{digits}f} | "
            f"{statistics.mean(r.selection for r in results):.{digits}f} | {factors} | "
            f"{statistics.mean(r.seconds for r in results):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suite", choices=METRICS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="names of files in configs/static")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "suites")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    args = parser.parse_args()
    register()
    quieten()
    warnings.filterwarnings("ignore")
    paths = sorted(STATIC.glob("*.yaml"))
    paths = [path for path in paths if merges_the_suite(path)]
    if args.methods:
        paths = [path for path in paths if path.stem in args.methods]
    prepared: dict[Path, MergeDataModule] = {}
    found: dict[str, dict[int, Result]] = {path.stem: {} for path in paths}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            build = [sys.executable, str(ROOT / "scripts" / "suites" / f"{args.suite}.py")]
            command = [*build, "--cache", str(args.cache), "--seed", str(seed)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            config = suite_file(args.suite, seed, args.cache.resolve(), Path(folder))
            for path in paths:
                torch.manual_seed(0)
                result = run(args.suite, path, config, prepared)
                found[path.stem][seed] = result
                print(f"seed {seed} {path.stem}: {result}", flush=True)
    print(render(args.suite, found))
    if args.json:
        plain = {
            name: {seed: result.__dict__ for seed, result in results.items()}
            for name, results in found.items()
        }
        args.json.write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    main()
