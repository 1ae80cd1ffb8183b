"""What a recipe states, tensor by tensor: origins, frozen, private, unused; and its errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import Clamp, Complement, Constant, Model, Softmax, Tensor, Uniform
from gradmerge.common.errors import CompatibilityError, ConfigError, FingerprintError
from gradmerge.common.names import named
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.sources import HuggingFace, InMemory


class Net(nn.Module):
    """A body, a part that the forward pass never uses, a norm with statistics, and a head."""

    def __init__(self, labels: int = 2) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.spare = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, labels)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


@pytest.fixture
def nets():
    """A base and two sources, all of whose tensors differ, statistics included."""
    torch.manual_seed(0)
    models = [Net() for _ in range(3)]
    for model in models:
        torch.nn.init.uniform_(model.norm.weight, 0.5, 2)
        torch.nn.init.normal_(model.norm.bias)
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return models


def state(model):
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def merged_tensors(plan):
    raw = plan.initial_raw()
    return {name: FitState(plan, raw).materialise(name) for name in plan.tensors}


def make(nets, with_base=True, **options):
    options.setdefault("coefficients", Tensor())
    options.setdefault("init", Constant([0.3, 0.5]))
    return Recipe(
        sources={"a": nets[1], "b": nets[2]}, base=nets[0] if with_base else None, **options
    )


def same(came, expected):
    torch.testing.assert_close(came, expected, rtol=1e-6, atol=1e-6)


# ---- origin -------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("origin", ["base", "zero", "mean", None])
def test_origin(nets, origin, with_base):
    if origin == "base" and not with_base:
        with pytest.raises(ConfigError, match="origin: base needs a base, got none"):
            make(nets, with_base, origin=origin)
        return
    recipe = make(nets, with_base, origin=origin)
    assert recipe.resolved_origin == (origin or ("base" if with_base else "zero"))
    base, a, b = map(state, nets)
    for name, came in merged_tensors(open_plan(recipe)).items():
        anchor = {
            "base": base[name],
            "zero": torch.zeros_like(base[name]),
            "mean": (a[name] + b[name]) / 2,
        }[recipe.resolved_origin]
        same(came, anchor + 0.3 * (a[name] - anchor) + 0.5 * (b[name] - anchor))


def test_uniform_from_zero_and_mean_is_the_average(nets):
    _, a, b = map(state, nets)
    for origin in ("zero", "mean"):
        plan = open_plan(make(nets, with_base=False, origin=origin, init=Uniform()))
        for name, came in merged_tensors(plan).items():
            same(came, (a[name] + b[name]) / 2)


# ---- frozen -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "weights"),
    [("origin", (1, 0, 0)), ("mean", (0, 0.5, 0.5)), (0.25, (0.5, 0.25, 0.25)), (1, (-1, 1, 1))],
)
def test_frozen_tensors_keep_their_stated_coefficient(nets, value, weights):
    plan = open_plan(make(nets, frozen={"^body": value}))
    states = [state(net) for net in nets]
    came = merged_tensors(plan)
    for name in ("body.weight", "body.bias"):
        assert name in plan.fixed
        assert name not in plan.learned
        assert name not in plan.layout.slots
        same(came[name], sum(w * s[name] for w, s in zip(weights, states, strict=True)))
    same(
        came["head.bias"],
        0.2 * states[0]["head.bias"] + 0.3 * states[1]["head.bias"] + 0.5 * states[2]["head.bias"],
    )


def test_first_frozen_pattern_wins(nets):
    every = make(nets, frozen={r"body\.weight": 0.5, "body": "origin", "": 1.0, "head": 0.0})
    with pytest.raises(ConfigError, match="at least one tensor with free coefficients, got none"):
        open_plan(every)
    plan = open_plan(make(nets, frozen={r"body\.weight": 0.5, "body": "origin", "norm": "mean"}))
    assert plan.fixed["body.weight"] == 0.5
    assert plan.fixed["body.bias"] == 0.0
    assert plan.fixed["norm.weight"] == 0.5
    assert set(plan.learned) == {"spare.weight", "spare.bias", "head.weight", "head.bias"}


def test_frozen_tensors_get_no_gradient_and_no_parameter(nets):
    merged = MergedModel(make(nets, frozen={"^head": "mean"}))
    assert merged.raw["tensor"].shape == (2, 6)
    merged(torch.ones(5, 3)).sum().backward()
    assert not any(name.startswith("head") for name in merged.touched)


# ---- private ------------------------------------------------------------------------------------


def test_private_heads_of_different_shapes(nets):
    nets[2].head = nn.Linear(4, 7)
    with pytest.raises(CompatibilityError, match=r"(?s)head\.weight.*private: \['\^head"):
        open_plan(make(nets))
    merged = MergedModel(make(nets, private=[r"^head\."], buffers="origin"))
    assert merged.plan.private == ["head.weight", "head.bias"]
    assert not any(name.startswith("head") for name in merged.plan.tensors)
    inputs = torch.ones(5, 3)
    body = {n: merged.state.materialise(n) for n in merged.plan.tensors}
    for task, net in (("a", nets[1]), ("b", nets[2])):
        weights = {**state(nets[0]), **body, **{n: t for n, t in state(net).items() if "head" in n}}
        model = Net(len(net.head.bias)).eval()
        model.load_state_dict(weights)
        same(merged(inputs, task=task), model(inputs))
    with pytest.raises(
        ConfigError, match=r"expected one of a, b, got none, but every task has a head\.weight"
    ):
        merged(inputs)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            {"head.bias": None},
            r"\[private\] in memory: head\.bias\s+expected a private tensor of each name.*got none",
        ),
        (
            {"head.weight": "head.out.weight", "head.bias": "head.out.bias"},
            r"(?s)head\.weight, head\.bias\n.*got head\.out\.weight, head\.out\.bias instead\n"
            r".*Save this source's head under these names",
        ),
    ],
)
def test_a_source_without_the_private_tensors_is_refused(nets, rename, message):
    other = {
        rename.get(name, name): tensor
        for name, tensor in state(nets[2]).items()
        if rename.get(name, name) is not None
    }
    sources = {"a": nets[1], "b": other}
    options = {"private": [r"^head\."], "init": Constant(0.5), "buffers": "origin"}
    for base in (None, nets[0]):
        with pytest.raises(CompatibilityError, match=r"1 problem\(s\)") as error:
            open_plan(Recipe(sources=sources, base=base, **options))
        assert re.search(message, str(error.value))
        with pytest.raises(CompatibilityError, match=message):
            open_plan(Recipe(sources=sources, base=base, **options), with_skeleton=False)
    headless = {name: t for name, t in state(nets[0]).items() if "head" not in name}
    assert open_plan(Recipe({"a": nets[1], "b": nets[2]}, base=headless, **options)).private


def test_a_source_that_serves_no_task_may_be_allowed_to_have_no_head(nets):
    other = {name: t for name, t in state(nets[2]).items() if "head" not in name}
    recipe = Recipe({"a": nets[1], "b": other}, private=[r"^head\."], allow=["private"])
    plan = open_plan(recipe)
    assert [problem.kind for problem in plan.warnings] == ["private"]
    assert MergedModel(plan, tasks={"t": "a"})(torch.ones(5, 3)).shape == (5, 2)
    message = r"source b \(in memory\) has no head\.weight.*task's `source`"
    with pytest.raises(ConfigError, match=message):
        MergedModel(plan)(torch.ones(5, 3), task="b")


def test_everything_private_leaves_nothing(nets):
    with pytest.raises(ConfigError, match="private: expected at least one tensor to merge"):
        open_plan(make(nets, private=["."]))


# ---- unused -------------------------------------------------------------------------------------


def after_backward(recipe):
    merged = MergedModel(recipe)
    merged(torch.randn(5, 3, generator=torch.Generator().manual_seed(1))).sum().backward()
    with pytest.warns(UserWarning, match=r"2 tensors got no gradient.*spare\.weight, spare\.bias"):
        unused = merged.fix_unused()
    assert unused == ["spare.weight", "spare.bias"]
    return merged


@pytest.mark.parametrize(
    ("unused", "with_base", "weights"),
    [
        ("auto", True, (1, 0, 0)),
        ("auto", False, (0, 0.5, 0.5)),
        ("origin", True, (1, 0, 0)),
        ("mean", True, (0, 0.5, 0.5)),
        ("mean", False, (0, 0.5, 0.5)),
    ],
)
def test_tensors_without_gradient_follow_the_stated_rule(nets, unused, with_base, weights):
    merged = after_backward(make(nets, with_base, unused=unused))
    states = [state(net) for net in nets]
    for name in ("spare.weight", "spare.bias"):
        came = merged.state.materialise(name)
        same(came, sum(w * s[name] for w, s in zip(weights, states, strict=True)))
    assert merged.fix_unused() == []


def test_unused_tensors_are_not_zeroed_where_the_origin_is_zero_beside_a_base(nets):
    merged = after_backward(make(nets, origin="zero"))
    _, a, b = map(state, nets)
    name = "spare.weight"
    same(merged.state.materialise(name), (a[name] + b[name]) / 2)


def test_tensor_that_the_network_has_no_place_for_follows_the_rule_too(nets):
    states = [
        {**state(net), "old.weight": torch.full((2,), float(i))} for i, net in enumerate(nets)
    ]
    for unused, expected in (("auto", 0.0), ("mean", 1.5)):
        recipe = Recipe(sources={"a": states[1], "b": states[2]}, base=states[0], unused=unused)
        plan = open_plan(recipe, Net())
        assert "old.weight" not in plan.learned
        same(FitState.start(plan).materialise("old.weight"), torch.full((2,), expected))


# ---- buffers ------------------------------------------------------------------------------------


def test_buffers_by_rule(nets):
    base, a, b = map(state, nets)
    for rule, expected in (
        ("origin", base["norm.running_var"]),
        ("mean", (a["norm.running_var"] + b["norm.running_var"]) / 2),
        ("recompute", (a["norm.running_var"] + b["norm.running_var"]) / 2),
    ):
        plan = open_plan(make(nets, buffers=rule))
        assert set(plan.buffers) == {
            "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"
        }  # fmt: skip
        same(plan.buffer("norm.running_var"), expected)
        assert plan.buffer("norm.num_batches_tracked").dtype == torch.int64


# ---- names --------------------------------------------------------------------------------------


def test_list_of_sources_gets_names(nets):
    a, b = InMemory(nets[1]), InMemory(nets[2])
    assert list(Recipe(sources=[a, b]).sources) == ["source0", "source1"]
    assert list(Recipe(sources=["org/math-7b", "models/code.safetensors"]).sources) == [
        "math-7b",
        "code",
    ]
    assert list(Recipe(sources=[Path("x/same"), "y/same", "z/base"]).sources) == [
        "same",
        "same1",
        "base2",
    ]
    assert list(Recipe(sources=[HuggingFace("org/tuned")]).sources) == ["tuned"]
    listed, named = Recipe(sources=[a, b]), Recipe(sources={"source0": a, "source1": b})
    assert listed == named


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["x/a2", "x/a", "y/a"], ["a2", "a", "a3"]),
        (["x/a", "y/a", "x/a1"], ["a", "a2", "a1"]),
        (["x/base", "x/base0", "base"], ["base1", "base0", "base2"]),
        (
            ["llama-3.1", "x/llama-3.2", "owner/llama-3.2"],
            ["llama-3.1", "llama-3.2", "llama-3.2-2"],
        ),
        (["x/llama-3.1/", Path("x/math.v2.bin")], ["llama-3.1", "math.v2"]),
        (["a.safetensors", "b.pt", "c.pth", "d.gguf"], ["a", "b", "c", "d.gguf"]),
        ([{}, "source0"], ["source0", "source0-1"]),
        ([{}, {}], ["source0", "source1"]),
    ],
)
def test_names_of_a_list_are_whole_and_unique(sources, names):
    assert list(named(sources)) == names
    assert list(named(sources).values()) == sources


def test_source_named_base(nets):
    with pytest.raises(ConfigError, match="expected names other than 'base', which is reserved"):
        open_plan(Recipe(sources={"base": nets[1], "b": nets[2]}, base=nets[0]))
    plan = open_plan(Recipe(sources={"base": nets[1], "b": nets[2]}, init=Constant([1.0, 0.0])))
    same(merged_tensors(plan)["body.weight"], state(nets[1])["body.weight"])


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": {}}, "sources: expected at least one, got none"),
        ({"sources": []}, "sources: expected at least one, got none"),
        ({"origin": "base"}, "origin: base needs a base, got none"),
        ({"frozen": {"(": 1.0}}, r"invalid regular expression '\('"),
        ({"private": ["["]}, r"invalid regular expression '\['"),
        ({"frozen": {"x": "average"}}, r"frozen\['x'\]: expected a number.*got 'average'"),
        ({"sources": {"a": "x"}, "coefficients": Complement()}, "exactly two sources, got 1"),
        ({"sources": {"a": "x"}, "coefficients": Softmax()}, "at least two sources, got one"),
    ],
)
def test_what_is_wrong_before_a_file_is_opened(options, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**{"sources": {"a": "x", "b": "y"}, **options})


def test_start_out_of_reach_of_the_link(nets):
    plan = open_plan(make(nets, coefficients=Clamp(Model(), 0.0, 0.4)))
    with pytest.raises(ConfigError, match=r"Clamp: .* lie in \[0, 0.4\], got 0.5"):
        plan.initial_raw()


def test_allowed_problem_becomes_a_warning(nets):
    extra = {**state(nets[2]), "more.weight": torch.ones(2)}
    sources = {"a": nets[1], "b": extra}
    with pytest.raises(CompatibilityError, match=r"\[extra\] in memory: more\.weight"):
        open_plan(Recipe(sources=sources))
    plan = open_plan(Recipe(sources=sources, allow=["extra"]))
    assert [problem.what for problem in plan.warnings] == ["more.weight"]
    assert "more.weight" not in plan.tensors


def test_coefficients_of_other_weights_are_refused(nets):
    plan = open_plan(make(nets))
    known = plan.fingerprints
    assert set(known) == {"base", "a", "b"}
    plan.require_fingerprints(known)
    with torch.no_grad():
        nets[2].body.weight[0, 0] += 1e-3
    other = open_plan(make(nets))
    assert other.fingerprints["a"] == known["a"]
    with pytest.raises(FingerprintError, match=r"trained on other weights of: b. b: expected"):
        other.require_fingerprints(known)
    with pytest.raises(FingerprintError, match="other weights of: base"):
        open_plan(make(nets, with_base=False, origin="zero")).require_fingerprints(known)


def test_norms_of_directions_follow_the_origin(nets):
    states = [state(net) for net in nets]
    names = list(open_plan(make(nets)).tensors)
    flat = [torch.cat([s[n].flatten() for n in names]).double() for s in states]
    for origin, anchor in (
        ("base", flat[0]),
        ("zero", 0 * flat[0]),
        ("mean", (flat[1] + flat[2]) / 2),
    ):
        expected = torch.stack([(f - anchor).square().sum() for f in flat[1:]])
        came = open_plan(make(nets, origin=origin)).direction_norms()
        torch.testing.assert_close(came, expected, rtol=1e-5, atol=0)
