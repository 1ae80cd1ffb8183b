"""Training with a stock Trainer: the steps it takes, precisions, scores and messages."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import distributed, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.testing._internal.distributed.fake_pg import FakeStore

from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData
from gradmerge.coefficients import Column, Element, Softmax, Tensor, Uniform
from gradmerge.common.errors import ConfigError
from gradmerge.engine.outputs import rows_of
from gradmerge.engine.predict import predict
from gradmerge.objectives import L1, CrossEntropy, KLToEnsemble, KLToSource, L2ToInit, Objective
from tiny import (
    SPLITS,
    Normalised,
    build,
    fit,
    module_of,
    raws,
    relatives,
    save_family,
    sentences,
    trainer_of,
    validate,
    vectors,
)


def with_sgd(module, rate=0.5):
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=rate)
    return module


def assert_same_raw(module, other, tolerance):
    for key, value in raws(module).items():
        torch.testing.assert_close(value, raws(other)[key], rtol=tolerance, atol=tolerance)


# ---- what a step is -------------------------------------------------------------------------


def plain_steps(models, data, steps, rate, weights):
    """Coefficients after SGD on the stacked task vectors, by autograd alone, in float64."""
    base, *sources = [model.double() for model in copy.deepcopy(models)]
    names = list(dict(base.named_parameters()))
    stacked = {
        n: torch.stack(
            [dict(s.named_parameters())[n] - dict(base.named_parameters())[n] for s in sources]
        )
        for n in names
    }
    z = torch.full((len(sources), len(names)), 0.3, dtype=torch.float64, requires_grad=True)
    stream = iter(data.train_dataloader())
    for _ in range(steps):
        batch = next(stream)
        theta = {
            n: dict(base.named_parameters())[n].detach()
            + torch.einsum("k,k...->...", z[:, i], stacked[n].detach())
            for i, n in enumerate(names)
        }
        losses = [
            weights[t]
            * cross_entropy(functional_call(base, theta, (b["x"].double(),)), b["labels"])
            for t, b in batch.items()
        ]
        (gradient,) = torch.autograd.grad(sum(losses) / sum(weights.values()), z)
        z = (z - rate * gradient).detach().requires_grad_()
    return z.detach()


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_steps_equal_plain_autograd_over_task_vectors(tmp_path, memory):
    models, weights = relatives(build()), {"a": 3.0, "b": 1.0}
    objective = Objective([CrossEntropy()], task_weights={"a": 3.0})
    module = with_sgd(module_of(models, objective, memory=memory))
    data = vectors()
    data.setup()
    expected = plain_steps(models, data, 3, 0.5, weights)
    fit(tmp_path, module, max_steps=3)
    assert (expected - 0.3).abs().max() > 1e-2
    torch.testing.assert_close(module.merged.raw["tensor"].double(), expected, rtol=0, atol=1e-6)


def test_the_optimiser_holds_the_coefficients_alone(tmp_path):
    module, trainer = fit(tmp_path)
    (optimiser,) = trainer.optimizers
    held = [p for group in optimiser.param_groups for p in group["params"]]
    assert len(held) == 1
    assert held[0] is module.merged.raw["tensor"]
    assert [tuple(p.shape) for p in module.parameters()] == [(2, 4)]
    assert list(module.state_dict()) == ["merged.raw.tensor"]


def test_sources_are_not_written_to(tmp_path):
    models = relatives(build(Normalised))
    before = [copy.deepcopy(model.state_dict()) for model in models]
    fit(tmp_path, module_of(models, Objective([CrossEntropy(), KLToSource()])))
    for model, state in zip(models, before, strict=True):
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("coefficients", [Tensor(), Column(), Softmax(Element())], ids=repr)
def test_streamed_memory_learns_what_resident_memory_learns(tmp_path, coefficients):
    learned = [
        fit(
            tmp_path,
            module_of(coefficients=coefficients, init=Uniform(), memory=memory),
            max_steps=6,
        )[0]
        for memory in ("resident", "streamed")
    ]
    start = module_of(coefficients=coefficients, init=Uniform())
    key = next(iter(raws(start)))
    assert not torch.allclose(raws(learned[0])[key], raws(start)[key], atol=1e-3)
    assert_same_raw(*learned, tolerance=1e-5)


def test_training_lowers_the_loss(tmp_path):
    module = module_of(learning_rate=0.1)
    data = vectors(batch_size=12)
    trainer = trainer_of(tmp_path, max_steps=40)
    first = validate(trainer, module, data)["selection/loss"]
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["train/loss"] < 0.8 * first


# ---- accumulation, clipping, precision ------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_accumulated_half_batches_equal_one_batch(tmp_path, memory):
    whole, _ = fit(tmp_path, with_sgd(module_of(memory=memory)), vectors(batch_size=4))
    halves, _ = fit(
        tmp_path,
        with_sgd(module_of(memory=memory)),
        vectors(batch_size=2),
        accumulate_grad_batches=2,
    )
    assert not torch.allclose(raws(whole)["tensor"], torch.tensor(0.3), atol=1e-2)
    assert_same_raw(whole, halves, tolerance=1e-6)


def test_clipping_bounds_the_step(tmp_path):
    free, _ = fit(tmp_path, with_sgd(module_of(), 1.0), max_steps=1)
    held, _ = fit(tmp_path, with_sgd(module_of(), 1.0), max_steps=1, gradient_clip_val=1e-3)
    moved = raws(held)["tensor"] - 0.3
    direction = raws(free)["tensor"] - 0.3
    assert direction.norm() > 1e-2
    # the step is a difference of numbers near 0.3, so it is known to float32's 3e-8
    torch.testing.assert_close(moved, 1e-3 * direction / direction.norm(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_keeps_wide_coefficients_and_learns_nearly_the_same(
    tmp_path, precision, memory
):
    wide, _ = fit(tmp_path, with_sgd(module_of()))
    module = with_sgd(module_of(memory=memory))
    low, trainer = fit(tmp_path, module, precision=precision)
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    assert low.merged.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    moved, expected = raws(low)["tensor"] - 0.3, raws(wide)["tensor"] - 0.3
    assert trainer.global_step == 4
    assert expected.norm() > 1e-2
    # bfloat16 keeps 8 bits
    assert (moved - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_scaler_s_factor_is_taken_out_again(tmp_path, memory):
    """float16 gradients are scaled against underflow, outside and within the step."""
    plain, _ = fit(tmp_path, with_sgd(module_of(memory=memory)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    scaled, trainer = fit(tmp_path, with_sgd(module_of(memory=memory)), plugins=[plugin])
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**10
    assert scaled._inner_scale() == 2.0**10
    moved, expected = raws(scaled)["tensor"] - 0.3, raws(plain)["tensor"] - 0.3
    # float16 keeps 11 bits
    assert (moved - expected).norm() < 0.01 * expected.norm()


def test_float64_is_float64_throughout(tmp_path):
    """Losses and teachers, too: two steps are those of autograd to float64's rounding."""
    models = [model.double() for model in relatives(build())]
    data = vectors()
    for task in data.tasks.values():
        for row in (row for split in task.path.values() for row in split):
            row["x"] = row["x"].double()
    objective = Objective([CrossEntropy(), KLToSource(0.5), KLToEnsemble(0.25, 1.0)])
    module = with_sgd(module_of(models, objective, dtype="float64"))
    start = raws(module)["tensor"]
    double, _ = fit(tmp_path, module, data, precision="64-true", max_steps=2)
    assert {p.dtype for p in double.parameters()} == {torch.float64}

    base, *own = (dict(model.named_parameters()) for model in models)
    places = {name: slot.index for name, slot in module.merged.plan.layout.slots.items()}

    def run(weights, x):
        return functional_call(models[0], weights, (x,)).log_softmax(-1)

    def loss(z, batches):
        theta = {
            n: base[n].detach() + sum(z[k, i] * (own[k][n] - base[n]).detach() for k in range(2))
            for n, i in places.items()
        }
        total = 0.0
        for teacher, batch in zip(own, batches.values(), strict=True):
            logits = functional_call(models[0], theta, (batch["x"],))
            total += cross_entropy(logits, batch["labels"])
            with torch.no_grad():
                p = (functional_call(models[0], teacher, (batch["x"],)) / 2).softmax(-1)
                q = sum(run(weights, batch["x"]).exp() for weights in own) / 2
            cross = (p * (p.log() - (logits / 2).log_softmax(-1))).sum(-1).mean()
            total += 0.5 * 4 * cross
            total += 0.25 * (q * (q.log() - logits.log_softmax(-1))).sum(-1).mean()
        return total / 2

    z, stream = start.clone(), iter(data.train_dataloader())
    for _ in range(2):
        leaf = z.clone().requires_grad_()
        z = z - 0.5 * torch.autograd.grad(loss(leaf, next(stream)), leaf)[0]
    assert (z - start).abs().max() > 1e-2
    torch.testing.assert_close(raws(double)["tensor"], z, rtol=0, atol=1e-13)


def test_a_teacher_runs_once_a_task_and_step(tmp_path, monkeypatch):
    module, seen = module_of(objective=Objective([KLToSource(), KLToSource(0.5, 1.0)])), []
    real = module.merged.as_source

    def as_source(name, own):
        seen.append(name)
        return real(name, own)

    monkeypatch.setattr(module.merged, "as_source", as_source)
    fit(tmp_path, module, max_steps=2, limit_val_batches=0)
    assert seen == ["a", "b"] * 2


# ---- terms and regularisers -----------------------------------------------------------------


def test_regularisers_move_the_first_step_by_their_gradient(tmp_path):
    plain, _ = fit(tmp_path, with_sgd(module_of()), max_steps=1)
    objective = Objective([CrossEntropy()], [L1(weight=0.1), L2ToInit(weight=5.0)])
    module, trainer = fit(tmp_path, with_sgd(module_of(objective=objective)), max_steps=1)
    # d mean|c| / dc = sign(c) / count, and the distance from the start has no slope at the start
    expected = raws(plain)["tensor"] - 0.5 * 0.1 / 8
    torch.testing.assert_close(raws(module)["tensor"], expected, rtol=0, atol=1e-7)
    assert trainer.callback_metrics["train/penalty"] == pytest.approx(0.1 * 0.3, rel=1e-5)


def test_a_strong_pull_to_the_start_keeps_coefficients_there(tmp_path):
    objective = Objective([CrossEntropy()], [L2ToInit(weight=1e4)])
    module, _ = fit(tmp_path, module_of(objective=objective, learning_rate=1e-3), max_steps=20)
    assert (raws(module)["tensor"] - 0.3).abs().max() < 2e-3
    free, _ = fit(tmp_path, module_of(learning_rate=1e-3), max_steps=20)
    assert (raws(free)["tensor"] - 0.3).abs().max() > 5e-3


def test_batch_norm_refuses_a_batch_of_one_example_and_never_gets_one_of_more(tmp_path):
    models = relatives(build(Normalised))
    with pytest.raises(ConfigError, match=r"norm: BatchNorm takes the .* got one .*\(1, 8\)"):
        fit(tmp_path, module_of(models), vectors(batch_size=1))
    # its statistics are recomputed on all three examples, not on two and then one
    data = vectors(count=3, batch_size=2, eval_batch_size=2)
    module, _ = fit(tmp_path, module_of(models, score_start=False), data, max_steps=1)
    assert module.merged.network_buffers.batch_norms[0].num_batches_tracked == 2
    kept = module_of(models, buffers="mean")
    fit(tmp_path, kept, vectors(batch_size=1), max_steps=1)


def test_synchronised_batch_norm_takes_one_example_a_process():
    """Two processes by their number alone; the layer itself runs on GPUs only, and says so last."""
    models = [nn.SyncBatchNorm.convert_sync_batchnorm(m) for m in relatives(build(Normalised))]
    module = module_of(models)
    module.train()
    one = torch.ones(1, 6)
    with pytest.raises(ConfigError, match=r"norm: BatchNorm takes .* got one .*\(1, 8\)"):
        module.merged(task="a", x=one)
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
            module.merged(task="a", x=one)
    finally:
        distributed.destroy_process_group()
    plain = module_of(relatives(build(Normalised)))
    plain.train()
    with pytest.raises(ConfigError, match="norm: BatchNorm takes"):
        plain.merged(task="a", x=one)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_is_the_source_itself_and_leaves_no_trace(memory, training):
    models = relatives(build(Normalised))
    module = module_of(models, Objective([KLToSource()]), memory=memory)
    module.train(training)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    weights = {n: module.merged.state.materialise(n) for n in module.merged.plan.tensors}
    buffers = {n: b.clone() for n, b in module.merged.skeleton.named_buffers()}
    modes = [m.training for m in module.merged.skeleton.modules()]
    before = module.merged(task="b", x=x)
    predictions = predict(module.merged, module.objective, "b", {"x": x}, shared=False)
    with torch.no_grad():
        torch.testing.assert_close(predictions.teacher, models[2](x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(predictions.teacher, predictions.logits, atol=1e-2)
    assert not predictions.teacher.requires_grad
    torch.testing.assert_close(module.merged(task="b", x=x), before, rtol=0, atol=0)
    for name, buffer in module.merged.skeleton.named_buffers():
        if "num_batches" not in name:
            assert torch.equal(buffer, buffers[name]), name
    assert [m.training for m in module.merged.skeleton.modules()] == modes
    for name, value in weights.items():
        assert torch.equal(module.merged.state.materialise(name), value)
    assert sum(p.numel() for p in module.parameters()) == 2 * len(weights)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_the_ensemble_is_of_all_sources_as_they_are(memory):
    models = relatives(build(Normalised))
    module = module_of(models, Objective([KLToEnsemble()]), memory=memory)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    predictions = predict(module.merged, module.objective, "b", {"x": x}, shared=False)
    assert predictions.teacher is None
    with torch.no_grad():
        expected = [model.eval()(x) for model in models[1:]]
    torch.testing.assert_close(predictions.ensemble, expected, rtol=1e-6, atol=1e-6)
    assert not any(logits.requires_grad for logits in predictions.ensemble)


def test_an_ensemble_needs_a_head_that_all_share():
    with pytest.raises(ConfigError, match=r"KLToEnsemble averages .* its own head\.bias, head"):
        module_of(objective=Objective([KLToEnsemble()]), private=["head.*"])


def test_distillation_needs_no_labels_and_pulls_towards_the_sources(tmp_path):
    unlabelled = {
        task: TaskData(
            {s: [{"x": e["x"]} for e in rows] for s, rows in data.path.items()}, "tensors"
        )
        for task, data in vectors().tasks.items()
    }
    module = module_of(objective=Objective([KLToSource()]), learning_rate=0.05)
    trainer = trainer_of(tmp_path, max_steps=40)
    data = MergeDataModule(unlabelled, batch_size=12)
    before = validate(trainer, module, data)["selection/loss"]
    trainer.fit(module, datamodule=data)
    after = validate(trainer, module, data)["selection/loss"]
    assert after < 0.9 * before


# ---- networks of transformers ---------------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_language_model_is_fitted_from_folders(tmp_path, family, memory):
    models, _ = family("llama-tied", dtype=torch.float32)
    paths = save_family(tmp_path, models)
    tasks = {
        task: TaskData(
            {s: [{"text": t} for t in sentences(9 * i + j, 6)] for j, s in enumerate(SPLITS)},
            max_length=8,
        )
        for i, task in enumerate("ab")
    }
    recipe = Recipe({"a": paths["a"], "b": paths["b"]}, base=paths["base"])
    module = MergeModule(recipe, memory=memory, activation_checkpointing=True)
    data = MergeDataModule(tasks, batch_size=2)
    trainer = trainer_of(tmp_path, max_steps=3)
    trainer.fit(module, datamodule=data)
    found = validate(trainer, module, data)
    perplexity = found["selection/a/perplexity"]
    assert found["selection/a/loss"] == pytest.approx(math.log(perplexity), rel=1e-4)
    assert not torch.allclose(raws(module)["tensor"], torch.tensor(0.3), atol=1e-3)


def test_padding_does_not_count_in_an_encoder_decoder(tmp_path, family):
    """Its attention mask is that of the encoder's tokens, its logits those of the decoder's."""
    models, inputs = family("t5", dtype=torch.float32)
    module = module_of(models)
    labels = inputs["decoder_input_ids"].clone()
    labels[1, 2:] = -100
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 4:] = 0
    logits, kept, _ = rows_of(
        module.merged, "a", {**inputs, "attention_mask": mask, "labels": labels}
    )
    assert len(logits) == len(kept) == (labels != -100).sum()
