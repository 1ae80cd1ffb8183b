"""Results of merging two at a time, and what is rejected."""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from folds import (
    NAMES,
    assert_equal,
    average,
    job_of,
    of_several_classes,
    provenance,
    recipe_of,
    tensors,
)
from gradmerge import MergeModule, Recipe
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
from gradmerge.common.errors import CompatibilityError, ConfigError, FingerprintError, SourceError
from gradmerge.drivers import Pairwise, Tree
from gradmerge.drivers.fold import FoldedRecipe
from gradmerge.engine.opening import open_plan
from gradmerge.finalisers import DepthRescale
from gradmerge.objectives import CrossEntropy, KLToEnsemble, KLToSource, Objective
from gradmerge.preprocess import RegMean
from tiny import (
    Normalised,
    Perceptron,
    build,
    relatives,
    trainer_of,
    vectors,
)


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


def test_sources_join_in_the_given_order(tmp_path):
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


def test_task_weights_may_name_tasks_of_later_steps(tmp_path):
    objective = Objective([CrossEntropy()], task_weights={"c": 2.0})
    models = relatives(build(), 4)
    Pairwise().run(job_of(tmp_path, models, objective=objective))
    objective = Objective([CrossEntropy()], task_weights={"d": 2.0})
    with pytest.raises(ConfigError, match=r"unknown task 'd' \(choose from a, b, c\)"):
        Pairwise().run(job_of(tmp_path / "other", models, objective=objective))


@pytest.mark.parametrize("given", [Objective([KLToEnsemble()]), KLToEnsemble()])
def test_an_ensemble_is_rejected_beyond_two_sources(tmp_path, given):
    """In a second step the merge so far would be one of its members."""
    with pytest.raises(ConfigError, match=r"Pairwise: KLToEnsemble averages .* first of 2 steps"):
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


def assert_own_heads(folder, models, data, tolerance=1e-6):
    """Each task's folder has its expert's head, and its score is of that head."""
    results = json.loads((folder / "provenance.json").read_text())["results"]["selection"]
    body = nn.Linear(6, 8)
    found = tensors(folder)
    body.load_state_dict({name: found[f"body.{name}"] for name in ("weight", "bias")})
    for name, model in zip(data.tasks, models[1:], strict=False):
        own = load_file(folder / "tasks" / name / "model-00002-of-00002.safetensors")
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
    """At learning rate 0 the loss of the second step is the divergence from a, b and c."""
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


def test_finalisers_act_once_in_the_last_step(tmp_path):
    models = relatives(build(), 4)
    recipe = recipe_of(models, finalisers=[DepthRescale(0.5, 0.5)])
    folder = Pairwise().run(job_of(tmp_path, models, recipe=recipe))
    base, plain = models[0].state_dict(), average(models[1:])
    for name, value in tensors(folder).items():
        expected = base[name].double() + 0.5 * (plain[name] - base[name].double())
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)


def test_options_that_a_fold_cannot_use_are_rejected(tmp_path):
    models = relatives(build(), 4)

    def refused(driver, message, **options):
        data = options.pop("data", None)
        recipe = recipe_of(options.pop("models", models), **options)
        with pytest.raises(ConfigError, match=message):
            driver.run(job_of(tmp_path, models, data, recipe=recipe))
        assert not (tmp_path / "driver").exists()

    refused(Pairwise(order=["a", "b"]), "order: expected each of a, b, c once, got a, b")
    with pytest.raises(ConfigError, match="every_n_steps: expected a number of at least 1, got 0"):
        Tree(every_n_steps=0)
    refused(Tree(order=["a", "b", "cc"]), r"order: unknown source 'cc' \(choose from a, b, c\)")
    refused(Pairwise(), "expected at least two models to merge .*, got a", models=models[:2])
    refused(Pairwise(), "RegMean: needs statistics of each source", preprocess=[RegMean()])


@pytest.mark.parametrize(
    ("driver", "link", "message"),
    [
        (
            Pairwise(),
            HardMask(Element()),
            r"step 1 at 0\.5 and 0\.5 .*HardMask: starting .* 0 or 1",
        ),
        (Tree(), Clamp(Element(), 0.0, 0.6), r"step 2 at 0\.6667 and 0\.3333 .* and Clamp cannot"),
    ],
)
def test_a_link_that_a_step_cannot_start_with_is_rejected_before_the_first(
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
        (WeightMatching(), ["head"], "private tensors cannot be combined with alignment"),
        (
            WeightMatching(reference="b"),
            [],
            "reference: merging two at a time aligns",
        ),
        (ActivationMatching(), [], "ActivationMatching: needs statistics of each source"),
    ],
)
def test_alignments_that_steps_cannot_use_are_rejected(alignment, private, message, tmp_path):
    models = relatives(build(), 4)
    sources = dict(zip("abc", models[1:], strict=True))
    recipe = FoldedRecipe(sources, private=private, alignment=alignment, init=Uniform())
    with pytest.raises(ConfigError, match=message):
        Pairwise().run(job_of(tmp_path, models, recipe=recipe))
    assert not (tmp_path / "driver").exists()


def test_a_fold_aligns_each_source_to_the_merge_so_far(tmp_path):
    """The average of three permutations of one network is that network again."""
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


def test_a_step_without_tasks_is_rejected(tmp_path):
    models = relatives(build(), 4)
    data = vectors(("c",), check_disjoint=False)
    with pytest.raises(ConfigError, match="no task belongs to a, b, which one step merges"):
        Pairwise().run(job_of(tmp_path, models, data))


def test_a_name_is_either_a_source_or_a_head(tmp_path):
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


@pytest.mark.parametrize("driver", [Pairwise(), Tree()])
def test_a_step_whose_tasks_have_no_weight_is_rejected_before_the_first(tmp_path, driver):
    objective = Objective(task_weights={"a": 0.0, "b": 0.0})
    job = job_of(tmp_path, relatives(build(), 4), objective=objective)
    with pytest.raises(ConfigError, match=r"every task here has weight 0 \(a, b\)"):
        driver.run(job)
    assert not job.folder.exists()


def test_a_source_that_changes_between_two_steps_is_named(tmp_path):
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("base", *"abc")]
    for path, model in zip(paths, relatives(build(), 4), strict=True):
        save_file(model.state_dict(), path)
    recipe = FoldedRecipe(dict(zip("abc", paths[1:], strict=True)), base=paths[0])
    job = job_of(tmp_path / "job", [], recipe=recipe)
    job.begin(Pairwise())
    job.step("step-1", {})
    os.replace(shutil.copy(paths[3], tmp_path / "copy"), paths[3])
    changed = r"c.safetensors: another file has taken its place"
    for attempt in (lambda: job.step("step-2", {}), lambda: job.trainer(tmp_path / "job")):
        with pytest.raises(SourceError, match=changed):
            attempt()
    with pytest.raises(SourceError, match=changed):
        job.export(lambda *_, **__: tmp_path, {}, [])
