"""The tuning of the benchmark of static methods, on a tiny network."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from gradmerge import MergeModule, Recipe
from gradmerge.coefficients import Model, Uniform
from gradmerge.evaluation import Selection
from gradmerge.operators import DisjointMean
from tiny import build, relatives, vectors

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        spec = importlib.util.spec_from_file_location("bench_methods", SCRIPTS / "bench_methods.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "bench_methods", module)
        spec.loader.exec_module(module)
        yield module


def test_an_operators_scale_is_tuned_on_selection(bench: ModuleType) -> None:
    """The factor is the best of all, each scored by a merge of its own."""
    base, *sources = relatives(build(), 3, scale=1.0)
    models = dict(zip("ab", sources, strict=True))
    options = {"base": base, "coefficients": Model(), "init": Uniform()}
    recipe = Recipe(models, operator=DisjointMean(), **options)
    module = MergeModule(recipe, score_experts=False)
    selection = Selection(module, vectors(count=40))
    chosen = bench.tuned(selection, recipe, None)
    accuracies = {}
    for factor in bench.FACTORS:
        scaled = replace(recipe, operator=DisjointMean(scale=factor))
        own = Selection(MergeModule(scaled, score_experts=False), vectors(count=40))
        accuracies[factor] = own.score()["average"]["accuracy"]
    assert len(set(accuracies.values())) > 2
    assert accuracies[chosen] == max(accuracies.values())
    assert module.results["selection"]["average"]["accuracy"] == accuracies[chosen]
