"""Checkpoints of one architecture, some of which store apart what others store as one tensor."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from families import family_of
from gradmerge import MergedModel, Recipe, merge
from gradmerge.coefficients import Constant
from stored import Suite, eager, loss_of, rewrite, stored

BATCH = {"input_ids": torch.arange(3, 19).view(2, 8)}


def save_as_in_memory(suite, name):
    """Store a source (or the base) as its network has it: fused, or split."""
    folder = suite.base if name == "base" else suite.sources[name]
    network = suite.network if name == "base" else suite.loaded[name]
    (file,) = folder.glob("*.safetensors")
    state = {n: t.clone() for n, t in network.state_dict().items() if n != "lm_head.weight"}
    if "lm_head.weight" in suite.names:
        state["lm_head.weight"] = network.state_dict()["lm_head.weight"].clone()
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "NomicBertForMaskedLM"])
@pytest.mark.parametrize("changed", [("a",), ("base",), ("base", "b")], ids="-".join)
def test_both_layouts_merge_as_one(tmp_path, name, changed):
    suite = Suite(eager(family_of(name).double()), tmp_path)
    coefficients = {n: torch.full((2,), 0.3).double() for n in suite.names}
    expected = loss_of(suite.run(coefficients, BATCH).logits)
    for source in changed:
        save_as_in_memory(suite, source)
    assert stored(suite.base).keys() != stored(suite.sources["a"]).keys()
    merged = MergedModel(Recipe(**suite.recipe(init=Constant(0.3))), dtype=torch.float64)
    loss = loss_of(merged(**BATCH).logits)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    assert merged.raw["tensor"].grad.abs().min() > 0
    merge(Recipe(**suite.recipe(init=Constant(0.3))), tmp_path / "out")
    with torch.no_grad():
        found = loss_of(suite.load(tmp_path / "out")(**BATCH).logits)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


def test_experts_stored_the_other_way_round(tmp_path):
    """Checkpoints of Qwen3-VL-MoE store `[experts, in, out]`, newer ones `[experts, out, in]`."""
    suite = Suite(eager(family_of("Qwen3VLMoeForConditionalGeneration").double()), tmp_path)
    coefficients = {n: torch.full((2,), 0.3).double() for n in suite.names}
    expected = loss_of(suite.run(coefficients, BATCH).logits)

    def turn(name, tensor):
        return tensor.transpose(1, 2).contiguous() if "gate_up_proj" in name else tensor

    for folder in (suite.base, *suite.sources.values()):
        rewrite(folder, turn)
    merged = MergedModel(Recipe(**suite.recipe(init=Constant(0.3))), dtype=torch.float64)
    assert len(merged.plan.binding.fused) == 2
    loss = loss_of(merged(**BATCH).logits)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    merge(Recipe(**suite.recipe(init=Constant(0.3))), tmp_path / "out")
    with torch.no_grad():
        found = loss_of(suite.load(tmp_path / "out")(**BATCH).logits)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-11, atol=0)
