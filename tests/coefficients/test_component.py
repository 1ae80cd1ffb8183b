"""AdaRank: coefficients of singular components, hard masks, and their merges and files."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy
import pytest
import torch
from safetensors import safe_open
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import (
    Column,
    Complement,
    Component,
    Constant,
    Element,
    FromFile,
    HardMask,
    LeadingComponents,
    Mixup,
    Model,
    Row,
    Scaled,
    Sigmoid,
    Tensor,
    Uniform,
    WithScale,
)
from gradmerge.common.errors import ConfigError
from gradmerge.drivers.layerwise.files import Starts
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export.folder import export_state
from gradmerge.export.plots import CoefficientTable
from gradmerge.export.provenance import mean_coefficients
from gradmerge.mergekit.writer import write_mergekit
from gradmerge.objectives import CrossEntropy, FisherToInit, Objective
from gradmerge.operators import Components, DisjointMean, Linear, Spread, Terms
from gradmerge.preprocess import Trim
from tiny import build, fit, module_of, raws, recipe_of, relatives

MASKED = {"coefficients": HardMask(Component()), "operator": Components(0.3)}


class Images(torch.nn.Module):
    """A convolution that is wider than tall, and a linear layer that is taller than wide."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.head = torch.nn.Linear(4, 6)

    def forward(self, x):
        return self.head(self.conv(x).tanh().mean(dim=(2, 3)))


def family(dtype=torch.float64, count=3):
    return relatives(build(Images).to(dtype), count)


def directions(models, name, origin="base"):
    """`A` and `B_k` of a tensor in float64, in numpy."""
    base, *sources = (dict(m.named_parameters())[name].detach().double().numpy() for m in models)
    anchors = {"base": base, "zero": 0 * base, "mean": sum(sources) / len(sources)}
    return anchors[origin], [source - anchors[origin] for source in sources]


def truncated(matrix, rank):
    """The best approximation of a given rank, from numpy's decomposition."""
    shape = matrix.shape
    if matrix.ndim < 2:
        return matrix
    u, s, v = numpy.linalg.svd(matrix.reshape(shape[0], -1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(shape)


def merged_tensors(recipe):
    plan = open_plan(recipe)
    raw = plan.initial_raw()
    return {n: FitState(plan, raw).materialise(n, torch.float64).numpy() for n in plan.tensors}


# ---- merges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["base", "zero", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_components_are_task_arithmetic_of_that_scale(origin, dtype):
    models = family(dtype)
    for init in (LeadingComponents(1.0), Constant(1.0)):
        found = merged_tensors(recipe_of(models, **MASKED, origin=origin, init=init))
        for name, tensor in found.items():
            anchor, known = directions(models, name, origin)
            tolerance = 1e-6 if dtype == torch.float32 else 1e-13
            assert abs(tensor - (anchor + 0.3 * sum(known))).max() < tolerance, name


def test_no_component_is_the_origin_bit_for_bit():
    models = family(torch.float32)
    plan = open_plan(recipe_of(models, **MASKED, init=Constant(0.0)))
    state = FitState.start(plan)
    for name in plan.tensors:
        assert torch.equal(state.materialise(name), dict(models[0].named_parameters())[name])


@pytest.mark.parametrize("share", [0.16, 0.5, 0.8])
@pytest.mark.parametrize("origin", ["base", "mean"])
def test_a_share_of_the_components_is_the_truncated_decomposition(share, origin):
    models = family()
    recipe = recipe_of(models, **MASKED, origin=origin, init=LeadingComponents(share))
    for name, tensor in merged_tensors(recipe).items():
        anchor, known = directions(models, name, origin)
        shape = tensor.shape
        rank = int(share * min(shape[0], tensor[0].size)) if tensor.ndim > 1 else 0
        expected = anchor + 0.3 * sum(truncated(direction, rank) for direction in known)
        assert abs(tensor - expected).max() < 1e-12, name


def test_components_of_trimmed_directions_and_of_one_source():
    models = family(count=2)
    recipe = recipe_of(models, **MASKED, init=LeadingComponents(0.5), preprocess=[Trim(0.5)])
    for kept in (False, True):
        plan = open_plan(recipe)
        if kept:
            plan.prepare_learning()
        raw = plan.initial_raw()
        for name in ("conv.weight", "head.weight"):
            anchor, (direction,) = directions(models, name)
            bound = numpy.sort(abs(direction), axis=None)[direction.size // 2]
            trimmed = numpy.where(abs(direction) >= bound, direction, 0)
            expected = anchor + 0.3 * truncated(trimmed, 2)
            got = FitState(plan, raw).materialise(name, torch.float64).numpy()
            assert abs(got - expected).max() < 1e-6, name


def test_frozen_tensors_and_other_granularities_take_the_linear_sum():
    models = family()
    frozen = {"head": 1.0, "conv.bias": 0.0}
    recipe = recipe_of(models, **MASKED, init=LeadingComponents(0.0), frozen=frozen)
    found = merged_tensors(recipe)
    anchor, known = directions(models, "head.weight")
    assert abs(found["head.weight"] - (anchor + 0.3 * sum(known))).max() < 1e-13
    for name in ("conv.weight", "conv.bias"):
        assert (found[name] == directions(models, name)[0]).all()
    for coefficients in (Tensor(), Column()):
        pair = [
            merged_tensors(recipe_of(models, coefficients=coefficients, **options))
            for options in (
                {"operator": Components(0.3), "init": Mixup(seed=1)},
                {"operator": Linear(), "init": Mixup(seed=1, scale=0.3)},
            )
        ]
        for name, tensor in pair[0].items():
            assert abs(tensor - pair[1][name]).max() < 1e-7  # raw numbers are float32


def test_a_tensor_is_decomposed_once(monkeypatch):
    calls, real = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or real(*a, **k))
    models = family()
    merged = MergedModel(recipe_of(models, **MASKED, init=LeadingComponents(0.5)))
    batch = torch.randn(2, 3, 5, 5)
    for _ in range(3):
        merged(batch).sum().backward()
        with torch.no_grad():
            merged.raw["head/weight"].neg_()
    assert len(calls) == 2 * 2


def test_a_static_merge_keeps_no_factors():
    plan = open_plan(recipe_of(family(), **MASKED, init=LeadingComponents(0.5)))
    raw = plan.initial_raw()
    first = {name: FitState(plan, raw).materialise(name) for name in plan.tensors}
    assert plan._facts == {}
    plan.prepare_learning()
    assert all(torch.equal(FitState(plan, raw).materialise(name), first[name]) for name in first)
    kept = plan._facts["conv.weight"].values()
    assert [tuple(factor.shape) for factor in kept] == [(4, 8), (8, 27)]


def test_directions_that_are_not_finite_are_refused():
    terms = Terms([torch.full((3, 3), float("nan"))], torch.zeros(3, 3))
    with pytest.raises(ConfigError, match="source 1 of 1 has NaN or infinity"):
        Components().combine(terms, torch.ones(1, 3), Spread("component"), torch.empty(3, 3))


# ---- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("origin", ["base", "zero", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_autograd_s_through_the_explicit_formula(memory, origin, masked):
    """`A + 0.3 sum_k U diag(c s) V^T` written out, in float64; masks straight through."""
    models = family()
    coefficients = HardMask(Component(), temperature=10.0) if masked else Component()
    init = LeadingComponents(0.5) if masked else Mixup(per="element", seed=3)
    recipe = recipe_of(
        models, coefficients=coefficients, operator=Components(0.3), origin=origin, init=init
    )
    merged = MergedModel(recipe, memory=memory, dtype=torch.float64)
    batch = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 5])
    cross_entropy(merged(batch), labels).backward()

    leaves = {key: raw.detach().clone().requires_grad_() for key, raw in merged.raw.items()}
    theta = {}
    for name in ("conv.weight", "conv.bias", "head.weight", "head.bias"):
        z = leaves[name.replace(".", "/")]
        if masked:
            soft = torch.sigmoid(z / 10)
            c = (soft > 0.5).double() + soft - soft.detach()
        else:
            c = z
        anchor, known = directions(models, name, origin)
        total = torch.tensor(anchor)
        for k, direction in enumerate(known):
            if direction.ndim == 1:
                total = total + 0.3 * c[k] * torch.tensor(direction)
                continue
            u, s, v = numpy.linalg.svd(direction.reshape(len(direction), -1), full_matrices=False)
            u, s, v = map(torch.tensor, (u, s, v))
            total = total + 0.3 * ((u * (c[k] * s)) @ v).view(direction.shape)
        theta[name] = total
    cross_entropy(functional_call(copy.deepcopy(models[0]), theta, (batch,)), labels).backward()
    for key, raw in merged.raw.items():
        assert leaves[key].grad.abs().max() > 1e-6, key
        torch.testing.assert_close(raw.grad, leaves[key].grad, rtol=1e-9, atol=1e-13)


def published_adarank(z, origin, directions, whole):
    """The merge of the authors' code: w times `m s + ((m > 1/2) - m) s`, the last part held."""
    theta = {}
    for name, anchor in origin.items():
        total = torch.tensor(anchor)
        for k, direction in enumerate(directions[name]):
            direction = torch.tensor(direction)
            if name in whole:
                total = total + z[name][k] * direction
                continue
            u, s, v = torch.linalg.svd(direction.flatten(1), full_matrices=False)
            weight, mask = z[name][k, 0], torch.sigmoid(z[name][k, 1:] / 10)
            masked = mask * s + (((mask > 0.5).double() - mask) * s).detach()
            total = total + weight * ((u * masked) @ v).view(direction.shape)
        theta[name] = total
    return theta


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("origin", ["base", "mean"])
def test_masks_and_scales_have_the_gradients_of_the_published_form(memory, origin):
    """Acceptance: the merge, dL/dw and dL/dm, by float64 autograd through the formula."""
    models = family()
    names = ("conv.weight", "conv.bias", "head.weight", "head.bias")
    found = {name: directions(models, name, origin) for name in names}
    for whole in ("conv", None):
        recipe = recipe_of(
            models,
            coefficients=WithScale(HardMask(Component(whole=whole))),
            operator=Components(),
            origin=origin,
            init=Scaled(LeadingComponents(0.5), 0.3),
        )
        merged = MergedModel(recipe, memory=memory, dtype=torch.float64)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():  # any scale, of either sign, and any mask
            for raw in merged.raw.values():
                raw.copy_(torch.randn(raw.shape, generator=generator, dtype=torch.float64))
        batch = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64)
        labels = torch.tensor([0, 1, 2, 5])
        cross_entropy(merged(batch), labels).backward()

        keys = {name: name.replace(".", "/") for name in names}
        z = {n: merged.raw[key].detach().clone().requires_grad_() for n, key in keys.items()}
        alone = ("conv.bias", "head.bias", *(["conv.weight"] if whole else []))
        conv = (2,) if whole else (2, 5)
        assert [tuple(z[n].shape) for n in names] == [conv, (2,), (2, 5), (2,)]
        theta = published_adarank(
            z, {n: pair[0] for n, pair in found.items()}, {n: p[1] for n, p in found.items()}, alone
        )
        got = {n: merged.state.materialise(n, torch.float64) for n in names}
        for name in names:
            torch.testing.assert_close(got[name], theta[name].detach(), rtol=0, atol=1e-12)
        cross_entropy(functional_call(copy.deepcopy(models[0]), theta, (batch,)), labels).backward()
        for name in names:
            grad = merged.raw[keys[name]].grad
            assert grad.abs().max() > 1e-6, name
            torch.testing.assert_close(grad, z[name].grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    "inner", [Component(), HardMask(Component()), Column(), Row(), Sigmoid(Column(), eps=1e-9)]
)
def test_the_scale_starts_at_the_largest_coefficient(inner):
    link = WithScale(inner, start=0.7)
    c = torch.tensor([[0.0, -2.0, 0.0], [0.3, 0.3, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    z = link.pull_back(c)
    assert z.shape == (3, 4)
    assert z[:, 0].tolist() == [-2.0, 0.3, 0.7]
    torch.testing.assert_close(link.link(z), c, rtol=0, atol=1e-8)
    alone = torch.tensor([0.25, -4.0, 0.0])
    assert torch.equal(link.link(link.pull_back(alone)), alone)
    none = torch.zeros(3, 0)
    assert link.link(link.pull_back(none)).shape == (3, 0)


def test_granularities_without_a_scale_are_rejected():
    for inner in (Tensor(), Element(), HardMask(Model())):
        with pytest.raises(ConfigError, match="expected Column, Row, Partition or Component"):
            WithScale(inner)
    with pytest.raises(ConfigError, match=r"got 1 for 2 sources \(Complement\)"):
        Recipe({"a": "nowhere", "b": "nowhere"}, coefficients=WithScale(Complement(Column())))
    with pytest.raises(ConfigError, match=r"Component.whole: invalid regular expression '\('"):
        Component(whole="(")


def test_importance_and_files_of_parts_know_the_place_of_a_scale(tmp_path):
    """F is of coefficients, files are of raw numbers, which are one more."""
    options = {
        "coefficients": WithScale(Column()),
        "init": Uniform(),
        "objective": Objective([CrossEntropy()], [FisherToInit(2.0, batches=2)]),
    }
    module = module_of(**options, learning_rate=0.05)
    _, trainer = fit(tmp_path, module, max_steps=3)
    assert trainer.callback_metrics["train/penalty"] > 0
    plan = module.merged.plan
    kept = module.regularisation.importance
    starts = Starts(plan, torch.float32)
    for slot in plan.layout.slots.values():
        assert kept[slot.key].shape == (2, *slot.shape)
        assert starts.entry(slot.key).shape == tuple(module.merged.raw[slot.key].shape)
        assert torch.equal(starts[slot.key], plan.initial_raw()[slot.key])


def test_the_mask_s_gradient_is_the_sigmoid_s():
    z = torch.linspace(-30, 30, 13, dtype=torch.float64).requires_grad_()
    weights = torch.randn(13, dtype=torch.float64)
    link = HardMask(temperature=4.0)
    mask = link.link(z)
    assert mask.tolist() == [float(v > 0) for v in z.tolist()]
    (mask * weights).sum().backward()
    soft = [1 / (1 + numpy.exp(-v / 4)) for v in z.tolist()]
    expected = [w * s * (1 - s) / 4 for w, s in zip(weights.tolist(), soft, strict=True)]
    torch.testing.assert_close(z.grad, torch.tensor(expected, dtype=torch.float64))
    start = torch.tensor([0.0, 1.0])
    assert torch.equal(link.link(link.pull_back(start)), start)
    assert link.pull_back(start).tolist() == pytest.approx([-0.1, 0.1])


def test_masks_change_in_training_and_stay_masks(tmp_path):
    module = module_of(coefficients=HardMask(Tensor()), init=Constant(1.0), learning_rate=0.05)
    fit(tmp_path, module, max_steps=20)
    values = torch.cat([c.flatten() for c in module.merged.coefficients().values()])
    assert set(values.tolist()) == {0.0, 1.0}


# ---- what is refused --------------------------------------------------------------------------


def test_mistakes_are_refused_before_anything_is_opened():
    sources = {"a": "nowhere", "b": "nowhere"}
    for operator in (Linear(), DisjointMean()):
        with pytest.raises(ConfigError, match="operator: expected Components"):
            Recipe(sources, coefficients=HardMask(Component()), operator=operator)
    with pytest.raises(ConfigError, match=r"share in \[0, 1\], got 1.5"):
        LeadingComponents(1.5)
    for options in ({"temperature": 0.0}, {"start": -1.0}):
        with pytest.raises(ConfigError, match="expected a positive number"):
            HardMask(**options)


def test_starts_that_are_no_masks_or_no_components_are_refused():
    models = relatives(build())
    with pytest.raises(ConfigError, match=r"must be 0 or 1, got 0\.3"):
        open_plan(recipe_of(models, **MASKED, init=Constant(0.3))).initial_raw()
    with pytest.raises(ConfigError, match="run over axis 1, not over singular components"):
        open_plan(recipe_of(models, coefficients=Column(), init=LeadingComponents())).initial_raw()


# ---- export -----------------------------------------------------------------------------------


def test_coefficients_are_recorded_as_components_and_read_as_nothing_else(tmp_path):
    models = relatives(build())
    recipe = recipe_of(models, **MASKED, init=LeadingComponents(0.5))
    plan = open_plan(recipe)
    raw = plan.initial_raw()
    folder = export_state(FitState(plan, raw), tmp_path / "merged")
    path = str(folder / "coefficients.st")
    with safe_open(path, framework="pt") as file:
        slots = json.loads(file.metadata()["slots"])
        assert slots["body.weight"] == "component"
        assert slots["body.bias"] == "scalar"
        assert tuple(file.get_tensor("body.weight").shape) == (2, 6)
    again = open_plan(replace(recipe, init=FromFile(path))).initial_raw()
    assert all(torch.equal(again[key], raw[key]) for key in raw)
    for coefficients in (Tensor(), Row(), Column()):
        other = recipe_of(models, coefficients=coefficients, init=FromFile(path))
        with pytest.raises(ConfigError, match="run over component, those of this merge"):
            open_plan(other).initial_raw()
    by_row = FitState.start(open_plan(recipe_of(models, coefficients=Row())))
    rows = export_state(by_row, tmp_path / "rows")
    wrong = FromFile(str(rows / "coefficients.st"))
    with pytest.raises(ConfigError, match="run over axis 0, those of this merge over component"):
        open_plan(replace(recipe, init=wrong)).initial_raw()
    by_tensor = FitState.start(open_plan(recipe_of(models, init=Constant(1.0))))
    coarse = export_state(by_tensor, tmp_path / "coarse")
    spread = replace(recipe, init=FromFile(str(coarse / "coefficients.st")))
    assert (open_plan(spread).initial_raw()["body/weight"] == torch.tensor(0.1)).all()


def test_mergekit_has_no_components(tmp_path):
    plan = open_plan(recipe_of(relatives(build()), **MASKED, init=Constant(1.0)))
    with pytest.raises(ConfigError, match=r"coefficients: Component has several per tensor"):
        write_mergekit(FitState.start(plan), tmp_path / "merge.yaml")


def test_tables_and_means_are_over_components(tmp_path):
    module, _ = fit(tmp_path, module_of(init=Constant(1.0)), max_steps=1)
    recipe = recipe_of(relatives(build()), **MASKED, init=LeadingComponents(0.5))
    merged = MergedModel(recipe)
    table = CoefficientTable.of(merged.state)
    found = dict(zip(table.names, table.mean.tolist(), strict=True))
    assert found["body.weight"] == [0.5, 0.5]
    assert found["head.weight"] == pytest.approx([1 / 3, 1 / 3])  # 1 of 3
    assert found["body.bias"] == [1.0, 1.0]
    expected = (0.5 + 1 / 3 + 2) / 4
    assert mean_coefficients(merged.state) == pytest.approx({"a": expected, "b": expected})
    assert raws(module)["tensor"].isfinite().all()
