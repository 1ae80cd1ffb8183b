"""What a training checkpoint holds, resuming from it, and what belongs to it besides
coefficients."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from families import count_runs
from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData
from gradmerge.coefficients import Clamp, Column, Constant, Group, Mixup, Tensor
from gradmerge.common.errors import ConfigError, FingerprintError
from gradmerge.common.spec import from_plain, to_plain
from gradmerge.objectives import L1, CrossEntropy, Entropy, KLToSource, Objective
from tiny import (
    SPLITS,
    Normalised,
    Perceptron,
    build,
    plain_statistics,
    raws,
    recipe_of,
    relatives,
    save_family,
    trainer_of,
    vectors,
)


def module_of(models=None, objective=None, memory="resident", learning_rate=1e-2, **recipe):
    models = models or relatives(build())
    return MergeModule(recipe_of(models, **recipe), objective, memory, learning_rate=learning_rate)


class Recorder(MergeModule):
    """Remembers the loss of every step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.__dict__.setdefault("losses", []).append(loss.detach().clone())
        return loss

    def configure_optimizers(self):
        optimiser = torch.optim.Adam(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.9)
        return [optimiser], [{"scheduler": scheduler, "interval": "step"}]


def every_step(path):
    return ModelCheckpoint(
        path, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False
    )


def saved(tmp_path, module, data=None, name="one.ckpt", **options):
    """A checkpoint after a short fit."""
    trainer = trainer_of(tmp_path, **options)
    trainer.fit(module, datamodule=data or vectors())
    trainer.save_checkpoint(tmp_path / name)
    return tmp_path / name


# ---- contents -------------------------------------------------------------------------------


class Wide(nn.Module):
    """A million weights."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 150_000), nn.Linear(150_000, 3)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def test_a_checkpoint_holds_coefficients_alone_and_loads_without_unpickling(tmp_path):
    module = module_of(relatives(build(Wide), scale=0.01))
    path = saved(tmp_path, module, vectors(count=4), max_steps=2)
    assert path.stat().st_size < 12_000
    assert sum(p.numel() for p in build(Wide).parameters()) > 1_000_000
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint["state_dict"]) == ["merged.raw.tensor"]
    assert checkpoint["gradmerge"]["sources"] == ["a", "b"]
    assert set(checkpoint["gradmerge"]["fingerprints"]) == {"base", "a", "b"}


def test_a_checkpoint_rebuilds_the_module_from_its_folders(tmp_path, family):
    models, inputs = family("bert", dtype=torch.float32)
    paths = save_family(tmp_path, models)
    objective = Objective([CrossEntropy(label_smoothing=0.1), Entropy(0.5)], [L1()], {"a": 2.0})
    recipe = Recipe(
        {"a": paths["a"], "b": paths["b"]},
        paths["base"],
        coefficients=Clamp(Group((r"layer\.\d+\.", "embeddings"))),
        init=Mixup(scale=0.7, seed=3),
        frozen={"pooler": "mean", "LayerNorm": 0.25},
        private=["classifier"],
    )
    module = MergeModule(recipe, objective, memory="streamed", learning_rate=0.5)
    with torch.no_grad():
        module.merged.raw["group"].add_(0.1)
    trainer = trainer_of(tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = MergeModule.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert loaded.recipe == recipe
    assert loaded.objective == objective
    assert (loaded.merged.memory, loaded.learning_rate) == ("streamed", 0.5)
    assert torch.equal(raws(loaded)["group"], raws(module)["group"])
    with torch.no_grad():
        came, expected = loaded.merged(task="b", **inputs), module.merged(task="b", **inputs)
    assert torch.equal(came.logits, expected.logits)


def test_coefficients_of_sources_in_memory_want_their_recipe_again(tmp_path):
    module = module_of(coefficients=Column(), objective=Objective([KLToSource()]))
    path = saved(tmp_path, module)
    with pytest.raises(
        ConfigError, match="in-memory sources, which it does not contain; pass the recipe"
    ):
        MergeModule.load_from_checkpoint(path)
    loaded = MergeModule.load_from_checkpoint(path, recipe=module.recipe)
    assert loaded.objective == module.objective
    for key, value in raws(module).items():
        assert torch.equal(raws(loaded)[key], value)


def test_plain_data_builds_no_class_from_elsewhere():
    with pytest.raises(ConfigError, match=r"uses subprocess.Popen, a class outside gradmerge"):
        from_plain({"class_path": "subprocess.Popen", "init_args": {"args": "true"}})
    for name in (
        "gradmerge.export.folder.export_merged",
        "gradmerge.Absent",
        "gradmerge.coefficients.initial_raw",
        "gradmerge.engine.recipe.Recipe",
        "gradmerge.absent.Recipe",
    ):
        with pytest.raises(ConfigError, match=f"unknown component '{name}'"):
            from_plain({"class_path": name, "init_args": {}})
    objective = Objective([CrossEntropy(), Entropy()], [L1()])
    assert from_plain(to_plain(objective)) == objective


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_coefficients_of_other_weights_are_refused(tmp_path, changed):
    models = relatives(build())
    path = saved(tmp_path, module_of(models))
    others = copy.deepcopy(models)
    with torch.no_grad():
        others[changed].head.bias[0] += 1e-6
    name = ["base", "a", "b"][changed]
    with pytest.raises(
        FingerprintError, match=f"trained on other weights of: {name}. {name}: expected"
    ):
        MergeModule.load_from_checkpoint(path, recipe=recipe_of(others))
    with pytest.raises(FingerprintError, match=f"other weights of: {name}"):
        trainer_of(tmp_path, max_steps=8).fit(
            module_of(others), datamodule=vectors(), ckpt_path=path
        )


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = saved(tmp_path, module_of())
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["gradmerge"]
    torch.save(checkpoint, path)
    with pytest.raises(ConfigError, match="one without gradmerge coefficients"):
        MergeModule.load_from_checkpoint(path, recipe=module_of().recipe)


# ---- resuming -------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_resumed_fit_takes_bitwise_the_same_steps(tmp_path, memory):
    """From every step, in the middle and at the end of epochs of three steps."""
    recipe = recipe_of(relatives(build(Normalised)), coefficients=Column())
    whole = Recorder(recipe, memory=memory)
    callback = every_step(tmp_path)
    trainer_of(tmp_path, max_steps=8, callbacks=[callback]).fit(whole, datamodule=vectors())
    assert len(whole.losses) == 8
    for step in (1, 2, 3, 4, 6):
        resumed = Recorder(recipe, memory=memory)
        trainer = trainer_of(tmp_path, max_steps=8)
        trainer.fit(resumed, datamodule=vectors(), ckpt_path=tmp_path / f"{step}.ckpt")
        assert trainer.global_step == 8
        assert torch.equal(torch.stack(resumed.losses), torch.stack(whole.losses[step:])), step
        for key, value in raws(whole).items():
            assert torch.equal(raws(resumed)[key], value), (step, key)


@pytest.mark.parametrize(
    ("limit", "check"), [(3, 1.0), (4, 1.0), (4, 2), (0.6, 1.0), (1.0, 1.0), (1.0, 2)]
)
def test_a_resumed_fit_keeps_its_epochs_and_validations(tmp_path, limit, check):
    """Of epochs of five steps, also limited to fewer; from every step."""

    class Watcher(MergeModule):
        def training_step(self, batch, batch_idx):
            seen.append((self.current_epoch, batch_idx, batch["a"]["x"].sum().item()))
            return super().training_step(batch, batch_idx)

        def on_validation_epoch_start(self):
            seen.append("validation")
            super().on_validation_epoch_start()

    recipe = module_of().recipe
    options = {"max_steps": 11, "limit_train_batches": limit, "val_check_interval": check}
    seen: list = []
    trainer = trainer_of(tmp_path, callbacks=[every_step(tmp_path)], **options)
    trainer.fit(Watcher(recipe), datamodule=vectors(count=20))
    whole, steps = seen, [i for i, event in enumerate(seen) if event != "validation"]
    assert len(steps) == 11
    assert len(seen) > 12
    for step in range(1, 11):
        seen = []
        path = tmp_path / f"{step}.ckpt"
        trainer_of(tmp_path, **options).fit(
            Watcher(recipe), datamodule=vectors(count=20), ckpt_path=path
        )
        expected = whole[steps[step - 1] + 1 :]
        if expected[0] == "validation":
            # The trainer takes a validation that was due at the checkpoint's own step for done.
            expected = expected[1:]
        assert seen == expected, step


def test_epochs_follow_one_another_with_all_their_steps(tmp_path):
    seen = []

    class Watcher(MergeModule):
        def training_step(self, batch, batch_idx):
            seen.append((self.current_epoch, batch["a"]["x"].sum().item()))
            return super().training_step(batch, batch_idx)

    trainer_of(tmp_path, max_steps=9).fit(Watcher(module_of().recipe), datamodule=vectors())
    assert [epoch for epoch, _ in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len({value for _, value in seen}) == 9


# ---- private tensors ------------------------------------------------------------------------


def test_private_heads_may_differ_in_their_labels(tmp_path):
    models = relatives(build())
    models[2].head = nn.Linear(8, 5)
    data = vectors()
    data.tasks["b"] = vectors(("b",), classes=5).tasks["b"]
    module = module_of(models, private=["head"], learning_rate=0.1)
    trainer = trainer_of(tmp_path, max_steps=5)
    trainer.fit(module, datamodule=data)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    body = copy.deepcopy(models[0].body)
    state = {n: module.merged.state.materialise(f"body.{n}") for n in ("weight", "bias")}
    body.load_state_dict(state)
    for task, expert in zip("ab", models[1:], strict=True):
        with torch.no_grad():
            expected = expert.head(body(x).tanh())
            came = module.merged(task=task, x=x)
        torch.testing.assert_close(came, expected, rtol=1e-6, atol=1e-6)
    assert list(module.merged.plan.tensors) == ["body.weight", "body.bias"]
    assert not torch.allclose(raws(module)["tensor"], torch.tensor(0.3), atol=1e-2)


# ---- BatchNorm ------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_batch_norm_statistics_are_those_of_the_merged_network(tmp_path, memory):
    models, data = relatives(build(Normalised)), vectors()
    module = module_of(models, memory=memory, learning_rate=0.1)
    trainer = trainer_of(tmp_path, max_steps=4)
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    expected = plain_statistics(module, models, data)
    found = module.merged.network_buffers.values()
    torch.testing.assert_close(
        found["norm.running_mean"], expected.running_mean, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        found["norm.running_var"], expected.running_var, rtol=1e-5, atol=1e-6
    )
    assert not torch.allclose(expected.running_mean, models[0].norm.running_mean, atol=1e-2)


def test_batch_norm_statistics_are_recomputed_for_a_checkpoint(tmp_path):
    models, data = relatives(build(Normalised)), vectors()
    module = module_of(models, learning_rate=0.1)
    path = saved(tmp_path, module, data, max_steps=4, limit_val_batches=0)
    expected = plain_statistics(module, models, data)
    found = torch.load(path, weights_only=True)["gradmerge"]["buffers"]
    torch.testing.assert_close(
        found["norm.running_mean"], expected.running_mean, rtol=1e-5, atol=1e-6
    )
    loaded = MergeModule.load_from_checkpoint(path, recipe=module.recipe)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        came, wanted = loaded.eval().merged(x=x), module.eval().merged(x=x)
    torch.testing.assert_close(came, wanted, rtol=1e-6, atol=1e-6)


def of_classes(count, order=None):
    """Data whose examples lie apart by class, the classes one after another or in an order."""
    data = vectors(("a",), count=count, eval_batch_size=2)
    splits = data.tasks["a"].path
    for split in splits.values():
        split.sort(key=lambda row: int(row["labels"]))
        for row in split:
            row["x"] = row["x"] + 3 * torch.eye(6)[row["labels"]]
    if order is not None:
        splits["adaptation"] = [splits["adaptation"][i] for i in order]
    return data


def validated_statistics(tmp_path, data):
    """What a validation recomputes: mean and variance."""
    module = module_of(relatives(build(Normalised)))
    trainer_of(tmp_path).validate(module, datamodule=data, verbose=False)
    found = module.merged.network_buffers.values()
    return torch.stack([found["norm.running_mean"], found["norm.running_var"]]).clone()


def test_batch_norm_statistics_of_sorted_data_are_those_of_shuffled_data(tmp_path):
    order = torch.randperm(32, generator=torch.Generator().manual_seed(5)).tolist()
    shuffled, ordered = of_classes(32, order), of_classes(32)
    expected = validated_statistics(tmp_path, shuffled)
    came = validated_statistics(tmp_path, ordered)
    torch.testing.assert_close(came, expected, rtol=1e-5, atol=1e-6)


def test_batch_norm_statistics_of_more_data_than_are_used_are_of_all_its_classes(tmp_path):
    """32 of 400 examples, which are sorted by class."""
    ordered = of_classes(400)
    came = validated_statistics(tmp_path, ordered)
    module = module_of(relatives(build(Normalised)))
    whole = plain_statistics(module, relatives(build(Normalised)), ordered)
    assert ((came[0] - whole.running_mean).abs() / whole.running_var.sqrt()).max() < 0.35
    assert (came[1] / whole.running_var).log().abs().max() < 0.5
    beginning = of_classes(400, range(32))
    beginning.setup()
    first = plain_statistics(module, relatives(build(Normalised)), beginning)
    assert ((first.running_mean - whole.running_mean).abs() / whole.running_var.sqrt()).max() > 0.7
    assert torch.equal(came, validated_statistics(tmp_path, ordered))


class Convolved(nn.Module):
    """Two BatchNorm layers, of images and of vectors, the first used twice."""

    def __init__(self):
        super().__init__()
        self.body, self.image = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.norm, self.apart = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x):
        x = self.image(self.body(self.image(x)))
        return self.norm(input=x.mean(dim=(2, 3)))


def test_batch_norm_statistics_are_the_mean_and_unbiased_variance_of_all_rows():
    merged = module_of(relatives(build(Convolved))).merged
    kept = {k: v.clone() for k, v in merged.network_buffers.values().items()}
    rows = {"image": [], "norm": []}

    def watch(name):
        def hook(module, args, kwargs):
            batch = args[0] if args else kwargs["input"]
            rows[name].append(batch.detach().movedim(1, -1).reshape(-1, 2).double())

        return merged.skeleton.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    norm = merged.skeleton.get_submodule("norm")
    own = dict(norm._forward_pre_hooks)
    hooks = [watch(name) for name in rows]
    generator = torch.Generator().manual_seed(4)
    batches = [torch.randn(n, 2, 4, 5, generator=generator) + 10 * n for n in (2, 7, 3)]
    merged.network_buffers.recompute([lambda x=x: merged(x) for x in batches])
    for hook in hooks:
        hook.remove()
    found = merged.network_buffers.values()
    for name, seen in rows.items():
        every = torch.cat(seen)
        assert len(every) == {"image": 2 * 12 * 20, "norm": 12}[name]
        mean, var = found[f"{name}.running_mean"], found[f"{name}.running_var"]
        torch.testing.assert_close(mean.double(), every.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var.double(), every.var(0), rtol=1e-5, atol=1e-6)
        assert found[f"{name}.num_batches_tracked"] == len(seen)
    for key in ("apart.running_mean", "apart.running_var"):
        assert torch.equal(found[key], kept[key])
    assert (norm.momentum, norm.training) == (0.1, False)
    assert norm._forward_pre_hooks == own


@pytest.mark.parametrize("rule", ["mean", "origin"])
def test_other_rules_keep_statistics_as_they_state(tmp_path, rule):
    models = relatives(build(Normalised))
    module = module_of(models, buffers=rule, learning_rate=0.1)
    trainer = trainer_of(tmp_path, max_steps=4)
    trainer.fit(module, datamodule=vectors())
    means = [model.norm.running_mean for model in models]
    expected = (means[1] + means[2]) / 2 if rule == "mean" else means[0]
    came = module.merged.network_buffers.values()["norm.running_mean"]
    torch.testing.assert_close(came, expected, rtol=1e-6, atol=1e-7)


def test_batch_norm_trains_on_its_batch_s_own_statistics_before_and_after_validation(tmp_path):
    models = relatives(build(Normalised))
    found = []

    class Watcher(MergeModule):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                came = self.merged(task="a", x=batch["a"]["x"])
            twin = copy.deepcopy(models[0])
            for name, parameter in twin.named_parameters():
                parameter.data.copy_(self.merged.state.materialise(name))
            found.append((came, twin.train()(batch["a"]["x"]).detach()))
            return super().training_step(batch, batch_idx)

    trainer_of(tmp_path, max_steps=5).fit(Watcher(recipe_of(models)), datamodule=vectors())
    assert len(found) == 5
    for came, expected in found:
        torch.testing.assert_close(came, expected, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_is_on_in_a_fit_before_and_after_validation(tmp_path, family):
    models, inputs = family("bert", dtype=torch.float32)
    found = []

    class Watcher(MergeModule):
        def training_step(self, batch, batch_idx):
            assert not any(module.training for module in self.merged.skeleton.modules())
            before = len(runs)
            loss = super().training_step(batch, batch_idx)
            found.append(len(runs) - before)
            return loss

    rows = [
        {"input_ids": ids, "labels": torch.tensor(0)} for ids in inputs["input_ids"].repeat(6, 1)
    ]
    splits = dict.fromkeys(SPLITS, rows)
    data = MergeDataModule({"a": TaskData(splits, "tensors")}, batch_size=4, check_disjoint=False)
    module = Watcher(recipe_of(models), activation_checkpointing=True)
    runs = count_runs(module.merged.skeleton)
    trainer_of(tmp_path, max_steps=5).fit(module, datamodule=data)
    assert found == [4] * 5, "two layers, each run in forward and in backward"


# ---- unused tensors -------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize(
    ("rule", "based", "value"),
    [("auto", True, 0.0), ("auto", False, 0.5), ("origin", False, 0.0), ("mean", True, 0.5)],
)
def test_unused_tensors_are_named_and_set_by_rule(tmp_path, rule, based, value, memory):
    models = relatives(build(Perceptron, extra=True))
    recipe = Recipe(
        {"a": models[1], "b": models[2]},
        base=models[0] if based else None,
        coefficients=Tensor(),
        init=Constant(0.3),
        unused=rule,
    )
    module = MergeModule(recipe, memory=memory)
    with pytest.warns(UserWarning, match=r"2 tensors got no gradient .* extra.weight, extra.bias"):
        path = saved(tmp_path, module)
    state = module.merged.state
    assert state.fixed == {"extra.weight": value, "extra.bias": value}
    base = models[0].extra.weight if based else torch.zeros(2, 2)
    a, b = (model.extra.weight for model in models[1:])
    expected = base + value * (a - base) + value * (b - base)
    got = state.materialise("extra.weight")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert torch.load(path, weights_only=True)["gradmerge"]["fixed"] == state.fixed
    loaded = MergeModule.load_from_checkpoint(path, recipe=recipe)
    assert loaded.merged.state.fixed == state.fixed
