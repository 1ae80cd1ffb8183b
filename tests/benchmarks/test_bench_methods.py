"""The tuning of the benchmark of static methods, on a tiny network."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

from gradmerge import MergeModule, Recipe
from gradmerge.coefficients import Model, Uniform
from gradmerge.operators import DisjointMean
from gradmerge.search import Scales
from gradmerge.training.search import Scorer
from tiny import build, relatives, vectors

PROGRAM = "methods"


def test_an_operators_scale_is_tuned_on_selection(bench: ModuleType) -> None:
    """The factor is the best of all, each scored by a merge of its own."""
    base, *sources = relatives(build(), 3, scale=1.0)
    models = dict(zip("ab", sources, strict=True))
    options = {"base": base, "coefficients": Model(), "init": Uniform()}
    recipe = Recipe(models, operator=DisjointMean(), **options)
    selection = Scorer(MergeModule(recipe, score_experts=False), vectors(count=40))
    best, chosen = bench.tuned(selection, recipe, None)
    accuracies = {}
    for factor in bench.FACTORS:
        scaled = replace(recipe, operator=DisjointMean(scale=factor))
        own = Scorer(MergeModule(scaled, score_experts=False), vectors(count=40))
        accuracies[factor] = own.score()["average"]["accuracy"]
    assert len(set(accuracies.values())) > 2
    assert accuracies[chosen] == max(accuracies.values())
    assert best.score()["average"]["accuracy"] == accuracies[chosen]


def test_suite_and_method_are_read_together(bench: ModuleType) -> None:
    """Sources keep their order: sums, folds and greedy choices depend on it."""
    bench.register()
    suite = bench.harness.CONFIGS / "suites" / "lm.yaml"
    recipe, data, search = bench.load(suite, bench.STATIC / "task_arithmetic_tuned.yaml")
    assert list(recipe.sources) == ["code", "plays", "reviews", "newsgroups"]
    assert list(data.tasks) == list(recipe.sources)
    assert isinstance(search, Scales)
