"""Groups found by tracing: as theory says, and a permuted network computes the same."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from networks import seeded
from permutations import (
    THREE_HEADS,
    ResNet,
    Vgg,
    group_at,
    llama,
    permuted,
    same_function,
    shaken,
    sizes,
    spec_of,
    vit,
)

# ---- perceptrons and convolutions ---------------------------------------------------------------


def test_a_perceptron_has_one_group_a_hidden_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))
    shaken(net)
    spec = spec_of(net)
    assert sizes(spec) == [7, 9]
    assert group_at(spec, "0.weight", 0) == group_at(spec, "2.weight", 1) == ["0"]
    assert spec.tensors["2.weight"][1].role == "in"
    assert spec.tensors["2.weight"][0].role == "out"
    assert spec.tensors["0.bias"][0].role == "along"
    assert not spec.tensors["0.weight"][1].groups  # inputs
    assert not spec.tensors["4.weight"][0].groups  # outputs
    places = [(p.module, p.axis, p.sizes) for p in spec.groups["0"].places]
    assert places == [("0", -1, (7,)), ("1", -1, (7,))]
    same_function(net, spec, {"input": torch.randn(4, 5)})


def test_vgg_carries_channels_through_norms_pools_and_the_flattening() -> None:
    torch.manual_seed(0)
    net = shaken(Vgg())
    spec = spec_of(net, {"x": [1, 3, 8, 8]})
    assert sizes(spec) == [6, 8, 10]
    last = group_at(spec, "features.4.weight", 0)
    factors = spec.tensors["classifier.0.weight"][1].segments[0].factors
    assert [(f.size, f.group) for f in factors] == [(8, last[0]), (4, None)]
    assert spec.tensors["features.1.running_var"][0].role == "square"
    assert group_at(spec, "features.1.running_mean", 0) == ["features.0"]
    same_function(net, spec, {"x": torch.randn(2, 3, 8, 8)})


def test_the_side_of_a_picture_is_found_where_only_one_fits() -> None:
    torch.manual_seed(0)
    net = shaken(Vgg())
    net.classifier[0] = nn.Linear(8 * 49, 10)  # 28 x 28
    assert sizes(spec_of(net)) == [6, 8, 10]


def test_a_resnet_has_one_group_a_block_and_one_a_residual_stream() -> None:
    torch.manual_seed(0)
    net = shaken(ResNet())
    spec = spec_of(net)
    assert sizes(spec) == [6, 6, 6, 10, 10, 10]  # streams of 6 and 10, one inner group a block
    stream = group_at(spec, "stem.weight", 0)
    for block in (0, 1):
        assert group_at(spec, f"blocks.{block}.conv2.weight", 0) == stream
        assert group_at(spec, f"blocks.{block}.conv1.weight", 0) != stream
    assert group_at(spec, "blocks.2.downsample.0.weight", 0) == group_at(spec, "head.weight", 1)
    # one ReLU serves two layers of a block: its calls show different groups
    inner = spec.groups[group_at(spec, "blocks.0.conv1.weight", 0)[0] or ""]
    assert ("blocks.0.relu", 0) in [(p.module, p.call) for p in inner.places]
    stream_places = [(p.module, p.call) for p in spec.groups[stream[0] or ""].places]
    assert ("blocks.0.relu", 1) in stream_places
    assert ("blocks.0.relu", 0) not in stream_places
    same_function(net, spec, {"x": torch.randn(2, 3, 16, 16)})


def test_a_shortcut_that_pads_channels_gives_groups_of_stretches() -> None:
    torch.manual_seed(0)
    net = shaken(ResNet(padded=True))
    spec = spec_of(net)
    # the stream of 10 is 2 padded, the 6 of the stream before, and 2 padded
    assert sizes(spec) == [2, 2, 6, 6, 6, 10, 10]
    segments = spec.tensors["head.weight"][1].segments
    assert [s.size for s in segments] == [2, 6, 2]
    assert segments[1].factors[0].group == group_at(spec, "stem.weight", 0)[0]
    same_function(net, spec, {"x": torch.randn(2, 3, 16, 16)})


class Grouped(nn.Module):
    """Depthwise and grouped convolutions, and GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.multiplied = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.mix = nn.Conv2d(24, 12, 1)
        self.grouped = nn.Conv2d(12, 20, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(2, 20)
        self.back = nn.ConvTranspose2d(20, 6, 2, stride=2)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.depthwise(functional.silu(self.stem(x))))
        x = self.norm(self.grouped(self.mix(self.multiplied(x).sigmoid())))
        return self.head(self.up(functional.leaky_relu(self.back(x))).mean((-2, -1)))


def test_grouped_convolutions_move_whole_groups_and_channels_within() -> None:
    torch.manual_seed(0)
    net = shaken(Grouped())
    spec = spec_of(net)
    # depthwise: the stem's 12; twice as many outputs: 12 x 2; groups of 4: 4 x 3 in, 4 x 5 out;
    # GroupNorm's 2 halves split the 4 groups into 2 x 2; back: 6 = 2 x 3; up: 2 x 4
    assert group_at(spec, "depthwise.weight", 0) == group_at(spec, "stem.weight", 0)
    assert len(set(group_at(spec, "multiplied.weight", 0))) == 2
    assert group_at(spec, "multiplied.weight", 0)[:1] == group_at(spec, "stem.weight", 0)
    assert [f.size for f in spec.tensors["grouped.weight"][0].segments[0].factors] == [2, 2, 5]
    assert [f.size for f in spec.tensors["grouped.weight"][1].segments[0].factors] == [3]
    assert [f.size for f in spec.tensors["back.weight"][1].segments[0].factors] == [2, 3]
    assert [f.size for f in spec.tensors["up.weight"][0].segments[0].factors] == [2, 3]
    assert sizes(spec) == sorted([12, 2, 2, 2, 3, 5, 2, 3, 4])
    same_function(net, spec, {"x": torch.randn(2, 3, 6, 6)})


# ---- transformers -------------------------------------------------------------------------------


def ids(count: int = 32) -> Tensor:
    return torch.randint(3, count, (2, 7), generator=torch.Generator().manual_seed(5))


def test_vit_has_a_stream_and_four_groups_a_layer() -> None:
    net = vit()
    spec = spec_of(net)
    # stream; a layer: heads, width of queries and keys, width of values, intermediate
    assert sizes(spec) == sorted([12, *[3, 4, 4, 20] * 2])
    same_function(net, spec, {"pixel_values": torch.randn(2, 3, 8, 8)})


def test_bert_has_a_stream_and_four_groups_a_layer() -> None:
    kind = transformers.BertForSequenceClassification
    net = shaken(seeded(kind, max_position_embeddings=16, num_labels=4, **THREE_HEADS))
    spec = spec_of(net)
    # the pooler's tanh between two linear layers is one more
    assert sizes(spec) == sorted([12, 12, *[3, 4, 4, 20] * 2])
    same_function(net, spec, {"input_ids": ids()})


def test_gpt2_cuts_its_fused_projection_into_three_stretches() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=12, n_layer=2, n_head=3, n_positions=16, n_inner=20
    )
    net = shaken(transformers.GPT2LMHeadModel(config))
    spec = spec_of(net)
    assert sizes(spec) == sorted([12, *[3, 4, 4, 20] * 2])
    rows, columns = spec.tensors["transformer.h.0.attn.c_attn.weight"]
    assert rows.role == "in"
    assert columns.role == "out"
    query, key, value = (tuple(f.group for f in s.factors) for s in columns.segments)
    assert query == key
    assert query[0] == value[0]  # heads
    assert query[1] != value[1]  # their widths
    assert group_at(spec, "transformer.wte.weight", 1) == [next(iter(rows.groups))]
    same_function(net, spec, {"input_ids": ids()})


def test_llama_moves_heads_of_keys_and_queries_within() -> None:
    net = llama("Llama")
    spec = spec_of(net)
    # stream; a layer: 2 heads of keys, 3 queries in each, 4 values wide, intermediate; the width
    # of queries and keys is rotated
    assert sizes(spec) == sorted([24, *[2, 3, 4, 20] * 2])
    attention = "model.layers.0.self_attn"
    query = spec.tensors[f"{attention}.q_proj.weight"][0].segments[0].factors
    key = spec.tensors[f"{attention}.k_proj.weight"][0].segments[0].factors
    output = spec.tensors[f"{attention}.o_proj.weight"][1].segments[0].factors
    assert [f.size for f in query] == [2, 3, 4]
    assert [f.group for f in query][:1] == [key[0].group]
    assert query[2].group is key[1].group is None
    assert [f.group for f in output[:2]] == [f.group for f in query[:2]]
    assert output[2].group == group_at(spec, f"{attention}.v_proj.weight", 0)[1]
    gate = group_at(spec, "model.layers.1.mlp.gate_proj.weight", 0)
    assert gate == group_at(spec, "model.layers.1.mlp.up_proj.weight", 0)
    assert gate == group_at(spec, "model.layers.1.mlp.down_proj.weight", 1)
    same_function(net, spec, {"input_ids": ids()})


def test_llama_by_eager_attention_has_the_same_groups() -> None:
    eager = llama("Llama", attn_implementation="eager")
    assert spec_of(eager) == spec_of(llama("Llama"))


def test_qwen2_has_biases_and_a_tied_head() -> None:
    net = llama("Qwen2", tie_word_embeddings=True)
    spec = spec_of(net)
    assert sizes(spec) == sorted([24, *[2, 3, 4, 20] * 2])
    bias = group_at(spec, "model.layers.0.self_attn.q_proj.bias", 0)
    assert bias == group_at(spec, "model.layers.0.self_attn.q_proj.weight", 0)
    assert "lm_head.weight" not in spec.tensors
    same_function(net, spec, {"input_ids": ids()})


def test_fused_gates_are_two_stretches() -> None:
    net = llama("Phi3", pad_token_id=0)
    spec = spec_of(net)
    up = spec.tensors["model.layers.0.mlp.gate_up_proj.weight"][0]
    assert [s.size for s in up.segments] == [20, 20]
    assert up.segments[0] == up.segments[1]
    assert sizes(spec) == sorted([24, *[2, 3, 4, 20] * 2])
    same_function(net, spec, {"input_ids": ids()})


def test_t5_shares_one_stream_between_encoder_and_decoder() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32,
        d_model=12,
        d_kv=4,
        d_ff=20,
        num_layers=1,
        num_heads=3,
        decoder_start_token_id=0,
    )
    net = shaken(transformers.T5ForConditionalGeneration(config))
    spec = spec_of(net)
    # embeddings are shared, so the streams are one; heads carry a position bias each, so the
    # layers of a stack share them; the decoder's attention to the encoder has its own
    assert sizes(spec) == sorted([12, *[4, 4] * 3, 3, 3, 3, 20, 20])
    # transformers gives the encoder's states out, too; they are no logits
    decoder = torch.randint(3, 32, (2, 4))
    with torch.no_grad():
        one = net(input_ids=ids(), decoder_input_ids=decoder).logits
        two = permuted(net, spec)(input_ids=ids(), decoder_input_ids=decoder).logits
    assert float((one - two).abs().max()) <= 1e-5 * float(one.abs().max())


class HeadsCutApart(nn.Module):
    """One projection, cut into heads first and into queries, keys and values then."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(6, 36), nn.Linear(12, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (9, 4)).transpose(1, 2).split(3, 1)
        seen = functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.out(seen.transpose(1, 2).flatten(2)).relu())


def test_heads_that_are_cut_apart_change_places() -> None:
    torch.manual_seed(0)
    net = shaken(HeadsCutApart())
    spec = spec_of(net, {"x": [2, 5, 6]})
    assert sizes(spec) == [3, 4, 5]  # heads, their width, and the last hidden layer
    segments = spec.tensors["qkv.weight"][0].segments
    assert [segment.sizes for segment in segments] == [(3, 4)] * 3
    assert len({segment.factors for segment in segments}) == 1
    same_function(net, spec, {"x": torch.randn(3, 7, 6)})


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def test_the_gates_of_a_recurrent_layer_are_stretches_of_one_group() -> None:
    torch.manual_seed(0)
    net = shaken(Recurrent())
    spec = spec_of(net, {"x": [1, 5, 4]})
    assert sizes(spec) == [6]
    gates = spec.tensors["lstm.weight_hh_l0"][0].segments
    assert [s.factors[0].group for s in gates] == [next(iter(spec.groups))] * 4
    same_function(net, spec, {"x": torch.randn(2, 5, 4)})


class Packed(nn.Module):
    """PyTorch's own attention with its packed projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


def test_torchs_own_encoder_layer() -> None:
    torch.manual_seed(0)
    net = shaken(Packed())
    spec = spec_of(net)
    # queries, keys and values are a product with a fixed 3, so they share the width of a head
    assert sizes(spec) == sorted([12, 3, 4, 20])
    same_function(net, spec, {"x": torch.randint(11, (2, 5))})


def test_mixture_of_experts_moves_units_within_experts() -> None:
    net = llama("Mixtral", num_local_experts=4, experts_implementation="eager")
    spec = spec_of(net)
    assert sizes(spec) == sorted([24, *[2, 3, 4, 20] * 2])
    experts = spec.tensors["model.layers.0.mlp.experts.gate_up_proj"]
    assert not experts[0].groups
    assert [s.size for s in experts[1].segments] == [20, 20]
    same_function(net, spec, {"input_ids": ids()})
