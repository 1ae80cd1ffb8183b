"""Starting values: each init in coefficient space, mapped back through the link."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from gradmerge import Recipe
from gradmerge.coefficients import (
    Column,
    Constant,
    DepthRamp,
    Element,
    FromFile,
    Group,
    InitContext,
    MergeTensor,
    MetaGPT,
    Mixup,
    Model,
    Partition,
    Row,
    Tensor,
    Uniform,
    initial_raw,
)
from gradmerge.common.errors import ConfigError
from gradmerge.engine.opening import open_plan

MATRIX = MergeTensor("layers.0.weight", (4, 3))


def context(tensors, num=2, norms=None):
    named = {tensor.name: tensor for tensor in tensors}
    return InitContext(tuple("abcdef"[:num]), named, norms or (lambda: torch.ones(num)))


def start(init, granularity, tensors=(MATRIX,), num=2, norms=None):
    """Starting coefficients by tensor, after the link."""
    layout = granularity.layout(tensors)
    rows = granularity.num_rows(num)
    raw = initial_raw(layout, init, context(tensors, num, norms), rows, granularity.pull_back)
    assert all(value.dtype == torch.float32 for value in raw.values())
    assert {key: tuple(value.shape) for key, value in raw.items()} == {
        key: (rows, *shape) for key, shape in layout.shapes.items()
    }
    return {n: granularity.link(slot.read(raw)) for n, slot in layout.slots.items()}


EVERY = [Model(), Group(), Tensor(), Column(), Row(), Partition(3), Element()]


@pytest.mark.parametrize("granularity", EVERY, ids=lambda g: type(g).__name__)
def test_constant_and_uniform(granularity):
    one = start(Constant(0.25), granularity)[MATRIX.name]
    assert torch.equal(one, torch.full_like(one, 0.25))
    each = start(Constant([0.2, 0.7, -1.0]), granularity, num=3)[MATRIX.name]
    for row, value in zip(each, [0.2, 0.7, -1.0], strict=True):
        assert torch.equal(row, torch.full_like(row, value))
    uniform = start(Uniform(), granularity, num=4)[MATRIX.name]
    assert torch.equal(uniform, torch.full_like(uniform, 0.25))


def test_constant_needs_one_value_per_source():
    with pytest.raises(ConfigError, match=r"expected one value or 2 \(for a, b\), got 3"):
        start(Constant([1.0, 2.0, 3.0]), Tensor())


@pytest.mark.parametrize("alpha", [0.4, 1.0, 3.0])
def test_mixup_of_two_is_a_beta_draw(alpha):
    draws = [start(Mixup(alpha, seed=seed), Model())[MATRIX.name] for seed in range(400)]
    for draw in draws:
        assert draw.sum().item() == pytest.approx(1, abs=1e-6)
    first = [draw[0].item() for draw in draws]
    # fixed seeds, so this cannot flicker: the draws are the same in every run
    assert stats.kstest(first, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert stats.kstest(first, stats.beta(4 * alpha, alpha).cdf).pvalue < 1e-6


def test_mixup_of_more_is_a_dirichlet_draw():
    tensor = MergeTensor("w", (40, 20))
    draws = start(Mixup(0.7, per="element"), Element(), [tensor], num=3)["w"].flatten(1)
    torch.testing.assert_close(draws.sum(0), torch.ones(800))
    for source in draws:  # the marginal of Dirichlet(a, a, a)
        assert stats.kstest(source.numpy(), stats.beta(0.7, 1.4).cdf).pvalue > 0.01


def test_mixup_shares_draws_as_it_says():
    tensors = [MergeTensor("layers.0.w", (5, 4)), MergeTensor("layers.1.w", (5, 4))]

    def distinct(per, granularity):
        got = start(Mixup(per=per, seed=3), granularity, tensors)
        return [len(got[t.name][0].unique()) for t in tensors], len(
            torch.cat([got[t.name][0].flatten() for t in tensors]).unique()
        )

    assert distinct("model", Element()) == ([1, 1], 1)
    assert distinct("tensor", Element()) == ([1, 1], 2)
    assert distinct("element", Element()) == ([20, 20], 40)
    assert distinct("tensor", Tensor()) == ([1, 1], 2)
    assert distinct("element", Column()) == ([4, 4], 8)
    assert distinct("element", Model()) == ([1, 1], 1)


def test_mixup_is_seeded_scaled_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = start(Mixup(seed=1), Tensor())[MATRIX.name]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, start(Mixup(seed=1), Tensor())[MATRIX.name])
    assert not torch.equal(first, start(Mixup(seed=2), Tensor())[MATRIX.name])
    scaled = start(Mixup(seed=1, scale=0.4), Tensor())[MATRIX.name]
    torch.testing.assert_close(scaled, 0.4 * first)
    with pytest.raises(ConfigError, match="alpha must be positive, got 0"):
        Mixup(alpha=0)


@pytest.mark.parametrize(
    ("names", "shares"),
    [
        (
            ["lm_head", "model.embed_tokens", "model.layers.0.q", "model.layers.1.q", "model.norm"],
            [1, 0, 1 / 3, 2 / 3, 1],
        ),
        (
            ["h.0.c", "h.1.c", "h.2.c", "ln_f", "wpe", "wte"],
            [1 / 4, 2 / 4, 3 / 4, 1, 0, 0],
        ),
        (["bert.embeddings.x", "bert.encoder.layer.0.q", "classifier"], [0, 1 / 2, 1]),
        (["classifier", "vit.embeddings.cls_token", "vit.encoder.layer.0.q"], [1, 0, 1 / 2]),
        (["decoder.block.0.layer.0.q", "decoder.block.1.layer.0.q", "shared"], [1 / 3, 2 / 3, 0]),
        (["bn1", "conv1", "fc", "layer1.0.conv1", "layer2.0.conv1"], [0, 0, 1, 1 / 3, 2 / 3]),
        (["0", "2", "4"], [1 / 4, 2 / 4, 3 / 4]),
    ],
    ids=["llama", "gpt2", "bert", "vit", "t5", "resnet", "sequential"],
)
def test_depth_ramp_follows_depth_in_any_order(names, shares):
    """Names are in alphabetical order, as in files, with `lm_head` first."""
    names = [f"{name}.weight" for name in names]
    expected = {name: 0.2 + 0.4 * share for name, share in zip(names, shares, strict=True)}
    for order in (names, names[::-1]):
        got = start(DepthRamp(0.2, 0.6), Tensor(), [MergeTensor(n, (2, 2)) for n in order])
        for name in names:
            assert got[name].tolist() == pytest.approx([expected[name]] * 2, abs=1e-6), name


def test_metagpt_closed_form_and_one_pass(family):
    models, _ = family("llama", dtype=torch.float64)
    recipe = Recipe(
        sources={"a": models[1], "b": models[2]},
        base=models[0],
        coefficients=Tensor(),
        init=MetaGPT(),
    )
    plan = open_plan(recipe)
    squared = [
        sum(
            float((p - q).detach().pow(2).sum())
            for p, q in zip(model.parameters(), models[0].parameters(), strict=True)
        )
        for model in models[1:]
    ]
    raw = plan.initial_raw()["tensor"]
    for row, value in zip(raw, squared, strict=True):
        torch.testing.assert_close(
            row, torch.full_like(row, value / sum(squared)), rtol=1e-6, atol=0
        )
    calls = []

    def norms():
        calls.append(1)
        return torch.tensor([1.0, 3.0])

    tensors = [MergeTensor(f"layers.{i}.w", (2,)) for i in range(5)]
    got = start(MetaGPT(), Tensor(), tensors, norms=norms)
    assert got["layers.4.w"].tolist() == [0.25, 0.75]
    assert len(calls) == 1  # it reads every weight of every source
    with pytest.raises(ConfigError, match="all directions are zero"):
        start(MetaGPT(), Tensor(), norms=lambda: torch.zeros(2))


def test_shared_coefficient_starts_at_the_mean():
    tensors = [MergeTensor(n, (2,)) for n in ("embed.w", "layers.0.w", "lm_head.w")]
    got = start(DepthRamp(0.0, 1.0), Model(), tensors)
    assert got["embed.w"].tolist() == pytest.approx([0.5, 0.5])


def coefficients_file(path, tensors, sources=("a", "b")):
    save_file(tensors, path, {"sources": json.dumps(sources)} if sources else None)
    return FromFile(str(path))


@pytest.mark.parametrize("granularity", EVERY[2:], ids=lambda g: type(g).__name__)
def test_from_file_of_the_same_granularity(tmp_path, granularity):
    wanted = start(Mixup(per="element", seed=4), granularity)
    init = coefficients_file(
        tmp_path / "c.safetensors", {n: t.contiguous() for n, t in wanted.items()}
    )
    assert torch.equal(start(init, granularity)[MATRIX.name], wanted[MATRIX.name])


def test_from_file_spreads_coarse_and_averages_fine(tmp_path):
    coarse = coefficients_file(tmp_path / "c.safetensors", {MATRIX.name: torch.tensor([0.25, 0.5])})
    got = start(coarse, Column())[MATRIX.name]
    assert got.tolist() == [[0.25] * 3, [0.5] * 3]
    fine = torch.arange(24.0).reshape(2, 4, 3)
    init = coefficients_file(tmp_path / "f.safetensors", {MATRIX.name: fine})
    assert start(init, Tensor())[MATRIX.name].tolist() == [5.5, 17.5]
    with pytest.raises(ConfigError, match=r"coefficients of shape \(4, 3\), expected \(3,\)"):
        start(init, Column())


def test_from_file_matches_sources_by_name(tmp_path):
    tensors = {MATRIX.name: torch.tensor([1.0, 2.0, 3.0])}
    init = coefficients_file(tmp_path / "c.safetensors", tensors, ("c", "a", "b"))
    assert start(init, Tensor(), num=3)[MATRIX.name].tolist() == [2.0, 3.0, 1.0]
    with pytest.raises(
        ConfigError, match=re.escape("for the sources ['c', 'a', 'b'], this merge has ['a', 'b']")
    ):
        start(init, Tensor(), num=2)
    bare = coefficients_file(tmp_path / "d.safetensors", tensors, None)
    assert start(bare, Tensor(), num=3)[MATRIX.name].tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ConfigError, match="is for 3 sources, this merge has 2"):
        start(bare, Tensor(), num=2)


def test_from_file_errors(tmp_path):
    init = coefficients_file(tmp_path / "c.safetensors", {"layers.0.weights": torch.ones(2)})
    with pytest.raises(
        ConfigError,
        match=r"no coefficients for layers\.0\.weight\. Did you mean 'layers\.0\.weights'",
    ):
        start(init, Tensor())
    with pytest.raises(ConfigError, match=r"none\.safetensors: no such file"):
        start(FromFile(str(tmp_path / "none.safetensors")), Tensor())
    (tmp_path / "bad.safetensors").write_bytes(b"garbage")
    with pytest.raises(ConfigError, match=r"bad\.safetensors: not a readable safetensors"):
        start(FromFile(str(tmp_path / "bad.safetensors")), Tensor())
