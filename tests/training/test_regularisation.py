"""Priors at the start of a fit, the norm of aTLAS, and the learned scale of logits."""

from __future__ import annotations

import copy
import json
import math

import numpy
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from gradmerge import MergeModule
from gradmerge.coefficients import (
    Chunks,
    Column,
    Component,
    Constant,
    Element,
    Group,
    Mixup,
    Model,
    Partition,
    Row,
    Sigmoid,
    Softmax,
    Tensor,
    Uniform,
)
from gradmerge.common.errors import ConfigError
from gradmerge.objectives import (
    L1,
    CrossEntropy,
    Entropy,
    FisherToInit,
    KLToSource,
    L2ToInit,
    Lp,
    Objective,
)
from gradmerge.operators import Components, Linear
from gradmerge.training.callbacks import ExportAtEnd
from gradmerge.training.logit_scale import LogitScale
from gradmerge.training.search import set_coefficients
from tiny import build, fit, module_of, raws, recipe_of, relatives, trainer_of, validate, vectors


def with_sgd(module, rate=0.5):
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=rate)
    return module


# ---- the norm over sources ----------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 1.5, 2])
def test_lp_is_the_mean_over_slots_of_the_norm_over_sources(p):
    generator = torch.Generator().manual_seed(1)
    found = {
        "x": torch.randn(3, 4, generator=generator).double(),
        "y": torch.randn(3, generator=generator).double(),
        "z": torch.randn(3, 2, 2, generator=generator).double(),
    }
    slots = [found["x"][:, i] for i in range(4)] + [found["y"]]
    slots += [found["z"][:, i, j] for i in range(2) for j in range(2)]
    norms = [sum(abs(v) ** p for v in slot.tolist()) ** (1 / p) for slot in slots]
    assert Lp(p).penalty(found, {}).item() == pytest.approx(sum(norms) / 9, rel=1e-12)
    if p == 1:
        assert L1().penalty(found, {}).item() == pytest.approx(sum(norms) / 27, rel=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_lp_has_no_slope_at_zero_where_atlas_starts(p):
    zero = torch.zeros(3, 4, requires_grad=True)
    Lp(p).penalty({"x": zero}, {}).backward()
    assert torch.equal(zero.grad, torch.zeros(3, 4))
    with pytest.raises(ConfigError, match=r"p: expected at least 1, got 0\.5"):
        Lp(0.5)


# ---- Fisher to the start -------------------------------------------------------------------------


def expand(slot, coefficient, shape):
    """`[sources, *slot]` to `[sources, *shape]`, for everything but components."""
    if slot.kind == "scalar":
        return coefficient.reshape(-1, *[1] * len(shape)).expand(-1, *shape)
    if slot.kind == "axis":
        place = [1] * len(shape)
        place[slot.axis] = -1
        if slot.length:
            runs = slot.shape[0]
            coefficient = coefficient[:, [i * runs // slot.length for i in range(slot.length)]]
        return coefficient.reshape(len(coefficient), *place).expand(-1, *shape)
    if slot.kind == "partition":
        parts = slot.parts(math.prod(shape), torch.device("cpu"))
        return coefficient[:, parts].reshape(-1, *shape)
    return coefficient


def explicit_importance(module, models, batches, data):
    """Mean squared gradients in the coefficients, float64, over the first batches, by hand."""
    base, *sources = [copy.deepcopy(model).double() for model in models]
    own = {n: p.detach() for n, p in base.named_parameters()}
    stacked = {
        n: torch.stack([dict(s.named_parameters())[n].detach() - own[n] for s in sources])
        for n in own
    }
    slots = module.merged.plan.layout.slots
    start = {n: c.detach().double() for n, c in module.merged.coefficients().items()}
    leaves = {(s.key, s.index): start[n].clone().requires_grad_() for n, s in slots.items()}
    squares = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
    data.setup()
    stream = iter(data.train_dataloader())
    for _ in range(batches):
        theta = {}
        for n, slot in slots.items():
            c = leaves[slot.key, slot.index]
            if slot.kind == "component":
                parts = []
                for k, direction in enumerate(stacked[n].numpy()):
                    u, s, v = map(torch.tensor, numpy.linalg.svd(direction, full_matrices=False))
                    parts.append((u * (c[k] * s)) @ v)
                theta[n] = own[n] + sum(parts)
            else:
                theta[n] = own[n] + (expand(slot, c, own[n].shape) * stacked[n]).sum(dim=0)
        losses = [
            cross_entropy(functional_call(base, theta, (b["x"].double(),)), b["labels"])
            for b in next(stream).values()
        ]
        found = torch.autograd.grad(sum(losses) / len(losses), list(leaves.values()))
        for square, gradient in zip(squares.values(), found, strict=True):
            square += gradient.square() / batches
    by_tensor = {n: squares[s.key, s.index] for n, s in slots.items()}
    mean = torch.cat([value.flatten() for value in by_tensor.values()]).mean()
    return {n: value / mean for n, value in by_tensor.items()}


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize(
    "coefficients",
    [
        Model(),
        Group((r"^body",)),
        Tensor(),
        Column(),
        Row(),
        Partition(3),
        Chunks(4.0),
        Component(),
        Element(),
        Softmax(Tensor()),
        Sigmoid(Element()),
    ],
    ids=lambda c: "-".join(n for n in (type(c).__name__, type(getattr(c, "inner", "")).__name__)),
)
def test_importance_is_the_mean_squared_gradient_of_each_batch(tmp_path, coefficients, memory):
    models = relatives(build())
    objective = Objective([CrossEntropy()], [FisherToInit(batches=3)])
    operator = Components() if isinstance(coefficients, Component) else Linear()
    init = Uniform() if isinstance(coefficients, Softmax) else Mixup(seed=2)
    recipe = recipe_of(models, coefficients=coefficients, operator=operator, init=init)
    module = MergeModule(recipe, objective, memory=memory)
    expected = explicit_importance(module, models, 3, vectors())
    fit(tmp_path, with_sgd(module, 0.0), max_steps=1)
    slots = module.merged.plan.layout.slots
    everything = []
    for name, value in expected.items():
        found = slots[name].read(module.regularisation.importance).double()
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-5)
        everything.append(found.flatten())
    assert torch.cat(everything).mean() == pytest.approx(1.0, rel=1e-6)


def test_the_penalty_moves_a_fit_by_its_formula(tmp_path):
    models, weight = relatives(build()), 0.7
    data = vectors()
    data.setup()
    objective = Objective([CrossEntropy()], [FisherToInit(weight, batches=2)])
    module = with_sgd(module_of(models, objective))
    importance = explicit_importance(module, models, 2, data)
    f = torch.stack(list(importance.values()), dim=1)
    base, *sources = [copy.deepcopy(model).double() for model in models]
    own = {n: p.detach() for n, p in base.named_parameters()}
    moves = {
        n: torch.stack([dict(s.named_parameters())[n].detach() - own[n] for s in sources])
        for n in own
    }
    z, stream = torch.full((2, 4), 0.3, dtype=torch.float64), iter(data.train_dataloader())
    for _ in range(3):
        z = z.detach().requires_grad_()
        theta = {
            n: own[n] + torch.einsum("k,k...->...", z[:, i], moves[n]) for i, n in enumerate(own)
        }
        losses = [
            cross_entropy(functional_call(base, theta, (b["x"].double(),)), b["labels"])
            for b in next(stream).values()
        ]
        loss = sum(losses) / 2 + weight * (f * (z - 0.3).square()).sum() / 8
        (gradient,) = torch.autograd.grad(loss, z)
        z = z - 0.5 * gradient
    _, trainer = fit(tmp_path, module, max_steps=3)
    torch.testing.assert_close(raws(module)["tensor"].double(), z.detach(), rtol=0, atol=2e-6)
    assert trainer.callback_metrics["train/penalty"] > 1e-4
    plain, _ = fit(tmp_path, with_sgd(module_of(models)), max_steps=3)
    assert (raws(plain)["tensor"] - raws(module)["tensor"]).abs().max() > 1e-3


def test_equal_importance_is_l2_to_the_start():
    start = {"x": torch.randn(2, 3), "y": torch.randn(2)}
    now = {name: value + torch.randn_like(value) for name, value in start.items()}
    ones = {name: torch.ones_like(value) for name, value in start.items()}
    expected = L2ToInit().penalty(now, start)
    torch.testing.assert_close(FisherToInit().penalty(now, start, ones), expected)
    with pytest.raises(ConfigError, match="importance of the coefficients was not measured"):
        FisherToInit().penalty(now, start)
    with pytest.raises(ConfigError, match="batches: expected at least 1"):
        FisherToInit(batches=0)


def test_a_resumed_fit_keeps_the_importance_of_its_start(tmp_path):
    def module():
        objective = Objective([CrossEntropy()], [FisherToInit(5.0, batches=2)])
        return with_sgd(module_of(objective=objective))

    whole, _ = fit(tmp_path, module(), max_steps=4)
    half, trainer = fit(tmp_path, module(), max_steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = module()
    trainer = trainer_of(tmp_path, max_steps=4)
    trainer.fit(rest, datamodule=vectors(), ckpt_path=tmp_path / "half.ckpt")
    kept, fresh = rest.regularisation.importance, half.regularisation.importance
    assert torch.equal(kept["tensor"], fresh["tensor"])
    assert torch.equal(raws(rest)["tensor"], raws(whole)["tensor"])


def test_an_objective_that_cares_for_nothing_has_no_importance(tmp_path):
    data = vectors()
    for task in data.tasks.values():
        for row in task.path["adaptation"]:
            row["labels"] = torch.tensor(-100)
    objective = Objective([CrossEntropy()], [FisherToInit(batches=2)])
    with pytest.raises(ConfigError, match="got zero in all coefficients over 2 batches"):
        fit(tmp_path, module_of(objective=objective), data)


def test_without_the_prior_nothing_is_measured(tmp_path):
    module, _ = fit(tmp_path, module_of(objective=Objective([CrossEntropy()], [L2ToInit()])))
    assert module.regularisation.importance == {}
    assert not module.regularisation.wants_batches


def test_a_searched_start_is_measured_from_in_float64():
    objective = Objective([CrossEntropy()], [L2ToInit(weight=1.0)])
    module = module_of(objective=objective, coefficients=Sigmoid(), dtype="float64")
    chosen = Constant(0.7)
    module.start_at(chosen)
    set_coefficients(module.merged, chosen)
    assert {start.dtype for start in module.regularisation.start.values()} == {torch.float64}
    assert module.regularisation.penalty() == 0


# ---- the learned scale of logits -----------------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_the_scale_learns_with_the_coefficients_by_its_formula(tmp_path, memory):
    models = relatives(build())
    data = vectors()
    data.setup()
    base, *sources = [copy.deepcopy(model).double() for model in models]
    names = list(dict(base.named_parameters()))
    stacked = {n: torch.stack([dict(s.named_parameters())[n] for s in sources]) for n in names}
    z = torch.full((2, 4), 0.5, dtype=torch.float64).log()
    a = torch.tensor(math.log(2.0), dtype=torch.float64)
    stream = iter(data.train_dataloader())
    for _ in range(3):
        z, a = z.detach().requires_grad_(), a.detach().requires_grad_()
        c = torch.softmax(z, dim=0)
        theta = {
            n: torch.einsum("k,k...->...", c[:, i], stacked[n].detach())
            for i, n in enumerate(names)
        }
        losses = [
            cross_entropy(a.exp() * functional_call(base, theta, (b["x"].double(),)), b["labels"])
            for b in next(stream).values()
        ]
        gradients = torch.autograd.grad(sum(losses) / 2, [z, a])
        z, a = z - 0.5 * gradients[0], a - 0.5 * gradients[1]
    module = module_of(
        models,
        coefficients=Softmax(Tensor()),
        init=Uniform(),
        origin="zero",
        logit_scale=2.0,
        memory=memory,
    )
    _, trainer = fit(tmp_path, with_sgd(module), max_steps=3)
    assert abs(float(a.detach()) - math.log(2.0)) > 1e-2
    torch.testing.assert_close(module.logit_scale.log_scale.double(), a, rtol=0, atol=1e-6)
    torch.testing.assert_close(raws(module)["tensor"].double(), z, rtol=0, atol=2e-6)
    assert trainer.callback_metrics["train/logit_scale"] > 0


def test_accumulated_and_scaled_gradients_of_the_scale_are_plain_ones(tmp_path):
    def module():
        return with_sgd(module_of(logit_scale=1.5))

    whole, _ = fit(tmp_path, module(), vectors(batch_size=4))
    halves, _ = fit(tmp_path, module(), vectors(batch_size=2), accumulate_grad_batches=2)
    moved = whole.logit_scale.log_scale - math.log(1.5)
    assert moved.abs() > 1e-2
    torch.testing.assert_close(
        halves.logit_scale.log_scale, whole.logit_scale.log_scale, rtol=0, atol=1e-6
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    half = fit(tmp_path, module(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])[0]
    difference = half.logit_scale.log_scale - whole.logit_scale.log_scale
    assert difference.abs() < 0.01 * moved.abs()  # float16 keeps 11 bits


def test_evaluation_and_export_do_without_the_scale(tmp_path):
    out = tmp_path / "merged"
    module = module_of(logit_scale=4.0, init=Constant(0.4))
    plain = module_of(init=Constant(0.4))
    data = vectors()
    scored = [validate(trainer_of(tmp_path), each, data) for each in (module, plain)]
    assert scored[0] == scored[1]
    module, trainer = fit(tmp_path, with_sgd(module), callbacks=[ExportAtEnd(str(out))])
    run = json.loads((out / "provenance.json").read_text())["run"]
    assert run["model"]["logit_scale"] == 4.0
    assert run["logit_scale"] == pytest.approx(module.logit_scale.value)
    assert run["logit_scale"] != pytest.approx(4.0, rel=1e-3)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert list(state["state_dict"]) == ["merged.raw.tensor", "logit_scale.log_scale"]
    assert state["gradmerge"]["run"]["logit_scale"] == run["logit_scale"]


def test_a_resumed_fit_goes_on_with_its_scale(tmp_path):
    whole, _ = fit(tmp_path, with_sgd(module_of(logit_scale=2.0)), max_steps=4)
    _, trainer = fit(tmp_path, with_sgd(module_of(logit_scale=2.0)), max_steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = with_sgd(module_of(logit_scale=2.0))
    trainer = trainer_of(tmp_path, max_steps=4)
    trainer.fit(rest, datamodule=vectors(), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(rest.logit_scale.log_scale, whole.logit_scale.log_scale)


def test_the_scale_stays_wide_in_low_precision(tmp_path):
    module, _ = fit(tmp_path, module_of(logit_scale=1.0), precision="bf16-true")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("start", [0.0, -1.0, math.inf])
def test_a_scale_that_is_not_positive_is_refused(start):
    with pytest.raises(ConfigError, match="logit_scale: expected a positive number"):
        LogitScale(start, [CrossEntropy()])


def test_a_scale_that_the_objective_would_run_away_with_is_refused():
    with pytest.raises(ConfigError, match="Entropy can be minimised by the scale alone"):
        module_of(objective=Objective([KLToSource(), Entropy()]), logit_scale=1.0)
