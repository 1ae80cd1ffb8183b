"""Moments of units, streamed over batches and sources, against numpy on explicit activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gradmerge import MergeDataModule, TaskData
from gradmerge.alignment.symmetry.spec import Place, UnitGroup
from gradmerge.calibration import activations
from gradmerge.calibration.activations import UnitPasses, place_rows
from gradmerge.common.errors import ConfigError
from gradmerge.engine.opening import Opening
from gradmerge.sources.collected import Needs
from gradmerge.training.collect import engine_of
from tiny import SPLITS, Normalised, Perceptron, build, recipe_of, relatives, vectors

BODY = UnitGroup("body", 8, (Place("body", -1, 0, (8,), 0),))
NORM = UnitGroup("norm", 8, (Place("norm", -1, 0, (8,), 0),))
BOTH = UnitGroup("both", 8, (*BODY.places, *NORM.places))


def passes(models, data, folder, lines=None, **options):
    """The passes over all tasks of sources a, b, ..."""
    recipe = recipe_of(models, **options)
    engine = engine_of(Opening(recipe), data)
    tasks = {name: list(data.tasks) for name in recipe.sources}
    report = (lambda line: None) if lines is None else lines.append
    loaders = dict(zip(data.tasks, data.evaluation_loaders("adaptation"), strict=True))
    return UnitPasses(engine.merged, loaders, tasks, Needs("activations"), folder, report)


def every_pair(names):
    return [(one, two) for i, one in enumerate(names) for two in names[i + 1 :]]


def written(folder, index, group):
    found = load_file(folder / index[group]["file"])
    return {k.split(":")[0]: v.numpy() for k, v in found.items() if k.endswith(f":{group}")}


def explicit(model, data, see):
    """Return `see` of all of a model's batches together, `[rows, units]` in float64."""
    rows = []
    with torch.no_grad():
        for loader in data.evaluation_loaders("adaptation"):
            rows += [see(model.eval(), batch["x"]).double() for batch in loader]
    return torch.cat(rows).numpy()


def of_body(model, x):
    return model.body(x)


def of_norm(model, x):
    return model.norm(model.body(x))


@pytest.mark.parametrize("memory", [1, 7000, 1 << 30])
def test_moments_are_those_of_all_rows_at_once(tmp_path, memory):
    models, data, lines = relatives(build(Normalised), 4), vectors("ab", count=10), []
    run = passes(models, data, tmp_path, lines)
    seen = {"body": [of_body], "norm": [of_norm], "both": [of_body, of_norm]}
    index = run.units([BODY, NORM, BOTH], every_pair("abc"), memory)
    files = {1: 3, 7000: 2, 1 << 30: 1}[memory]  # six matrices of 512 bytes per group
    assert len(list(tmp_path.iterdir())) == files
    assert lines == [
        f"activations of 3 of 3 groups of units from 20 examples through 3 sources, in {files} "
        "readings of the data"
    ]
    assert not np.allclose(models[1].norm.running_mean, models[2].norm.running_mean)
    for group, every in seen.items():
        places = [[explicit(model, data, see) for see in every] for model in models[1:]]
        rows = [np.concatenate(of) for of in places]
        # covariances are those within places, each about its own mean
        apart = [np.concatenate([place - place.mean(0) for place in of]) for of in places]
        got = written(tmp_path, index, group)
        assert index[group]["rows"] == len(rows[0]) == 20 * len(every)
        for i in range(3):
            np.testing.assert_allclose(got[f"mean-{i}"], rows[i].mean(0), atol=1e-12)
            for j in range(i, 3):
                moment = got[f"cross-{i}-{j}" if i < j else f"square-{i}"]
                covariance = moment - np.outer(got[f"mean-{i}"], got[f"mean-{j}"])
                expected = apart[i].T @ apart[j] / len(rows[i])
                np.testing.assert_allclose(covariance, expected, atol=1e-12)
                spread = [
                    np.sqrt(got[f"square-{k}"].diagonal() - got[f"mean-{k}"] ** 2) for k in (i, j)
                ]
                expected = np.corrcoef(apart[i], apart[j], rowvar=False)[:8, 8:]
                np.testing.assert_allclose(covariance / np.outer(*spread), expected, atol=1e-10)


def test_a_reference_runs_once_a_batch_and_every_pair_as_often_as_it_must(tmp_path, monkeypatch):
    models, data = relatives(build(), 5), vectors("ab", count=8, eval_batch_size=4)
    run = passes(models, data, tmp_path)
    calls = []
    rows = activations.rows_of
    monkeypatch.setattr(activations, "rows_of", lambda *args: calls.append(1) or rows(*args))
    to_second = [("b", name) for name in "acd"]
    index = run.units([BODY], to_second)
    assert len(calls) == 4 * 4  # four batches, four sources
    got = written(tmp_path, index, "body")
    assert {key for key in got if key.startswith("cross")} == {
        "cross-1-0",
        "cross-1-2",
        "cross-1-3",
    }
    one, two = (explicit(model, data, of_body) for model in (models[2], models[1]))
    np.testing.assert_allclose(got["cross-1-0"], one.T @ two / len(one), atol=1e-12)
    calls.clear()
    run.units([BODY], every_pair("abcd"))
    assert len(calls) == 4 * (4 + 2 + 1 + 1)  # ab ac ad, bc, bd, cd: what the last pair had is kept


def token_data(count=6):
    """Sequences of different length, padded in batches."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        ids = torch.randint(32, (3 + i % 4,), generator=generator)
        mask = torch.ones(len(ids), dtype=torch.long)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(i % 2)})
    paths = {"adaptation": rows, **dict.fromkeys(SPLITS[1:], rows[:1])}
    described = {"a": TaskData(path=paths, kind="tensors")}
    return MergeDataModule(described, batch_size=3, eval_batch_size=3, check_disjoint=False)


def test_rows_of_padding_do_not_count_and_factors_are_told_apart(tmp_path, family):
    models, _ = family("bert", dtype=torch.float32)
    data = token_data()
    layer = "bert.encoder.layer.1"
    up = f"{layer}.intermediate.dense"
    value = f"{layer}.attention.self.value"
    groups = [
        UnitGroup("up", 24, (Place(up, -1, 0, (24,), 0),)),
        UnitGroup("heads", 2, (Place(value, -1, 0, (2, 8), 0),)),
        UnitGroup("within", 8, (Place(value, -1, 0, (2, 8), 1),)),
        UnitGroup("last", 16, (Place(up, -1, 8, (16,), 0),)),
        UnitGroup("fixed", 3, (Place(up, -1, 0, (3, 8), 0),)),  # the order of its eights is known
    ]
    run = passes(models, data, tmp_path)
    index = run.units(groups, [("a", "b")])
    sources = models[1:3]
    seen = {(k, place): [] for k in range(2) for place in (up, value)}
    for k, model in enumerate(sources):
        hooks = [
            model.get_submodule(place).register_forward_hook(
                lambda _, __, output, key=(k, place): seen[key].append(output[0].double())
            )
            for place in (up, value)
        ]
        with torch.no_grad():
            for row in data.tasks["a"].path["adaptation"]:
                model(input_ids=row["input_ids"][None])  # alone: nothing is padded
        for hook in hooks:
            hook.remove()
    tokens = sum(len(row["input_ids"]) for row in data.tasks["a"].path["adaptation"])
    whole = {key: torch.cat(rows).numpy() for key, rows in seen.items()}
    cut = {
        "up": (up, lambda x: x),
        "heads": (value, lambda x: np.sqrt(np.square(x.reshape(-1, 2, 8)).mean(2))),
        "within": (value, lambda x: np.sqrt(np.square(x.reshape(-1, 2, 8)).mean(1))),
        "fixed": (up, lambda x: x.reshape(-1, 3, 8).transpose(0, 2, 1).reshape(-1, 3)),
        "last": (up, lambda x: x[:, 8:]),
    }
    rows_a_token = {"up": 1, "heads": 1, "within": 1, "last": 1, "fixed": 8}
    for group, (place, see) in cut.items():
        a, b = (see(whole[k, place]) for k in range(2))
        got = written(tmp_path, index, group)
        assert index[group]["rows"] == len(a) == tokens * rows_a_token[group]
        np.testing.assert_allclose(got["cross-0-1"], a.T @ b / len(a), atol=1e-5)
        np.testing.assert_allclose(got["square-1"], b.T @ b / len(b), atol=1e-5)


def test_channels_of_a_convolution_count_positions_as_rows():
    place = Place("conv", -3, 2, (2, 3), 0)
    output = torch.randn(4, 10, 5, 6)
    rows = place_rows(place, output, torch.ones(4, 10))
    assert rows.shape == (4 * 3 * 5 * 6, 2)
    expected = output[:, 2:8].reshape(4, 2, 3, 5, 6)
    for unit in range(2):
        assert torch.equal(rows[:, unit].sort()[0], expected[:, unit].flatten().sort()[0])
    assert torch.equal(rows.sum(dim=1).sort()[0], expected.sum(dim=1).flatten().sort()[0])
    assert torch.equal(place_rows(place, (output, None), None), rows)


class Twice(nn.Module):
    """One activation module called twice."""

    def __init__(self):
        super().__init__()
        self.body, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.head(self.act(self.second(self.act(self.body(x)))))


def test_calls_of_one_module_are_told_apart(tmp_path):
    models, data = relatives(build(Twice)), vectors(count=8)
    groups = [
        UnitGroup("first", 8, (Place("act", -1, 0, (8,), 0, call=0),)),
        UnitGroup("second", 5, (Place("act", -1, 0, (5,), 0, call=1),)),
    ]
    index = passes(models, data, tmp_path).units(groups, [("a", "b")])

    def first(model, x):
        return model.body(x).relu()

    def second(model, x):
        return model.second(first(model, x)).relu()

    for group, see in (("first", first), ("second", second)):
        rows = explicit(models[2], data, see)
        np.testing.assert_allclose(
            written(tmp_path, index, group)["square-1"], rows.T @ rows / len(rows), atol=1e-12
        )


class Fickle(Perceptron):
    """Sees more rows the larger its first weight is."""

    def forward(self, x):
        times = 2 if self.body.weight[0, 0] > 0 else 1
        return self.head(self.body(x.repeat(times, 1)).tanh())[: len(x)]


def test_a_network_whose_course_depends_on_its_weights_is_refused(tmp_path):
    models, data = relatives(build(Fickle)), vectors(count=4)
    with torch.no_grad():
        models[1].body.weight[0, 0], models[2].body.weight[0, 0] = 1.0, -1.0
    message = "task a: the units of body gave other rows in b than in a"
    with pytest.raises(ConfigError, match=message):
        passes(models, data, tmp_path).units([BODY], [("a", "b")])


def test_groups_that_never_ran_are_refused(tmp_path):
    models, data = relatives(build(extra=True)), vectors(count=4)
    group = UnitGroup("extra", 2, (Place("extra", -1, 0, (2,), 0),))
    with pytest.raises(ConfigError, match="not every module that shows the units of extra ran in"):
        passes(models, data, tmp_path).units([BODY, group], [("a", "b")])
    nowhere = UnitGroup("nowhere", 8)
    assert set(passes(models, data, tmp_path).units([BODY, nowhere], [("a", "b")])) == {"body"}


def test_activations_that_are_not_finite_are_refused(tmp_path):
    models, data = relatives(build()), vectors(count=4)
    with torch.no_grad():
        models[2].body.weight.mul_(3e38).sign_().mul_(3e38)  # finite, but sums of them are not
    with pytest.raises(ConfigError, match="source b gave numbers that are not finite in"):
        passes(models, data, tmp_path).units([BODY], [("a", "b")])


def test_no_data_at_all_is_refused(tmp_path):
    run = passes(relatives(build()), vectors(count=4), tmp_path)
    run.loaders = dict.fromkeys(run.loaders, ())
    with pytest.raises(ConfigError, match="the sources gave no activations: the tasks have no"):
        run.units([BODY], [("a", "b")])


def test_sources_run_with_their_own_heads(tmp_path):
    models, data = relatives(build()), vectors(count=8)
    group = UnitGroup("classes", 3, (Place("head", -1, 0, (3,), 0),))
    index = passes(models, data, tmp_path, private=["head"]).units([group], [("a", "b")])
    rows = [explicit(model, data, lambda model, x: model(x)) for model in models[1:]]
    np.testing.assert_allclose(
        written(tmp_path, index, "classes")["cross-0-1"],
        rows[0].T @ rows[1] / len(rows[0]),
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("order", "flat"),
    [
        ("btcw", False),
        ("bctw", False),
        ("bcwt", False),
        ("btwc", True),
        ("tbcw", False),
        ("ctbw", False),
        ("wcbt", None),
    ],
)
def test_padding_is_left_out_of_every_layout_that_tells_it(order, flat):
    """Batch 3, tokens 5; where neither is where it may stand, all rows stay."""
    sizes = {"b": 3, "t": 5, "c": 4, "w": 2}
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, 4, 2, generator=generator)
    mask = (torch.arange(5) < torch.tensor([5, 3, 1])[:, None]).long()
    laid = values.permute(["btcw".index(name) for name in order])
    laid = laid.flatten(0, 1) if flat else laid
    axis = order.index("c") - 4
    rows = place_rows(Place("m", axis, 0, (sizes["c"],), 0), laid, mask)
    kept = values.flatten(0, 1) if flat is None else values[mask != 0]
    wanted = kept.movedim(1, -1).reshape(-1, 4)
    assert rows.shape == wanted.shape
    assert torch.equal(*(torch.tensor(sorted(r.tolist())) for r in (rows, wanted)))


def test_outputs_without_tokens_hold_no_padding():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    place = Place("m", -1, 0, (4,), 0)
    for shape in ((2, 4), (2, 7, 4), (3, 4)):
        assert len(place_rows(place, torch.randn(shape), mask)) == torch.Size(shape[:-1]).numel()
