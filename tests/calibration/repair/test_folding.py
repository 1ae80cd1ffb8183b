"""The corrections that REPAIR folds in: targets, order of finalisers, one pass or many."""

from __future__ import annotations

import copy

import pytest
import torch

from gradmerge import MergedModel, Recipe
from gradmerge.alignment import OptimalTransport, WeightMatching
from gradmerge.calibration.repair.measure import Run
from gradmerge.coefficients import Constant, Model, Uniform
from gradmerge.common.errors import ConfigError
from gradmerge.finalisers import REPAIR, DepthRescale, SpectralRescale
from gradmerge.finalisers.repair import correction_of
from repairing import (
    Convolutions,
    Deep,
    ResNet,
    assert_statistics,
    averages,
    channels,
    exported,
    images,
    networks,
    repaired,
    run_of,
    vectors,
)


@pytest.mark.parametrize("kind", [Deep, Convolutions])
def test_folded_weights_are_the_normaliser_on_the_fly(kind):
    """The paper's: each layer's output is normalised by its batch, then given the targets."""
    models = networks(kind)
    batch = (vectors if kind is Deep else images)(50)[0]
    merged, _ = repaired(models, [batch])
    places = [n for n, m in models[0].named_modules() if n not in ("", "head")]
    targets = averages(models, [batch], places)
    twin = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(sum(dict(m.named_parameters())[name] for m in models) / 2)
    for place in places:

        def normalise(_, __, output, place=place):
            dims = [d for d in range(output.dim()) if d != 1]
            shape = [1, -1] + [1] * (output.dim() - 2)
            mean, deviation = (t.float().view(shape) for t in targets[place])
            apart = output - output.mean(dims, keepdim=True)
            return apart / output.std(dims, correction=0, keepdim=True) * deviation + mean

        twin.get_submodule(place).register_forward_hook(normalise)
    with torch.no_grad():
        torch.testing.assert_close(merged(batch), twin(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("buffers", ["recompute", "mean"])
@pytest.mark.parametrize("kind", [Deep, Convolutions, ResNet])
def test_one_pass_over_one_batch_gives_what_passes_over_its_parts_give(kind, buffers, memory):
    models = networks(kind)
    parts = (vectors if kind is Deep else images)(30, 12)
    options = {"frozen": {r"third\.bias": "mean"}} if kind is Deep else {}
    passes, found = [], []
    for batches in (parts, [torch.cat(parts)]):
        merged, renormalisation = repaired(
            models, batches, memory=memory, buffers=buffers, **options
        )
        calls = []
        runs = [run_of(merged, batch) for batch in batches]
        counted = [Run(lambda run=run, calls=calls: (calls.append(1), run.call())) for run in runs]
        renormalisation.correct(counted)
        passes.append(len(calls))
        found.append(merged)
    assert passes == [2 * len(renormalisation.survey.stages), 1]
    many, one = (merged.state.corrections.of for merged in found)
    assert many.keys() == one.keys()
    for name, correction in many.items():
        torch.testing.assert_close(one[name].scale, correction.scale, rtol=1e-4, atol=1e-5)
        if correction.shift is not None:
            torch.testing.assert_close(one[name].shift, correction.shift, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        got, wanted = (merged(parts[0]) for merged in found)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for name, buffer in found[0].network_buffers.values().items():
        if "num_batches" not in name:
            torch.testing.assert_close(found[1].network_buffers.values()[name], buffer)


def test_an_average_of_two_scalings_of_one_network_is_that_network():
    """Scaled by 4 and back behind the ReLU: an average is off by 1.5625, which REPAIR takes out."""
    (model,), batches = networks(Deep, 1), vectors(30, 20)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (scaled.first.weight, scaled.first.bias):
            tensor.mul_(4)
        scaled.second.weight.div_(4)
    merged, _ = repaired([model, scaled], batches)
    with torch.no_grad():
        expected = model(batches[0])
        torch.testing.assert_close(scaled(batches[0]), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged(batches[0]), expected, rtol=1e-5, atol=1e-5)
        merged.train()
        assert (merged(batches[0]) - expected).abs().max() > 0.02


def test_the_variance_collapse_of_independent_networks_is_undone():
    models, batches = networks(Deep, 4, width=64), vectors(200)
    places = ["first", "second", "third"]
    wanted = averages(models, batches, places)
    merged, _ = repaired(models, batches)
    collapsed = Recipe(dict(zip("abcd", models, strict=True)), coefficients=Model(), init=Uniform())
    ratios = []
    for each in (MergedModel(collapsed), merged):
        got = channels(exported(each, models[0]), batches, places)
        ratios.append([float((got[p][1] / wanted[p][1]).mean()) for p in places])
    assert ratios[0][0] < 0.6
    assert ratios[0][2] < 0.15, "from layer to layer"
    assert ratios[1] == pytest.approx([1, 1, 1], abs=1e-4)


def test_of_one_source_nothing_changes():
    (model,), batches = networks(Deep, 1), vectors(20, 12)
    merged, _ = repaired([model], batches)
    for name, tensor in model.named_parameters():
        got = merged.state.materialise(name)
        torch.testing.assert_close(got, tensor.detach(), rtol=1e-5, atol=1e-6)


def test_of_one_source_with_batch_norm_the_function_stays():
    """Whatever its statistics were of: gain and bias make up for those that are recomputed."""
    (model,), batches = networks(ResNet, 1), images(20, 12)
    merged, _ = repaired([model], batches)
    means = [merged.network_buffers.values()["norm.running_mean"], model.norm.running_mean]
    assert not torch.allclose(*means, atol=1e-3)
    with torch.no_grad():
        expected = model(batches[0])
        torch.testing.assert_close(merged(batches[0]), expected, rtol=1e-5, atol=1e-5)


def test_targets_go_by_coefficients_where_asked_for():
    models, batches = networks(Deep), vectors(40)
    repair = REPAIR(interpolate="coefficients")
    merged, _ = repaired(models, batches, repair, init=Constant([0.6, 0.2]))
    places = ["first", "second", "third"]
    expected = averages(models, batches, places, [0.75, 0.25])
    assert_statistics(channels(exported(merged, models[0]), batches, places), expected)
    with pytest.raises(ConfigError, match=r"none below, got \[0.6, -0.2\] at first.weight"):
        repaired(models, batches, repair, init=Constant([0.6, -0.2]))


@pytest.mark.parametrize(("reference", "number"), [("a", 0), ("b", 1)])
@pytest.mark.parametrize("interpolate", ["mean", "coefficients"])
def test_a_source_whose_units_are_mixed_sets_no_target(reference, number, interpolate):
    """Its view computes something else than the source, whose channels are none of the merge."""
    models, batches = networks(Deep), vectors(40, 30)
    mixing = OptimalTransport(ground="weights", regularisation=0.2, reference=reference)
    repair = REPAIR(interpolate=interpolate)
    merged, _ = repaired(models, batches, repair, alignment=mixing)
    places = ["first", "second", "third"]
    own = channels(models[number], batches, places)
    assert_statistics(channels(exported(merged, models[0]), batches, places), own)
    assert merged.state.corrections.report["targets of"] == [reference]
    view = exported_source(merged, models[0], "ba"[number])
    mixed, original = (channels(m, batches, places) for m in (view, models[1 - number]))
    shrunk = mixed["third"][1].mean() / original["third"][1].mean()
    assert shrunk < 0.7  # a target that the merge would have been scaled down to


def test_every_source_sets_targets_where_units_are_permuted():
    models, batches = networks(Deep), vectors(40, 30)
    merged, _ = repaired(models, batches, alignment=WeightMatching())
    assert "targets of" not in merged.state.corrections.report
    places = ["first", "second", "third"]
    twin = exported(merged, models[0])
    aligned = [exported_source(merged, models[0], name) for name in "ab"]
    assert_statistics(channels(twin, batches, places), averages(aligned, batches, places))


def exported_source(merged, model, name):
    twin = copy.deepcopy(model)
    twin.load_state_dict({n: merged.plan.read(name, n) for n in merged.plan.tensors}, strict=False)
    return twin.eval()


def test_a_constant_channel_gets_the_mean_alone():
    values = [torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2.0], [0.0, 0.5], [3.0, 4.0])]
    target = torch.tensor([2.0, 1.0], dtype=torch.float64)
    scale, shift, constant = correction_of(*values, target)
    assert scale.tolist() == [1, 2]
    assert shift.tolist() == [2, 0]
    assert constant == 1


@pytest.mark.parametrize("others", ["before", "after"])
def test_others_act_in_the_order_given(others):
    models, batches = networks(Deep), vectors(40)
    free = [DepthRescale(0.5, 1.5), SpectralRescale()]
    finalisers = [*free, REPAIR()] if others == "before" else [REPAIR(), *free]
    merged, _ = repaired(models, batches, finalisers=finalisers)
    places = ["first", "second", "third"]
    expected = averages(models, batches, places)
    twin = exported(merged, models[0])
    got = channels(twin, batches, places)
    with torch.no_grad():
        torch.testing.assert_close(merged(batches[0]), twin(batches[0]), rtol=1e-5, atol=1e-5)
    if others == "before":
        assert_statistics(got, expected)
    else:
        norms = [torch.linalg.matrix_norm(m.first.weight.detach(), 2) for m in models]
        own = torch.linalg.matrix_norm(twin.first.weight.detach(), 2)
        torch.testing.assert_close(own, sum(norms) / 2, rtol=1e-5, atol=0)
        assert not torch.allclose(got["second"][1], expected["second"][1], rtol=1e-2)


# ---- where it is off ------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_it_is_off_while_coefficients_learn(memory):
    models, (batch,) = networks(Deep), vectors(40)
    merged, _ = repaired(models, [batch], memory=memory)
    plain = MergedModel(
        Recipe(dict(zip("ab", models, strict=True)), coefficients=Model(), init=Uniform()),
        memory=memory,
    )
    with torch.no_grad():
        finished = merged(batch)
    losses = []
    for model in (merged, plain):
        loss = model(batch).square().mean()
        with torch.no_grad():
            model(batch)  # finished in between, before backward
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    assert torch.equal(merged.raw["model"].grad, plain.raw["model"].grad)
    with torch.no_grad():
        assert torch.equal(merged(batch), finished)
        torch.testing.assert_close(merged.train()(batch), plain(batch), rtol=0, atol=0)
    assert not torch.allclose(finished, plain(batch), atol=1e-2)


def test_no_finalisers_change_no_bit():
    models, (batch,) = networks(ResNet), images(8)
    plain, none = (
        MergedModel(Recipe(dict(zip("ab", models, strict=True)), **options))
        for options in ({}, {"finalisers": []})
    )
    assert not none.plan.finalisation.active
    for name in plain.plan.tensors:
        first, second = (m.state.materialise(name) for m in (plain, none))
        assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(plain(batch), none(batch))
