"""Searches on known scores, and scores of a real merge on the selection split."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from gradmerge import MergeDataModule, MergeModule, TaskData
from gradmerge.coefficients import Clamp, Constant, DepthRamp, Mixup, Model, Scaled, Tensor
from gradmerge.common.errors import ConfigError
from gradmerge.common.spec import from_plain
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.operators import DisjointMean
from gradmerge.preprocess import ElectSign, Trim
from gradmerge.search import Draws, GreedySoup, Scales, soup
from gradmerge.training.search import Scorer, set_coefficients
from tiny import SPLITS, build, examples, recipe_of, relatives

NAMES = ("a", "b", "c", "d")


def greedy(scores):
    """Return the paper's choice from a table of scores by set of members."""
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


def test_a_soup_of_one_source_is_that_source():
    assert GreedySoup().run(Constant(), ("a",), lambda init: 0.0) == Constant([1.0])


def test_scales_choose_the_best_factor_and_the_first_among_equals():
    start = DepthRamp(0.2, 0.4)
    scores = {0.1: 1.0, 0.2: 3.0, 0.5: 3.0, 1.0: 2.0}
    chosen = Scales(list(scores)).run(start, NAMES, lambda init: scores[init.factor])
    assert chosen == Scaled(start, 0.2)
    with pytest.raises(ConfigError, match="at least one value"):
        Scales([])


@pytest.mark.parametrize(
    ("values", "peak", "tried", "chosen"),
    [
        ([0.2, 0.4, 0.6], 0.85, [0.8, 1.0], 0.8),  # by the step
        ([0.25, 0.5, 1.0], 5.0, [2.0, 4.0, 8.0], 4.0),  # by the ratio
        ([0.25, 0.5, 1.0], 0.06, [0.125, 0.0625, 0.03125], 0.0625),
        ([0.3, 0.1, 0.2], 0.05, [0.05, 0.025], 0.05),  # halved, as a step would reach 0
        ([0.2, 0.4, 0.6], 9.0, [0.8, 1.0, 1.2, 1.4], 1.4),
        ([0.2, 0.4, 0.6], 0.4, [], 0.4),
        ([0.0, 0.4, 0.6], -1.0, [], 0.0),
        ([0.4], 9.0, [], 0.4),
    ],
)
def test_a_grid_goes_on_where_its_edge_is_the_best(values, peak, tried, chosen):
    asked = []

    def score(init):
        asked.append(init.factor)
        return -abs(init.factor - peak)

    search = Scales(values)
    if tried:
        with pytest.warns(UserWarning, match=rf"best factor of the grid is .*, and {chosen:g} is"):
            found = search.run(Constant(), NAMES, score)
    else:
        found = search.run(Constant(), NAMES, score)
    assert found == Scaled(Constant(), chosen)
    assert asked == pytest.approx([*values, *tried])
    assert len(asked) <= search.count(len(NAMES))


def test_a_grid_does_not_go_on_if_told_so_and_says_where_it_ends():
    search = Scales([0.2, 0.4], widen=False)
    assert search.count(len(NAMES)) == 2
    with pytest.warns(UserWarning, match=r"is the largest, 0.4; none .*\(widen: true"):
        found = search.run(Constant(), NAMES, lambda init: init.factor)
    assert found == Scaled(Constant(), 0.4)
    with pytest.warns(UserWarning, match="again the last one; give such"):
        Scales([0.2, 0.4]).run(Constant(), NAMES, lambda init: init.factor)


def test_a_grid_does_not_go_on_beyond_a_link():
    models, data = relatives(build()), sealed("ab")
    recipe = recipe_of(models, coefficients=Clamp(Model(), 0, 1), init=Constant(1.0))
    selection = Scorer(MergeModule(recipe, score_experts=False), data)
    selection.score = lambda: {"average": {"loss": -float(selection.module.merged.raw["model"][0])}}
    with pytest.warns(UserWarning, match=r"is the largest, 1; none beyond it was tried\."):
        chosen, found = selection.search(Scales([0.5, 1.0], "loss"))
    assert chosen.factor == 1
    assert len(found["trials"]) == 2


def test_scaled_coefficients_are_the_inner_ones_times_the_factor():
    models = relatives(build())
    for coefficients in (Model(), Tensor(), Clamp(Tensor(), 0, 1)):
        for inner in (Constant([0.2, 0.6]), DepthRamp(0.2, 0.4)):
            plans = [
                open_plan(recipe_of(models, coefficients=coefficients, init=init))
                for init in (inner, Scaled(inner, 0.5))
            ]
            raws = [plan.initial_raw() for plan in plans]
            for name in plans[0].tensors:
                whole, half = (
                    FitState(p, r).coefficient(name) for p, r in zip(plans, raws, strict=True)
                )
                torch.testing.assert_close(half, 0.5 * whole)


class Sealed(list):
    """A split that must not be read."""

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
    """Return a plain network's mean accuracy and cross-entropy on the selection split."""
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
def test_a_search_uses_only_the_selection_split(metric, memory):
    models, data = relatives(build(), count=4), sealed("abc")
    recipe = recipe_of(models, coefficients=Model(), init=Constant(1.0))
    selection = Scorer(MergeModule(recipe, memory=memory, score_experts=False), data)
    values = [0.1, 0.3, 0.5, 1.0]
    chosen, found = selection.search(Scales(values, metric, widen=False))
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
    selection = Scorer(MergeModule(recipe, score_experts=False), data)
    selection.search(GreedySoup("loss"))
    for trial in selection.trials:
        network = merged_network(models, trial.init.value)
        assert trial.average["loss"] == pytest.approx(accuracy_and_loss(network, data)[1], abs=1e-5)


def test_a_missing_score_is_named():
    rows = {s: [{"x": torch.randn(6)}] * 3 for s in SPLITS}
    data = MergeDataModule({"a": TaskData(path=rows, kind="tensors")}, check_disjoint=False)
    from gradmerge.objectives import Entropy

    module = MergeModule(recipe_of(relatives(build(), 2)), Entropy(), score_experts=False)
    with pytest.raises(
        ConfigError, match=r"no accuracy, which the search optimises \(it has loss\)"
    ):
        Scorer(module, data).search(Scales([0.5]))


def test_coefficients_that_a_link_cannot_represent_are_rejected():
    recipe = recipe_of(relatives(build()), coefficients=Clamp(Model(), 0, 1))
    with pytest.raises(ConfigError, match=r"Clamp"):
        set_coefficients(MergedModel(recipe), Constant(1.5))


def test_scales_without_effect_are_rejected():
    with pytest.raises(ConfigError, match="all have the same score"):
        Scales([0.5, 1.0]).run(Constant(1.0), ("a", "b"), lambda init: 0.25)
    assert Scales([0.5]).run(Constant(1.0), ("a",), lambda init: 0.25) == Scaled(Constant(1.0), 0.5)


# ---- M3: the best of several draws ------------------------------------------------------------


def test_draws_are_seeded_mixups_and_the_first_of_the_best_wins():
    scores, asked = [0.1, 0.7, 0.2, 0.7], []

    def score(init):
        asked.append(init)
        return scores[len(asked) - 1]

    chosen = Draws(4, alpha=0.5, per="tensor", seed=7, scale=0.8).run(Constant(), NAMES, score)
    assert asked == [Mixup(0.5, "tensor", 0.8, 7 + i) for i in range(4)]
    assert chosen == asked[1] == Mixup(0.5, "tensor", 0.8, 8)


def test_a_logged_draw_reproduces(tmp_path):
    models, data = relatives(build(), count=3), sealed("ab")
    recipe = recipe_of(models, coefficients=Tensor(), init=Constant(0.0))
    selection = Scorer(MergeModule(recipe, score_experts=False), data)
    chosen, found = selection.search(Draws(5, per="tensor", metric="loss"))
    losses = [trial["selection"]["loss"] for trial in found["trials"]]
    assert len(set(losses)) == 5
    seeds = [trial["init"]["init_args"]["seed"] for trial in found["trials"]]
    assert seeds == [0, 1, 2, 3, 4]
    again = from_plain(found["chosen"])
    assert again == chosen == Mixup(1.0, "tensor", 1.0, seeds[losses.index(min(losses))])
    raw = open_plan(recipe_of(models, coefficients=Tensor(), init=again)).initial_raw()
    assert torch.equal(raw["tensor"], selection.module.merged.raw["tensor"].detach())


@pytest.mark.parametrize("seed", [0, 1])
def test_a_draw_on_ties_is_the_papers_rule_after_an_election(seed):
    """The ratio mixes entries where both sources survive; a lone survivor is kept."""
    models = relatives(build(), count=3)
    init = Mixup(0.5, seed=seed)
    recipe = recipe_of(
        models,
        coefficients=Model(),
        init=init,
        preprocess=[Trim(0.5), ElectSign()],
        operator=DisjointMean(),
    )
    plan = open_plan(recipe)
    raw = plan.initial_raw()
    ratio = raw["model"].flatten().tolist()
    assert sum(ratio) == pytest.approx(1.0, abs=1e-6)
    counts = [0, 0]
    for name in plan.tensors:
        base, *sources = (dict(m.named_parameters())[name].detach().flatten() for m in models)
        trimmed = []
        for source in sources:
            direction = source - base
            kept = direction.abs().argsort(descending=True)[: int(0.5 * len(direction))]
            trimmed.append(torch.zeros_like(direction).index_copy_(0, kept, direction[kept]))
        merged = FitState(plan, raw).materialise(name).flatten()
        for i, (d1, d2) in enumerate(zip(*(t.tolist() for t in trimmed), strict=True)):
            sign = 1 if d1 + d2 >= 0 else -1
            alive = [d if d * sign > 0 else 0.0 for d in (d1, d2)]
            both = bool(alive[0] and alive[1])
            counts[both] += 1
            expected = ratio[0] * alive[0] + ratio[1] * alive[1] if both else sum(alive)
            assert float(merged[i] - base[i]) == pytest.approx(expected, abs=1e-6)
    assert min(counts) > 5


def test_draws_reject_invalid_mixtures():
    with pytest.raises(ConfigError, match="num_draws must be at least 1"):
        Draws(0)
    for make in (lambda: Draws(alpha=0.0), lambda: Mixup(alpha=-1.0)):
        with pytest.raises(ConfigError, match="In M3, alpha <= 0 selects the first"):
            make()
    with pytest.raises(ConfigError, match="expected at least two sources to mix, got a"):
        Draws(2).run(Constant(), ("a",), lambda init: 0.0)


def test_a_search_never_chooses_a_merge_without_a_score(monkeypatch):
    module = MergeModule(recipe_of(relatives(build(), 3), coefficients=Model()))
    described = {
        task: TaskData({s: examples(3 * i + j, 6) for j, s in enumerate(SPLITS)}, kind="tensors")
        for i, task in enumerate("ab")
    }
    selection = Scorer(module, MergeDataModule(described))
    values = iter([float("nan"), 0.5, 0.9, 0.7])
    monkeypatch.setattr(selection, "score", lambda: {"average": {"accuracy": next(values)}})
    chosen, found = selection.search(Draws(num_draws=4))
    assert chosen == from_plain(found["trials"][2]["init"])
    values = iter([float("nan")] * 4)
    with pytest.raises(ConfigError, match="Draws: none of 4 merges has a score"):
        selection.search(Draws(num_draws=4))


def test_an_init_gets_the_same_context_in_a_search_as_in_a_merge():
    """Origin, labels and names, by which `FromMergekit` finds its values."""
    seen = []

    class Look(Constant):
        def coefficient(self, tensor, slot, context):
            seen.append((context.origin, dict(context.labels), context.names, context.sources))
            return super().coefficient(tensor, slot, context)

    recipe = recipe_of(relatives(build(), 3), origin="zero", coefficients=Model(), init=Look(0.5))
    merged = MergedModel(recipe)
    first = seen[0]
    assert first[0] == "zero"
    assert len(first[2]) == 4
    seen.clear()
    set_coefficients(merged, Scaled(Look(0.5), 1.0))
    assert seen[0] == first
