"""NaN and infinity in sources are found by name, wherever they are stored."""

from __future__ import annotations

import copy
import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gradmerge import MergedModel, Recipe, merge
from gradmerge.cli.inspect import inspect_sources, render
from gradmerge.coefficients import Constant
from gradmerge.common import finite
from gradmerge.common.errors import NonFiniteError
from gradmerge.common.finite import CHUNK, is_finite, non_finite, scan
from gradmerge.engine.opening import open_plan
from gradmerge.operators._native import native_kernels
from gradmerge.preprocess import Trim
from gradmerge.sources import as_source
from gradmerge.sources.base import find_flaws, fingerprints_of, require_finite, tensor_bytes
from tiny import Normalised, Perceptron, build, recipe_of, relatives

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
]


@pytest.fixture(params=["torch", "native"])
def kernel(request, monkeypatch):
    """Each way of looking at tensors."""
    kernels = native_kernels()
    if request.param == "native" and kernels is None:
        pytest.skip("no compiler")
    test = kernels.finite_test if request.param == "native" else None
    monkeypatch.setattr(finite, "_fast", test)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=["nan", "inf"])
def test_every_dtype(dtype, value):
    good = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert non_finite(good) is None
    bad = good.clone()
    bad[13, 2] = bad[20, 0] = value
    if dtype == torch.float8_e4m3fn and math.isinf(value):  # it has no infinity
        bad.view(torch.uint8)[13, 2] = bad.view(torch.uint8)[20, 0] = 0xFF
    flaw = non_finite(bad)
    assert (flaw.count, flaw.total, flaw.first) == (2, 120, (13, 2))
    assert flaw.infinite == (math.isinf(value) and dtype != torch.float8_e4m3fn)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("at", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
def test_every_place(at):
    tensor = torch.ones(2 * CHUNK + 6)
    tensor[at] = math.nan
    assert non_finite(tensor).first == (at,)
    digest = hashlib.sha256()
    assert scan(tensor, tensor_bytes(tensor), digest.update).first == (at,)
    assert digest.digest() == hashlib.sha256(tensor.numpy().tobytes()).digest()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_sum_that_overflows_is_no_flaw(dtype):
    assert is_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))


def test_opposite_infinities_do_not_cancel():
    assert not is_finite(torch.tensor([math.inf, -math.inf, 1.0]))


def test_numbers_without_nan_and_empty_tensors_pass():
    for tensor in (torch.arange(5), torch.tensor([True]), torch.ones(0, 3), torch.tensor(2.0)):
        assert non_finite(tensor) is None


def spoiled(model, name, value=math.nan):
    other = copy.deepcopy(model)
    other.state_dict()[name].view(-1)[1] = value
    return other


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_files(tmp_path, suffix):
    state = spoiled(build(), "head.weight").state_dict()
    file = tmp_path / f"x{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    with pytest.raises(NonFiniteError, match=r"x \(.*x.*\): head.weight: 1 of 24 .*\[0, 1\] = nan"):
        require_finite({"x": as_source(file).open()}, ())


def test_hashing_finds_the_same_flaws():
    module = spoiled(spoiled(build(), "head.weight"), "body.bias", math.inf)
    apart, hashed = as_source(module).open(), as_source(module).open()
    fingerprints_of({"x": hashed})
    assert {n: str(f) for n, f in hashed._flaws.items()} == {
        n: str(f) for n, f in apart.flaws.items()
    }
    assert set(apart.flaws) == {"head.weight", "body.bias"}
    good = as_source(build()).open()
    good.fingerprint()
    assert good._flaws == {}


def lora(folder, base, value):
    factors = {
        f"base_model.model.body.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (2, 6)), ("B", (8, 2)))
    }
    factors["base_model.model.body.lora_B.weight"][3, 1] = value
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["body"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return as_source(str(folder), as_source(base)).open()


def test_factors_of_an_adapter_and_its_base(tmp_path):
    good = lora(tmp_path / "good", build(), 1.0)
    require_finite({"x": good}, ())
    with pytest.raises(NonFiniteError, match=r"adapter_model.*lora_B.weight: 1 of 16.*\[3, 1\]"):
        require_finite({"x": lora(tmp_path / "bad", build(), math.nan)}, ())
    with pytest.raises(NonFiniteError, match=r"in memory.*head.bias"):
        require_finite({"x": lora(tmp_path / "b", spoiled(build(), "head.bias"), 1.0)}, ())


@pytest.mark.parametrize("where", [0, 1, 2], ids=["base", "a", "b"])
@pytest.mark.parametrize("private", [[], ["^head"]], ids=["merged", "private"])
def test_nothing_is_merged_or_learned_from_them(tmp_path, where, private):
    models = relatives(build())
    models[where] = spoiled(models[where], "head.weight")
    recipe = recipe_of(models, private=private)
    if private and where == 0:
        pytest.skip("a base's head takes no part")
    named = f"{('base', 'a', 'b')[where]} .*head.weight: 1 of 24"
    with pytest.raises(NonFiniteError, match=named):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(NonFiniteError, match=named):
        MergedModel(recipe, models[1])


@pytest.mark.parametrize(
    "options",
    [{"frozen": {".*bias": "origin"}}, {"preprocess": [Trim(0.5)]}],
    ids=["frozen", "trim"],
)
def test_entries_that_the_merge_would_not_use_are_found_too(tmp_path, options):
    models = relatives(build())
    models[1] = spoiled(models[1], "body.bias")
    with pytest.raises(NonFiniteError, match=r"a .*body.bias: 1 of 8"):
        merge(recipe_of(models, **options), tmp_path / "out")


class Masked(nn.Module):
    def __init__(self, low=-math.inf):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.register_buffer("seen", torch.full((6, 6), low).triu(1))

    def forward(self, x):
        return self.body(x) + self.seen


def test_masks_that_all_sources_agree_on_are_kept(tmp_path):
    models = relatives(build(Masked))
    merged = MergedModel(recipe_of(models), models[1])
    assert merged.plan.infinite_buffers == {"seen"}
    assert torch.equal(merged.network_buffers.values()["seen"], models[0].seen)


@pytest.mark.parametrize(("low", "count"), [(math.nan, 3), (0.0, 2)], ids=["nan", "others"])
def test_other_masks_are_refused(low, count):
    models = relatives(build(Masked))
    if math.isnan(low):
        for model in models:
            model.seen[0, 1] = low
    else:
        models[0].seen.zero_()
    recipe = recipe_of(models)
    found, masks = find_flaws(
        {n: as_source(m).open() for n, m in zip("xyz", models, strict=True)}, ["seen"]
    )
    assert (sorted(name for flaw in found for name in flaw.names), masks) == (
        list("xyz")[3 - count :],
        [],
    )
    with pytest.raises(NonFiniteError, match="seen"):
        MergedModel(recipe, models[1])


def test_a_static_merge_keeps_the_usual_masks(tmp_path):
    models = relatives(build())
    states = [
        {**m.state_dict(), "attn_mask": torch.full((3, 3), -math.inf).triu(1)} for m in models
    ]
    recipe = Recipe({"a": states[1], "b": states[2]}, states[0], init=Constant(0.5))
    written = load_file(merge(recipe, tmp_path / "out") / "model.safetensors")
    assert torch.equal(written["attn_mask"], states[0]["attn_mask"])
    assert all(v.isfinite().all() for n, v in written.items() if n != "attn_mask")


def test_weights_are_looked_at_once(monkeypatch):
    models = relatives(build(Normalised))
    plan = open_plan(recipe_of(models), models[1])
    plan.require_finite()
    reads = []
    for checkpoint in (plan.base, *plan.sources.values()):
        monkeypatch.setattr(checkpoint, "read", lambda name: reads.append(name))
    plan.require_finite()
    assert not reads


def test_inspect_reports_them_as_problems(tmp_path):
    models = relatives(build(Perceptron))
    sources = {"a": spoiled(models[1], "head.weight"), "b": models[2]}
    found = inspect_sources(sources, models[0])
    assert not found["compatible"]
    assert [(p.kind, p.what) for p in found["problems"]] == [("nonfinite", "head.weight")]
    assert "1 of 24 entries, first [0, 1] = nan" in render(found)
    unread = inspect_sources(sources, models[0], statistics=False)
    assert unread["compatible"]
    assert "weights were not read" in render(unread)
