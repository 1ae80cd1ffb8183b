"""Groups found by tracing: what theory says, and a permuted network computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from gradmerge.alignment import WeightMatching
from gradmerge.alignment.symmetry.example import at_other_sizes
from gradmerge.alignment.symmetry.spec import Group, PermutationSpec, Place
from gradmerge.alignment.symmetry.trace import tensors_of
from gradmerge.alignment.symmetry.verify import Float64, verify
from gradmerge.errors import ConfigError
from gradmerge.sources.in_memory import persistent_tensors
from networks import seeded
from permutations import THREE_HEADS, ResNet, Vgg, llama, permuted, plain_axis, shaken, spec_of, vit


def outputs(module: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(module(**inputs))


def same_function(module: nn.Module, spec: PermutationSpec, inputs: dict[str, Tensor]) -> None:
    """1e-5 in float32, 1e-10 in float64, relative to the largest output."""
    other = permuted(module, spec)
    moved = [
        name
        for name, tensor in persistent_tensors(module).items()
        if not torch.equal(tensor, persistent_tensors(other)[name])
    ]
    assert moved, "nothing was permuted"
    for one, two in zip(outputs(module, inputs), outputs(other, inputs), strict=True):
        assert float((one - two).abs().max()) <= 1e-5 * float(one.abs().max())
        assert float(one.std()) > 1e-4 * float(one.abs().max())
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    module, other = copy.deepcopy(module).double(), copy.deepcopy(other).double()
    with Float64():  # Llama takes its norms in float32 whatever its weights
        pairs = zip(outputs(module, wide), outputs(other, wide), strict=True)
        for one, two in pairs:
            assert one.dtype == torch.float64
            assert float((one - two).abs().max()) <= 1e-10 * float(one.abs().max())


def sizes(spec: PermutationSpec) -> list[int]:
    return sorted(group.size for group in spec.groups.values())


def group_at(spec: PermutationSpec, tensor: str, axis: int, segment: int = 0) -> list[str | None]:
    return [f.group for f in spec.tensors[tensor][axis].segments[segment].factors]


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
    assert spec.fixed["0.weight[1]"] == "it is a constant or an input"
    assert spec.fixed["4.weight[0]"] == "it is the network's output"
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


# ---- what is refused or fixed -------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self, odd: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.body = nn.Module()
        self.head = nn.Linear(6, 2)
        self.odd = odd

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.odd(self.inner(x)))


def test_an_operator_without_a_rule_is_refused_by_name() -> None:
    net = Odd(lambda x: torch.linalg.solve_triangular(torch.eye(6), x.mT, upper=True).mT)
    with pytest.raises(ConfigError, match=r"operator aten.linalg_solve_triangular.*the network"):
        spec_of(net)


def test_an_operator_is_refused_with_its_module() -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).real

    net = Odd(None)
    net.odd = Wrapped()
    net.head = nn.Linear(4, 2)
    with pytest.raises(ConfigError, match=r"aten._fft_r2c.*in module odd .*hand-written"):
        spec_of(net)


def test_what_fixes_the_order_of_units() -> None:
    constants = torch.linspace(1, 2, 6)
    breaking = {
        "a constant that differs": lambda x: x * constants,
        "a mirror": lambda x: x.flip(-1),
        "a rotation": lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1) + x,
        "a running sum": lambda x: x.cumsum(-1),
        "a unit by its place": lambda x: x + x[..., :1],
        "the largest ones": lambda x: torch.topk(x, 6).values,
    }
    for odd in breaking.values():
        spec = spec_of(Odd(odd))
        assert not any(6 in (g.size,) for g in spec.groups.values())
    keeping = {
        "a constant that is the same": lambda x: x * torch.full((6,), 2.0),
        "a softmax": lambda x: x.softmax(-1),
        "a norm": lambda x: x / x.norm(dim=-1, keepdim=True),
        "a column that only tells a shape": lambda x: x + torch.zeros(x[..., 0].shape)[..., None],
        "a maximum": lambda x: x - x.amax(-1, keepdim=True),
    }
    for odd in keeping.values():
        assert sizes(spec_of(Odd(odd))) == [6]


def test_units_behind_rotations_keep_what_freedom_is_left() -> None:
    # halves that trade places: pairs (i, i + 3) cannot be told apart by stretches, so all is fixed;
    # halves that only stand side by side stay free within themselves
    spec = spec_of(Odd(lambda x: torch.cat((x[..., :2].relu(), x[..., 2:].tanh()), -1)))
    assert sizes(spec) == [2, 4]


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)
        self.idle = nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def test_what_the_run_does_not_reach_is_fixed() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)did not reach idle\.weight, idle\.bias.*`unreached`"
    ):
        spec_of(Partly())
    spec = spec_of(Partly(), unreached=["^idle"])
    assert sizes(spec) == [5]
    assert "idle.weight" not in spec.tensors
    assert spec.fixed["idle.weight[0]"] == "the run does not reach it"


class BySize(nn.Module):
    """What it does with its units depends on the size of the input, where `turns` says so."""

    def __init__(self, turns: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.turns = turns
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if self.turns(x):
            hidden = hidden.roll(1, dims=-1)
        return self.second(hidden)


@pytest.mark.parametrize(
    ("turns", "got"),
    [
        (lambda x: len(x) == 1, r"x \[1, 3, 5\]"),
        (lambda x: len(x) > 2, r"x \[3, 13, 5\]"),
        (lambda x: x.shape[1] < 6, r"x \[1, 3, 5\]"),
        (lambda x: x.shape[1] > 6, r"x \[3, 13, 5\]"),
    ],
)
def test_a_course_that_depends_on_the_size_is_refused(
    turns: Callable[[Tensor], bool], got: str
) -> None:
    """Units are free on the example alone: batches of 1 and 3, lengths of 3 and 13 turn them."""
    match = rf"changes what BySize computes .* with {got}\).*by themselves: first\."
    with pytest.raises(ConfigError, match=match):
        spec_of(BySize(turns), {"x": [2, 6, 5]})
    assert spec_of(BySize(lambda x: False), {"x": [2, 6, 5]}).groups["first"].size == 8


@pytest.mark.parametrize("fixed", ["batch", "length", "both"])
def test_a_network_that_refuses_other_sizes_is_checked_on_those_it_takes(fixed: str) -> None:
    taken = []

    class Fixed(BySize):
        def forward(self, x: Tensor) -> Tensor:
            if (fixed != "length" and len(x) != 2) or (fixed != "batch" and x.shape[1] != 6):
                raise ValueError("not this size")
            found = super().forward(x)
            taken.append(tuple(x.shape))
            return found

    spec = spec_of(Fixed(lambda x: False), {"x": [2, 6, 5]})
    assert spec.groups["first"].size == 8
    assert spec.checked is not None
    others = {"batch": {(2, 3, 5), (2, 13, 5)}, "length": {(1, 6, 5), (3, 6, 5)}, "both": set()}
    assert set(taken) == {(2, 6, 5), *others[fixed]}
    if fixed != "both":
        turned = Fixed(lambda x: tuple(x.shape) != (2, 6, 5))
        with pytest.raises(ConfigError, match="permuting units changes what Fixed computes"):
            spec_of(turned, {"x": [2, 6, 5]})


class Folded(nn.Module):
    """Heads share an axis with examples, which vary slowest (or fastest)."""

    def __init__(self, heads_first: bool) -> None:
        super().__init__()
        self.heads_first = heads_first
        self.query, self.act, self.out = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query(x).view(-1, 4, 2)
        if self.heads_first:
            heads = heads.transpose(0, 1)
        folded = self.act(heads.reshape(-1, 2)).view(heads.shape)
        if self.heads_first:
            folded = folded.transpose(0, 1)
        return self.out(folded.reshape(-1, 8))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads_first", [False, True])
def test_units_are_not_looked_for_where_they_share_an_axis_with_examples(
    heads_first: bool, batch: int
) -> None:
    """A stretch of fixed length would show those of the first examples alone."""
    module = Folded(heads_first)
    spec = spec_of(module, {"x": [batch, 6]})
    heads = [group for group in spec.groups.values() if group.size == 4]
    width = [group for group in spec.groups.values() if group.size == 2]
    assert [group.places for group in heads] == [(Place("query", -1, 0, (4, 2), 0),)]
    assert [p.module for p in width[0].places] == ["query", "act"]
    same_function(module, spec, {"x": torch.randn(5, 6)})
    (place,) = heads[0].places
    assert place.units(module.query(torch.randn(5, 6))).shape == (5 * 2, 4)


def test_other_sizes_keep_ids_masks_and_pictures_consistent() -> None:
    def sizes(example: dict[str, Tensor]) -> list[dict[str, list[int]]]:
        found = at_other_sizes(example, lambda other: None)
        return [{k: list(v.shape) for k, v in other.items()} for other, _ in found]

    ids = torch.arange(6).expand(1, 6)
    text = {"input_ids": ids, "mask": torch.ones(1, 1, 6, 6), "decoder_input_ids": ids[:, :5]}
    assert sizes(text) == [
        {"input_ids": [2, 3], "mask": [2, 1, 3, 3], "decoder_input_ids": [2, 2]},
        {"input_ids": [3, 13], "mask": [3, 1, 13, 13], "decoder_input_ids": [3, 11]},
    ]
    assert sizes({"x": torch.ones(1, 3, 32, 32)}) == [{"x": [2, 3, 24, 24]}, {"x": [3, 3, 32, 32]}]
    assert sizes({"x": torch.ones(2, 7)}) == [{"x": [1, 7]}, {"x": [3, 7]}]
    longest = [other for other, _ in at_other_sizes({"x": ids}, lambda other: None)][-1]["x"]
    assert longest.tolist() == [[*range(6), *range(6), 0]] * 3


@pytest.mark.parametrize(
    ("shape", "whole", "found"),
    [
        ([1, 512], False, [[2, 7], [3, 5]]),
        ([3, 512], False, [[1, 7], [2, 5]]),
        ([8, 32], False, [[1, 7], [3, 5]]),
        ([1, 80, 3000], False, [[2, 7, 3000], [3, 5, 3000]]),
        ([2, 3, 64, 64], False, [[1, 3, 48, 48], [3, 3, 32, 32]]),
        ([1, 512], True, [[2, 512]]),
        ([8, 512], True, [[1, 512], [3, 512]]),
    ],
)
def test_a_large_example_is_only_cut(shape: list[int], whole: bool, found: list[list[int]]) -> None:
    """A network that takes a length alone (`whole`) is run on two of a single one, never more."""
    tried = []

    def attempt(other: Mapping[str, Tensor]) -> None:
        tried.append(other["x"].numel())
        if whole and other["x"].shape[1] != shape[1]:
            raise ValueError("not this length")

    x = torch.zeros(shape, dtype=torch.int64 if len(shape) == 2 else torch.float32)
    others = at_other_sizes({"x": x}, attempt)
    assert [list(other["x"].shape) for other, _ in others] == found
    assert max(tried) <= (2 * x.numel() if whole and shape[0] == 1 else x.numel())


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input": [-1, 3]}, r"example: input: expected a shape .*got \[-1, 3\]"),
        ({"input": [True, 3]}, r"example: input: expected a shape .*got \[True, 3\]"),
        (
            {"input": [10**9, 10**4, 3]},
            r"example: input: a tensor of shape \[1000000000, .* cannot",
        ),
        ({3: [1, 3]}, r"example: expected names of arguments of Linear, got 3. It takes input"),
    ],
)
def test_an_example_that_is_no_shape_is_named(example: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(nn.Linear(3, 4), example)


def test_options_of_a_matching_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match=r"WeightMatching.example: expected shapes .*got '\[1"):
        WeightMatching(example=[1, 3])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"WeightMatching.unreached: '\(' is not a regular"):
        WeightMatching(unreached=["("])


def test_a_network_that_does_not_run_asks_for_an_example() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x) + y

    with pytest.raises(ConfigError, match=r"does not run on .*Give `example`"):
        spec_of(Two())
    with pytest.raises(ConfigError, match=r"not called with 'z'.*It takes x, y"):
        spec_of(Two(), {"z": [1, 3]})
    assert sizes(spec_of(Two(), {"x": [1, 3], "y": [1, 4]})) == []


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.places = nn.Parameter(torch.randn(1, 9, 5))
        self.lift = nn.Linear(5, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.body(x) + self.lift(self.places)[:, : x.shape[1]]).relu())


def test_positions_beyond_the_example_keep_their_order() -> None:
    torch.manual_seed(0)
    net = shaken(Positions())
    spec = spec_of(net, {"x": [1, 4, 4]})
    assert sizes(spec) == [5, 6]
    assert spec.fixed["places[1]"].startswith(("it is a constant", "slices leave it out"))
    same_function(net, spec, {"x": torch.randn(2, 9, 4)})


class Routed(nn.Module):
    """Each row goes to the expert of its largest score; `stacked`: one tensor holds them all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.router = nn.Linear(6, 5)
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).relu()
        chosen = self.router(x).argmax(-1)
        out = torch.zeros(len(x), 3)
        for i in range(5):
            (rows,) = torch.where(chosen == i)
            if len(rows):
                out = out.index_add(0, rows, self.experts[i](x[rows]))
        return out


def test_paths_that_depend_on_weights_must_be_reached() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)did not reach experts.*values that depend on weights"
    ):
        spec_of(Routed())


def test_mixture_of_experts_moves_units_within_experts() -> None:
    net = llama("Mixtral", num_local_experts=4, experts_implementation="eager")
    spec = spec_of(net)
    assert sizes(spec) == sorted([24, *[2, 3, 4, 20] * 2])
    experts = spec.tensors["model.layers.0.mlp.experts.gate_up_proj"]
    assert not experts[0].groups
    assert [s.size for s in experts[1].segments] == [20, 20]
    same_function(net, spec, {"input_ids": ids()})


def test_a_network_too_large_to_check_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = spec_of(Partly(), unreached=["^idle"])
    assert checked.checked is not None
    assert checked.checked <= 1e-8
    monkeypatch.setattr("gradmerge.alignment.symmetry.verify.LIMIT", 10)
    unchecked = spec_of(Partly(), unreached=["^idle"])
    assert unchecked.checked is None
    assert unchecked == checked


class Two(nn.Module):
    """What `give` makes of the logits and of a hidden layer of 4."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head, self.side = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 5)
        self.give = give

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).relu()
        return self.give(self.head(hidden), self.side(hidden))


def test_outputs_beside_logits_keep_their_order_but_hidden_states_may_move() -> None:
    boxes = spec_of(Two(lambda logits, side: {"logits": logits, "boxes": side}))
    assert sizes(boxes) == [4]
    states = spec_of(Two(lambda logits, side: {"logits": logits, "decoder_hidden_states": (side,)}))
    assert sizes(states) == [4, 5]
    with pytest.raises(ConfigError, match="gives a Categorical among its outputs"):
        spec_of(Two(lambda logits, side: (logits, torch.distributions.Categorical(logits=side))))


def test_a_wrong_specification_is_seen_with_two_units_masks_and_nan() -> None:
    groups = {"h": Group("h", 2)}
    for seed in range(20):
        assert PermutationSpec(groups, {}).random(seed)["h"].tolist() == [1, 0]

    class Masked(nn.Module):
        def __init__(self, fill: float) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fill = nn.Linear(3, 2), nn.Linear(2, 4), fill

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.tensor([False, False, True, True])
            return self.fc2(self.fc1(x).relu()).masked_fill(mask, self.fill)

    names = {f"fc{i}.{kind}": f"fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    out = plain_axis([2], ["h"])
    wrong = PermutationSpec(
        groups, {"fc1.weight": (out, plain_axis([3], [None])), "fc1.bias": (out,)}
    )
    for fill in (0.0, -1e9, torch.finfo(torch.float32).min, float("-inf")):
        right = spec_of(Masked(fill))
        assert sizes(right) == [2]
        assert right.checked is not None
        with pytest.raises(ConfigError, match="the specification is wrong for it"):
            verify(wrong, Masked(fill), names, {"x": torch.randn(2, 3)})
    with pytest.raises(ConfigError, match="gives no finite output"):
        verify(wrong, Masked(0.0), names, {"x": torch.empty(0, 3)})


# ---- what is multiplied ----------------------------------------------------------------------


class SingleHead(nn.Module):
    """Attention with one head, by products or by the fused operator; a gate by channels."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 5)
        self.out, self.squeeze, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.fused:
            seen = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        else:
            seen = (q @ k.mT / 6**0.5).softmax(dim=-1) @ v
        x = self.out(seen)
        return self.head(x * self.squeeze(x.mean(dim=1, keepdim=True)).sigmoid().expand_as(x))


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0])


class Standardised(nn.Linear):
    """Weights that are multiplied with weights, and functions of one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)
        return x * x.sigmoid() * (1 + torch.tanh(x**3)) / x.square().mean(-1, keepdim=True)


class Gated(nn.Module):
    """Two layers of 6 units, `joined` in one way or another."""

    def __init__(self, joined: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.joined = joined
        self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.joined(self.one(x), self.two(x).sigmoid()))


class Halves(nn.Module):
    """A gated linear unit whose halves are taken by `half`."""

    def __init__(self, half: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.half, self.both, self.head = half, nn.Linear(4, 12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.both(x)
        return self.head(self.half(x, 0) * self.half(x, 6).sigmoid())


@pytest.mark.parametrize(
    ("joined", "multiplied"),
    [
        (lambda a, b: torch.lerp(torch.zeros_like(a), a, b), True),
        (lambda a, b: torch.lerp(a, torch.ones_like(a), b), True),
        (lambda a, b: torch.lerp(a, b, 0.3), False),
        (lambda a, b: torch.lerp(a, b, torch.tensor(0.3)), False),
        (lambda a, b: torch.lerp(a, a.tanh(), a.sigmoid()) + b, False),
        (lambda a, b: torch.stack([a, b]).prod(0), True),
        (lambda a, b: torch.stack([a, b], dim=1).cumprod(1)[:, 1], True),
        (lambda a, b: torch.stack([a, b]).sum(0), False),
        (lambda a, b: (a + b).prod(-1, keepdim=True) + a, True),
    ],
    ids=["end", "self", "number", "constant", "own", "prod", "cumprod", "sum", "prod of units"],
)
def test_gates_by_other_operators_are_products_too(
    joined: Callable[[Tensor, Tensor], Tensor], multiplied: bool
) -> None:
    groups = spec_of(Gated(joined), {"x": [2, 4]}).groups
    assert {group.size: group.multiplied for group in groups.values()} == {6: multiplied}


@pytest.mark.parametrize(
    "half",
    [
        lambda x, at: x[:, at : at + 6],
        lambda x, at: x.narrow(1, at, 6),
        lambda x, at: x.view(-1, 2, 6)[:, torch.tensor([at // 6])].flatten(1),
        lambda x, at: x.view(-1, 2, 6).index_select(1, torch.tensor([at // 6])).flatten(1),
    ],
    ids=["slice", "narrow", "index", "index_select"],
)
def test_halves_taken_by_place_or_index_are_two(half: Callable[[Tensor, int], Tensor]) -> None:
    groups = spec_of(Halves(half), {"x": [2, 4]}).groups
    assert {group.size: group.multiplied for group in groups.values()} == {6: True}


@pytest.mark.parametrize(
    ("make", "shape", "multiplied", "free"),
    [
        (lambda: SingleHead(False), (2, 3, 4), {"q", "out"}, {"v"}),
        (lambda: SingleHead(True), (2, 3, 4), {"q", "out"}, {"v"}),
        (Cells, (2, 3, 4), {"cells.0"}, set()),
        (lambda: nn.Sequential(Standardised(4, 6), nn.Linear(6, 2)), (2, 4), set(), {"0"}),
        (
            lambda: nn.Sequential(
                nn.Conv1d(2, 6, 1), nn.Conv1d(6, 6, 2, groups=6), nn.ReLU(), nn.Conv1d(6, 3, 1)
            ),
            (2, 2, 5),
            {"0"},
            set(),
        ),
        (
            lambda: nn.Sequential(
                nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(), nn.Linear(6, 2)
            ),
            (2, 4),
            set(),
            {"0"},
        ),
    ],
    ids=["products", "fused attention", "lstm", "own function", "depthwise", "norm"],
)
def test_units_that_are_multiplied_with_others_are_told(
    make: Callable[[], nn.Module], shape: tuple[int, ...], multiplied: set[str], free: set[str]
) -> None:
    module = make()
    name = "input" if isinstance(module, nn.Sequential) else "x"
    groups = spec_of(module, {name: list(shape)}).groups
    assert {n for n, group in groups.items() if group.multiplied} == multiplied
    assert {n for n, group in groups.items() if not group.multiplied} == free
