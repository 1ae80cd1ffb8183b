"""Searches on known scores, and scores of the selection split on a real merge."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from gradmerge import MergeDataModule, MergeModule, TaskData
from gradmerge.coefficients import Clamp, Constant, DepthRamp, Model, Scaled, Tensor
from gradmerge.errors import ConfigError
from gradmerge.evaluation import Selection, set_coefficients
from gradmerge.merged import MergedModel
from gradmerge.search import GreedySoup, Scales, soup
from tiny import SPLITS, build, examples, recipe_of, relatives

NAMES = ("a", "b", "c", "d")


def greedy(scores):
    """The paper's recipe, over a table of scores by set of members."""
    order = sorted(range(4), key=lambda k: scores[frozenset([k])], reverse=True)
    members = []
    for k in order:
        tried = frozenset([*members, k])
        if not members or scores[tried] >= scores[frozenset(members)]:
            members.append(k)
    return frozenset(members)


@pytest.mark.parametrize("seed", range(12))
def test_greedy_soup_is_the_papers_choice_on_known_scores(seed):
    generator = torch.Generator().manual_seed(seed)
    sets = [frozenset(s) for n in range(1, 5) for s in itertools.combinations(range(4), n)]
    # few values, so that ties happen; they count as not worse
    draws = torch.randint(5, (len(sets),), generator=generator).tolist()
    scores = dict(zip(sets, draws, strict=True))
    asked = []

    def score(init):
        members = frozenset(k for k, value in enumerate(init.value) if value)
        assert init.value == [1 / len(members) if k in members else 0.0 for k in range(4)]
        asked.append(members)
        return float(scores[members])

    chosen = GreedySoup().run(Constant(0.3), NAMES, score)
    expected = greedy(scores)
    assert chosen == soup(sorted(expected), 4)
    assert len(asked) == 4 + 3


def test_a_soup_of_one_source_is_it():
    assert GreedySoup().run(Constant(), ("a",), lambda init: 0.0) == Constant([1.0])


def test_scales_take_the_best_factor_and_the_first_of_equal_ones():
    start = DepthRamp(0.2, 0.4)
    scores = {0.1: 1.0, 0.2: 3.0, 0.5: 3.0, 1.0: 2.0}
    chosen = Scales(list(scores)).run(start, NAMES, lambda init: scores[init.factor])
    assert chosen == Scaled(start, 0.2)
    with pytest.raises(ConfigError, match="at least one value"):
        Scales([])


def test_scaled_coefficients_are_the_inner_ones_times_the_factor():
    models = relatives(build())
    for coefficients in (Model(), Tensor(), Clamp(Tensor(), 0, 1)):
        for inner in (Constant([0.2, 0.6]), DepthRamp(0.2, 0.4)):
            plans = [
                recipe_of(models, coefficients=coefficients, init=init).open()
                for init in (inner, Scaled(inner, 0.5))
            ]
            raws = [plan.initial_raw() for plan in plans]
            for name in plans[0].tensors:
                whole, half = (p.coefficient(name, r) for p, r in zip(plans, raws, strict=True))
                torch.testing.assert_close(half, 0.5 * whole)


class Sealed(list):
    """A split that nobody may read."""

    def __getitem__(self, index):
        raise AssertionError("the test split was read")

    def __iter__(self):
        raise AssertionError("the test split was read")


def sealed(tasks="ab", count=30):
    described = {}
    for i, task in enumerate(tasks):
        splits = {s: examples(100 * i + j, count) for j, s in enumerate(SPLITS)}
        described[task] = TaskData(path={**splits, "test": Sealed(splits["test"])}, kind="tensors")
    return MergeDataModule(described, batch_size=8, check_disjoint=False)


def accuracy_and_loss(model, data):
    """Means over tasks of a plain network's accuracy and cross-entropy on the selection split."""
    hits, losses = [], []
    for task in data.tasks.values():
        rows = task.path["selection"]
        x, y = (torch.stack([row[key] for row in rows]) for key in ("x", "labels"))
        with torch.no_grad():
            logits = model(x)
        hits.append((logits.argmax(dim=1) == y).double().mean())
        losses.append(functional.cross_entropy(logits, y))
    return float(sum(hits) / len(hits)), float(sum(losses) / len(losses))


def merged_network(models, coefficients):
    base, *sources = models
    network = build()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            origin = base.get_parameter(name)
            total = sum(
                c * (s.get_parameter(name) - origin)
                for c, s in zip(coefficients, sources, strict=True)
            )
            parameter.copy_(origin + total)
    return network


@pytest.mark.parametrize("metric", ["score", "loss"])
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_search_goes_by_the_selection_split_alone(metric, memory):
    models, data = relatives(build(), count=4), sealed("abc")
    recipe = recipe_of(models, coefficients=Model(), init=Constant(1.0))
    selection = Selection(MergeModule(recipe, memory=memory, score_experts=False), data)
    values = [0.1, 0.3, 0.5, 1.0]
    chosen, found = selection.search(Scales(values, metric))
    known = [accuracy_and_loss(merged_network(models, [v] * 3), data) for v in values]
    for trial, (accuracy, loss) in zip(selection.trials, known, strict=True):
        assert trial.average["accuracy"] == pytest.approx(accuracy, abs=1e-6)
        assert trial.average["loss"] == pytest.approx(loss, abs=1e-5)
    best = [known[i][0] if metric == "score" else -known[i][1] for i in range(4)]
    assert chosen.factor == values[best.index(max(best))]
    raw = selection.module.merged.raw["model"]
    torch.testing.assert_close(raw, torch.full((3,), chosen.factor).view_as(raw))
    assert [trial["init"]["init_args"]["factor"] for trial in found["trials"]] == values
    assert found["chosen"]["init_args"]["factor"] == chosen.factor


def test_greedy_soup_scores_averages_of_the_sources():
    models, data = relatives(build(), count=4), sealed("abc")
    recipe = recipe_of(models, coefficients=Model())
    selection = Selection(MergeModule(recipe, score_experts=False), data)
    selection.search(GreedySoup("loss"))
    for trial in selection.trials:
        network = merged_network(models, trial.init.value)
        assert trial.average["loss"] == pytest.approx(accuracy_and_loss(network, data)[1], abs=1e-5)


def test_a_score_that_the_tasks_do_not_have_is_named():
    rows = {s: [{"x": torch.randn(6)}] * 3 for s in SPLITS}
    data = MergeDataModule({"a": TaskData(path=rows, kind="tensors")}, check_disjoint=False)
    from gradmerge.objectives import Entropy

    module = MergeModule(recipe_of(relatives(build(), 2)), Entropy(), score_experts=False)
    with pytest.raises(ConfigError, match=r"no accuracy, which the search goes by \(it has loss\)"):
        Selection(module, data).search(Scales([0.5]))


def test_coefficients_that_a_link_cannot_reach_are_refused():
    recipe = recipe_of(relatives(build()), coefficients=Clamp(Model(), 0, 1))
    with pytest.raises(ConfigError, match=r"Clamp"):
        set_coefficients(MergedModel(recipe), Constant(1.5))


def test_scales_that_change_nothing_are_refused():
    with pytest.raises(ConfigError, match="give one and the same score"):
        Scales([0.5, 1.0]).run(Constant(1.0), ("a", "b"), lambda init: 0.25)
    assert Scales([0.5]).run(Constant(1.0), ("a",), lambda init: 0.25) == Scaled(Constant(1.0), 0.5)
