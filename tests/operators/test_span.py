"""Operators beyond the linear one against their formulas, written out over whole vectors.

The oracles know one coefficient per source. A coefficient that belongs to some entries means the
merge of the whole tensor with it, read off at these entries, so every spread follows from that.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from test_operators import kernels  # noqa: F401
from torch.func import functional_call

from architectures import logits_of
from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import Constant, Tensor, Uniform
from gradmerge.common.errors import ConfigError
from gradmerge.common.spec import from_plain, to_plain
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.operators import (
    ArceeFusion,
    DisjointMean,
    Karcher,
    Linear,
    ModelStock,
    MultiSlerp,
    NearSwap,
    Slerp,
    Spread,
    Terms,
    chunks,
    span,
)
from gradmerge.preprocess import Trim
from gradmerge.sources import InMemory
from terms import expand, spread_of, widened

SPREADS = ["scalar", "first", "last", "partition", "element"]
SHAPES = [(4, 5), (2, 1, 2, 3), (8,)]


# ---- formulas -----------------------------------------------------------------------------------


def vectors(per, shape):
    """Return the dimensions along which a vector runs."""
    if per == "tensor" or len(shape) < 2:
        return tuple(range(len(shape)))
    return (len(shape) - 1,) if per == "row" else (0,)


def inner(a, b, dims):
    return (a * b).sum(dims, keepdim=True) if dims else a * b


def slerp(per="tensor", threshold=0.9995):
    def merge(b, c, origin):
        dims, t = vectors(per, b.shape[1:]), c[1] / (c[0] + c[1])
        lengths = [inner(x, x, dims).sqrt() for x in b]
        cosine = inner(b[0], b[1], dims) / (lengths[0] * lengths[1])
        angle = torch.acos(cosine)
        arc = (torch.sin((1 - t) * angle) * b[0] + torch.sin(t * angle) * b[1]) / angle.sin()
        return torch.where(cosine.abs() > threshold, (1 - t) * b[0] + t * b[1], arc)

    return merge


def multislerp(normalize=True):
    def merge(b, c, origin):
        a = c / c.sum() if normalize else c
        lengths = [x.norm() for x in b]
        units = [x / n for x, n in zip(b, lengths, strict=True)]
        mean = sum(w * u for w, u in zip(a, units, strict=True))
        mean = mean / mean.norm()
        tangents = [u - (u * mean).sum() * mean for u in units]
        walk = sum(w * t for w, t in zip(a, tangents, strict=True))
        far = torch.linalg.vector_norm(walk)
        end = mean * far.cos() + walk * torch.sinc(far / math.pi)
        return end * sum(w * n for w, n in zip(a, lengths, strict=True))

    return merge


def karcher(max_iter=10, tol=1e-5):
    def merge(b, c, origin):
        a, lengths = c / c.sum(), [x.norm() for x in b]
        units = [x / n for x, n in zip(b, lengths, strict=True)]
        mean = sum(w * u for w, u in zip(a, units, strict=True))
        mean = mean / mean.norm()
        for _ in range(max_iter):
            walk = torch.zeros_like(mean)
            for w, u in zip(a, units, strict=True):
                angle = (u * mean).sum().acos()
                walk = walk + w * angle / angle.sin() * (u - (u * mean).sum() * mean)
            if walk.norm() < tol:
                break
            mean = walk.norm().cos() * mean + walk.norm().sin() * walk / walk.norm()
            mean = mean / mean.norm()
        return mean * sum(w * n for w, n in zip(c, lengths, strict=True))

    return merge


def stock(per="tensor"):
    def merge(b, c, origin):
        dims, num = vectors(per, b.shape[1:]), len(b)
        pairs = [(i, j) for i in range(num) for j in range(i)]
        lengths = [inner(x, x, dims).sqrt() for x in b]
        cosines = [inner(b[i], b[j], dims) / (lengths[i] * lengths[j]) for i, j in pairs]
        cosine = sum(cosines) / len(cosines)
        ratio = num * cosine / (1 + (num - 1) * cosine)
        return ratio * sum(w * x for w, x in zip(c, b, strict=True))

    return merge


def disjoint(normalize=True, elect="sum", scale=1.0):
    def merge(b, c, origin):
        weighted = torch.stack([w * x for w, x in zip(c, b, strict=True)])
        votes = weighted.sum(0) if elect == "sum" else weighted.sign().sum(0)
        agree = torch.where(votes >= 0, weighted > 0, weighted < 0).double()
        total = (agree * weighted).sum(0)
        taking_part = sum(w * m for w, m in zip(c, agree, strict=True))
        return scale * total / torch.where(taking_part == 0, 1, taking_part if normalize else 1)

    return merge


def nearswap(b, c, origin):
    return sum(torch.where(x.abs() > w, w * x.sign(), x) for w, x in zip(c, b, strict=True))


def fusion(b, c, origin):
    total = torch.zeros_like(b[0])
    for w, x in zip(c, b, strict=True):
        p, q = ((y.softmax(-1) + 1e-8) for y in (origin + x, origin))
        importance = x.abs() * (p * (p.log() - q.log())).sum(-1, keepdim=True)
        ranked = importance.flatten().sort().values
        low, middle, high = (ranked[int(s * (len(ranked) - 1))] for s in (0.25, 0.5, 0.75))
        total = total + w * torch.where(importance >= middle + 1.5 * (high - low), x, 0)
    return total


@dataclass
class Case:
    operator: object
    formula: object
    origins: tuple[str, ...] = ("base", "zero", "mean", "directions", "directions alone")
    sources: int = 3


FROM_BASE = ("base", "directions")
NOT_MEAN = ("base", "zero", "directions", "directions alone")
CASES = {
    "slerp": Case(Slerp(), slerp(), NOT_MEAN, 2),
    "slerp row": Case(Slerp("row"), slerp("row"), NOT_MEAN, 2),
    "slerp column": Case(Slerp("column", 0.9), slerp("column", 0.9), NOT_MEAN, 2),
    "multislerp": Case(MultiSlerp(), multislerp()),
    "multislerp as given": Case(MultiSlerp(False), multislerp(False)),
    "karcher": Case(Karcher(), karcher()),
    "karcher 2 steps": Case(Karcher(2, 1e-9), karcher(2, 1e-9)),
    "stock": Case(ModelStock(), stock(), FROM_BASE),
    "stock row": Case(ModelStock("row"), stock("row"), FROM_BASE),
    "disjoint mean": Case(DisjointMean(), disjoint()),
    "disjoint count": Case(DisjointMean(True, "count", 0.7), disjoint(True, "count", 0.7)),
    "disjoint sum": Case(DisjointMean(False, scale=1.3), disjoint(False, scale=1.3)),
    "nearswap": Case(NearSwap(), nearswap, FROM_BASE),
    "fusion": Case(ArceeFusion(), fusion, FROM_BASE),
}


def make(case, shape, dtype, origin, kind, size=1.0):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base, taken_off = draw(*shape), origin.startswith("directions")
    common = draw(*shape)  # a shared part, so that angles are neither 0 nor 90 degrees
    directions = [size * (draw(*shape) + common) for _ in range(case.sources)]
    near = [(d if taken_off else base + d).to(dtype) for d in directions]
    anchor = base.to(dtype) if origin in FROM_BASE else None
    spread, slot = spread_of(kind, shape)
    coefficient = 0.2 + 0.7 * torch.rand(
        case.sources, *slot, generator=generator, dtype=torch.float64
    )
    if origin == "mean":
        coefficient[0] += 1  # equal ones nearly cancel, and a direction near zero has no digits
    return Terms(near, anchor, origin == "mean", taken_off), spread, coefficient, draw(*shape)


def exact(case, terms, spread, coefficient, grad):
    """Merged tensor and `dL/dc` by float64 autograd over the formula."""
    stacked, anchor = widened(terms)
    if not terms.directions:
        stacked = stacked - anchor
    shape, num = tuple(terms.shape), len(stacked)
    leaf = coefficient.double().requires_grad_()
    slots = leaf.view(num, -1)
    place = expand(torch.arange(slots.shape[1]).view(coefficient[:1].shape), spread, shape)[0]
    theta = anchor.clone()
    for slot in range(slots.shape[1]):
        merged = case.formula(stacked, slots[:, slot], anchor)
        theta = theta + torch.where(place == slot, merged, 0)
    (slope,) = torch.autograd.grad(theta, leaf, grad.double())
    return theta.detach(), slope


@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize("name", CASES)
def test_merge_and_gradient_equal_the_formula_in_float64(name, kind, monkeypatch):
    monkeypatch.setattr(chunks, "_CPU_CHUNK", 12)  # so that small tensors have several blocks
    case, largest = CASES[name], 0.0
    for origin in case.origins:
        for shape in SHAPES:
            terms, spread, coefficient, grad = make(case, shape, torch.float64, origin, kind)
            theta, slope = exact(case, terms, spread, coefficient, grad)
            out = torch.empty(shape, dtype=torch.float64)
            assert case.operator.combine(terms, coefficient, spread, out) is out
            torch.testing.assert_close(out, theta, rtol=1e-9, atol=1e-9)
            got = case.operator.contract(terms, grad, coefficient, spread)
            assert got.shape == coefficient.shape
            torch.testing.assert_close(got, slope, rtol=1e-9, atol=1e-9)
            largest = max(largest, float(slope.abs().max()))
    assert largest > 0.1, "nothing was tested"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["scalar", "first", "last"])
@pytest.mark.parametrize("name", CASES)
def test_stored_types_and_kernels(kernels, name, kind, dtype):  # noqa: F811
    """Float32 results of several blocks, by either implementation of the linear part."""
    case = CASES[name]
    terms, spread, coefficient, grad = make(case, (40, 33), dtype, case.origins[0], kind, 0.1)
    theta, slope = exact(case, terms, spread, coefficient, grad)
    out = case.operator.combine(terms, coefficient.float(), spread, torch.empty(40, 33))
    torch.testing.assert_close(out.double(), theta, rtol=1e-6, atol=2e-6)
    got = case.operator.contract(terms, grad.float(), coefficient.float(), spread)
    assert got.dtype == torch.float32
    # a slope is a sum of products of the gradient, whose sizes are about 1, and directions
    bound = 1e-6 * (terms.shape.numel() if kind == "scalar" else 40)
    torch.testing.assert_close(got.double(), slope, rtol=1e-5, atol=bound)


def test_several_blocks_of_a_large_tensor():
    for name in ("slerp", "slerp row", "slerp column", "karcher", "disjoint mean"):
        case = CASES[name]
        terms, spread, coefficient, grad = make(
            case, (260, 700), torch.float32, "base", "scalar", 0.1
        )
        theta, slope = exact(case, terms, spread, coefficient, grad)
        out = case.operator.combine(terms, coefficient, spread, torch.empty(260, 700))
        torch.testing.assert_close(out.double(), theta, rtol=1e-6, atol=2e-6)
        got = case.operator.contract(terms, grad.float(), coefficient, spread)
        torch.testing.assert_close(got, slope, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_scalars_and_empty_tensors(name):
    case = CASES[name]
    for origin in case.origins:
        terms, spread, coefficient, grad = make(case, (), torch.float64, origin, "scalar")
        out = case.operator.combine(
            terms, coefficient, spread, torch.empty((), dtype=torch.float64)
        )
        assert out.isfinite()
        assert case.operator.contract(terms, grad, coefficient, spread).isfinite().all()
    empty = Terms([torch.empty(0, 3)] * case.sources, torch.empty(0, 3))
    coefficient = torch.ones(case.sources)
    out = case.operator.combine(empty, coefficient, Spread("scalar"), torch.empty(0, 3))
    assert out.shape == (0, 3)
    got = case.operator.contract(empty, torch.empty(0, 3), coefficient, Spread("scalar"))
    assert torch.equal(got, torch.zeros(case.sources))


# ---- closed forms and edges ---------------------------------------------------------------------


def merged(operator, sources, coefficient, base=None):
    sources = [torch.as_tensor(source, dtype=torch.float64) for source in sources]
    terms = Terms(sources, None if base is None else torch.as_tensor(base, dtype=torch.float64))
    coefficient = torch.tensor(coefficient, dtype=torch.float64)
    out = operator.combine(terms, coefficient, Spread("scalar"), torch.empty_like(sources[0]))
    grad = operator.contract(terms, torch.ones_like(out), coefficient, Spread("scalar"))
    assert grad.isfinite().all()
    return out


def close(got, *expected):
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_means_on_the_sphere_in_closed_form():
    x, y, z = [2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0]
    close(merged(Slerp(), [x, y], [2.0, 1.0]), 3**0.5, 1, 0)  # 30 of 90 degrees
    close(merged(Slerp(), [x, y], [1.0, 0.0]), 2, 0, 0)
    close(
        merged(Slerp(threshold=0.8), [[1.0, 2, 2], [2.0, 3, 2]], [1, 3], [1.0, 2, 0]), 1.75, 2.75, 2
    )
    for operator in (MultiSlerp(), Karcher()):
        close(merged(operator, [x, y, z], [1 / 3] * 3), *[2 / 3**0.5] * 3)
        close(merged(operator, [x, [0, 6.0, 0]], [0.5, 0.5]), 8**0.5, 8**0.5, 0)
        close(merged(operator, [[1.0, 2, 3]], [1.0], [1.0, 0, 0]), 1, 2, 3)
    # a third of the way, not a third of the chord
    close(merged(Karcher(50, 1e-12), [x, y], [2 / 3, 1 / 3]), 3**0.5, 1, 0)


def test_the_model_stock_in_closed_form():
    base = [1.0, 1.0, 1.0]
    orthogonal = [[2.0, 1, 1], [1.0, 2, 1]]
    close(merged(ModelStock(), orthogonal, [0.5, 0.5], base), *base)
    close(merged(ModelStock(), [[2.0, 1, 1]] * 2, [0.5, 0.5], base), 2, 1, 1)
    # 60 degrees: t = 2 cos / (1 + cos) = 2 / 3
    pair = [[2.0, 1, 1], [1.5, 1 + 0.75**0.5, 1]]
    close(merged(ModelStock(), pair, [0.5, 0.5], base), 1.5, 1 + 0.75**0.5 / 3, 1)
    # opposite: no estimate
    close(merged(ModelStock(), [[2.0, 1, 1], [0.0, 1, 1]], [0.5, 0.5], base), *base)


@pytest.mark.parametrize("name", CASES)
def test_sources_that_equal_the_base_leave_it(name):
    case, base = CASES[name], torch.randn(4, 5, dtype=torch.float64)
    out = merged(case.operator, [base] * case.sources, [0.4] * case.sources, base)
    torch.testing.assert_close(out, base, rtol=0, atol=1e-15)


def test_parallel_opposite_and_missing_directions():
    x = torch.tensor([1.0, 2.0, 2.0])
    close(merged(Slerp(), [x, 3 * x], [0.5, 0.5]), 2, 4, 4)
    close(merged(Slerp(), [x, -x], [0.75, 0.25]), 0.5, 1, 1)
    close(merged(Slerp("row"), [x[None], -x[None]], [0.75, 0.25]), [0.5, 1, 1])
    for operator in (MultiSlerp(), Karcher()):
        close(merged(operator, [x, 3 * x], [0.5, 0.5]), 2, 4, 4)
        # lengths are averaged, and vectors of length 0 have no direction
        close(merged(operator, [x, 0 * x], [0.5, 0.5]), 0.5, 1, 1)
    close(merged(MultiSlerp(), [x, -x], [0.5, 0.5]), 0, 0, 0)
    close(merged(Karcher(), [x, -x], [0.5, 0.5]), 1, 2, 2)  # the first is where it starts
    # coefficients that cannot be normalised count as equal
    close(merged(Slerp(), [x, 3 * x], [0.5, -0.5]), 2, 4, 4)


def test_disjoint_mean_by_hand():
    sources = [[3.0, -1, 0, 1, -2], [-1.0, -1, 0, -1, 1.5], [-1.0, 5, 2, 0, 0.1]]
    ones = [1.0, 1, 1]
    close(merged(DisjointMean(), sources, ones), 3, 5, 2, 1, -2)
    close(merged(DisjointMean(elect="count"), sources, ones), -1, -1, 2, 1, 0.8)
    close(merged(DisjointMean(False), sources, [1.0, 2.0, 0.5]), 3, -3, 1, -2, 3.05)
    # coefficients of the agreeing ones that cancel divide by one
    close(merged(DisjointMean(), [[1.0], [-1.0]], [0.5, -0.5]), 1)


def test_nearswap_by_hand_and_negative_thresholds():
    source, base = [1.5, 0.9, 1.0, -2.0], [1.0] * 4
    close(merged(NearSwap(), [source], [0.2], base), 1.2, 0.9, 1, 0.8)
    close(merged(NearSwap(), [source], [-0.2], base), *base)
    close(merged(NearSwap(), [source, source], [0.2, 9.0], base), 1.7, 0.8, 1, -2.2)


def test_gram_matrices_of_frozen_tensors_are_computed_once(monkeypatch):
    calls = []
    original = span._gram
    monkeypatch.setattr(span, "_gram", lambda *args: calls.append(1) or original(*args))
    terms, spread, coefficient, grad = make(
        CASES["karcher"], (5, 7), torch.float32, "base", "first"
    )
    for _ in range(2):
        Karcher().combine(terms, coefficient, spread, torch.empty(5, 7))
        Karcher().contract(terms, grad, coefficient, spread)
    assert len(calls) == 1


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_says_which_operator_it_was(name):
    operator = CASES[name].operator
    assert from_plain(to_plain(operator)) == operator


# ---- refusals -----------------------------------------------------------------------------------


def test_an_election_of_directions_from_the_mean_is_warned_of():
    """They sum to zero: with equal coefficients, rounding would elect the signs."""
    two = {name: InMemory(torch.nn.Linear(4, 2)) for name in "ab"}
    with pytest.warns(UserWarning, match="rounding elects the sign of every entry that all"):
        Recipe(sources=two, origin="mean", operator=DisjointMean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Recipe(sources=two, origin="mean", operator=DisjointMean(elect="count"))
        Recipe(sources=two, origin="zero", operator=DisjointMean())


def test_merges_that_cannot_be_expressed_are_refused():
    base, *models = (torch.nn.Linear(4, 2) for _ in range(4))
    sources = {f"m{i}": InMemory(model) for i, model in enumerate(models)}
    two = dict(list(sources.items())[:2])
    with pytest.raises(ConfigError, match="Slerp: expected two sources, got 3; MultiSlerp"):
        Recipe(sources=sources, operator=Slerp())
    with pytest.raises(ConfigError, match="two directions are opposite"):
        Recipe(sources=two, origin="mean", operator=Slerp())
    for operator in (ModelStock(), NearSwap(), ArceeFusion()):
        with pytest.raises(ConfigError, match=rf"{type(operator).__name__}: expected .* a base"):
            Recipe(sources=two, operator=operator)
    with pytest.raises(ConfigError, match=r"ModelStock: expected two sources or more.*got 1"):
        Recipe(sources={"m": models[0]}, base=base, operator=ModelStock())
    with pytest.raises(ConfigError, match=r"threshold: expected a number in \[0, 1\), got 1"):
        Slerp(threshold=1)
    with pytest.raises(ConfigError, match="max_iter: expected at least 0, got -1"):
        Karcher(max_iter=-1)
    with pytest.raises(ConfigError, match=r"tol: expected a number in \(0, 1\), got 0"):
        Karcher(tol=0)
    for operator in (MultiSlerp(), Karcher()):
        with pytest.raises(ConfigError, match="coefficients sum to zero"):
            merged(operator, [[1.0, 0], [0, 1.0]], [0.5, -0.5])
    balanced = [[1.0, 0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]]
    with pytest.raises(ConfigError, match="weighted directions cancel out"):
        merged(MultiSlerp(), balanced, [1 / 3] * 3)


class Constants(Linear):
    """An operator without a gradient."""

    differentiable = False


def test_nothing_is_learned_through_an_operator_without_gradient():
    base, a = (torch.nn.Linear(4, 2) for _ in range(2))
    recipe = Recipe(sources={"a": a}, base=base, operator=Constants(), init=Constant(1.0))
    plan = open_plan(recipe)
    assert torch.equal(FitState.start(plan).materialise("weight"), a.weight)
    with pytest.raises(
        ConfigError, match=r"differentiable .*, got Constants, .*\n.*gradmerge merge"
    ):
        MergedModel(recipe)


# ---- whole networks -----------------------------------------------------------------------------

WHOLE = ["slerp", "slerp row", "multislerp", "karcher", "stock", "disjoint mean", "nearswap"]


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("name", [*WHOLE, "fusion"])
def test_a_network_learns_through_it(family, name, memory):
    case = CASES[name]
    models, inputs = family("llama-tied", case.sources + 1)
    sources = {f"m{i}": model for i, model in enumerate(models[1:])}
    value = 0.03 if name == "nearswap" else 0.4
    recipe = Recipe(
        sources=sources,
        base=models[0],
        operator=case.operator,
        coefficients=Tensor(),
        init=Constant(value),
    )
    merged = MergedModel(recipe, memory=memory, dtype=torch.float64)
    loss = logits_of(merged(**inputs)).square().mean()
    loss.backward()
    base = dict(models[0].named_parameters())
    named = [dict(model.named_parameters()) for model in models[1:]]
    leaf = merged.raw["tensor"].detach().clone().requires_grad_()
    thetas = {}
    for i, key in enumerate(merged.plan.tensors):
        anchor = base[key].detach()
        directions = torch.stack([tensors[key].detach() - anchor for tensors in named])
        thetas[key] = anchor + case.formula(directions, leaf[:, i], anchor)
    # every tensor has a nonzero direction
    expected = logits_of(functional_call(models[0], thetas, (), inputs)).square().mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(merged.raw["tensor"].grad, leaf.grad, rtol=1e-8, atol=1e-12)
    assert leaf.grad.abs().max() > 1e-6


def test_a_frozen_origin_is_the_origin_under_every_operator(family):
    models, _ = family("llama", 3, torch.float32)
    for operator in (Slerp(), MultiSlerp(), Karcher(), ModelStock(), DisjointMean()):
        recipe = Recipe(
            sources={"a": models[1], "b": models[2]},
            base=models[0],
            operator=operator,
            frozen={"embed": "origin"},
            init=Uniform(),
        )
        plan = open_plan(recipe, with_skeleton=False)
        name = "model.embed_tokens.weight"
        assert torch.equal(FitState.start(plan).materialise(name), models[0].state_dict()[name])


def test_ties_is_trim_and_disjoint_mean(family):
    models, _ = family("gpt2", 4, torch.float32)
    recipe = Recipe(
        sources={f"m{i}": model for i, model in enumerate(models[1:])},
        base=models[0],
        preprocess=[Trim(0.3)],
        operator=DisjointMean(),
        init=Uniform(),
    )
    plan = open_plan(recipe, with_skeleton=False)
    for name in plan.tensors:
        base = models[0].state_dict()[name]
        kept = []
        for model in models[1:]:
            direction = model.state_dict()[name] - base
            count = max(1, int(0.3 * base.numel()))
            bound = direction.abs().flatten().topk(count).values[-1]
            kept.append(torch.where(direction.abs() >= bound, direction, 0).double())
        formula = base.double() + disjoint()(torch.stack(kept), torch.full((3,), 1 / 3).double(), 0)
        got = FitState.start(plan).materialise(name)
        torch.testing.assert_close(got.double(), formula, rtol=1e-6, atol=1e-7)
