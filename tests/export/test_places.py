"""Rows and columns of the plots, against the tensors of real architectures."""

from __future__ import annotations

import pytest
import torch
import transformers

from gradmerge.export.places import grid_of, place_of

ATTENTION = ["q", "k", "v", "o"]
# class, config and sizes; layers by label; components, in order
FAMILIES = {
    "Llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(num_hidden_layers=11),
        [str(i) for i in range(11)],
        [*ATTENTION, "gate", "up", "down", "norms"],
    ),
    "GPT-2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_layer=2),
        ["0", "1"],
        ["qkv", "o", "up", "down", "norms"],
    ),
    "BERT": (
        transformers.BertForSequenceClassification,
        transformers.BertConfig(num_hidden_layers=2),
        ["0", "1"],
        [*ATTENTION, "up", "down", "norms"],
    ),
    "ViT": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(num_hidden_layers=2),
        ["0", "1"],
        [*ATTENTION, "up", "down", "norms"],
    ),
    "T5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(num_layers=2, feed_forward_proj="gated-gelu"),
        ["encoder 0", "encoder 1", "decoder 0", "decoder 1"],
        [
            *ATTENTION,
            *("gate", "up", "down"),
            *(f"cross {name}" for name in ATTENTION),
            "norms",
            "layer.SelfAttention.relative_attention_bias",
        ],
    ),
    "Mixtral": (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(num_hidden_layers=2),
        ["0", "1"],
        [*ATTENTION, "experts gate+up", "experts down", "router", "norms"],
    ),
    "DistilBERT": (
        transformers.DistilBertForSequenceClassification,
        transformers.DistilBertConfig(n_layers=2),
        ["0", "1"],
        [*ATTENTION, "up", "down", "norms"],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_known_families_have_a_row_per_layer_and_a_column_per_component(family):
    kind, config, layers, components = FAMILIES[family]
    with torch.device("meta"):
        names = [name for name, _ in kind(config).named_parameters()]
    grid = grid_of(sorted(names))  # files list tensors in alphabetical order
    assert [
        row for row, stack in zip(grid.rows, grid.stacks, strict=True) if stack is not None
    ] == (layers)
    assert grid.columns == components
    assert set(grid.cells) == set(names)
    outside = [name for name in names if grid.cells[name][1] is None]
    assert not [name for name in outside if ".0." in name or ".1." in name]
    filled = {grid.cells[name] for name in names if name not in outside}
    per_layer = {len([c for r, c in filled if r == row]) for row, _ in filled}
    assert max(per_layer) <= len(components)


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("model.layers.1.block_sparse_moe.gate.weight", "router"),
        ("model.layers.1.block_sparse_moe.experts.3.w1.weight", "experts gate"),
        ("model.layers.1.mlp.experts.12.down_proj.weight", "experts down"),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", "shared up"),
        ("model.layers.1.mlp.shared_expert_gate.weight", "mlp.shared_expert_gate"),
        ("model.layers.1.self_attn.q_norm.weight", "norms"),
        ("model.layers.1.self_attn.kv_b_proj.weight", "self_attn.kv_b_proj"),
        ("blocks.1.attn.proj.bias", "o"),
        ("backbone.layers.1.mixer.in_proj.weight", "mixer.in_proj"),
        ("model.decoder.layers.1.encoder_attn.k_proj.bias", "cross k"),
    ],
)
def test_other_names_have_the_component_that_they_say(name, component):
    assert place_of(name).component == component
    assert place_of(name).layer == (1,)


def test_rows_are_in_the_order_of_the_network():
    names = ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
    names += [f"model.layers.{i}.mlp.up_proj.weight" for i in (10, 2)]
    grid = grid_of(names)
    assert grid.rows == ["embed_tokens", "2", "10", "norm", "lm_head"]
    assert grid.cells["lm_head.weight"] == (4, None)
    assert grid.cells["model.layers.10.mlp.up_proj.weight"] == (2, 0)


def test_nested_layers_and_networks_without_layers_have_rows_of_their_own():
    nested = grid_of([f"stages.{i}.layers.{j}.conv.weight" for i in (0, 1) for j in (0, 1)])
    assert nested.rows == ["0.0", "0.1", "1.0", "1.1"]
    flat = grid_of(["body.weight", "body.bias", "head.weight"])
    assert (flat.rows, flat.columns) == (["body", "head"], ["weight", "bias"])
    assert flat.cells["head.weight"] == (1, 0)
