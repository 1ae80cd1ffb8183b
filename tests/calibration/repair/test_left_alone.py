"""Layers that REPAIR leaves alone, and the order in which it corrects the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradmerge import MergedModel, Recipe
from gradmerge.calibration.repair.survey import in_order
from gradmerge.coefficients import Constant, Model, Uniform
from gradmerge.common.errors import ConfigError
from gradmerge.finalisers import REPAIR
from repairing import (
    GIVEN,
    LAST,
    assert_statistics,
    averages,
    channels,
    exported,
    images,
    networks,
    repaired,
    vectors,
)


class Standardised(nn.Linear):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=1, keepdim=True)
        return nn.functional.linear(x, weight, self.bias)


class Odd(nn.Module):
    """Layers that cannot be corrected, each for a reason of its own."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.standardised = Standardised(6, 6)
        self.frozen, self.skipped = nn.Linear(6, 6), nn.Linear(6, 6)
        self.partly = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.uncalled = nn.Linear(2, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.twice(self.norm(self.twice(x)).relu()).relu())
        x = self.standardised(self.other(self.one(x)).relu()).relu()
        return self.head(self.partly(self.skipped(self.frozen(x)).relu()).relu())


def test_what_cannot_be_corrected_is_left_alone_and_named():
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Odd().eval())
    merged, found = repaired(
        models,
        vectors(30),
        REPAIR(skip=["^skipped"]),
        frozen={r"^frozen\.": "mean", r"partly\.bias": "mean"},
    )
    assert found.survey.left == {
        "twice.weight": "it is called 2 times a pass",
        "norm.weight": "it is called 2 times a pass",
        "one.weight": "its weight is shared by one.weight, other.weight",
        "standardised.weight": "its weight is transformed before use",
        "frozen.weight": "it is frozen",
        "skipped.weight": "skip names it",
        "head.weight": LAST,
        "uncalled.weight": "no pass calls it",
    }
    assert merged.state.corrections.report["scale alone"] == ["partly.weight"]
    places = ["partly"]
    twin, expected = exported(merged, models[0]), averages(models, vectors(30), places)
    assert_statistics(channels(twin, vectors(30), places), expected, mean=False)
    average = {
        n: (p + dict(models[1].named_parameters())[n]) / 2 for n, p in models[0].named_parameters()
    }
    for name, tensor in twin.named_parameters():
        same = torch.allclose(tensor, average[name], atol=1e-6)
        assert same == (name != "partly.weight"), name


class Loops(nn.Module):
    """The course depends on the batch's size, and on a number among the weights."""

    def __init__(self):
        super().__init__()
        self.first, self.loop, self.side = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.third, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.level = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        x, size = self.first(x).relu(), len(x)
        for _ in range(1 + size % 2):
            x = self.loop(x).relu()
        if size > 20:
            x = self.side(x).relu()
        x = self.third(x).relu()
        if self.level > 0:
            x = self.third(x).relu()
        return self.head(x)


def loops(*levels):
    models = []
    for seed, level in enumerate(levels):
        torch.manual_seed(seed)
        models.append(Loops().eval())
        models[-1].level.data.fill_(level)
    return models


def test_calls_are_those_of_all_batches():
    """Called twice on the third batch alone; called on the second and third alone."""
    models, batches = loops(-1, -2), vectors(20, 30, 31)
    merged, found = repaired(models, batches)
    report = merged.state.corrections.report
    assert report["corrected"] == ["first.weight", "side.weight", "third.weight"]
    assert report["left alone"] == {
        "loop.weight": "it is called 2 times a pass",
        "head.weight": LAST,
    }
    assert [[layer.place for layer in stage] for stage in found.survey.stages] == [
        ["first"],
        ["side"],
        ["third"],
    ]
    twin, places = exported(merged, models[0]), ["first", "side", "third"]
    assert_statistics(channels(twin, batches, places), averages(models, batches, places))


def test_calls_are_those_of_all_sources():
    models, batches = loops(-1, 2), vectors(20, 30)
    merged, _ = repaired(models, batches)
    report = merged.state.corrections.report
    assert report["corrected"] == ["first.weight", "loop.weight", "side.weight"]
    assert report["left alone"]["third.weight"] == "source b calls it 2 times a pass"
    twin, places = exported(merged, models[0]), ["first", "loop", "side"]
    assert_statistics(channels(twin, batches, places), averages(models, batches, places))


@pytest.mark.parametrize("sizes", [[30], [30, 40]])
def test_a_layer_that_the_merged_network_alone_calls_again_is_refused(sizes):
    """Coefficients that leave the sources' range turn the number's sign."""
    models, batches = loops(-1, -2), vectors(*sizes)
    message = r"merged network calls third more than once.*Name third.weight in `skip`"
    with pytest.raises(ConfigError, match=message):
        repaired(models, batches, init=Constant([1.0, -0.9]))
    merged, _ = repaired(models, batches, REPAIR(skip=["^third"]), init=Constant([1.0, -0.9]))
    assert "third.weight" not in merged.state.corrections.report["corrected"]


class Experts(nn.Module):
    """Rows go to one of two experts by the sign of a number; each is called on its rows."""

    def __init__(self, norm=False):
        super().__init__()
        kind = (lambda: nn.BatchNorm1d(6)) if norm else (lambda: nn.Linear(6, 6))
        self.first = nn.Linear(6, 6)
        self.experts, self.head = nn.ModuleList(kind() for _ in range(2)), nn.Linear(6, 3)

    def forward(self, x):
        chosen = (x[:, 0] > 0).long()
        x = self.first(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[chosen == i] = expert(x[chosen == i])
        return self.head(y.relu())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sizes", [(8,), (8, 4)])
def test_an_expert_that_no_row_reaches_is_named(sizes, norm):
    torch.manual_seed(0)
    models = [Experts(norm).eval() for _ in range(2)]
    batches = [batch.abs() for batch in vectors(*sizes)]
    merged, _ = repaired(models, batches, buffers="mean")
    report = merged.state.corrections.report
    assert report["corrected"] == ["first.weight", "experts.1.weight"]
    assert report["left alone"] == {
        "experts.0.weight": "no row of the data reaches it in the merged network",
        "head.weight": LAST,
    }
    before, after = (
        MergedModel(
            Recipe(dict(zip("ab", models, strict=True)), coefficients=Model(), init=Uniform())
        ),
        exported(merged, models[0]),
    )
    kept = before.state.materialise("experts.0.weight")
    torch.testing.assert_close(after.experts[0].weight, nn.Parameter(kept))


class Turned(Loops):
    """Two layers change places with the batch's size."""

    def forward(self, x):
        order = (self.side, self.loop) if len(x) > 20 else (self.loop, self.side)
        x = self.first(x).relu()
        for layer in order:
            x = layer(x).relu()
        return self.head(self.third(x).relu())


def test_orders_of_calls_that_contradict_each_other_are_refused():
    models = [Turned().eval(), Turned().eval()]
    with pytest.raises(ConfigError, match=r"batches call loop, side in orders that"):
        repaired(models, vectors(20, 30))
    merged, _ = repaired(models, vectors(20, 30), REPAIR(skip=[r"^side\."]))
    places = ["first", "loop", "third"]
    twin, expected = exported(merged, models[0]), averages(models, vectors(20, 30), places)
    got = channels(twin, vectors(20, 30), places)
    assert_statistics(got, expected)


def test_one_order_keeps_that_of_every_batch():
    assert in_order(["124", "234", "35"]) == list("12345")
    assert in_order([]) == []


class Detector(nn.Module):
    """Class and box heads behind one trunk; an output that another layer reads; a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.stem, self.trunk = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.classes, self.boxes = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 8, 1)
        self.coarse, self.fine = nn.Linear(6, 5), nn.Linear(11, 3)
        self.project = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        features = self.trunk(self.stem(x).relu()).relu()
        boxes = torch.empty(len(x), 2, features[0, 0].numel(), 4)
        boxes[:] = self.boxes(features).unflatten(1, (2, 4)).flatten(3).mT
        classes = self.classes(features).permute(0, 2, 3, 1).reshape(len(x), -1, 4)
        pooled = features.mean(dim=(2, 3))
        coarse = self.coarse(pooled)
        fine = self.fine(torch.cat([pooled, coarse.softmax(dim=1)], dim=1))
        found = {"boxes": [boxes], "classes": classes.softmax(dim=-1)}
        return found, (coarse[:, :], fine.squeeze(1)), self.norm(self.project(pooled))


def test_no_output_of_the_network_is_corrected():
    """Output layers keep the average of the sources, whichever was called last."""
    models, batches = networks(Detector), images(16, 5)
    merged, found = repaired(models, batches)
    assert found.survey.left == {
        "classes.weight": LAST,
        "boxes.weight": LAST,
        "coarse.weight": GIVEN,
        "fine.weight": LAST,
        "norm.weight": LAST,
        "project.weight": "it feeds a BatchNorm",
    }
    assert merged.state.corrections.report["corrected"] == ["stem.weight", "trunk.weight"]
    twin, places = exported(merged, models[0]), ["stem", "trunk"]
    assert_statistics(channels(twin, batches, places), averages(models, batches, places))
    for name, tensor in twin.named_parameters():
        if not name.startswith(("stem", "trunk")):
            average = sum(dict(model.named_parameters())[name] for model in models) / 2
            torch.testing.assert_close(tensor, average, rtol=1e-6, atol=1e-7)
    seen = channels(twin, batches, ["project"])["project"][0].float()
    torch.testing.assert_close(twin.norm.running_mean, seen, rtol=1e-4, atol=1e-5)


def test_nothing_to_correct_is_an_error():
    models = [nn.Linear(6, 3), nn.Linear(6, 3)]
    with pytest.raises(
        ConfigError, match=r"no layer to correct.*outputs \(weight: it is a last layer"
    ):
        repaired(models, vectors(9))
