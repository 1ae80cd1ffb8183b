"""Preprocess steps against sorting and counting, and merges over processed directions."""

from __future__ import annotations

import copy
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

from architectures import logits_of
from gradmerge import MergedModel, Recipe, export_merged
from gradmerge.coefficients import Column, Constant, Element, Mixup, Tensor
from gradmerge.common.errors import ConfigError
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.preprocess import (
    Breadcrumbs,
    ElectSign,
    ProcessedDirections,
    RandomDrop,
    Site,
    Trim,
)
from gradmerge.preprocess.base import Chain

SITE = Site("layers.0.weight", ("a", "b", "c"))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask from a full stable sort; among equal magnitudes the last ones are kept."""
    order = values.flatten().abs().sort(stable=True).indices
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order[len(order) - count :]] = True
    return mask.view(values.shape)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999, 1.0])
def test_trim_keeps_the_largest_of_each_tensor(density):
    directions = draw(3, 20, 31)
    got = Trim(density)(directions.clone(), SITE)
    for before, after in zip(directions, got, strict=True):
        count = max(1, int(density * before.numel()))
        assert torch.equal(after, before * largest(before, count))
        assert int((after != 0).sum()) == count


def test_trim_of_equal_magnitudes_keeps_exactly_its_share():
    directions = torch.ones(1, 10).mul_(torch.tensor([1.0, -1.0] * 5))
    site = Site("x", ("a",))
    assert int((Trim(0.3)(directions.clone(), site) != 0).sum()) == 3
    zeros = torch.zeros(1, 10)
    assert torch.equal(Trim(0.3)(zeros.clone(), site), zeros)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.73])
def test_trim_over_the_whole_model(density):
    tensors = {f"t{i}": draw(2, 40 + i, 7, seed=i) * (1 + i) for i in range(4)}

    def passes():
        for name, directions in tensors.items():
            yield Site(name, ("a", "b")), directions.clone()

    step = Chain([Trim(density, "model")], passes)
    got = {site.name: step(directions, site) for site, directions in passes()}
    for k in range(2):
        whole = torch.cat([directions[k].flatten() for directions in tensors.values()])
        kept = torch.cat([directions[k].flatten() for directions in got.values()])
        assert torch.equal(kept, whole * largest(whole, int(density * len(whole))))


def test_a_survey_sees_what_earlier_steps_leave():
    tensors = {"x": draw(2, 50, seed=1), "y": draw(2, 50, seed=2)}

    def passes():
        for name, directions in tensors.items():
            yield Site(name, ("a", "b")), directions.clone()

    step = Chain([ElectSign(), Trim(0.1, "model")], passes)
    got = torch.cat([step(d, site)[0] for site, d in passes()])
    elected = torch.cat([ElectSign()(d, site)[0] for site, d in passes()])
    assert torch.equal(got, elected * largest(elected, 10))


@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.5, 0.2), (0.9, 0.3), (1.0, 0.5)])
def test_breadcrumbs_drops_both_ends(density, gamma):
    directions = draw(3, 200)
    got = Breadcrumbs(density, gamma)(directions.clone(), SITE)
    for before, after in zip(directions, got, strict=True):
        kept = int(density * 200)
        top = min(int(gamma * 200), 200 - kept)
        mask = largest(before, kept + top) & ~largest(before, top)
        assert torch.equal(after, before * mask)


@pytest.mark.parametrize("by", ["sum", "count"])
def test_elect_sign(by):
    directions = torch.tensor(
        [[3.0, -1.0, 0.0, 1.0, -2.0], [-1.0, -1.0, 0.0, -1.0, 1.5], [-1.0, 5.0, 2.0, 0.0, 0.1]]
    )
    expected = {
        "sum": [[3.0, 0, 0, 1, -2], [0, 0, 0, 0, 0], [0, 5, 2, 0, 0]],
        "count": [[0.0, -1, 0, 1, 0], [-1, -1, 0, 0, 1.5], [-1, 0, 2, 0, 0.1]],
    }[by]
    assert torch.equal(ElectSign(by)(directions.clone(), SITE), torch.tensor(expected))


def test_random_drop_is_unbiased_and_its_draws_are_its_own():
    directions = torch.ones(3, 200_000)
    got = RandomDrop(0.25, seed=4)(directions.clone(), SITE)
    assert got.unique().tolist() == [0.0, 4.0]
    # five standard deviations of a mean over 200,000 draws
    assert (got.mean(dim=1) - 1).abs().max() < 5 * (3 / 200_000) ** 0.5
    assert not torch.equal(got[0], got[1])
    again = RandomDrop(0.25, seed=4)(torch.ones(2, 200_000), Site(SITE.name, ("c", "a")))
    assert torch.equal(again, got[[2, 0]]), "draws depend on the source's name, not its place"
    other = RandomDrop(0.25, seed=4)(torch.ones(3, 200_000), Site("other", SITE.sources))
    assert not torch.equal(other[0], got[0])


def test_random_drop_rescales_as_told():
    directions = draw(3, 5000)
    plain = RandomDrop(0.5, "none")(directions.clone(), SITE)
    assert ((plain == 0) | (plain == directions)).all()
    by_norm = RandomDrop(0.5, "l1")(directions.clone(), SITE)
    torch.testing.assert_close(by_norm.abs().sum(dim=1), directions.abs().sum(dim=1))
    assert torch.equal(by_norm != 0, plain != 0)


@pytest.mark.parametrize("make", [Trim, Breadcrumbs, RandomDrop])
@pytest.mark.parametrize("density", [-0.1, 1.5, [0.2, 1.5], {"x": 0.2, ".*": [0.1, 1.5]}])
def test_density_must_be_a_share(make, density):
    message = rf"{make.__name__}\.density.*: expected a share in \[0, 1\], got (-0\.1|1\.5)"
    with pytest.raises(ConfigError, match=message):
        make(density)
    with pytest.raises(ConfigError, match=r"gamma: expected a share in \[0, 1\), got 1"):
        Breadcrumbs(0.5, 1)


@pytest.mark.parametrize("make", [Trim, Breadcrumbs, RandomDrop])
def test_density_by_source_and_tensor(make):
    directions, site = draw(3, 20, 30), Site("layers.0.weight", ("a", "b", "c"))
    got = make({"nothing": 0.9, r"layers\.0": [0.0, 0.5, 1.0], ".*": 0.1})(directions.clone(), site)
    assert int(got[0].count_nonzero()) == 0
    for k, density in ((1, 0.5), (2, 1.0)):
        alone = make(density)(directions[k : k + 1].clone(), Site(site.name, (site.sources[k],)))
        assert torch.equal(got[k], alone[0])
    assert int(make({".*": 0.1, site.name: 1.0})(directions.clone(), site).count_nonzero()) == 1800
    with pytest.raises(ConfigError, match=r"no expression matches the tensor layers\.0\.weight"):
        make({"head": 0.5})(directions.clone(), site)
    with pytest.raises(ConfigError, match=r"expected one value or 3 \(for a, b, c\), got 2"):
        make([0.5, 0.5])(directions.clone(), site)
    with pytest.raises(ConfigError, match=r"invalid regular expression '\('"):
        make({"(": 0.5})


def test_a_density_by_tensor_is_refused_over_the_whole_model():
    with pytest.raises(ConfigError, match="a density by tensor has no meaning with scope model"):
        Trim({".*": 0.2}, "model")


@pytest.mark.parametrize("make", [Trim, Breadcrumbs])
def test_rescaling_restores_the_sum_of_magnitudes(make):
    directions = draw(3, 20, 31)
    plain, got = (make(0.3, rescale=r)(directions.clone(), SITE) for r in ("none", "l1"))
    torch.testing.assert_close(got.abs().sum(dim=(1, 2)), directions.abs().sum(dim=(1, 2)))
    ratio = (got / plain)[plain != 0].view(3, -1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


# ---- merges over processed directions -----------------------------------------------------------

TIES = [Trim(0.3), ElectSign()]


def processed(models, origin, steps):
    """`(origin, directions)` of each tensor, by hand."""
    base, *sources = (dict(model.named_parameters()) for model in models)
    found = {}
    for name in base:
        stacked = torch.stack([source[name].detach() for source in sources])
        anchor = {
            "base": base[name].detach(),
            "zero": torch.zeros_like(stacked[0]),
            "mean": stacked.mean(dim=0),
        }[origin]
        directions = stacked - anchor
        for step in steps:
            directions = step(directions, Site(name, ("a", "b")))
        found[name] = anchor, directions
    return found


def loss_of(output):
    logits = logits_of(output).flatten(0, -2)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("origin", ["base", "zero", "mean"])
@pytest.mark.parametrize(
    "granularity", [Tensor(), Column(), Element()], ids=lambda g: type(g).__name__
)
def test_learning_over_processed_directions(family, granularity, origin, memory):
    models, inputs = family("llama", dtype=torch.float32)
    recipe = Recipe(
        sources={"a": models[1], "b": models[2]},
        base=models[0],
        origin=origin,
        preprocess=TIES,
        coefficients=granularity,
        init=Constant(0.3),
    )
    merged = MergedModel(recipe, memory=memory)
    loss = loss_of(merged(**inputs))
    loss.backward()
    by_hand = processed(models, origin, TIES)
    leaves = {
        name: anchor.double().add(0.3 * directions.double().sum(dim=0)).requires_grad_()
        for name, (anchor, directions) in by_hand.items()
    }
    expected = loss_of(functional_call(copy.deepcopy(models[0]).double(), leaves, (), inputs))
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for name, leaf in leaves.items():
        wanted = (by_hand[name][1].double() * leaf.grad).flatten(1).sum(dim=1)
        slot = merged.plan.layout.slots[name]
        grad = slot.read({key: raw.grad for key, raw in merged.raw.items()})
        scale = (by_hand[name][1].double() * leaf.grad).abs().flatten(1).sum(dim=1)
        assert (
            (grad.reshape(2, -1).double().sum(dim=1) - wanted).abs() <= 1e-4 * scale + 1e-9
        ).all()
        got = merged.state.materialise(name, torch.float32)
        torch.testing.assert_close(got.double(), leaf.detach(), rtol=1e-6, atol=1e-6)


def test_static_merge_computes_on_the_way_and_training_keeps_files(tmp_path, family, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    models, _ = family("llama", dtype=torch.float32)
    recipe = Recipe(
        sources={"a": models[1], "b": models[2]}, base=models[0], preprocess=[RandomDrop(0.5)]
    )
    plan = open_plan(recipe)
    raw = plan.initial_raw()
    on_the_way = {name: FitState(plan, raw).materialise(name) for name in plan.tensors}
    maps = Path("/proc/self/maps")
    assert str(tmp_path) not in maps.read_text()
    merged = MergedModel(recipe)
    assert str(tmp_path) not in maps.read_text(), "its coefficients can be looked at without"
    with torch.inference_mode():  # an evaluation before the first step
        merged.state.materialise(next(iter(plan.tensors)))
    assert maps.read_text().count(str(tmp_path)) == len(plan.tensors)
    assert not list(tmp_path.iterdir()), "the files have no names, so a killed run leaves none"
    for name, expected in on_the_way.items():
        assert torch.equal(FitState(merged.plan, raw).materialise(name), expected)
    del merged
    gc.collect()
    assert str(tmp_path) not in maps.read_text(), "their space is released with the model"


def test_export_of_processed_directions_reloads_to_the_same_logits(tmp_path, family):
    from transformers import AutoModelForCausalLM

    models, inputs = family("llama", dtype=torch.float32)
    for name, model in zip(("base", "a", "b"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    recipe = Recipe(
        sources={"a": str(tmp_path / "a"), "b": str(tmp_path / "b")},
        base=str(tmp_path / "base"),
        preprocess=TIES,
        init=Mixup(seed=1),
    )
    merged = MergedModel(recipe)
    folder = export_merged(merged, tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(
            again(**inputs).logits, merged(**inputs).logits, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("value", ["origin", 0.5])
def test_tensors_frozen_at_the_origin_do_not_count_in_the_model(value):
    """A large frozen tensor would use up the share; one merged with a number counts."""
    torch.manual_seed(0)
    base, *models = (torch.nn.Sequential(torch.nn.Linear(4, 6)) for _ in range(3))
    for model in models:
        model[0].bias.data.add_(100)
    recipe = Recipe(
        dict(zip("ab", models, strict=True)),
        base=base,
        preprocess=[Trim(0.25, scope="model")],
        frozen={r"bias": value},
        init=Constant(1.0),
    )
    plan = open_plan(recipe, with_skeleton=False)
    kept = plan.terms("0.weight")
    counts = [int(mask.bool().sum()) for mask in kept.masks]
    assert counts == ([6, 6] if value == "origin" else [1, 1])


def test_two_threads_that_ask_first_read_the_whole_model_once():
    """An export hashes its inputs in one thread and merges in another."""
    passes = []

    def every():
        passes.append(None)
        time.sleep(0.05)
        yield SITE, lambda: draw(3, 4, 5)

    alone = ProcessedDirections([Trim(0.5, scope="model")], every)
    expected = alone.read(SITE.name)
    wanted = len(passes)
    passes.clear()
    shared = ProcessedDirections([Trim(0.5, scope="model")], every)
    start = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: (start.wait(), shared.read(SITE.name))[1], range(2)))
    assert all(torch.equal(got, expected) for got in found)
    # each thread may list the tensors itself; only one pass reads all of them
    assert len(passes) <= wanted + 1
