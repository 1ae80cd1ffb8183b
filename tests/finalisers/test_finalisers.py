"""Finalisers without data, and the way of all of them through evaluation, checkpoint and export."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import nn

from gradmerge import MergedModel, MergeModule, Recipe
from gradmerge.cli.commands import export
from gradmerge.cli.commands import merge as plain_merge
from gradmerge.cli.configs import read_merge_input
from gradmerge.cli.main import merge_options
from gradmerge.coefficients import Column, Constant, DepthRamp, Model, Scaled, Tensor, Uniform
from gradmerge.common.errors import ConfigError
from gradmerge.common.spec import from_plain, to_plain
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export.folder import export_merged
from gradmerge.finalisers import REPAIR, DepthRescale, SpectralRescale
from gradmerge.finalisers.spectral import spectral_norm
from gradmerge.mergekit.writer import mergekit_yaml
from gradmerge.operators import MultiSlerp
from gradmerge.preprocess import Unify
from gradmerge.sources.names import depth_of
from tiny import (
    Normalised,
    build,
    recipe_of,
    relatives,
    save_family,
    text_world,
    trainer_of,
    vectors,
    write_yaml,
)

# ---- by matrix ------------------------------------------------------------------------------


def norm_of(matrix, kind):
    singular = torch.linalg.svdvals(matrix.double().flatten(1))
    return float(singular[0] if kind == "spectral" else singular.square().sum().sqrt())


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3, 4, 3)
        self.wide = nn.Linear(20, 300)
        self.tall = nn.Linear(300, 5)


@pytest.mark.parametrize("target", ["mean", "max"])
@pytest.mark.parametrize("kind", ["spectral", "frobenius"])
@pytest.mark.parametrize("origin", ["base", "zero", "mean"])
def test_norms_of_matrices_are_those_of_the_sources(kind, origin, target):
    models = relatives(build(Mixed), 4)
    coefficients = {"init": Constant([0.5, 0.2, 0.1]), "coefficients": Tensor()}
    recipe = recipe_of(models, origin=origin, **coefficients)
    finished = open_plan(replace(recipe, finalisers=[SpectralRescale(kind, target)]))
    plain, raw = open_plan(recipe), finished.initial_raw()
    for name in finished.tensors:
        sources = [model.state_dict()[name].double() for model in models]
        origins = {"base": sources[0], "zero": torch.zeros(()), "mean": sum(sources[1:]) / 3}
        anchor = origins[origin]
        got = FitState(finished, raw).materialise(name, torch.float64)
        before = FitState(plain, raw).materialise(name, torch.float64)
        if got.dim() < 2:
            assert torch.equal(got, before)
            continue
        norms = [norm_of(source - anchor, kind) for source in sources[1:]]
        wanted = max(norms) if target == "max" else sum(norms) / 3
        assert norm_of(got - anchor, kind) == pytest.approx(wanted, rel=1e-5)
        assert norm_of(before - anchor, kind) < 0.9 * wanted, "an average is smaller"
        cosine = torch.cosine_similarity((got - anchor).flatten(), (before - anchor).flatten(), 0)
        assert cosine == pytest.approx(1, abs=1e-9), "its direction stays"


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (257, 257)])
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_lanczos_steps_give_the_largest_singular_value(shape, decay):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values * torch.exp(-decay * torch.arange(len(values)))
    matrix = left @ torch.diag(values) @ right
    assert spectral_norm(matrix) == pytest.approx(float(values[0]), rel=1e-9)
    assert spectral_norm(matrix * 0) == 0
    equal = left @ right  # all singular values are 1
    assert spectral_norm(equal) == pytest.approx(1, rel=1e-9)


def test_a_delta_of_zero_stays_zero():
    models = relatives(build(Mixed), 3)
    recipe = recipe_of(models, init=Constant(0.0), finalisers=[SpectralRescale()])
    plan = open_plan(recipe)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(FitState.start(plan).materialise(name), tensor)


def test_a_broken_source_is_named():
    models = relatives(build(Mixed), 3)
    with torch.no_grad():
        models[2].wide.weight[0, 0] = float("nan")
    plan = open_plan(recipe_of(models, init=Constant([1.0, 0.0]), finalisers=[SpectralRescale()]))
    with pytest.raises(ConfigError, match=r"wide\.weight: expected finite numbers, got NaN"):
        FitState.start(plan).materialise("wide.weight")


# ---- by depth -------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)


DEPTHS = {"embed_tokens.weight": 0.0, "head.weight": 1.0, "head.bias": 1.0}
DEPTHS.update({f"layers.{i}.{n}": (i + 1) / 4 for i in range(3) for n in ("weight", "bias")})


@pytest.mark.parametrize("origin", ["base", "zero"])
def test_rescaling_by_depth_is_rescaling_coefficients(origin):
    models = relatives(build(Blocks), 3)
    own = recipe_of(models, origin=origin, init=Constant(0.4))
    finished = open_plan(replace(own, finalisers=[DepthRescale(0.5, 1.5)]))
    ramp = open_plan(replace(own, init=DepthRamp(0.2, 0.6)))
    raw = open_plan(own).initial_raw()
    for name, depth in DEPTHS.items():
        assert depth_of(name, DEPTHS) == depth
        got = FitState(finished, raw).materialise(name, torch.float64)
        by_coefficients = FitState.start(ramp).materialise(name, torch.float64)
        torch.testing.assert_close(got, by_coefficients, rtol=1e-6, atol=1e-7)
        theta = [model.state_dict()[name].double() for model in models]
        anchor = theta[0] if origin == "base" else torch.zeros(())
        factor = 0.4 * (0.5 + depth)
        expected = anchor + factor * sum(each - anchor for each in theta[1:])
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_two_finalisers_multiply_and_frozen_tensors_stay():
    models = relatives(build(Blocks), 3)
    own = recipe_of(models, init=Constant(0.4), frozen={r"layers\.1\.": "mean"})
    plain = open_plan(own)
    twice = open_plan(replace(own, finalisers=[DepthRescale(0.5, 0.5), DepthRescale(3.0, 3.0)]))
    for name, tensor in models[0].state_dict().items():
        before, after = (FitState.start(plan).materialise(name) for plan in (plain, twice))
        if "layers.1" in name:
            assert torch.equal(before, after)
        else:
            torch.testing.assert_close(after - tensor, 1.5 * (before - tensor))


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_evaluation_and_export_see_the_same_tensors(memory):
    models = relatives(build(Normalised), 3)
    finalisers = [SpectralRescale(), DepthRescale(0.5, 0.8)]
    recipe = recipe_of(models, coefficients=Column(), finalisers=finalisers)
    merged, plain = (
        MergedModel(r, memory=memory) for r in (recipe, replace(recipe, finalisers=[]))
    )
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    twin = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(merged.state.materialise(name))
        twin.load_state_dict(merged.network_buffers.values(), strict=False)
        torch.testing.assert_close(merged(x), twin(x), rtol=1e-6, atol=1e-6)
        assert not torch.allclose(merged(x), plain(x), atol=1e-2)
    assert torch.equal(merged(x), plain(x)), "where a gradient is recorded coefficients learn"
    with torch.no_grad():
        assert torch.equal(merged.train()(x), plain.train()(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_ends_of_a_depth_rescale_are_finite(value):
    with pytest.raises(ConfigError, match="DepthRescale: last: expected a finite number"):
        DepthRescale(1.0, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "nuclear"}, "SpectralRescale: norm: expected spectral or frobenius"),
        ({"target": "sum"}, "SpectralRescale: target: expected mean or max"),
    ],
)
def test_options_of_a_spectral_rescale_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        SpectralRescale(**options)


def test_finalisers_are_plain_data_and_back():
    given = [REPAIR("coefficients", 3, ["x"]), SpectralRescale("frobenius"), DepthRescale(1.0, 2.0)]
    assert from_plain(to_plain(given)) == given


# ---- through evaluation, checkpoint and export ----------------------------------------------


@pytest.fixture
def text(tmp_path, family):
    """Folders of a tiny BERT, and a data module with padding."""
    from gradmerge import MergeDataModule, TaskData

    models, _ = family("bert", 3, torch.float32)
    paths = save_family(tmp_path, models)
    generator = torch.Generator().manual_seed(1)

    def rows(count):
        found = []
        for _ in range(count):
            length = int(torch.randint(3, 9, (), generator=generator))
            ids = torch.randint(3, 32, (length,), generator=generator)
            ones = torch.ones(length, dtype=torch.long)
            label = torch.randint(2, (), generator=generator)
            found.append({"input_ids": ids, "attention_mask": ones, "labels": label})
        return found

    tasks = {
        task: TaskData({s: rows(10) for s in ("adaptation", "selection", "test")}, "tensors")
        for task in "ab"
    }
    data = MergeDataModule(tasks, batch_size=4, check_disjoint=False)
    recipe = Recipe(
        {"a": paths["a"], "b": paths["b"]},
        base=paths["base"],
        finalisers=[SpectralRescale(), REPAIR()],
    )
    return recipe, data, rows


def logits(model, rows):
    model.eval()
    with torch.no_grad():
        found = [model(**{k: v[None] for k, v in row.items() if k != "labels"}) for row in rows]
    return torch.cat([each.logits for each in found])


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_an_export_gives_the_logits_that_were_evaluated(tmp_path, text, memory):
    recipe, data, rows = text
    module = MergeModule(recipe, memory=memory, learning_rate=0.1)
    trainer = trainer_of(tmp_path, max_steps=4, val_check_interval=2)
    trainer.fit(module, datamodule=data)
    assert module.merged.training is False
    (found,) = trainer.validate(module, datamodule=data, verbose=False)[:1]
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    examples = rows(6)
    wanted = logits(module.eval().merged, examples)
    export_merged(module.merged, tmp_path / "direct")
    export(str(tmp_path / "kept.ckpt"), output=str(tmp_path / "from-checkpoint"))
    for folder in ("direct", "from-checkpoint"):
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(loaded, examples), wanted, rtol=1e-5, atol=1e-5)
        provenance = json.loads((tmp_path / folder / "provenance.json").read_text())
        assert len(provenance["finalisation"]["corrected"]) == 13
        assert provenance["finalisation"]["left alone"]["classifier.weight"].startswith(
            "it is a last"
        )
        assert provenance["recipe"]["init_args"]["finalisers"][1]["class_path"].endswith("REPAIR")
    module.train()
    off = logits(module.merged.train(), examples[:1])
    assert torch.isfinite(off).all()
    assert found["selection/loss"] > 0


def test_a_checkpoint_keeps_corrections(tmp_path, text):
    recipe, data, rows = text
    module = MergeModule(recipe, learning_rate=0.1)
    trainer = trainer_of(tmp_path, max_steps=3, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    path = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(path)  # computed when saved: nothing was validated
    state = torch.load(path, weights_only=True)["gradmerge"]["finalisation"]
    assert len(state["corrections"]) == 2 * 13
    assert set(state["corrections"]["bert.pooler.dense.bias"]) == {"scale", "shift", "axis"}
    assert set(state["corrections"]["bert.pooler.dense.weight"]) == {"scale", "axis"}
    loaded = MergeModule.load_from_checkpoint(path)
    examples = rows(4)
    got, wanted = logits(loaded.merged, examples), logits(module.merged, examples)
    assert torch.equal(got, wanted)
    loaded.refresh_buffers()  # without data: the checkpoint's are of these coefficients
    again = MergeModule.load_from_checkpoint(path)
    with torch.no_grad():
        again.merged.raw["tensor"].add_(0.1)
    with pytest.raises(ConfigError, match="REPAIR takes the tasks' adaptation data"):
        again.refresh_buffers()
    before = {n: c.scale for n, c in loaded.merged.state.corrections.of.items()}
    trainer_of(tmp_path).validate(loaded, datamodule=data, verbose=False)
    for name, correction in loaded.merged.state.corrections.of.items():
        torch.testing.assert_close(correction.scale, before[name], rtol=1e-5, atol=1e-5)


def test_corrections_follow_the_coefficients(tmp_path):
    data = vectors()
    recipe = recipe_of(relatives(build(Normalised)), finalisers=[REPAIR()])
    module = MergeModule(recipe)
    data.setup()
    state = module.merged.state
    module.refresh_buffers(data)
    first = state.corrections
    module.refresh_buffers(data)
    assert state.corrections is first is not None, "nothing changed, so nothing is computed"
    with torch.no_grad():
        module.merged.raw["tensor"].mul_(2)
    module.refresh_buffers(data)
    name = "norm.weight"
    assert not torch.allclose(state.corrections.of[name].scale, first.of[name].scale, atol=1e-3)
    assert set(state.corrections.of) == {"norm.weight", "norm.bias"}
    module.merged.fix(["norm.bias"], 0.5)
    module.refresh_buffers(data)
    assert set(state.corrections.of) == {"norm.weight"}, "the bias is frozen now"
    assert state.corrections.report["scale alone"] == ["norm.weight"]


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_before_heads_of_tasks_the_last_shared_layer_is_corrected(tmp_path, memory):
    """Each source runs on the data of all tasks, to the point where heads begin."""
    data, models = vectors(count=20), relatives(build())
    options = {"init": Uniform(), "finalisers": [REPAIR()], "private": [r"^head\."]}
    module = MergeModule(recipe_of(models, **options), memory=memory)
    trainer_of(tmp_path).validate(module, datamodule=data, verbose=False)
    assert module.merged.state.corrections.report["corrected"] == ["body.weight"]
    rows = [row["x"] for task in "ab" for row in data.tasks[task].path["adaptation"]]
    x = torch.stack(rows)
    weight, bias = (module.merged.state.materialise(f"body.{n}") for n in ("weight", "bias"))
    got = (x @ weight.T + bias).double()
    own = [model.body(x).detach().double() for model in models[1:]]
    torch.testing.assert_close(got.mean(0), sum(y.mean(0) for y in own) / 2, rtol=0, atol=1e-4)
    wanted = sum(y.std(0, correction=0) for y in own) / 2
    torch.testing.assert_close(got.std(0, correction=0), wanted, rtol=1e-4, atol=0)
    for task, model in zip("ab", models[1:], strict=True):
        with torch.no_grad():
            expected = model.head((x @ weight.T + bias).tanh())
            found = module.eval().merged(task=task, x=x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    export_merged(module.merged, tmp_path / "merged")
    card = (tmp_path / "merged/README.md").read_text()
    assert "after REPAIR (`finalisers`)" in card


def test_a_search_tries_finished_merges(tmp_path):
    from gradmerge.search import Scales

    data, folder = vectors(count=30), tmp_path / "merged"
    recipe = recipe_of(relatives(build(Normalised)), coefficients=Model(), finalisers=[REPAIR()])
    search = Scales([0.5, 1.0], metric="loss")
    plain_merge(recipe, data, search=search, output=str(folder))
    found = json.loads((folder / "provenance.json").read_text())
    chosen = found["search"]["chosen"]["init_args"]["factor"]
    module = MergeModule(replace(recipe, init=Scaled(Constant(0.3), chosen)))
    (scores,) = [trainer_of(tmp_path).validate(module, datamodule=data, verbose=False)]
    losses = {
        t["init"]["init_args"]["factor"]: t["selection"]["loss"] for t in found["search"]["trials"]
    }
    assert scores[0]["selection/loss"] == pytest.approx(losses[chosen], rel=1e-5)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name in module.merged.plan.tensors:
            expected = module.merged.state.materialise(name)
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_without_data_it_is_refused(tmp_path):
    recipe = recipe_of(relatives(build(Normalised)), finalisers=[REPAIR()])
    module = MergeModule(recipe)
    with pytest.raises(ConfigError, match=r"REPAIR takes the tasks' adaptation data.*refresh_buff"):
        module.refresh_buffers()
    with pytest.raises(ConfigError, match=r"data for REPAIR, got none; add a config"):
        plain_merge(recipe, output=str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_a_static_merge_computes_it_on_the_way(tmp_path):
    data = vectors(count=30)
    models = relatives(build(Normalised))
    recipe = recipe_of(models, init=Uniform(), coefficients=Model(), finalisers=[REPAIR()])
    plain_merge(recipe, data, output=str(tmp_path / "merged"))
    came = load_file(tmp_path / "merged/model.safetensors")
    twin = copy.deepcopy(models[0])
    twin.load_state_dict(came)
    every = [data.tasks[task].path["adaptation"] for task in "ab"]
    x = torch.stack([row["x"] for rows in every for row in rows])

    def outputs(model):
        with torch.no_grad():
            rows = model.norm(model.body(x)).double()
        return torch.stack([rows.mean(0), rows.std(0, correction=0)])

    expected = (outputs(models[1]) + outputs(models[2])) / 2
    torch.testing.assert_close(outputs(twin), expected, rtol=1e-4, atol=1e-4)
    average = (models[1].norm.weight + models[2].norm.weight) / 2
    assert not torch.allclose(came["norm.weight"], average, atol=1e-3)
    provenance = json.loads((tmp_path / "merged/provenance.json").read_text())
    assert provenance["finalisation"]["corrected"] == ["norm.weight"]


def test_data_is_kept_where_a_finaliser_needs_it(tmp_path):
    suite = write_yaml(tmp_path / "suite.yaml", text_world(tmp_path))
    for number, (finalisers, needed) in enumerate(
        [(["REPAIR"], True), ([{"class_path": "gradmerge.finalisers.REPAIR"}], True), ([], False)]
    ):
        recipe = {"finalisers": finalisers, "statistics": "somewhere"}
        method = write_yaml(tmp_path / f"{number}.yaml", {"model": {"recipe": recipe}})
        files = ["--config", suite, "--config", method, "--output", "merged"]
        assert ("data" in merge_options("merge", read_merge_input(files))) == needed


# ---- outputs that cannot hold them ----------------------------------------------------------


@pytest.mark.parametrize("outputs", ["tasks", "compact"])
def test_outputs_a_task_refuse_finalisers(tmp_path, outputs):
    recipe = recipe_of(relatives(build()), preprocess=[Unify()], finalisers=[SpectralRescale()])
    with pytest.raises(ConfigError, match="expected no finalisers, got SpectralResc"):
        plain_merge(recipe, outputs=outputs, output=str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def folders(tmp_path, family):
    models, _ = family("llama", 3, torch.float32)
    paths = save_family(tmp_path, models)
    return Recipe({"a": paths["a"], "b": paths["b"]}, base=paths["base"], init=Constant(0.4))


@pytest.mark.parametrize("origin", ["base", "zero", "mean"])
def test_mergekit_is_given_rescaled_coefficients(folders, origin):
    finalisers = [SpectralRescale(), DepthRescale(0.5, 1.5)]
    init = Constant([0.5, 0.2])
    recipe = replace(folders, origin=origin, finalisers=finalisers, init=init)
    plan = open_plan(recipe, with_skeleton=False)
    raw = plan.initial_raw()
    models = yaml.safe_load(mergekit_yaml(FitState(plan, raw)))["models"]
    paths = {str(entry["model"]): entry["parameters"]["weight"] for entry in models}
    for name in plan.tensors:
        total = 0
        for path, weight in paths.items():
            rows = weight if isinstance(weight, list) else [{"value": weight}]
            value = next(r["value"] for r in rows if r.get("filter", "") in name)
            owner = next(c for c in (plan.base, *plan.sources.values()) if c.label == path)
            total = total + value * owner.read(name).double()
        expected = FitState(plan, raw).materialise(name, torch.float64)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_mergekit_cannot_express_repair(folders, tmp_path):
    recipe = replace(folders, finalisers=[REPAIR()])
    plan = open_plan(recipe, with_skeleton=False)
    with pytest.raises(ConfigError, match="finalisers: REPAIR changes a tensor by channels"):
        mergekit_yaml(FitState.start(plan))
    with pytest.raises(ConfigError, match="finalisers: REPAIR changes a tensor by channels"):
        plain_merge(recipe, mergekit=True, output=str(tmp_path / "merged.yaml"))


def test_they_follow_any_operator():
    models = relatives(build(), 3)
    own = recipe_of(models, operator=MultiSlerp(), origin="zero", init=Constant(0.5))
    plain, finished = open_plan(own), open_plan(replace(own, finalisers=[SpectralRescale()]))
    name = "body.weight"
    norms = [norm_of(model.state_dict()[name], "spectral") for model in models[1:]]
    raw = plain.initial_raw()
    got = FitState(finished, raw).materialise(name)
    assert norm_of(got, "spectral") == pytest.approx(sum(norms) / 2, rel=1e-5)
    before = FitState(plain, raw).materialise(name)
    torch.testing.assert_close(got / got.norm(), before / before.norm(), rtol=1e-5, atol=1e-6)
