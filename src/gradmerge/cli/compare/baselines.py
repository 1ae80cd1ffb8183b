"""The rows that every comparison has: base, each expert on all tasks, average, and ensemble."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from gradmerge.cli.compare.methods import Method
from gradmerge.cli.compare.work import (
    MissingError,
    Other,
    Say,
    Work,
    read_final,
    score_others,
    write_final,
)
from gradmerge.common.memory import peak_memory, reset_peak_memory

BASELINES = Method(
    "baselines",
    (),
    inline=yaml.safe_dump(
        {
            "model": {
                "recipe": {
                    "coefficients": {"class_path": "Model"},
                    "init": {"class_path": "Uniform"},
                    "operator": {"class_path": "Linear"},
                    "preprocess": [],
                    "finalisers": [],
                }
            }
        }
    ),
)


def rows_of(work: Work) -> list[tuple[str, str, Any]]:
    """Return name, kind and coefficients of each built-in row."""
    given = work.method.tree(work.suite)["model"]["recipe"]
    sources = list(given.get("sources") or {})
    count = len(sources)
    rows: list[tuple[str, str, Any]] = []
    if given.get("base") is not None and given.get("origin") in (None, "base"):
        rows.append(("base", "base", [0.0] * count))
    for at, source in enumerate(sources):
        rows.append((f"expert {source}", "expert", [float(i == at) for i in range(count)]))
    rows.append(("uniform average", "average", [1 / count] * count))
    return [*rows, *([("ensemble", "ensemble", None)] if work.ensemble else [])]


class Baselines:
    """Scores the built-in rows of a seed on the test split.

    Args:
        work: the seed.
        say: called after each row.
        known_only: only read records; what they lack raises `MissingError`.
    """

    def __init__(self, work: Work, say: Say, known_only: bool = False) -> None:
        self.work, self._say, self._known_only = work, say, known_only
        self._found: Any = None

    def run(self) -> list[str]:
        """Score all rows, and return the names of their records."""
        return [self._row(*row) for row in rows_of(self.work)]

    def _row(self, name: str, kind: str, coefficients: Any) -> str:
        key = self.work.key(name, None)
        path: Path = self.work.place / f"final-{key}.json"
        about = {"row": name, "kind": kind, "source": name.removeprefix("expert ")}
        if read_final(path) is None:
            began = time.perf_counter()
            test, examples = self._score(kind, coefficients, None)
            told = {"memory": peak_memory(), "trials": 0, "test": test}
            told |= {"score": self.score.name, "higher_is_better": self.score.higher_is_better}
            write_final(path, {**about, **told}, examples)
            value = test["average"].get(self.score.name, float("nan"))
            shown = f"{name}: test {self.score.name.replace('_', ' ')} {value:.4f}"
            self._say(shown, time.perf_counter() - began)
        score_others(self.work, path, about, lambda o: self._score(kind, coefficients, o))
        return path.name

    def _open(self) -> None:
        from gradmerge.cli.compare.opened import module_of, parse, recipe_of, shared_data

        if self._found is not None:
            return
        reset_peak_memory()
        self._found = parse(self.work.options(None))
        recipe = recipe_of(self._found)
        self.data = shared_data(self._found.datamodule, recipe)
        self.module = module_of(self._found, recipe)
        # base and experts are as they are, whatever the suite fixes in merges
        plain = replace(recipe, frozen={})
        self.whole = module_of(self._found, plain) if recipe.frozen else self.module

    def _score(self, kind: str, coefficients: Any, other: Other | None) -> tuple[Any, Any]:
        if self._known_only:
            raise MissingError
        from gradmerge.cli.compare.opened import other_data, scorer_of
        from gradmerge.coefficients import Constant
        from gradmerge.training.ensemble import ensemble_scores
        from gradmerge.training.search import set_coefficients

        self._open()
        data = self.data if other is None else other_data(self.work, other)
        if kind == "ensemble":
            data.attach(self.whole.merged)
            data.setup()
            self.whole.take_tasks(data.tasks)
            found, examples, self.score = ensemble_scores(self.whole, data)
            return found, examples
        module = self.module if kind == "average" else self.whole
        set_coefficients(module.merged, Constant(coefficients))
        module.keep_examples()
        tree = self.work.method.tree(self.work.suite)
        found = scorer_of(module, data, tree).test()
        self.score = module.score
        return found, module.examples
