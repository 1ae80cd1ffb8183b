"""Gradients and merged weights against plain float64 autograd over stacked directions."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch.func import functional_call

from architectures import ARCHITECTURES, logits_of
from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import (
    Clamp,
    Column,
    Complement,
    ConcreteMask,
    Constant,
    Element,
    Group,
    Mixup,
    Model,
    Partition,
    Row,
    Shared,
    Sigmoid,
    Softmax,
    Tanh,
    Tensor,
    Uniform,
)
from gradmerge.engine.state import FitState

GRANULARITIES = [Model(), Group(), Tensor(), Column(), Row(), Partition(3, seed=1), Element()]
FINE = (Column, Row, Partition, Element)
LINKS = {
    "identity": lambda inner: inner,
    "clamp": Clamp,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "softmax": Softmax,
    "complement": Complement,
    "complement-sigmoid": lambda inner: Complement(Sigmoid(inner)),
    "shared": lambda inner: Shared(ConcreteMask(inner) if isinstance(inner, FINE) else inner),
}
ORIGINS = ["base", "zero", "mean"]


def loss_of(output):
    logits = logits_of(output).flatten(0, -2)
    target = torch.arange(len(logits)) % logits.shape[-1]
    return torch.nn.functional.cross_entropy(logits, target)


def expanded(merged: MergedModel, name: str, coefficient: torch.Tensor) -> torch.Tensor:
    """`[sources, *slot]` to `[sources, *shape]`, written without the engine's kernels."""
    slot, shape = merged.plan.layout.slots[name], merged.plan.tensors[name].shape
    if slot.kind == "scalar":
        return coefficient.reshape(-1, *[1] * len(shape)).expand(-1, *shape)
    if slot.kind == "axis":
        place = [1] * len(shape)
        place[slot.axis] = -1
        return coefficient.reshape(len(coefficient), *place).expand(-1, *shape)
    if slot.kind == "partition":
        parts = slot.parts(torch.Size(shape).numel(), torch.device("cpu"))
        return coefficient[:, parts].reshape(-1, *shape)
    return coefficient


def oracle(merged: MergedModel, models, inputs, origin: str, dtype=torch.float64):
    """Loss and gradients by ordinary autograd, by default in float64, and the merged tensors."""
    models = [copy.deepcopy(model).to(dtype) for model in models]
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    raws = {k: raw.detach().to(dtype).requires_grad_() for k, raw in merged.raw.items()}
    base, sources = models[0], models[1:]
    stacked = {
        n: torch.stack([dict(s.named_parameters())[n] for s in sources]).detach()
        for n, _ in base.named_parameters()
    }
    anchors = {
        "base": lambda n: dict(base.named_parameters())[n].detach(),
        "zero": lambda n: torch.zeros_like(stacked[n][0]),
        "mean": lambda n: stacked[n].mean(dim=0),
    }
    thetas = {}
    for name in stacked:
        anchor = anchors[origin](name)
        coefficient = expanded(merged, name, FitState(merged.plan, raws).coefficient(name))
        thetas[name] = anchor + (coefficient * (stacked[name] - anchor)).sum(dim=0)
    loss = loss_of(functional_call(base, thetas, (), inputs))
    loss.backward()
    return loss, {k: raw.grad for k, raw in raws.items()}, thetas


def build(models, granularity, link="identity", origin="base", init=None, **options):
    init = init or (Uniform() if "softmax" in link or "complement" in link else Constant(0.3))
    recipe = Recipe(
        sources={"a": models[1], "b": models[2]},
        base=models[0],
        origin=origin,
        coefficients=LINKS[link](granularity),
        init=init,
        buffers="origin",
    )
    return MergedModel(recipe, **options)


def jitter(merged):
    """Move away from the symmetric start, where links have special gradients."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for raw in merged.raw.values():
            raw.add_(0.05 * torch.randn(raw.shape, generator=generator, dtype=raw.dtype))


def assert_same(ours, reference, tolerance):
    scale = max(grad.abs().max() for grad in reference.values())
    for key, grad in reference.items():
        came = ours[key].grad
        error = (came.double() - grad).norm() / max(grad.norm(), 1e-6 * scale)
        assert error <= tolerance, f"{key}: relative error {error:.2e}"


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: type(g).__name__)
def test_every_granularity_and_link_equals_float64_autograd(family, granularity, link, memory):
    models, inputs = family("llama-tied")
    merged = build(models, granularity, link, memory=memory, dtype=torch.float64)
    jitter(merged)
    loss = loss_of(merged(**inputs))
    loss.backward()
    expected, grads, _ = oracle(merged, models, inputs, "base")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same(merged.raw, grads, 1e-9)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize(
    "granularity", [Tensor(), Column(), Element()], ids=lambda g: type(g).__name__
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_and_origin_equals_float64_autograd(
    family, name, granularity, origin, memory
):
    models, inputs = family(name)
    merged = build(models, granularity, origin=origin, memory=memory, dtype=torch.float64)
    jitter(merged)
    loss = loss_of(merged(**inputs))
    loss.backward()
    expected, grads, thetas = oracle(merged, models, inputs, origin)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same(merged.raw, grads, 1e-9)
    for key in merged.plan.tensors:
        came = merged.state.materialise(key, torch.float64)
        torch.testing.assert_close(came, thetas[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: type(g).__name__)
def test_float32_gradient_is_within_a_millionth(family, granularity, link, memory):
    """The contraction in float32, given the float64 gradient of the merged tensors."""
    models, _inputs = family("llama-tied", dtype=torch.float32)
    merged = build(models, granularity, link, memory=memory)
    jitter(merged)
    wide = build(
        [m.double() for m in family("llama-tied", dtype=torch.float32)[0]], granularity, link
    )
    for name in merged.state.learned:
        generator = torch.Generator().manual_seed(5)
        shape = merged.plan.tensors[name].shape
        grad = torch.randn(shape, generator=generator)
        raw = merged.plan.z(name, merged.raw)
        came = merged.state.contract(name, grad, raw)
        expected = wide.state.contract(name, grad.double(), raw.double())
        error = (came.double() - expected).norm() / expected.norm().clamp_min(1e-12)
        # the mean of a mask is fixed, so that most of a gradient along it cancels
        assert error <= (1e-5 if link == "shared" else 1e-6), f"{name}: {error:.2e}"


def assert_float32_is_as_good_as_it_gets(merged, models, inputs, origin):
    """The whole gradient, through network and merge in float32, within a millionth.

    Where ordinary float32 autograd through the same network is itself off by more than a third of
    that (its activations are rounded, too, and one coefficient per model sums terms that cancel),
    within three times its error. A sum that cancels may come out right by luck, so its error is the
    largest over copies of the weights that differ by less than their last bit.
    """

    def error(grads, exact):
        difference = [(grads[key].double() - exact[key]).flatten() for key in exact]
        whole = torch.cat([grad.flatten() for grad in exact.values()])
        return float(torch.cat(difference).norm() / whole.norm())

    def ordinary(models):
        _, exact, _ = oracle(merged, models, inputs, origin)
        return error(oracle(merged, models, inputs, origin, torch.float32)[1], exact)

    loss_of(merged(**inputs)).backward()
    ours = {key: raw.grad for key, raw in merged.raw.items()}
    found = error(ours, oracle(merged, models, inputs, origin)[1])
    if found > max(1e-6, 3 * ordinary(models)):
        assert found <= 3 * max(ordinary(nudged(models, seed)) for seed in range(8))


def nudged(models, seed):
    """Copies whose weights differ by less than their last bit."""
    generator = torch.Generator().manual_seed(seed)
    copies = [copy.deepcopy(model) for model in models]
    with torch.no_grad():
        for parameter in (p for model in copies for p in model.parameters()):
            parameter.mul_(1 + 1.2e-7 * (torch.rand(parameter.shape, generator=generator) - 0.5))
    return copies


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: type(g).__name__)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32_end_to_end_in_every_architecture(family, name, granularity, origin, memory):
    models, inputs = family(name, dtype=torch.float32)
    merged = build(models, granularity, origin=origin, memory=memory)
    jitter(merged)
    assert_float32_is_as_good_as_it_gets(merged, models, inputs, origin)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: type(g).__name__)
def test_float32_end_to_end_for_every_link(family, granularity, link, memory):
    models, inputs = family("llama-tied", dtype=torch.float32)
    merged = build(models, granularity, link, memory=memory)
    jitter(merged)
    assert_float32_is_as_good_as_it_gets(merged, models, inputs, "base")


@pytest.mark.parametrize("name", ["llama-tied", "t5", "convolutions"])
@pytest.mark.parametrize(
    "granularity", [Tensor(), Column(), Element()], ids=lambda g: type(g).__name__
)
def test_both_memory_modes_and_accumulate_agree(family, name, granularity):
    models, inputs = family(name)
    grads = []
    for memory in ("resident", "streamed"):
        for way in ("plain", "accumulate"):
            merged = build(models, granularity, memory=memory, dtype=torch.float64)
            jitter(merged)
            if way == "plain":
                (loss_of(merged(**inputs)) + 2 * loss_of(merged(**inputs))).backward()
            else:
                loss, values = merged.accumulate(
                    [
                        lambda m=merged: loss_of(m(**inputs)),
                        lambda m=merged: 2 * loss_of(m(**inputs)),
                    ]
                )
                loss.backward()
                torch.testing.assert_close(loss.detach(), sum(values))
            grads.append({key: raw.grad.clone() for key, raw in merged.raw.items()})
    for other in grads[1:]:
        for key, grad in grads[0].items():
            torch.testing.assert_close(other[key], grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "convolutions"])
def test_autocast_gives_the_same_in_both_modes(family, name):
    models, inputs = family(name, dtype=torch.float32)
    found = []
    for memory in ("resident", "streamed"):
        merged = build(models, Tensor(), memory=memory)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(merged(**inputs))
        loss.backward()
        found.append((loss.detach(), {key: raw.grad for key, raw in merged.raw.items()}))
    (first, grads), (second, others) = found
    assert abs(first - second) <= 2e-3 * abs(first)
    for key, grad in grads.items():
        # bfloat16 keeps 8 bits, and the modes round a weight's gradient at other places
        assert (others[key] - grad).norm() <= 0.02 * grad.norm()


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_low_precision_sources_are_accumulated_in_float32(family, memory):
    models, inputs = family("llama", dtype=torch.float32)
    low = [model.to(torch.bfloat16) for model in models]
    merged = build(low, Tensor(), memory=memory)
    loss_of(merged(**inputs)).backward()
    wide = build([model.double() for model in low], Tensor(), dtype=torch.float64)
    loss_of(wide(**inputs)).backward()
    for key, raw in wide.raw.items():
        assert (merged.raw[key].grad.double() - raw.grad).norm() <= 1e-5 * raw.grad.norm()


def test_coefficients_of_zero_and_one_are_exact(family):
    models, _ = family("llama", dtype=torch.float32)
    for granularity in (Model(), Tensor(), Column(), Row(), Partition(3), Element()):
        for value, expected in (([0.0, 0.0], models[0]), ([1.0, 0.0], models[1])):
            merged = build(models, granularity, init=Constant(value))
            for key in merged.plan.tensors:
                came = merged.state.materialise(key)
                assert torch.equal(came, dict(expected.named_parameters())[key]), key


def test_granularities_agree_where_their_coefficients_do(family):
    models, inputs = family("gpt2")
    outputs = [
        logits_of(build(models, g, init=Mixup(seed=3), dtype=torch.float64)(**inputs))
        for g in GRANULARITIES
    ]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-6, atol=1e-7)


def test_stale_backward_is_refused(family):
    models, inputs = family("llama")
    for memory in ("resident", "streamed"):
        merged = build(models, Tensor(), memory=memory, dtype=torch.float64)
        loss = loss_of(merged(**inputs))
        with torch.no_grad():
            merged.raw["tensor"].add_(0.1)
        with pytest.raises(RuntimeError, match="coefficients changed between forward and backward"):
            loss.backward()


def test_tied_weight_is_merged_once(family):
    models, _ = family("llama-tied")
    merged = build(models, Element(), dtype=torch.float64)
    assert "lm_head.weight" not in merged.plan.tensors
    places = merged.plan.binding.parameters["model.embed_tokens.weight"]
    assert set(places) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_evaluation_in_inference_mode_does_not_spoil_training(family, memory):
    models, inputs = family("convolutions")
    merged = build(models, Tensor(), memory=memory, dtype=torch.float64)
    with torch.inference_mode():
        before = loss_of(merged(**inputs))
    with torch.no_grad():
        merged.raw["tensor"].add_(0.1)
    loss, _ = merged.accumulate([lambda: loss_of(merged(**inputs))])
    loss.backward()
    assert before != loss
    _, grads, _ = oracle(merged, models, inputs, "base")
    assert_same(merged.raw, grads, 1e-9)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_step_leaves_no_tensor_to_the_collector(memory):
    """What only the garbage collector frees would pile up over steps: an Element merge's gradients
    are a model a source.
    """
    torch.manual_seed(0)
    base, a, b = (torch.nn.Linear(4, 3) for _ in range(3))
    recipe = Recipe(sources={"a": a, "b": b}, base=base, coefficients=Element())
    merged = MergedModel(recipe, memory=memory)
    runs = [lambda: merged(torch.ones(2, 4)).square().sum()] * 2
    merged.accumulate(runs)[0].backward()
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())
        for _ in range(3):
            merged.accumulate(runs)[0].backward()
        after = sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())
    finally:
        gc.enable()
    assert after == before
