"""Static merges against mergekit, in memory, on six architectures.

A method is a row of `METHODS`: what mergekit is told and the factors that say the same here. Sums
over sources in another order than mergekit's differ by rounding, so results are equal to 1e-6 of a
tensor's largest entry; rows marked `exact` add in its order and are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import nn

pytest.importorskip("mergekit", reason="the oracle of these tests: pip install gradmerge[parity]")

from architectures import ARCHITECTURES, WIDE
from gradmerge import Recipe
from gradmerge.coefficients import Constant, Uniform
from gradmerge.engine.opening import open_plan
from gradmerge.engine.plan import Plan
from gradmerge.engine.state import FitState
from gradmerge.operators import (
    AbstractOperator,
    ArceeFusion,
    DisjointMean,
    Karcher,
    Linear,
    ModelStock,
    MultiSlerp,
    NearSwap,
    Slerp,
)
from gradmerge.preprocess import (
    AbstractPreprocess,
    Breadcrumbs,
    MagnitudeDrop,
    RandomDrop,
    SelectTop,
    ShareOfSquares,
    Site,
    Trim,
)
from mergekit import merge_methods, sparsify
from networks import transformer

SEED = 5
WEIGHTS = (0.5, 0.3, 0.4)
DENSITIES = [0.3, 0.5, 0.8]


def of(names: str, values: Any) -> dict[str, Any]:
    """mergekit's value an input."""
    return dict(zip(names, values, strict=True))


@dataclass
class Method:
    """A merge as both sides say it. Sources are called a, b, c."""

    theirs: str
    parameters: dict[str, Any]
    coefficients: tuple[float, ...] | None
    """None: 1 / K each."""
    operator: AbstractOperator = field(default_factory=Linear)
    preprocess: tuple[AbstractPreprocess, ...] = ()
    sources: str = "abc"
    base: bool = True
    """Whether directions are measured from the base."""
    their_base: str | None = "base"
    """What is mergekit's base; its method may take it as one of the merged."""
    exact: bool = False
    amplifies: bool = False
    """Whether short vectors that nearly cancel get large weights, and with them rounding."""


def weighted(**more: Any) -> dict[str, Any]:
    return {"weight": of("abc", WEIGHTS), **more}


DENSITY = {"density": of("abc", DENSITIES)}
NUSLERP = {"weight": of("ab", (0.9, 0.3))}
DROP = RandomDrop(DENSITIES, "l1", SEED)
NO_BASE = {"base": False, "their_base": None}
PAIR = {"sources": "ab"}
METHODS = {
    "linear": Method("linear", weighted(), tuple(w / 1.2 for w in WEIGHTS), **NO_BASE),
    # products by powers of two are exact, so only the order of the sum counts
    "linear, halves": Method(
        "linear", {"weight": of("abc", (0.5, 0.25, 0.25))}, (0.5, 0.25, 0.25), exact=True, **NO_BASE
    ),
    "linear, sum": Method("linear", weighted(normalize=False), WEIGHTS, **NO_BASE),
    "task_arithmetic": Method("task_arithmetic", weighted(), WEIGHTS),
    "task_arithmetic, lambda": Method(
        "task_arithmetic", weighted(**{"lambda": 0.7}), tuple(0.7 * w for w in WEIGHTS)
    ),
    "ties": Method(
        "ties", weighted(**DENSITY), WEIGHTS, DisjointMean(), (Trim(DENSITIES),), exact=True
    ),
    "ties, sum": Method(
        "ties",
        weighted(density=0.2, normalize=False, **{"lambda": 0.7}),
        WEIGHTS,
        DisjointMean(False, scale=0.7),
        (Trim(0.2),),
        exact=True,
    ),
    "ties, rescaled": Method(
        "ties",
        weighted(density=0.2, rescale=True),
        WEIGHTS,
        DisjointMean(),
        (Trim(0.2, rescale="l1"),),
    ),
    "dare_linear": Method("dare_linear", weighted(**DENSITY), WEIGHTS, Linear(), (DROP,)),
    "dare_ties": Method("dare_ties", weighted(**DENSITY), WEIGHTS, DisjointMean(False), (DROP,)),
    "dare_ties, not rescaled": Method(
        "dare_ties",
        weighted(rescale=False, normalize=True, **DENSITY),
        WEIGHTS,
        DisjointMean(),
        (RandomDrop(DENSITIES, "none", SEED),),
        exact=True,
    ),
    "breadcrumbs": Method(
        "breadcrumbs",
        weighted(gamma=0.1, **DENSITY),
        WEIGHTS,
        Linear(),
        (Breadcrumbs(DENSITIES, 0.1),),
    ),
    "breadcrumbs_ties": Method(
        "breadcrumbs_ties",
        weighted(gamma=0.1, **DENSITY),
        WEIGHTS,
        DisjointMean(False),
        (Breadcrumbs(DENSITIES, 0.1),),
        exact=True,
    ),
    "della_linear": Method(
        "della_linear",
        weighted(epsilon=0.15, **DENSITY),
        WEIGHTS,
        Linear(),
        (MagnitudeDrop(DENSITIES, 0.15, "l1", SEED),),
    ),
    "della": Method(
        "della",
        weighted(epsilon=0.1, normalize=True, rescale=False, **DENSITY),
        WEIGHTS,
        DisjointMean(),
        (MagnitudeDrop(DENSITIES, 0.1, "none", SEED),),
        exact=True,
    ),
    "sce": Method(
        "sce",
        {"select_topk": 0.4},
        (1.0, 1.0, 1.0),
        Linear(),
        (SelectTop(0.4), ShareOfSquares()),
    ),
    "sce, all": Method("sce", {}, (1.0, 1.0, 1.0), Linear(), (SelectTop(1.0), ShareOfSquares())),
    "slerp": Method("slerp", {"t": 0.3}, (0.7, 0.3), Slerp(), (), "ab", False, "a"),
    "slerp, linear": Method(
        "slerp", {"t": 0.25}, (0.75, 0.25), Slerp(), (), "aa", False, "a", exact=True
    ),
    "nuslerp": Method(
        "nuslerp", NUSLERP, (0.9, 0.3), Slerp(threshold=0.9999999), **PAIR, **NO_BASE
    ),
    "nuslerp, base": Method("nuslerp", NUSLERP, (0.9, 0.3), Slerp(threshold=0.9999999), **PAIR),
    "nuslerp, by row": Method(
        "nuslerp",
        {"nuslerp_flatten": False, **NUSLERP},
        (0.9, 0.3),
        Slerp("row", 0.9999999),
        **PAIR,
        **NO_BASE,
    ),
    "nuslerp, base, by column": Method(
        "nuslerp",
        {"nuslerp_flatten": False, "nuslerp_row_wise": True, **NUSLERP},
        (0.9, 0.3),
        Slerp("column", 0.9999999),
        **PAIR,
        amplifies=True,
    ),
    "nuslerp, no sum": Method(
        "nuslerp", {"weight": of("ab", (0.3, -0.3))}, (0.3, -0.3), Slerp(), **PAIR
    ),
    "multislerp": Method("multislerp", weighted(), WEIGHTS, MultiSlerp(), **NO_BASE),
    "multislerp, base": Method("multislerp", weighted(), WEIGHTS, MultiSlerp()),
    "multislerp, as given": Method(
        "multislerp", weighted(normalize_weights=False), WEIGHTS, MultiSlerp(False)
    ),
    "karcher": Method("karcher", {}, None, Karcher(), **NO_BASE),
    "karcher, 2 steps": Method("karcher", {"max_iter": 2}, None, Karcher(2), **NO_BASE),
    "model_stock": Method("model_stock", {}, None, ModelStock()),
    "model_stock, by row": Method(
        "model_stock", {"filter_wise": True}, None, ModelStock("row"), amplifies=True
    ),
    "nearswap": Method("nearswap", {"t": 0.02}, (0.02,), NearSwap(), sources="a"),
    "arcee_fusion": Method("arcee_fusion", {}, (1.0,), ArceeFusion(), sources="a", exact=True),
}


def _qwen2() -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    kind = transformers.Qwen2ForCausalLM
    return transformer(kind, **WIDE, **heads, tie_word_embeddings=True)


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "qwen2": _qwen2,
    "resnet": _resnet,
    **{name: ARCHITECTURES[name][0] for name in ("llama", "gpt2", "bert", "vit")},
}


@pytest.fixture(scope="module", params=BUILDERS)
def models(request: pytest.FixtureRequest) -> dict[str, nn.Module]:
    """A base and three models near it: every tensor moves, and every BatchNorm has statistics."""
    torch.manual_seed(0)
    made = {name: BUILDERS[request.param]() for name in ("base", *"abc")}
    with torch.no_grad():
        for name, model in made.items():
            if name != "base":
                model.load_state_dict(made["base"].state_dict())
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(0.05 * torch.rand_like(tensor) - 0.02)
    return made


def named(method: Method, models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The sources; a second one of a name is the same model again."""
    first, *rest = method.sources
    return {first: models[first], **{s + "'" * (s == first): models[s] for s in rest}}


def theirs(
    method: Method, models: dict[str, nn.Module], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """What mergekit makes of whole state dicts."""
    given = named(method, models)
    if method.their_base == "base":
        given = {"base": models["base"], **given}
    states = {name: model.state_dict() for name, model in given.items()}
    return merge_methods.merge_state_dicts(
        states, method.theirs, base=method.their_base, parameters=method.parameters, dtype=dtype
    )


def ours(method: Method, models: dict[str, nn.Module]) -> Plan:
    """The opened recipe of the same merge."""
    coefficients = method.coefficients
    recipe = Recipe(
        sources=named(method, models),
        base=models["base"] if method.base else None,
        operator=method.operator,
        preprocess=list(method.preprocess),
        init=Uniform() if coefficients is None else Constant(list(coefficients)),
    )
    return open_plan(recipe, with_skeleton=False)


def give_the_same_draws(
    monkeypatch: pytest.MonkeyPatch, names: list[str], sources: str, by_row: bool
) -> None:
    """mergekit draws as our steps do: by seed, tensor and source."""
    sites = iter([(name, source) for name in names for source in sources])

    def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
        name, source = next(sites)
        generator = Site(name, tuple(sources)).generator(SEED, source)
        if probabilities.dim() > 2:  # rows of a convolution run along its inputs
            moved = probabilities.movedim(1, -1) if by_row else probabilities
            draws = torch.rand(moved.shape, generator=generator)
            draws = draws.movedim(-1, 1) if by_row else draws
        else:
            draws = torch.rand(probabilities.shape, generator=generator)
        return (draws < probabilities).to(probabilities.dtype)

    monkeypatch.setattr(sparsify.torch, "bernoulli", bernoulli)


def apart(came: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in parts of the largest entry."""
    return float((came - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", METHODS)
def test_equal_to_mergekit(name, models, monkeypatch):
    method = METHODS[name]
    state = models["a"].state_dict()
    floating = [key for key, tensor in state.items() if tensor.is_floating_point()]
    by_row = method.theirs.startswith("della")
    give_the_same_draws(monkeypatch, floating, method.sources, by_row)
    expected = theirs(method, models)
    precise = theirs(method, models, torch.float64) if method.amplifies else {}
    plan = ours(method, models)
    raw = plan.initial_raw()
    # all parameters are compared (tied ones once); BatchNorm statistics have rules of their own
    assert set(plan.tensors) == {key for key, _ in models["a"].named_parameters()}
    for key in plan.tensors:
        came = FitState(plan, raw).materialise(key)
        assert came.dtype == torch.float32
        if by_row and came.dim() > 1 and came.shape[1] == 1:
            continue  # ranks in a row of one entry: mergekit divides by zero
        if method.exact:
            assert torch.equal(came, expected[key]), key
        bound = 1e-6
        if method.amplifies:
            # no worse than mergekit's own rounding, by its result in float64
            bound += 3 * apart(expected[key].double(), precise[key])
        assert apart(came, expected[key]) <= bound, key


@pytest.mark.parametrize("models", ["resnet"], indirect=True)
def test_statistics_by_the_mean_are_those_of_linear(models):
    recipe = Recipe(sources={s: models[s] for s in "abc"}, buffers="mean", init=Uniform())
    plan = open_plan(recipe)
    expected = merge_methods.merge_state_dicts(
        {s: models[s].state_dict() for s in "abc"}, "linear", parameters={"weight": 1.0}
    )
    floating = [name for name in plan.buffers if expected[name].is_floating_point()]
    assert floating
    for name in floating:
        torch.testing.assert_close(plan.buffer(name), expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("theirs", "density"), [("dare_linear", 0.3), ("dare_ties", 0.8)])
def test_random_drops_agree_in_distribution(theirs, density):
    """Of a direction of ones, each keeps a binomial share and scales it back to the same norm."""
    torch.manual_seed(0)
    size = 100_000
    base, source = torch.zeros(size), torch.ones(size)
    by_them = merge_methods.merge_state_dicts(
        {"base": {"w": base}, "a": {"w": source}},
        theirs,
        base="base",
        parameters={"weight": 1.0, "density": density},
    )["w"]
    by_us = RandomDrop(density, "l1")(source[None].clone(), Site("w", ("a",)))[0]
    deviation = (density * (1 - density) / size) ** 0.5
    for came in (by_them, by_us):
        assert abs(float((came != 0).double().mean()) - density) < 5 * deviation
        assert len(came.unique()) == 2
        torch.testing.assert_close(came.double().mean(), torch.tensor(1.0).double())
    # and neither follows the other
    both = float(((by_them != 0) & (by_us != 0)).double().mean())
    assert abs(both - density**2) < 5 * (density**2 * (1 - density**2) / size) ** 0.5
