"""Granularities share coefficients, and links constrain them."""

from __future__ import annotations

import pytest
import torch

from gradmerge import Recipe
from gradmerge.coefficients import (
    Clamp,
    Column,
    Complement,
    ConcreteMask,
    Element,
    Group,
    MergeTensor,
    Model,
    Partition,
    Row,
    Shared,
    Sigmoid,
    Softmax,
    Tanh,
    Tensor,
)
from gradmerge.common.errors import ConfigError
from gradmerge.engine.opening import open_plan


def plan_of(family, name, granularity):
    models = family(name, dtype=torch.float32)[0]
    recipe = Recipe(
        sources={"a": models[1], "b": models[2]}, base=models[0], coefficients=granularity
    )
    return open_plan(recipe), models[0]


# ---- granularities ------------------------------------------------------------------------------


def test_column_runs_over_inputs_of_real_layers(family):
    """Conv1D stores `[in, out]`: its column axis is 0. Oracle: the modules' own features."""
    plan, model = plan_of(family, "gpt2", Column())
    slots, width = plan.layout.slots, model.config.n_embd
    block = "transformer.h.0"
    for name, inputs, axis in (
        (f"{block}.attn.c_attn.weight", width, 0),
        (f"{block}.attn.c_proj.weight", width, 0),
        (f"{block}.mlp.c_fc.weight", width, 0),
        (f"{block}.mlp.c_proj.weight", 4 * width, 0),
        ("transformer.wte.weight", width, 1),
        (f"{block}.ln_1.weight", width, 0),
    ):
        assert (slots[name].kind, slots[name].axis, slots[name].shape) == (
            "axis",
            axis,
            (inputs,),
        ), name
    for name in (f"{block}.attn.c_attn.bias", f"{block}.ln_1.bias"):
        assert (slots[name].kind, slots[name].shape) == ("scalar", ()), name


def test_row_runs_over_outputs_of_real_layers(family):
    plan, model = plan_of(family, "gpt2", Row())
    slots, width = plan.layout.slots, model.config.n_embd
    block = "transformer.h.0"
    for name, outputs, axis in (
        (f"{block}.attn.c_attn.weight", 3 * width, 1),
        (f"{block}.mlp.c_proj.weight", width, 1),
        ("transformer.wte.weight", 32, 0),
        (f"{block}.attn.c_attn.bias", 3 * width, 0),
    ):
        assert (slots[name].kind, slots[name].axis, slots[name].shape) == (
            "axis",
            axis,
            (outputs,),
        ), name


def test_column_and_row_of_convolutions_and_recurrent_layers(family):
    columns = plan_of(family, "convolutions", Column())[0].layout.slots
    rows = plan_of(family, "convolutions", Row())[0].layout.slots
    for name, column, row in (
        ("first.weight", (3,), (8,)),
        ("depthwise.weight", (1,), (8,)),
        ("up.weight", (8,), (4,)),  # a transposed convolution stores [in, out, ...]
        ("recurrent.weight_ih_l0", (4,), (20,)),
        ("head.weight", (5,), (3,)),
        ("norm.weight", (8,), (8,)),
        ("scale", (), ()),
    ):
        assert (columns[name].shape, rows[name].shape) == (column, row), name
    for bias in ("head.bias", "norm.bias", "recurrent.bias_ih_l0", "recurrent.bias_hh_l0"):
        assert (columns[bias].kind, columns[bias].shape) == ("scalar", ()), bias
        assert rows[bias].kind == "axis"


@pytest.mark.parametrize(
    ("granularity", "count"),
    [(Model(), 1), (Group(), 3), (Tensor(), 20)],
    ids=["model", "group", "tensor"],
)
def test_shared_tables_on_a_real_model(family, granularity, count):
    """Tied Llama: 2 blocks of 9 tensors, the embedding and the last norm."""
    plan, _ = plan_of(family, "llama-tied", granularity)
    (shape,) = plan.layout.shapes.values()
    assert shape == (count,)
    assert {slot.index for slot in plan.layout.slots.values()} == set(range(count))


def test_element_has_the_tensors_own_shape(family):
    plan, _ = plan_of(family, "gpt2", Element())
    for name, slot in plan.layout.slots.items():
        assert (slot.kind, slot.shape) == ("element", plan.tensors[name].shape)


def test_group_patterns():
    names = [
        "model.embed.weight",
        "model.layers.0.self_attn.q.weight",
        "model.layers.0.self_attn.k.weight",
        "model.layers.0.mlp.up.weight",
        "model.layers.10.mlp.up.weight",
        "model.layers.1.norm.weight",
        "decoder.layers.0.mlp.up.weight",
        "lm_head.weight",
    ]
    tensors = [MergeTensor(name, (2, 2)) for name in names]

    def groups(*patterns):
        slots = Group(patterns).layout(tensors).slots if patterns else Group().layout(tensors).slots
        found = {}
        for name in names:
            found.setdefault(slots[name].index, []).append(names.index(name))
        return sorted(found.values())

    assert groups() == [[0, 7], [1, 2, 3], [4], [5], [6]]
    assert groups(r"layers\.\d+\.(self_attn|mlp)") == [[0, 5, 7], [1, 2], [3], [4], [6]]
    assert groups(r"self_attn", r"^model\.layers") == [[0, 6, 7], [1, 2], [3, 4, 5]]
    assert groups(r"$nothing") == [list(range(8))]
    with pytest.raises(ConfigError, match=r"Group.patterns: invalid regular expression '\('"):
        Group(("(",))


@pytest.mark.parametrize("size", [1, 4, 10, 23, 5000, 1 << 19])
def test_partition_is_reproducible_and_balanced(size):
    def parts(seed=0, name="layers.0.weight", num=10):
        tensor = MergeTensor(name, (size,))
        slot = Partition(num, seed).layout([tensor]).slots[name]
        assert slot.shape == (min(num, size),)
        return slot.parts(size, torch.device("cpu"))

    first = parts()
    assert torch.equal(first, parts())
    counts = torch.bincount(first, minlength=min(10, size))
    assert len(counts) == min(10, size)
    if size <= 5000:
        assert counts.max() - counts.min() <= 1
    else:  # independent draws: five standard deviations of a binomial count
        assert (counts - size / 10).abs().max() <= 5 * (size * 0.09) ** 0.5
    if size > 20:
        assert not torch.equal(first, parts(seed=1))
        assert not torch.equal(first, parts(name="layers.1.weight"))


def test_partition_needs_a_part():
    with pytest.raises(ConfigError, match="num_parts: expected at least 1, got 0"):
        Partition(0)


# ---- links --------------------------------------------------------------------------------------

LINKS = {
    "identity": (Tensor(), -5.0, 5.0),
    "clamp": (Clamp(Tensor(), -0.5, 2.0), -0.5, 2.0),
    "sigmoid": (Sigmoid(Tensor()), 0.01, 0.99),
    "tanh": (Tanh(Tensor()), -0.99, 0.99),
    "clamp of tanh": (Clamp(Tanh(Tensor()), -0.5, 0.5), -0.5, 0.5),
}


@pytest.mark.parametrize("name", LINKS)
def test_pull_back_is_the_inverse_inside_the_range(name):
    link, low, high = LINKS[name]
    wanted = torch.linspace(low, high, 41, dtype=torch.float64).expand(3, -1)
    torch.testing.assert_close(link.link(link.pull_back(wanted)), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "link", [Softmax(), Softmax(Element()), Complement(), Complement(Sigmoid())]
)
def test_pull_back_is_the_inverse_where_sources_share(link):
    first = torch.linspace(0.01, 0.99, 41, dtype=torch.float64)
    wanted = torch.stack([first, 1 - first])
    raw = link.pull_back(wanted)
    assert len(raw) == link.num_rows(2)
    torch.testing.assert_close(link.link(raw), wanted, rtol=1e-12, atol=1e-12)


def test_starts_near_a_bound_are_pulled_to_where_links_learn():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        Sigmoid().link(Sigmoid().pull_back(ends)), torch.tensor([0.01, 0.99], dtype=torch.float64)
    )
    torch.testing.assert_close(
        Tanh().link(Tanh().pull_back(2 * ends - 1)),
        torch.tensor([-0.99, 0.99], dtype=torch.float64),
    )
    got = Softmax().link(Softmax().pull_back(ends[:, None]))
    assert got.isfinite().all()
    torch.testing.assert_close(got[:, 0], torch.tensor([1e-4, 1.0]).double(), rtol=0, atol=1.1e-4)


def test_softmax_and_complement_sum_to_one():
    raw = 10 * torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = Softmax().link(raw)
    torch.testing.assert_close(got.sum(0), torch.ones(7, 3, dtype=torch.float64))
    assert (got > 0).all()
    expected = raw.exp() / raw.exp().sum(0)
    torch.testing.assert_close(got, expected)
    got = Complement().link(raw[:1])
    torch.testing.assert_close(got, torch.stack([raw[0], 1 - raw[0]]))


def test_clamp_comes_back_from_its_bound_where_a_plain_clamp_does_not():
    """Descent on (c - target)^2 from beyond the bound, by torch's own clamp and by ours."""

    def descend(function, raw, target):
        raw = torch.tensor([raw], requires_grad=True)
        for _ in range(200):
            (grad,) = torch.autograd.grad(((function(raw) - target) ** 2).sum(), raw)
            raw = (raw - 0.1 * grad).detach().requires_grad_()
        return function(raw).item()

    plain, ours = (lambda raw: raw.clamp(0, 1)), Clamp().link
    for raw, bound in ((-0.3, 0.0), (1.3, 1.0)):
        assert descend(plain, raw, 0.5) == bound
        assert descend(ours, raw, 0.5) == pytest.approx(0.5, abs=1e-4)
        assert descend(ours, raw, bound + 3 * (bound - 0.5)) == bound


def test_clamp_gradient_by_cases():
    raw = torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.4, 0.4, 1.0, 1.0, 2.0, 2.0], requires_grad=True)
    outer = torch.tensor([1.0, -1.0] * 5)
    got = Clamp().link(raw)
    torch.testing.assert_close(got.detach(), raw.detach().clamp(0, 1))
    got.backward(outer)
    # descent subtracts: at the low bound a positive gradient pushes out, at the high a negative one
    expected = torch.tensor([0.0, -1.0, 0.0, -1.0, 1.0, -1.0, 1.0, 0.0, 1.0, 0.0])
    assert torch.equal(raw.grad, expected)


def test_a_concrete_mask_has_its_scale_as_the_mean():
    link = Shared(ConcreteMask(Element(), temperature=0.7, scale=0.4))
    generator = torch.Generator().manual_seed(0)
    raw = 2 * torch.randn(link.num_rows(3), 4, 5, generator=generator, dtype=torch.float64)
    m = 1 / (1 + (-raw / 0.7).exp())
    got = link.link(raw)
    torch.testing.assert_close(got, 0.4 * m / m.mean())
    assert got.mean() == pytest.approx(0.4)
    # a start that is not constant: another z, the same coefficients
    wanted = 0.4 + 0.3 * torch.linspace(-1, 1, 21, dtype=torch.float64)[None]
    back = link.pull_back(wanted.expand(3, -1))
    torch.testing.assert_close(link.link(back), wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(link.pull_back(torch.full((3, 6), 0.4)), torch.zeros(1, 6))
    single = link.link(torch.zeros(1, 1, dtype=torch.float64))
    assert single.item() == 0.4, "a tensor with one number"
    assert torch.equal(link.pull_back(torch.full((3, 1), 0.4)), torch.zeros(1, 1))


@pytest.mark.parametrize(
    "link",
    [Sigmoid(), Tanh(), Softmax(), Complement(Sigmoid()), Shared(), ConcreteMask(Element())],
)
def test_link_gradients(link):
    rows = link.num_rows(2)
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(rows, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(link.link, raw)


@pytest.mark.parametrize(
    ("link", "values", "message"),
    [
        (Clamp(), [0.5, 1.5], r"Clamp: .* lie in \[0, 1\], got 1.5"),
        (Clamp(low=-1, high=0.5), [-1.5, 0.1], r"Clamp: .* lie in \[-1, 0.5\], got -1.5"),
        (Sigmoid(), [0.5, -0.2], r"Sigmoid: .* lie in \[0, 1\], got -0.2"),
        (Tanh(), [0.5, 1.2], r"Tanh: .* lie in \[-1, 1\], got 1.2"),
        (Softmax(), [0.3, 0.3], "Softmax: .* sum to 1 .* a sum of 0.6. Use init Uniform"),
        (Complement(), [0.3, 0.3], "Complement: .* sum to 1 .* a sum of 0.6. Use init Uniform"),
        (Shared(), [0.3, 0.4], r"Shared: .* the same for all sources, got numbers .* by 0.1"),
        (ConcreteMask(Element()), [[0.3, 0.5]], r"must have the mean 0.3 .*, got 0.4. Use init"),
        (ConcreteMask(Element()), [[-0.1, 0.7]], r"ConcreteMask: .* lie in \[0, 0.6\], got -0.1"),
        (Complement(Sigmoid()), [1.5, -0.5], r"Sigmoid: .* lie in \[0, 1\], got 1.5"),
    ],
)
def test_start_that_a_link_cannot_reach(link, values, message):
    with pytest.raises(ConfigError, match=message):
        link.pull_back(torch.tensor(values, dtype=torch.float64))


def test_message_shows_the_sum_that_is_wrong():
    good_then_bad = torch.tensor([[0.5, 0.2], [0.5, 0.2]])
    with pytest.raises(ConfigError, match=r"a sum of 0.4"):
        Softmax().pull_back(good_then_bad)


def test_links_check_their_options():
    with pytest.raises(ConfigError, match=r"low: expected a number below high 0.5, got 1.0"):
        Clamp(low=1.0, high=0.5)
    for link, high in ((Sigmoid, 0.5), (Tanh, 1), (Softmax, 1)):
        with pytest.raises(
            ConfigError, match=rf"{link.__name__}.eps: expected a number in \(0, {high}\)"
        ):
            link(eps=0.0)
    for num in (1, 3):
        with pytest.raises(ConfigError, match=f"exactly two sources, got {num}"):
            Complement().num_rows(num)
    with pytest.raises(ConfigError, match=r"ConcreteMask: expected Element, .* got Tensor"):
        ConcreteMask(Sigmoid(Tensor()))
    with pytest.raises(ConfigError, match=r"ConcreteMask.temperature: expected a positive"):
        ConcreteMask(temperature=0.0)
    with pytest.raises(ConfigError, match="Softmax: expected coefficients of each source inside"):
        Softmax(Shared()).num_rows(2)
    with pytest.raises(ConfigError, match="Softmax: expected at least two sources, got one"):
        Complement(Softmax()).num_rows(2)
