"""Merges of two at a time: what they make, how they go on after a kill, and what they refuse."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
import transformers
import wandb
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from safetensors.torch import load_file
from torch import nn

import tiny
from gradmerge import MergeModule, Recipe, TaskData
from gradmerge.alignment import ActivationMatching, WeightMatching
from gradmerge.coefficients import (
    Clamp,
    Complement,
    Constant,
    Element,
    HardMask,
    Sigmoid,
    Uniform,
)
from gradmerge.coefficients import Tensor as TensorGranularity
from gradmerge.drivers import Continual, Job, Output, Pairwise, Tree
from gradmerge.drivers.fold import FoldedRecipe
from gradmerge.drivers.wandb import finish_wandb_run
from gradmerge.engine.opening import open_plan
from gradmerge.errors import CompatibilityError, ConfigError, FingerprintError
from gradmerge.finalisers import DepthRescale
from gradmerge.objectives import CrossEntropy, KLToEnsemble, KLToSource, Objective
from gradmerge.preprocess import RegMean, Trim
from tiny import (
    SPLITS,
    Normalised,
    Perceptron,
    build,
    close_wandb_run,
    examples,
    relatives,
    save_family,
    trainer_of,
    vectors,
)

NAMES = "abcdef"


def recipe_of(models, **options):
    """Base and sources `a`, `b`, ..., to be merged two at a time."""
    sources = dict(zip(NAMES, models[1:], strict=False))
    return FoldedRecipe(sources, base=models[0], **options)


def job_of(root, models, data=None, learning_rate=0.0, callbacks=(), recipe=None, **options):
    """A job whose trainers take four steps and keep the best of two validations."""
    recipe = recipe or recipe_of(models)

    def make(folder, more, overrides):
        best = ModelCheckpoint(folder / "best", "best", monitor="selection/loss")
        first = [c for c in more if not isinstance(c, Checkpoint)]
        rest = [c for c in more if isinstance(c, Checkpoint)]
        own = {"max_steps": 5, "val_check_interval": 2, "check_val_every_n_epoch": None}
        every = [*first, *callbacks, best, *rest]
        return trainer_of(folder, callbacks=every, **{**own, **overrides})

    output = options.pop("output", None)
    return Job(
        recipe,
        data or vectors(tuple(recipe.sources), check_disjoint=False),
        Path(root),
        make,
        {"learning_rate": learning_rate, **options},
        output,
    )


def average(models):
    states = [model.state_dict() for model in models]
    return {name: torch.stack([s[name].double() for s in states]).mean(dim=0) for name in states[0]}


def tensors(folder):
    return load_file(folder / "model.safetensors")


def provenance(folder):
    return json.loads((folder / "provenance.json").read_text())["driver"]


def assert_equal(folder, expected, tolerance=1e-6):
    found = tensors(folder)
    assert set(found) == set(expected)
    for name, value in found.items():
        torch.testing.assert_close(
            value.double(), expected[name], rtol=tolerance, atol=tolerance, msg=name
        )


# ---- what they make -------------------------------------------------------------------------


@pytest.mark.parametrize("link", [TensorGranularity(), Complement(Sigmoid(Element()))])
def test_a_fold_that_learns_nothing_is_the_plain_average(tmp_path, link):
    models = relatives(build(), 4)
    recipe = recipe_of(models, coefficients=link, origin="zero")
    folder = Pairwise().run(job_of(tmp_path, models, recipe=recipe))
    assert folder == tmp_path / "merged"
    assert_equal(folder, average(models[1:]))
    said = provenance(folder)
    assert [step["merged"] for step in said["steps"]] == [[["a"], ["b"]], [["a", "b"], ["c"]]]
    assert [list(step["coefficients"].values()) for step in said["steps"]] == [
        pytest.approx([1 / 2, 1 / 2]),
        pytest.approx([2 / 3, 1 / 3]),
    ]
    assert [step["tasks"] for step in said["steps"]] == [["a", "b"], ["a", "b", "c"]]
    hashes = {name: entry["sha256"] for name, entry in said["sources"].items()}
    assert hashes == job_of(tmp_path, models, recipe=recipe).fingerprints
    assert said["steps"][1]["fingerprints"]["c"] == hashes["c"]
    card = (folder / "README.md").read_text()
    assert "A merge of 3 checkpoints" in card
    assert "2. a + b with c (mean coefficients 0.667, 0.333)" in card
    stored = tensors(tmp_path / "driver/steps/step-1/merged")
    assert {value.dtype for value in stored.values()} == {torch.float32}


@pytest.mark.parametrize("count", [4, 5])
def test_a_tree_that_learns_nothing_is_the_plain_average(tmp_path, count):
    models = relatives(build(), count + 1)
    folder = Tree(tasks="all", keep_steps=False).run(job_of(tmp_path, models))
    assert_equal(folder, average(models[1:]))
    expected = [[["a"], ["b"]], [["c"], ["d"]], [["a", "b"], ["c", "d"]]]
    if count == 5:  # the odd one out advances
        expected += [[["a", "b", "c", "d"], ["e"]]]
    found = provenance(folder)["steps"]
    assert [step["merged"] for step in found] == expected
    assert all(step["tasks"] == list(NAMES[:count]) for step in found)
    assert not list((tmp_path / "driver").rglob("merged")), "each was removed once merged on"


def test_the_order_is_the_one_stated_and_it_counts(tmp_path):
    models = relatives(build(), 4)
    folders = [
        Pairwise(order=order).run(job_of(tmp_path / str(i), models, learning_rate=0.1))
        for i, order in enumerate((["c", "a", "b"], "given"))
    ]
    first, second = (provenance(folder)["steps"] for folder in folders)
    assert [step["merged"] for step in first] == [[["c"], ["a"]], [["c", "a"], ["b"]]]
    assert [step["merged"] for step in second] == [[["a"], ["b"]], [["a", "b"], ["c"]]]
    one, other = map(tensors, folders)
    assert any(not torch.allclose(one[name], other[name], atol=1e-3) for name in one)


def test_a_step_may_start_at_the_recipe_s_init(tmp_path):
    models = relatives(build(), 3)
    recipe = recipe_of(models, init=Constant(0.3))
    folder = Pairwise(start="recipe").run(job_of(tmp_path, models, recipe=recipe))
    base, a, b = (model.state_dict() for model in models)
    expected = {
        name: base[name].double() + 0.3 * (a[name] + b[name] - 2 * base[name]).double()
        for name in base
    }
    assert_equal(folder, expected)


def test_learning_in_steps_lowers_the_loss(tmp_path):
    models = relatives(build(), 4)
    before = Pairwise().run(job_of(tmp_path / "0", models))
    after = Pairwise().run(job_of(tmp_path / "1", models, learning_rate=0.1))
    losses = [
        [step["results"]["selection"]["average"]["loss"] for step in provenance(folder)["steps"]]
        for folder in (before, after)
    ]
    assert losses[1][0] < losses[0][0]
    assert losses[1][1] < losses[0][1]


def test_weights_of_tasks_that_join_later_are_no_mistake(tmp_path):
    objective = Objective([CrossEntropy()], task_weights={"c": 2.0})
    models = relatives(build(), 4)
    Pairwise().run(job_of(tmp_path, models, objective=objective))
    objective = Objective([CrossEntropy()], task_weights={"d": 2.0})
    with pytest.raises(ConfigError, match="'d' is no task; there are a, b, c"):
        Pairwise().run(job_of(tmp_path / "other", models, objective=objective))


@pytest.mark.parametrize("given", [Objective([KLToEnsemble()]), KLToEnsemble()])
def test_an_ensemble_is_of_two_sources_or_refused(tmp_path, given):
    """In a second step the merge so far would be one of its members."""
    with pytest.raises(ConfigError, match=r"Pairwise: KLToEnsemble averages .* of 2 steps all but"):
        Pairwise().run(job_of(tmp_path / "three", relatives(build(), 4), objective=given))
    assert not (tmp_path / "three").exists()
    folder = Pairwise().run(job_of(tmp_path / "two", relatives(build(), 3), objective=given))
    assert (folder / "provenance.json").is_file()


def test_batch_norm_statistics_are_those_of_the_exported_network(tmp_path):
    models = relatives(build(Normalised), 4)
    data = vectors("abc", check_disjoint=False)
    folder = Pairwise().run(job_of(tmp_path, models, data, learning_rate=0.1))
    found = tensors(folder)
    twin = build(Normalised)
    twin.load_state_dict(found)
    twin.norm.reset_running_stats()
    twin.norm.momentum = None
    x = torch.stack([row["x"] for t in "abc" for row in data.tasks[t].path["adaptation"]])
    with torch.no_grad():
        twin.train()(x)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            found[f"norm.{name}"], getattr(twin.norm, name), rtol=1e-5, atol=1e-6
        )


# ---- heads ----------------------------------------------------------------------------------


def of_several_classes(count=3):
    """Experts with heads of 3, 4, 5... classes, and data of as many."""
    models = relatives(build(), count + 1)
    for i, model in enumerate(models[1:]):
        torch.manual_seed(i)
        model.head = nn.Linear(8, 3 + i)
    tasks = {}
    for i, name in enumerate(NAMES[:count]):
        splits = {s: examples(100 * i + j, 12, 3 + i) for j, s in enumerate(SPLITS)}
        tasks[name] = TaskData(path=splits, kind="tensors")
    data = vectors("abc", check_disjoint=False)
    data.tasks = tasks
    return models, data


def assert_own_heads(folder, models, data, tolerance=1e-6):
    """Each task's folder has its expert's head, and its score is of that head."""
    results = json.loads((folder / "provenance.json").read_text())["results"]["selection"]
    body = nn.Linear(6, 8)
    found = tensors(folder)
    body.load_state_dict({name: found[f"body.{name}"] for name in ("weight", "bias")})
    for name, model in zip(data.tasks, models[1:], strict=False):
        own = load_file(folder / "tasks" / name / "head.safetensors")
        assert torch.equal(own["head.weight"], model.head.weight)
        rows = data.tasks[name].path["selection"]
        x, y = (torch.stack([row[key] for row in rows]) for key in ("x", "labels"))
        with torch.no_grad():
            logits = model.head(body(x).tanh())
        loss = nn.functional.cross_entropy(logits, y).item()
        assert results[name]["loss"] == pytest.approx(loss, rel=1e-5)
        accuracy = (logits.argmax(dim=1) == y).float().mean().item()
        assert results[name]["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("driver", [Pairwise(), Tree(tasks="all")])
def test_each_task_keeps_its_own_head(tmp_path, driver):
    models, data = of_several_classes()
    recipe = recipe_of(models, private=["head"])
    folder = driver.run(job_of(tmp_path, models, data, 0.1, recipe=recipe))
    assert_own_heads(folder, models, data)
    steps = tmp_path / "driver/steps/step-1/merged/tasks"
    assert {path.name for path in steps.iterdir()} >= {"a", "b"}


def test_the_teacher_of_a_task_is_its_own_source(tmp_path):
    """Before any step the loss of the second merge is the divergence from a, b and c."""
    models = relatives(build(), 4)
    objective = Objective([KLToSource(temperature=1.0)])
    data = vectors("abc", check_disjoint=False)
    folder = Pairwise().run(job_of(tmp_path, models, data, objective=objective))
    merged = build()
    merged.load_state_dict(tensors(folder))
    results = json.loads((folder / "provenance.json").read_text())["results"]["selection"]
    for name, model in zip("abc", models[1:], strict=True):
        x = torch.stack([row["x"] for row in data.tasks[name].path["selection"]])
        with torch.no_grad():
            student, teacher = merged(x).log_softmax(-1), model(x).log_softmax(-1)
        loss = nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
        assert results[name]["loss"] == pytest.approx(loss.item(), rel=1e-4)


# ---- continual ------------------------------------------------------------------------------


def continue_(tmp_path, models, earlier, names, data=None, recipe=None, **options):
    """Further sources onto a folder."""
    own = {name: options.pop(name) for name in ("projection", "alpha") if name in options}
    chosen = {n: models[1 + NAMES.index(n)] for n in names}
    recipe = recipe or FoldedRecipe(chosen, base=models[0])
    job = job_of(tmp_path, models, data, recipe=recipe, **options)
    return Continual(earlier=str(earlier), **own).run(job)


def test_new_sources_join_an_earlier_merge_with_their_share(tmp_path):
    models = relatives(build(), 5)
    recipe = FoldedRecipe({"a": models[1], "b": models[2]}, base=models[0])
    earlier = Pairwise().run(job_of(tmp_path / "0", models, recipe=recipe))
    folder = continue_(tmp_path / "1", models, earlier, "cd")
    assert_equal(folder, average(models[1:]))
    said = provenance(folder)
    assert said["members"] == ["a", "b", "c", "d"]
    assert list(said["sources"]) == ["base", "a", "b", "c", "d"]
    assert [list(step["coefficients"].values()) for step in said["steps"]] == [
        pytest.approx([2 / 3, 1 / 3]),
        pytest.approx([3 / 4, 1 / 4]),
    ]
    # and on from there: the folder says who is in it
    more = relatives(build(), 6)
    last = continue_(tmp_path / "2", more, folder, "e")
    assert_equal(last, average(more[1:]))


def test_learning_on_new_tasks_alone_is_warned_of(tmp_path):
    """It forgets the earlier ones; with any of their data nothing is said."""
    models = relatives(build(), 4)
    recipe = FoldedRecipe({"a": models[1], "b": models[2]}, base=models[0])
    earlier = Pairwise().run(job_of(tmp_path / "0", models, recipe=recipe))
    with pytest.warns(UserWarning, match=r"no task is of a, b, which the earlier merge serves"):
        continue_(tmp_path / "1", models, earlier, "c", vectors("c"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Continual: no task")
        continue_(tmp_path / "2", models, earlier, "c", vectors("bc", check_disjoint=False))


def opcm(base, sources, alpha, scale=1.0, count=1):
    """The recursion as published, in float64, by tensor; norms are the model's.

    The first of `sources` may be a merge of `count` sources, with its lambda.
    """
    deltas = [
        {k: v.double().numpy() - base[k].double().numpy() for k, v in s.items()} for s in sources
    ]
    length = lambda d: np.sqrt(sum((v**2).sum() for v in d.values()))  # noqa: E731
    merged, mean = deltas[0], length(deltas[0])
    scales = []
    for new in deltas[1:]:
        total = {}
        for name, delta in new.items():
            old = merged[name]
            if delta.ndim == 2:
                u, s, vt = np.linalg.svd(old)
                rank = int(np.argmax(np.cumsum(s) > alpha * s.sum()))
                inner = u.T @ delta @ vt.T
                np.fill_diagonal(inner, 0)
                inner[:rank, :rank] = 0
                delta = u @ inner @ vt
            total[name] = scale * old + delta
        mean = (count * mean + length(new)) / (count + 1)
        count += 1
        scale = length(total) / mean
        scales.append(scale)
        merged = {name: value / scale for name, value in total.items()}
    return {k: torch.from_numpy(base[k].double().numpy() + v) for k, v in merged.items()}, scales


def test_projection_is_opcm_s_recursion_one_source_at_a_time(tmp_path):
    """Onto a single source first, whose lambda is 1; then on from the folder that it wrote."""
    models = relatives(build(), 5)
    states = [model.state_dict() for model in models]
    first = tmp_path / "first"
    recipe = FoldedRecipe({"a": models[1]}, base=models[0], init=Constant(1.0))
    write_single(first, recipe)
    folder = continue_(tmp_path / "1", models, first, "bc", projection=True, alpha=0.4)
    expected, scales = opcm(states[0], states[1:4], 0.4)
    assert_equal(folder, expected, 2e-5)
    steps = provenance(folder)["steps"]
    assert [step["lambda"] for step in steps] == pytest.approx(scales, rel=1e-5)
    assert scales[0] > 1.1
    folder = continue_(tmp_path / "2", models, folder, "d", projection=True, alpha=0.4)
    expected, _ = opcm(states[0], states[1:], 0.4)
    assert_equal(folder, expected, 2e-5)


def write_single(folder, recipe):
    from gradmerge.engine.opening import open_plan
    from gradmerge.export.folder import export_plan

    plan = open_plan(recipe, with_skeleton=False)
    export_plan(plan, plan.initial_raw(), folder)


def test_an_earlier_merge_of_another_kind_counts_as_orthogonal_directions(tmp_path):
    models = relatives(build(), 4)
    states = [model.state_dict() for model in models]
    recipe = FoldedRecipe({"a": models[1], "b": models[2]}, base=models[0])
    earlier = Pairwise().run(job_of(tmp_path / "0", models, recipe=recipe))
    folder = continue_(tmp_path / "1", models, earlier, "c", projection=True)
    merged = tensors(earlier)
    expected, _ = opcm(states[0], [merged, states[3]], 0.5, 2**0.5, 2)
    assert_equal(folder, expected, 2e-5)


def test_a_continual_merge_keeps_heads_and_takes_the_earlier_merge_as_teacher(tmp_path):
    models, data = of_several_classes()
    first = data.restricted("ab")
    recipe = FoldedRecipe({"a": models[1], "b": models[2]}, base=models[0], private=["head"])
    earlier = Pairwise().run(job_of(tmp_path / "0", models, first, 0.1, recipe=recipe))
    recipe = FoldedRecipe({"c": models[3]}, base=models[0], private=["head"])
    objective = Objective([KLToSource(temperature=1.0)])
    options = {"recipe": recipe, "objective": objective}
    folder = continue_(tmp_path / "1", models, earlier, "c", data, **options)
    found, before = tensors(folder), tensors(earlier)
    results = json.loads((folder / "provenance.json").read_text())["results"]["selection"]
    for name, model in zip("abc", models[1:], strict=True):
        own = load_file(folder / "tasks" / name / "head.safetensors")
        assert torch.equal(own["head.weight"], model.head.weight)
        rows = torch.stack([row["x"] for row in data.tasks[name].path["selection"]])

        def logits(weights, x=rows, model=model):
            hidden = x @ weights["body.weight"].T + weights["body.bias"]
            return model.head(hidden.tanh()).log_softmax(-1)

        with torch.no_grad():
            teacher = logits(before if name in "ab" else model.state_dict())
            loss = nn.functional.kl_div(
                logits(found), teacher, log_target=True, reduction="batchmean"
            )
        assert results[name]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    # without the earlier tasks' data their heads travel all the same
    folder = continue_(tmp_path / "2", models, earlier, "c", data.restricted("c"), recipe=recipe)
    for name, model in zip("abc", models[1:], strict=True):
        own = load_file(folder / "tasks" / name / "head.safetensors")
        assert torch.equal(own["head.weight"], model.head.weight)


def test_what_an_earlier_merge_must_say(tmp_path):
    models = relatives(build(), 4)
    recipe = FoldedRecipe({"a": models[1], "b": models[2]}, base=models[0])
    earlier = Pairwise().run(job_of(tmp_path / "0", models, recipe=recipe))
    with pytest.raises(ConfigError, match="earlier: absent: expected a model folder"):
        continue_(tmp_path / "1", models, "absent", "c")
    with pytest.raises(ConfigError, match=r"b: the earlier merge .* has a source of that name"):
        continue_(tmp_path / "1", models, earlier, "bc")
    moved = copy.deepcopy(models)
    with torch.no_grad():
        moved[0].head.bias.add_(1)
    with pytest.raises(ConfigError, match="is a merge over another base"):
        continue_(tmp_path / "1", moved, earlier, "c")
    recipe = FoldedRecipe({"c": models[3]})
    with pytest.raises(ConfigError, match="projection: expected origin base"):
        continue_(tmp_path / "1", models, earlier, "c", recipe=recipe, projection=True)
    recipe = FoldedRecipe({"c": models[3]}, base=models[0], preprocess=[Trim()])
    with pytest.raises(ConfigError, match="projection: it takes the directions as they are"):
        continue_(tmp_path / "1", models, earlier, "c", recipe=recipe, projection=True)
    (earlier / "provenance.json").unlink()
    with pytest.raises(ConfigError, match=r"no provenance\.json that says how many sources"):
        continue_(tmp_path / "1", models, earlier, "c")


# ---- going on -------------------------------------------------------------------------------


class Kill(lightning.Callback):
    """Raises at a hook and optimiser step of the n-th fit."""

    def __init__(self, fit, hook, step):
        self.fit, self.step, self.fits = fit, step, 0
        setattr(self, hook, self.raise_)

    def on_fit_start(self, trainer, pl_module):
        self.fits += 1

    def raise_(self, trainer, *_):
        if self.fits == self.fit and trainer.global_step == self.step and trainer.state.fn == "fit":
            raise RuntimeError("killed")


def files(folder):
    """Time of change and content of everything below a folder."""
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    folder = Pairwise(every_n_steps=1).run(job_of(root, relatives(build(), 4), learning_rate=0.3))
    return tensors(folder), load_file(folder / "coefficients.safetensors")


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 0),
        ("on_train_batch_start", 2),
        ("on_validation_start", 2),
        ("on_validation_epoch_end", 4),
        ("on_train_batch_end", 3),
        ("on_train_end", 5),
    ],
)
def test_a_killed_job_goes_on_bitwise_as_it_would_have(tmp_path, uninterrupted, hook, step):
    models = relatives(build(), 4)
    driver = Pairwise(every_n_steps=1)
    options = {"learning_rate": 0.3}
    with pytest.raises(RuntimeError, match="killed"):
        driver.run(job_of(tmp_path, models, callbacks=[Kill(2, hook, step)], **options))
    assert not (tmp_path / "merged").exists()
    first = tmp_path / "driver/steps/step-1"
    before = files(first)
    went_on = (tmp_path / "driver/steps/step-2/last.ckpt").is_file()
    assert went_on == (step > 0)
    folder = driver.run(job_of(tmp_path, models, **options))
    assert files(first) == before, "a finished step is not touched again"
    merged, coefficients = uninterrupted
    found = load_file(folder / "coefficients.safetensors")
    assert all(torch.equal(found[name], value) for name, value in coefficients.items())
    assert all(torch.equal(tensors(folder)[name], value) for name, value in merged.items())
    assert not torch.allclose(coefficients["body.weight"], torch.tensor([2 / 3, 1 / 3]), atol=1e-2)


FOLDS = {  # driver, its sources, step of the kill, of how many, where the first one starts
    "tree": (Tree, {}, "abcde", 3, 4, [1 / 2, 1 / 2]),
    "continual": (Continual, {}, "cd", 2, 2, [2 / 3, 1 / 3]),
    "continual, projected": (Continual, {"projection": True}, "cd", 2, 2, [1.0, 1.0]),
}


@pytest.mark.parametrize("name", FOLDS)
def test_every_fold_that_was_killed_goes_on_bitwise_as_it_would_have(tmp_path, name):
    kind, options, names, number, count, start = FOLDS[name]
    models = relatives(build(), 6)
    if kind is Continual:
        two = FoldedRecipe(dict(zip("ab", models[1:3], strict=True)), base=models[0])
        earlier = Tree().run(job_of(tmp_path / "first", models, learning_rate=0.3, recipe=two))
        options = {**options, "earlier": str(earlier)}
    sources = {source: models[1 + NAMES.index(source)] for source in names}

    def run(root, *callbacks):
        recipe = FoldedRecipe(sources, base=models[0])
        own = {"learning_rate": 0.3, "callbacks": callbacks, "recipe": recipe}
        driver = kind(every_n_steps=1, **options)
        return driver.run(job_of(tmp_path / root, models, **own))

    whole = run("whole")
    with pytest.raises(RuntimeError, match="killed"):
        run("parts", Kill(number, "on_train_batch_start", 2))
    steps = tmp_path / "parts/driver/steps"
    before = {i: files(steps / f"step-{i}") for i in range(1, number)}
    assert (steps / f"step-{number}/last.ckpt").is_file()
    assert not (tmp_path / "parts/merged").exists()
    found = run("parts")
    for i, content in before.items():
        assert files(steps / f"step-{i}") == content, "a finished step is not touched again"
    for file in ("coefficients.safetensors", "model.safetensors"):
        assert (found / file).read_bytes() == (whole / file).read_bytes()
    said = [provenance(folder)["steps"] for folder in (whole, found)]
    assert len(said[0]) == count
    for first, second in zip(*said, strict=True):
        assert ("lambda" in first) == ("projection" in options)
        for key in ("steps", "coefficients", "results", "lambda"):
            assert first.get(key) == second.get(key), key
    learned = list(said[0][0]["coefficients"].values())
    assert learned != pytest.approx(start, abs=1e-2), "something must have been learned"


def test_a_fit_that_was_told_to_stop_early_does_not_go_on(tmp_path):
    """Killed between the last validation, which stops it, and the end of the step."""

    def job(*more):
        early = EarlyStopping("selection/loss", stopping_threshold=1e9)  # at the first validation
        return job_of(tmp_path, relatives(build(), 3), learning_rate=0.3, callbacks=[early, *more])

    with pytest.raises(RuntimeError, match="killed"):
        Pairwise(every_n_steps=1).run(job(Kill(1, "on_train_end", 2)))
    said = []
    again = job()
    again.say = said.append
    folder = Pairwise(every_n_steps=1).run(again)
    (step,) = provenance(folder)["steps"]
    assert (step["steps"], step["checkpoint"]) == (2, "best.ckpt")
    assert f"going on from {tmp_path}/driver/steps/step-1/last.ckpt" in said


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
def test_a_job_that_validates_at_the_end_of_epochs_goes_on_as_well(tmp_path, hook):
    """Callbacks that watch a score act before the state is saved: there is none after a resume."""

    def job(root, *more):
        models = relatives(build(), 3)
        found = job_of(root, models, learning_rate=1.5, callbacks=more)
        make = found.make_trainer

        def by_epochs(folder, callbacks, overrides):
            early = EarlyStopping("selection/loss", patience=1)
            settings = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1, "max_steps": 12}
            return make(folder, [early, *callbacks], {**overrides, **settings})

        found.make_trainer = by_epochs
        return found

    whole = provenance(Pairwise().run(job(tmp_path / "whole")))["steps"][0]
    with pytest.raises(RuntimeError, match="killed"):
        Pairwise().run(job(tmp_path / "killed", Kill(1, hook, 3)))
    folder = Pairwise().run(job(tmp_path / "killed"))
    again = provenance(folder)["steps"][0]
    for name in ("steps", "checkpoint", "coefficients", "results"):
        assert again[name] == whole[name], name


def test_finalisers_act_once_in_the_last_step(tmp_path):
    models = relatives(build(), 4)
    recipe = recipe_of(models, finalisers=[DepthRescale(0.5, 0.5)])
    folder = Pairwise().run(job_of(tmp_path, models, recipe=recipe))
    base, plain = models[0].state_dict(), average(models[1:])
    for name, value in tensors(folder).items():
        expected = base[name].double() + 0.5 * (plain[name] - base[name].double())
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)


def test_an_output_that_was_moved_is_written_again(tmp_path):
    models = relatives(build(), 4)
    folder = Pairwise().run(job_of(tmp_path, models, learning_rate=0.3))
    kept = tensors(folder)
    folder.rename(tmp_path / "elsewhere")
    assert Pairwise().run(job_of(tmp_path, models, learning_rate=0.3)) == folder
    assert all(torch.equal(value, kept[name]) for name, value in tensors(folder).items())


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import lightning
from test_folds import Pairwise, build, job_of, relatives

class Die(lightning.Callback):
    fits = 0
    def on_fit_start(self, *_):
        Die.fits += 1
    def on_train_batch_start(self, trainer, *_):
        if Die.fits == 2 and trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

models = relatives(build(), 4)
Pairwise(every_n_steps=1).run(job_of(sys.argv[2], models, learning_rate=0.3, callbacks=[Die()]))
"""


@pytest.mark.slow
def test_a_job_that_was_killed_outright_goes_on(tmp_path, uninterrupted):
    here = str(Path(__file__).parent)
    path = os.pathsep.join([str(Path(tiny.__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCRIPT, here, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == -signal.SIGKILL, done.stderr
    job = job_of(tmp_path, relatives(build(), 4), learning_rate=0.3)
    folder = Pairwise(every_n_steps=1).run(job)
    found = load_file(folder / "coefficients.safetensors")
    assert all(torch.equal(found[name], value) for name, value in uninterrupted[1].items())


def test_a_finished_job_does_nothing_again(tmp_path):
    models = relatives(build(), 3)
    folder = Pairwise().run(job_of(tmp_path, models))
    before = files(tmp_path)
    said = []
    job = job_of(tmp_path, models)
    job.say = said.append
    assert Pairwise().run(job) == folder
    assert files(tmp_path) == before
    assert said == [f"this job is finished: {folder}"]


def test_another_job_in_the_folder_is_refused_with_what_differs(tmp_path):
    models = relatives(build(), 4)
    Pairwise().run(job_of(tmp_path, models))
    changed = copy.deepcopy(models)
    with torch.no_grad():
        changed[2].head.bias[0] += 1
    for job, driver, message in (
        (
            job_of(tmp_path, models, learning_rate=0.1),
            Pairwise(),
            r"learning_rate: was 0.0, is 0.1",
        ),
        (job_of(tmp_path, models), Pairwise(tasks="all"), 'tasks: was "members", is "all"'),
        (job_of(tmp_path, models), Tree(), "Pairwise.*Tree"),
        (job_of(tmp_path, changed), Pairwise(), "fingerprints.b: was"),
        (
            job_of(tmp_path, models, vectors("abc", batch_size=3, check_disjoint=False)),
            Pairwise(),
            "batch_size: was 4, is 3",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            driver.run(job)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("job.json", "{}", "got one without `job`"),
        ("job.json", "[]", "got list"),
        ("job.json", '{"job": "x", "seed": 0', r"got something else \(Expecting"),
        ("job.json", '{"job": "x", "seed": 0, "content": null}', "got `content` of type NoneType"),
        ("steps/step-1/step.json", "{}", "got one without `step`"),
        ("steps/step-1/step.json", '{"step": {}}', "got one without `result`"),
    ],
)
def test_a_damaged_record_is_refused_by_name(tmp_path, name, content, message):
    models = relatives(build(), 3)
    folder = Pairwise().run(job_of(tmp_path, models))
    folder.rename(tmp_path / "elsewhere")
    path = tmp_path / "driver" / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"{name}: expected the record .*{message}.*restart"):
        Pairwise().run(job_of(tmp_path, models))
    assert path.read_text() == content
    assert Pairwise(restart=True).run(job_of(tmp_path, models)) == folder


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"driver": 1}', '{"driver": {"job": 1}}'])
def test_a_folder_with_another_provenance_is_not_the_job_s_own(tmp_path, content):
    models = relatives(build(), 3)
    folder = Pairwise().run(job_of(tmp_path, models))
    (folder / "provenance.json").write_text(content)
    with pytest.raises(ConfigError, match="merged exists; give another folder"):
        Pairwise().run(job_of(tmp_path, models))


def test_a_job_begun_anew_moves_the_earlier_one_aside(tmp_path):
    models = relatives(build(), 3)
    Pairwise().run(job_of(tmp_path, models))
    before = files(tmp_path / "driver")
    with pytest.raises(ConfigError, match="merged exists; give another folder"):
        Pairwise(restart=True).run(job_of(tmp_path, models, learning_rate=0.1))
    assert files(tmp_path / "driver") == before
    output = Output(str(tmp_path / "merged"), overwrite=True)
    Pairwise(restart=True).run(job_of(tmp_path, models, learning_rate=0.1, output=output))
    assert files(tmp_path / "driver.before-1") == before
    assert files(tmp_path / "driver").keys() == before.keys()


def test_an_output_of_something_else_is_refused_before_any_step(tmp_path):
    (tmp_path / "merged").mkdir()
    with pytest.raises(ConfigError, match="merged exists; give another folder"):
        Pairwise().run(job_of(tmp_path, relatives(build(), 3)))
    assert not (tmp_path / "driver").exists()


# ---- what they refuse -----------------------------------------------------------------------


def test_what_a_fold_has_no_meaning_for_is_refused(tmp_path):
    models = relatives(build(), 4)

    def refused(driver, message, **options):
        data = options.pop("data", None)
        recipe = recipe_of(options.pop("models", models), **options)
        with pytest.raises(ConfigError, match=message):
            driver.run(job_of(tmp_path, models, data, recipe=recipe))
        assert not (tmp_path / "driver").exists()

    refused(Pairwise(order=["a", "b"]), "order: expected each of a, b, c once, got a, b")
    with pytest.raises(ConfigError, match="every_n_steps: must be at least 1, got 0"):
        Tree(every_n_steps=0)
    refused(Tree(order=["a", "b", "cc"]), "order: 'cc' is no source; there are a, b, c")
    refused(Pairwise(), "expected at least two to merge, got a", models=models[:2])
    refused(Pairwise(), "RegMean: its statistics are of the sources", preprocess=[RegMean()])


@pytest.mark.parametrize(
    ("driver", "link", "message"),
    [
        (
            Pairwise(),
            HardMask(Element()),
            r"step 1 at 0\.5 and 0\.5, .*HardMask: starting .* 0 or 1",
        ),
        (Tree(), Clamp(Element(), 0.0, 0.6), r"step 2 at 0\.6667 and 0\.3333, .* and Clamp cannot"),
    ],
)
def test_a_link_that_no_step_can_start_with_is_refused_before_the_first(
    tmp_path, driver, link, message
):
    models = relatives(build(), 4)
    recipe = recipe_of(models, coefficients=link, init=Constant(1.0))
    with pytest.raises(ConfigError, match=f"start: average begins {message}.*driver.start recipe"):
        driver.run(job_of(tmp_path, models, recipe=recipe))
    assert not (tmp_path / "driver").exists()
    if isinstance(link, HardMask):
        driver = replace(driver, start="recipe")
        assert driver.run(job_of(tmp_path, models, recipe=recipe)).is_dir()


@pytest.mark.parametrize(
    ("alignment", "private", "message"),
    [
        (WeightMatching(), ["head"], "private tensors and alignment do not go together"),
        (
            WeightMatching(reference="b"),
            [],
            "reference: a merge of two at a time aligns",
        ),
        (ActivationMatching(), [], "ActivationMatching: its statistics are of the sources"),
    ],
)
def test_alignments_that_steps_cannot_have_are_refused(alignment, private, message, tmp_path):
    models = relatives(build(), 4)
    sources = dict(zip("abc", models[1:], strict=True))
    recipe = FoldedRecipe(sources, private=private, alignment=alignment, init=Uniform())
    with pytest.raises(ConfigError, match=message):
        Pairwise().run(job_of(tmp_path, models, recipe=recipe))
    assert not (tmp_path / "driver").exists()


def test_a_fold_aligns_each_source_to_the_merge_so_far(tmp_path):
    """Three orders of one network's units: the fold's average is that network again."""
    network = build(Perceptron)
    models = [network]
    for seed in (1, 2):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        moved = copy.deepcopy(network)
        with torch.no_grad():
            moved.body.weight.copy_(network.body.weight[order])
            moved.body.bias.copy_(network.body.bias[order])
            moved.head.weight.copy_(network.head.weight[:, order])
        models.append(moved)
    recipe = FoldedRecipe(
        dict(zip("abc", models, strict=True)),
        alignment=WeightMatching(example={"x": [1, 6]}),
        init=Uniform(),
    )
    folder = Pairwise().run(job_of(tmp_path, models, recipe=recipe))
    found = load_file(folder / "model.safetensors")
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


class LookAtRun(lightning.Callback):
    def __init__(self):
        self.seen = []

    def on_fit_start(self, trainer, pl_module):
        run = trainer.logger.experiment
        self.seen.append((run.id, run.name, run.group))


def wandb_job(folder, look, monkeypatch, env, **options):
    """A job of two steps with a W&B logger, and environment variables `WANDB_*`."""
    for name in ("NAME", "RUN_GROUP", "RUN_ID", "SWEEP_ID", "LAUNCH"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    for name, value in {"MODE": "offline", "SILENT": "true", **env}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    job = job_of(folder, relatives(build(), 4), callbacks=[look])
    make = job.make_trainer

    def logging(root, callbacks, overrides):
        logger = WandbLogger(project="gradmerge", save_dir=folder, offline=True, **options)
        return make(root, callbacks, {**overrides, "logger": logger})

    job.make_trainer = logging
    return job


@pytest.fixture
def wandb_anew():
    """W&B as it is in a new process: it reads the environment anew."""
    wandb.teardown()
    yield
    close_wandb_run()  # else it stays behind, without the service that it logs to
    wandb.teardown()


@pytest.mark.parametrize("set_by_user", [False, True])
def test_runs_of_one_job_are_one_group_of_w_and_b(tmp_path, monkeypatch, wandb_anew, set_by_user):
    env = {"NAME": "mine", "RUN_GROUP": "ours"} if set_by_user else {}
    look = LookAtRun()
    job = wandb_job(tmp_path / "one", look, monkeypatch, env)
    Pairwise(keep_steps=False).run(job)
    finish_wandb_run()
    number = json.loads((job.folder / "job.json").read_text())["job"]
    start, group = ("mine-", "ours") if set_by_user else ("", f"one-{number[:8]}")
    assert [run[1:] for run in look.seen] == [(f"{start}step-1", group), (f"{start}step-2", group)]


@pytest.mark.parametrize("given", ["environment", "logger"])
def test_each_step_has_a_w_and_b_id_of_its_own_and_keeps_it(
    tmp_path, monkeypatch, wandb_anew, given
):
    env, options = ({"RUN_ID": "abc"}, {}) if given == "environment" else ({}, {"id": "abc"})
    look = LookAtRun()
    job = wandb_job(tmp_path / "one", look, monkeypatch, env, **options)
    make = job.make_trainer

    def killed(root, callbacks, overrides):
        return make(root, [*callbacks, Kill(1, "on_train_batch_start", 1)], overrides)

    job.make_trainer = killed
    with pytest.raises(RuntimeError, match="killed"):
        Pairwise().run(job)
    assert wandb.run.id == "abc-step-1"
    job.make_trainer = make
    Pairwise().run(job)
    finish_wandb_run()
    assert [run[0] for run in look.seen] == ["abc-step-1", "abc-step-1", "abc-step-2"]


def test_a_job_in_a_sweep_is_the_one_run_of_its_agent(tmp_path, monkeypatch, wandb_anew):
    look = LookAtRun()
    job = wandb_job(tmp_path / "one", look, monkeypatch, {"SWEEP_ID": "s", "RUN_ID": "abc"})
    Pairwise().run(job)
    assert [run[:2] for run in look.seen] == [("abc", "one")] * 2
    assert len(list((tmp_path / "one" / "wandb").glob("offline-run-*"))) == 1
    finish_wandb_run()
    assert wandb.run.id == "abc"


def test_a_w_and_b_run_that_the_user_opened_stays_open(tmp_path, monkeypatch, wandb_anew):
    look = LookAtRun()
    job = wandb_job(tmp_path / "one", look, monkeypatch, {})
    run = wandb.init(project="gradmerge", dir=tmp_path, mode="offline")
    Pairwise().run(job)
    finish_wandb_run()
    assert wandb.run is run
    run.log({"after": 1})
    assert [seen[0] for seen in look.seen] == [run.id] * 2


def test_a_step_without_tasks_says_so(tmp_path):
    models = relatives(build(), 4)
    data = vectors(("c",), check_disjoint=False)
    with pytest.raises(ConfigError, match="no task is of a, b, which one step merges"):
        Pairwise().run(job_of(tmp_path, models, data))


def test_a_name_serves_as_source_or_as_head(tmp_path):
    base, a, b = relatives(build(Perceptron), 3)
    with pytest.raises(ConfigError, match=r"heads: expected names other than .*, got a;"):
        Recipe({"a": a, "b": b}, base=base, heads={"a": a})
    other = build(Perceptron)
    other.body = nn.Linear(6, 9)
    with pytest.raises(CompatibilityError, match=r"body\.weight"):
        open_plan(Recipe({"a": a}, base=base, heads={"b": other}))


def test_a_head_serves_a_task_of_a_plain_fit(tmp_path):
    models, data = of_several_classes(2)
    recipe = Recipe({"a": models[1]}, base=models[0], private=["head"], heads={"b": models[2]})
    module = MergeModule(recipe, learning_rate=0.1)
    trainer = trainer_of(tmp_path, max_steps=2)
    trainer.fit(module, datamodule=data)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert module.merged(task="b", x=x).shape == (4, 4)
        with module.merged.as_source("b"):
            came = module.merged(task="b", x=x)
        torch.testing.assert_close(came, models[2](x))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    moved = copy.deepcopy(models[2])
    with torch.no_grad():
        moved.head.bias.add_(1)
    changed = replace(recipe, heads={"b": moved})
    with pytest.raises(FingerprintError, match="trained on other weights of: b"):
        MergeModule.load_from_checkpoint(tmp_path / "one.ckpt", recipe=changed)


def test_a_step_s_last_state_is_a_checkpoint_as_any_other(tmp_path, family, monkeypatch):
    """It names the step's recipe, heads included, and loads without the job."""
    monkeypatch.chdir(tmp_path)
    models, _ = family("bert", 4, dtype=torch.float32)
    paths = save_family(tmp_path, models)
    recipe = FoldedRecipe({k: paths[k] for k in "abc"}, base=paths["base"], private=["classifier"])
    generator = torch.Generator().manual_seed(3)

    def rows():
        tokens = torch.randint(32, (6, 5), generator=generator)
        return [{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(tokens)]

    data = vectors("abc", check_disjoint=False)
    for name in "abc":
        data.tasks[name] = TaskData({split: rows() for split in SPLITS}, kind="tensors")
    job = job_of(tmp_path, models, data, learning_rate=0.1, recipe=recipe)
    Pairwise(every_n_steps=1).run(job)
    module = MergeModule.load_from_checkpoint(tmp_path / "driver/steps/step-2/last.ckpt")
    assert list(module.recipe.sources) == ["step-1", "c"]
    assert list(module.recipe.heads) == ["a", "b"]
    tokens = torch.arange(10).view(2, 5)
    own = transformers.BertForSequenceClassification.from_pretrained("merged/tasks/a")
    assert torch.equal(own.classifier.weight, models[1].classifier.weight)
    with torch.no_grad():
        for task in "abc":
            assert module.merged(task=task, input_ids=tokens).logits.isfinite().all()


@pytest.mark.parametrize("driver", [Pairwise(), Tree()])
def test_a_step_whose_tasks_weigh_nothing_is_refused_before_the_first(tmp_path, driver):
    objective = Objective(task_weights={"a": 0.0, "b": 0.0})
    job = job_of(tmp_path, relatives(build(), 4), objective=objective)
    with pytest.raises(ConfigError, match=r"every task here weighs 0 \(a, b\)"):
        driver.run(job)
    assert not job.folder.exists()


def test_a_model_of_a_step_that_is_gone_and_wanted_again_is_named(tmp_path):
    models = relatives(build(), 4)
    folder = Pairwise(keep_steps=False).run(job_of(tmp_path, models))
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"step step-2 merges this model.*begin anew"):
        Pairwise(keep_steps=False).run(job_of(tmp_path, models))
    moved.rename(folder)
    assert Pairwise(keep_steps=False).run(job_of(tmp_path, models)) == folder
