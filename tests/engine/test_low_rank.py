"""LoRA sources merged from their factors, against the same merge of dense folders."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import Chunks, Clamp, Column, Constant, Element, Model, Row, Tensor
from gradmerge.common.errors import ConfigError
from gradmerge.engine import plan as plan_module
from gradmerge.engine.opening import open_plan
from gradmerge.operators import DisjointMean, Linear
from gradmerge.sources import HuggingFace, Lora

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
IDS = torch.arange(16).view(2, 8)
GRANULARITIES = [Model(), Tensor(), Column(), Row(), Chunks(3.0, 0.0), Element(), Clamp(Column())]


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


LINEAR = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
NETWORKS = {"llama": (llama, LINEAR), "gpt2": (gpt2, ["c_attn", "c_proj", "wte"])}


@pytest.fixture(scope="module", params=NETWORKS)
def suite(request, tmp_path_factory):
    """A base, two adapters on it (one of fewer layers), and PEFT's own dense merges."""
    build, targets = NETWORKS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    base = build().double().eval()
    base.save_pretrained(root / "base")
    adapters, dense = {}, {}
    for seed, name in enumerate(("a", "b")):
        layers = {"layers_to_transform": [1]} if name == "b" and request.param == "llama" else {}
        config = peft.LoraConfig(r=2 + seed, lora_alpha=8, target_modules=targets, **layers)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(root / name, save_embedding_layers=False)
        adapters[name] = Lora(str(root / name), HuggingFace(str(root / "base")))
        model.merge_and_unload().save_pretrained(root / f"{name}-dense")
        dense[name] = str(root / f"{name}-dense")
    return str(root / "base"), adapters, dense


def learning(suite, which, granularity=None, memory="resident", **options):
    base, *sources = suite
    recipe = Recipe(
        sources=sources[which],
        base=base,
        coefficients=granularity or Tensor(),
        init=Constant(0.4),
        **options,
    )
    return MergedModel(recipe, memory=memory, dtype=torch.float64)


def gradients(merged):
    loss = merged(IDS).logits.square().mean()
    loss.backward()
    grads = {key: raw.grad for key, raw in merged.raw.items()}
    return loss.detach(), {n: slot.read(grads) for n, slot in merged.plan.layout.slots.items()}


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: type(g).__name__)
def test_factors_give_the_gradients_of_dense_sources(suite, granularity, memory):
    ours = learning(suite, 0, granularity, memory)
    loss, found = gradients(ours)
    expected_loss, expected = gradients(learning(suite, 1, granularity, memory))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-11, atol=0)
    assert found
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-13, msg=name)
    if not isinstance(granularity, Element):
        plan = ours.plan
        spreads = {n: plan._spread(n, IDS.device) for n in found if len(plan.tensors[n].shape) > 1}
        assert all(plan._spread_terms(n, spread).updates for n, spread in spreads.items())


def test_factors_are_placed_with_their_sources(suite):
    merged = learning(suite, 0, GRANULARITIES[0], "streamed")
    expected, plan = gradients(merged), merged.plan
    items = [item for name in plan.tensors for item in plan.items(name)]
    assert {"left", "right"} <= {item.kind for item in items}
    found = [plan._item(item) for item in items]
    assert [(own.shape, own.dtype) for own in found] == [plan.form(item) for item in items]
    words = dict.fromkeys(plan.owners, "device")
    plan.place(words, IDS.device)
    merged.zero_grad()
    loss, placed = gradients(merged)
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(grad, expected[1][name]) for name, grad in placed.items())
    assert sum(plan.sizes()[0].values()) == sum(own.nbytes for own in found)


@pytest.mark.parametrize(
    "granularity",
    [g for g in GRANULARITIES if not isinstance(g, Chunks)],  # its runs lie along the rows
    ids=lambda g: type(g).__name__,
)
def test_rows_are_merged_and_contracted_apart(suite, granularity, monkeypatch):
    """Of three processes that divide the adapters, each has rows of the left factors."""
    monkeypatch.setattr(plan_module, "SMALLEST_SHARED", 1)
    merged = learning(suite, 0, granularity)
    plan, generator = merged.plan, torch.Generator().manual_seed(3)
    divided = 0
    for name in merged.state.learned:
        z = merged.state.own(name).detach()
        shape = plan.tensors[name].shape
        whole = plan.combine(name, z, torch.empty(shape).double())
        grad = torch.randn(shape, generator=generator).double()
        total, _ = plan.contract(name, grad, z)
        parts = [plan.share(name, i, 3) for i in range(3)]
        if None in parts:
            continue
        divided += 1
        merges = [plan.combine(name, z, torch.empty(p.of_shape).double(), p) for p in parts]
        # not bit by bit: a BLAS may add up a product of fewer rows in another order
        torch.testing.assert_close(torch.cat(merges), whole, rtol=1e-12, atol=1e-15)
        sums = [plan.contract(name, p.of(grad).contiguous(), z, rows=p)[0] for p in parts]
        torch.testing.assert_close(sum(sums), total, rtol=1e-9, atol=1e-12)
    assert divided > 4


def test_tensors_without_a_direction_are_the_bases_own(suite):
    merged = learning(suite, 0)
    adapted = set(merged.plan.layout.slots)
    bare = set(merged.plan.tensors) - adapted
    changed = {
        name
        for name in adapted
        if any(
            not torch.equal(source.read(name), merged.plan.base.read(name))
            for source in merged.plan.sources.values()
        )
    }
    assert bare
    assert changed == adapted
    assert {merged.state.fixed[name] for name in bare} == {0.0}
    for name in bare:
        assert merged.make(name).data_ptr() == merged.plan.read("base", name).data_ptr()


def test_a_merge_with_fixed_coefficients_is_that_of_dense_sources(suite):
    plans = [learning(suite, which).plan for which in (0, 1)]
    for name in plans[0].layout.slots:
        shape = plans[0].tensors[name].shape
        found = [plan.combine(name, 0.7, torch.empty(shape).double()) for plan in plans]
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13, msg=name)
        low = [plan.combine(name, torch.tensor([0.3, 0.9]).double(), torch.empty(shape).bfloat16())
               for plan in plans]  # fmt: skip
        torch.testing.assert_close(*low, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "options",
    [{"operator": DisjointMean()}, {"origin": "mean"}, {"operator": Linear(form="directions")}],
    ids=["operator", "origin", "rounding"],
)
def test_other_merges_form_dense_directions(suite, options):
    loss, found = gradients(learning(suite, 0, **options))
    expected_loss, expected = gradients(learning(suite, 1, **options))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=0)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-11, msg=name)


def test_an_adapter_on_another_copy_of_the_base_is_dense(suite, tmp_path):
    """Only the very same files prove that a tensor is the base's own, short of reading it."""
    base, adapters, _ = suite
    transformers.AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path)
    recipe = Recipe(sources=adapters, base=str(tmp_path), init=Constant(0.4))
    plan = open_plan(recipe)
    assert set(plan.layout.slots) | set(plan.unchanged) == set(plan.tensors)
    assert all(plan._updates(name) is None for name in plan.tensors)


def test_sources_that_are_the_base_itself_are_refused(suite):
    base = suite[0]
    with pytest.raises(ConfigError, match="expected weights that differ from the base"):
        open_plan(Recipe(sources={"a": base, "b": base}, base=base))
