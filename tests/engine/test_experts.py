"""Learning on tensors that transformers fuses or splits, against its own loading and autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef

from families import family_of
from gradmerge import MergedModel, Recipe
from gradmerge.alignment import WeightMatching
from gradmerge.coefficients import Column, Constant, Row, Tensor
from gradmerge.common.errors import CompatibilityError, ConfigError
from gradmerge.export.folder import export_merged
from stored import Suite, eager, loss_of, stored

MIXTURES = ("Qwen3MoeForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM")
SPLITS = ("NomicBertForMaskedLM", "GteForMaskedLM")
BATCH = {"input_ids": torch.arange(3, 19).view(2, 8)}


def network_of(name: str):
    if name == "DeepseekV3ForCausalLM":
        config = transformers.DeepseekV3Config(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            n_group=2,
            moe_intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=4,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            topk_group=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        )
        torch.manual_seed(0)
        return transformers.DeepseekV3ForCausalLM(config).eval()
    return family_of(name)


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    made: dict[str, Suite] = {}

    def suite(name: str) -> Suite:
        if name not in made:
            made[name] = Suite(eager(network_of(name).double()), tmp_path_factory.mktemp(name))
        return made[name]

    return suite


def learning(suite: Suite, granularity=None, memory="resident", **options):
    granularity = granularity or Tensor()
    recipe = Recipe(**suite.recipe(coefficients=granularity, init=Constant(0.3), **options))
    return MergedModel(recipe, memory=memory, dtype=torch.float64)


def coefficients_of(merged: MergedModel, table: torch.Tensor):
    return {name: table[:, slot.index] for name, slot in merged.plan.layout.slots.items()}


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("name", MIXTURES + SPLITS)
def test_twenty_adam_steps_equal_float64_autograd(suites, tmp_path, name, memory):
    suite = suites(name)
    merged = learning(suite, memory=memory)
    made = len(merged.plan.binding.fused) + len(merged.plan.binding.split)
    assert made > 0
    assert set(merged.plan.layout.slots) == {n for n in suite.names if n in merged.plan.tensors}
    table = merged.raw["tensor"].detach().clone().requires_grad_()
    ours = torch.optim.Adam(merged.raw.parameters(), lr=0.01)
    theirs = torch.optim.Adam([table], lr=0.01)
    for step in range(20):
        ours.zero_grad()
        if step % 2:
            loss = loss_of(merged(**BATCH).logits)
        else:
            loss, _ = merged.accumulate([lambda: loss_of(merged(**BATCH).logits)])
        loss.backward()
        theirs.zero_grad()
        expected = loss_of(suite.run(coefficients_of(merged, table), BATCH).logits)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
        scale = table.grad.abs().max()
        assert (merged.raw["tensor"].grad - table.grad).abs().max() <= 1e-9 * scale
        ours.step()
        theirs.step()
    torch.testing.assert_close(merged.raw["tensor"].detach(), table.detach(), rtol=1e-7, atol=1e-9)

    export_merged(merged, tmp_path / "out")
    assert stored(tmp_path / "out").keys() == stored(suite.base).keys()
    loaded = suite.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, merged(**BATCH).logits)


@pytest.mark.parametrize("name", MIXTURES)
def test_sources_run_with_their_own_weights(suites, name):
    suite = suites(name)
    merged = learning(suite)
    for source, model in suite.loaded.items():
        with torch.no_grad(), merged.as_source(source):
            assert torch.equal(merged(**BATCH).logits, model(**BATCH).logits)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_frozen_experts_beside_learned_ones(suites, memory):
    suite = suites("Qwen3MoeForCausalLM")
    frozen = {r"experts\.1\.": "origin", r"experts\.2\.up_proj": 1.0}
    merged = learning(suite, memory=memory, frozen=frozen)
    table = merged.raw["tensor"].detach().clone().requires_grad_()
    chosen = coefficients_of(merged, table)
    ones = {n: torch.ones(2).double() for n in suite.names if ".experts.2.up_proj" in n}
    expected = loss_of(suite.run({**chosen, **ones}, BATCH).logits)
    expected.backward()
    loss = loss_of(merged(**BATCH).logits)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(merged.raw["tensor"].grad, table.grad, rtol=1e-8, atol=1e-12)
    assert not any(".experts.1." in name for name in merged.plan.layout.slots)


def test_streamed_memory_holds_one_module_of_experts(suites):
    suite = suites("MixtralForCausalLM")
    merged = learning(suite, memory="streamed")
    living: list[tuple[StorageWeakRef, int]] = []
    most = 0
    plain = merged._empty

    def empty(shape, dtype):
        nonlocal most
        made = plain(shape, dtype)
        living.append((StorageWeakRef(made.untyped_storage()), made.nbytes))
        most = max(most, sum(size for ref, size in living if not ref.expired()))
        return made

    merged._empty = empty
    loss_of(merged(**BATCH).logits).backward()
    experts = merged.skeleton.model.layers[0].mlp.experts
    one = sum(8 * p.shape.numel() for p in experts.parameters())
    everything = sum(8 * torch.Size(t.shape).numel() for t in merged.plan.tensors.values())
    # and the pool's idle block of the head
    assert one <= most <= 1.3 * one < everything / 2


@pytest.mark.parametrize("granularity", [Column(), Row()], ids=["column", "row"])
@pytest.mark.parametrize("name", ["GptOssForCausalLM", "GraniteMoeForCausalLM"])
def test_stacked_experts_have_coefficients_of_each_expert(tmp_path, name, granularity):
    """As if every expert were a matrix of its own, whichever way round it is stored."""
    network = eager(family_of(name).double())
    suite = Suite(network, tmp_path)
    merged = learning(suite, granularity)
    stacks = [n for n, slot in merged.plan.layout.slots.items() if slot.experts]
    assert len(stacks) >= 4
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for raw in merged.raw.values():
            raw.add_(0.1 * torch.randn(raw.shape, generator=generator, dtype=raw.dtype))
    raws = {k: raw.detach().clone().requires_grad_() for k, raw in merged.raw.items()}
    turned = name == "GptOssForCausalLM"
    thetas = {}
    names = {places[0]: own for own, places in merged.plan.binding.owners.items()}
    for place, base in suite.network.named_parameters():
        slot, shape = merged.plan.layout.slots[names[place]], base.shape
        c = raws[slot.key]
        if slot.experts:
            outer = 1 if isinstance(granularity, Column) != turned else 2
            c = c.view(2, slot.experts, -1)
            c = c.unsqueeze(1 + outer) if len(shape) == 3 else c
        elif slot.kind == "axis":
            c = c.view(2, *[-1 if i == slot.axis else 1 for i in range(len(shape))])
        else:
            c = c.view(2, *[1] * len(shape))
        others = [model.get_parameter(place).detach() for model in suite.loaded.values()]
        theta = base.detach()
        for k, other in enumerate(others):
            theta = theta + c[k] * (other - base.detach())
        thetas[place] = theta
    output = torch.func.functional_call(suite.network, thetas, (), BATCH)
    expected = loss_of(output.logits)
    expected.backward()
    loss = loss_of(merged(**BATCH).logits)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    for key, raw in merged.raw.items():
        scale = max(raws[key].grad.abs().max(), torch.tensor(1e-6))
        assert (raw.grad - raws[key].grad).abs().max() <= 1e-9 * scale, key


def test_experts_stored_apart_have_the_columns_of_their_own_matrices(suites):
    merged = learning(suites("Qwen3MoeForCausalLM"), Column())
    name = "model.layers.0.mlp.experts.2.gate_proj.weight"
    slot, shape = merged.plan.layout.slots[name], merged.plan.tensors[name].shape
    assert (slot.kind, slot.axis, slot.shape, slot.experts) == ("axis", 1, (shape[1],), 0)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_float32_runs_transformers_grouped_kernels(suites, tmp_path, memory):
    network = network_of("Qwen3MoeForCausalLM")
    suite = Suite(network, tmp_path)
    merged = MergedModel(Recipe(**suite.recipe(init=Constant(0.5))), memory=memory)
    assert merged.skeleton.config._experts_implementation != "eager"
    loss = loss_of(merged(**BATCH).logits)
    loss.backward()
    coefficients = {n: torch.full((2,), 0.5).double() for n in suite.names}
    with torch.no_grad():
        expected = loss_of(suite.run(coefficients, BATCH).logits.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert all(raw.grad.isfinite().all() and raw.grad.any() for raw in merged.raw.values())


def test_a_missing_expert_is_named(suites, tmp_path):
    suite = suites("Qwen3MoeForCausalLM")
    other = Suite(eager(network_of("Qwen3MoeForCausalLM").double()), tmp_path)
    for folder in (other.base, *other.sources.values()):
        for file in folder.glob("*.safetensors"):
            tensors = {n: t for n, t in stored(folder).items() if ".experts.3." not in n}
            save_file(tensors, file, metadata={"format": "pt"})
    wrong = r"experts\.down_proj\n *expected 4 tensors in the files, got 3"
    with pytest.raises(CompatibilityError, match=wrong):
        learning(other)
    assert learning(suite)


def test_alignment_names_what_it_does_not_support(suites):
    with pytest.raises(ConfigError, match=r"alignment: Qwen3MoeForCausalLM fuses or splits 4"):
        learning(suites("Qwen3MoeForCausalLM"), alignment=WeightMatching(), origin="mean")


def test_a_copy_of_the_model_is_its_own(suites):
    merged = learning(suites("Qwen3MoeForCausalLM"))
    loss_of(merged(**BATCH).logits).backward()
    other = copy.deepcopy(merged)
    with torch.no_grad():
        other.raw["tensor"].add_(1.0)
        assert not torch.equal(other(**BATCH).logits, merged(**BATCH).logits)


def test_the_oracle_sees_a_wrong_order(suites, tmp_path):
    """Experts in another order are another network, which the comparison must tell."""
    suite = suites("Qwen3MoeForCausalLM")
    merged = learning(suite)
    coefficients = {n: torch.full((2,), 0.3).double() for n in suite.names}
    right = loss_of(suite.run(coefficients, BATCH).logits)
    swapped = {
        **coefficients,
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2).double(),
    }
    with torch.no_grad():
        assert loss_of(merged(**BATCH).logits).sub(right).abs() < 1e-12
        assert loss_of(suite.run(swapped, BATCH).logits).sub(right).abs() > 1e-9
