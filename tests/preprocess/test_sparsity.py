"""Directions that are never stored: kernels against torch operations, which sort and count."""

from __future__ import annotations

import pytest
import torch

from gradmerge import Recipe
from gradmerge.coefficients import Constant
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.operators import DisjointMean, Linear, MaskedDirections, Spread, Terms, masked
from gradmerge.operators._native import native_kernels
from gradmerge.preprocess import Breadcrumbs, MagnitudeDrop, RandomDrop, Site, Trim

STEPS = {
    "trim": [Trim(0.3)],
    "trim, rescaled": [Trim(0.3, rescale="l1")],
    "trim to nothing": [Trim(0.0)],
    "breadcrumbs": [Breadcrumbs(0.6, 0.1)],
    "drop": [RandomDrop(0.4)],
    "drop, L1": [RandomDrop(0.4, "l1")],
    "by rank in its row": [MagnitudeDrop(0.5, 0.2, "none")],
    "by rank in its row, L1": [MagnitudeDrop([0.5, 1.0], 0.2, "l1")],
    "drop, then trim": [RandomDrop(0.5), Trim(0.9), Breadcrumbs(0.8, 0.05)],
}


@pytest.fixture(params=["torch", "native"])
def kernels(request, monkeypatch):
    if request.param == "native" and native_kernels() is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("GRADMERGE_KERNELS", request.param)
    return request.param


def drawn(shape, dtype, seed=0, coarse=False):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return ((values * 4).round() / 4 if coarse else values).to(dtype)


def selected(steps, sources, origin, site):
    directions = MaskedDirections(sources, origin)
    for step in steps:
        step.survey(list).select(directions, site)
    return directions


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("coarse", [True, False], ids=["equals", "distinct"])
def test_kernels_select_what_torch_does(monkeypatch, steps, dtype, based, coarse):
    monkeypatch.setattr(masked, "_FEW", 0)
    shape, site = (37, 91), Site("x", ("a", "b"))
    sources = [drawn(shape, dtype, seed, coarse) for seed in (1, 2)]
    origin = drawn(shape, dtype, 3, coarse) if based else None
    found = {}
    for choice in ("torch", "auto"):
        monkeypatch.setenv("GRADMERGE_KERNELS", choice)
        directions = selected(steps, sources, origin, site)
        found[choice] = [directions.direction(k) for k in range(2)]
    for plain, got in zip(found["torch"], found["auto"], strict=True):
        assert torch.equal(plain != 0, got != 0)
        torch.testing.assert_close(got, plain, rtol=1e-6, atol=0)


def test_ranks_in_rows_of_a_convolution_run_along_the_inputs(kernels):
    weight, site = drawn((8, 300, 3, 3), torch.float32), Site("x", ("a",))
    step = MagnitudeDrop(0.5, 0.45, "none", seed=4)
    got = selected([step], [weight], None, site).direction(0).view(weight.shape)
    rows = weight.movedim(1, -1)
    flat = selected([step], [rows.reshape(-1, 300)], None, site).direction(0)
    assert torch.equal(got.movedim(1, -1).reshape(-1), flat)
    kept = (flat != 0).view(-1, 300).gather(1, rows.reshape(-1, 300).abs().argsort(dim=1)).float()
    assert kept[:, :60].mean() < 0.2
    assert kept[:, -60:].mean() > 0.8


def test_convolutions_of_several_sources_do_not_wait_for_each_other():
    """Each source runs in a thread of the pool and must not wait for other threads of it."""
    site, steps = Site("x", ("a", "b", "c")), [MagnitudeDrop(0.5, 0.2, "l1")]
    sources = [drawn((64, 512, 3, 3), torch.float32, seed) for seed in (1, 2, 3)]
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[threads] = selected(steps, sources, None, site)
    finally:
        torch.set_num_threads(before)
    for k in range(3):
        torch.testing.assert_close(found[1].direction(k), found[2].direction(k))


@pytest.mark.parametrize("coarse", [True, False], ids=["equals", "distinct"])
def test_threads_count_equals_on(monkeypatch, coarse):
    source, site = drawn(700_001, torch.float32, 1, coarse), Site("x", ("a",))
    found = {}
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            directions = selected([Breadcrumbs(0.55, 0.07, "l1")], [source], None, site)
            found[threads] = directions.direction(0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[1] != 0, found[3] != 0)
    assert int((found[1] != 0).sum()) <= int(0.55 * 700_001)
    torch.testing.assert_close(found[1], found[3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["scalar", "axis", "partition", "element"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("based", [True, False])
def test_a_merge_of_selected_directions(kernels, kind, out_dtype, based):
    shape, site = (23, 45), Site("x", ("a", "b", "c"))
    sources = [drawn(shape, torch.bfloat16, seed) for seed in (1, 2, 3)]
    origin = drawn(shape, torch.bfloat16, 4) if based else None
    directions = selected(STEPS["drop, L1"], sources, origin, site)
    terms = Terms(sources, origin, masks=directions.masks, factors=directions.factors)
    parts = torch.randint(5, (23 * 45,), generator=torch.Generator().manual_seed(0))
    spread = Spread(kind, 1, parts if kind == "partition" else None)
    slots = {"scalar": (), "axis": (45,), "partition": (5,), "element": shape}[kind]
    coefficient = drawn((3, *slots), torch.float32, 5)
    got = Linear().combine(terms, coefficient, spread, torch.empty(shape, dtype=out_dtype))
    dense = torch.stack([directions.direction(k) for k in range(3)]).double().view(3, *shape)
    spread_out = {
        "scalar": lambda: coefficient.view(3, 1, 1),
        "axis": lambda: coefficient.view(3, 1, 45),
        "partition": lambda: coefficient[:, parts].view(3, *shape),
        "element": lambda: coefficient,
    }[kind]().double()
    expected = (spread_out * dense).sum(dim=0) + (0 if origin is None else origin.double())
    tolerance = 1e-6 if out_dtype == torch.float32 else 2**-8
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=2e-6)
    grad = drawn(shape, torch.float32, 6)
    if kind == "element":
        wanted = grad.double() * dense
    elif kind == "axis":
        wanted = (grad.double() * dense).sum(dim=1)
    elif kind == "scalar":
        wanted = (grad.double() * dense).sum(dim=(1, 2))
    else:
        products = (grad.double() * dense).view(3, -1)
        wanted = torch.zeros(3, 5, dtype=torch.float64).index_add_(1, parts, products)
    contracted = Linear().contract(terms, grad, coefficient, spread).double()
    torch.testing.assert_close(contracted, wanted, rtol=1e-5, atol=1e-4)


def test_a_static_merge_of_selections_stores_no_directions(monkeypatch):
    """The directions themselves are never read."""
    layers = [torch.nn.Linear(30, 40) for _ in range(3)]
    recipe = Recipe(
        {"a": layers[1], "b": layers[2]}, base=layers[0], preprocess=[Trim(0.5)], init=Constant(1.0)
    )
    plan = open_plan(recipe, with_skeleton=False)

    def refuse(name):
        raise AssertionError(f"directions of {name} were stored")

    monkeypatch.setattr(plan, "direction", refuse)
    got = FitState.start(plan).materialise("weight")
    base, *sources = (layer.weight.detach() for layer in layers)
    deltas = [source - base for source in sources]
    kept = [d * (d.abs() >= d.abs().flatten().sort().values[600]) for d in deltas]
    torch.testing.assert_close(got, base + kept[0] + kept[1])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("kind", ["scalar", "axis", "partition", "element"])
@pytest.mark.parametrize("based", [True, False])
def test_the_kernel_of_the_disjoint_mean(monkeypatch, normalize, elect, kind, based):
    """Kernels and torch's operations give the same float32 numbers, up to rounding."""
    shape, site = (23, 45), Site("x", ("a", "b", "c"))
    sources = [drawn(shape, torch.bfloat16, seed) for seed in (1, 2, 3)]
    origin = drawn(shape, torch.bfloat16, 4) if based else None
    directions = selected([Trim(0.6), RandomDrop(0.7)], sources, origin, site)
    masked = Terms(sources, origin, masks=directions.masks, factors=directions.factors)
    parts = torch.randint(5, (23 * 45,), generator=torch.Generator().manual_seed(0))
    spread = Spread(kind, 1, parts if kind == "partition" else None)
    slots = {"scalar": (), "axis": (45,), "partition": (5,), "element": shape}[kind]
    coefficient = drawn((3, *slots), torch.float32, 5).abs()
    operator = DisjointMean(normalize, elect, scale=0.7)
    found = {}
    for choice in ("torch", "auto"):
        monkeypatch.setenv("GRADMERGE_KERNELS", choice)
        for name, terms in (("masked", masked), ("dense", masked.dense())):
            out = torch.empty(shape)
            found[choice, name] = operator.combine(terms, coefficient, spread, out)
    for got in found.values():
        torch.testing.assert_close(got, found["torch", "dense"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [Trim(0.5), RandomDrop(0.5), MagnitudeDrop(0.5, 0.2, "l1")])
def test_selections_do_not_depend_on_modes_and_defaults(kernels, step):
    """A trainer evaluates in inference mode, and the default dtype may differ."""
    layers = [torch.nn.Conv2d(5, 40, 3) for _ in range(3)]
    recipe = Recipe({"a": layers[1], "b": layers[2]}, base=layers[0], preprocess=[step, Trim(0.9)])

    def merged():
        plan = open_plan(recipe, with_skeleton=False)
        return FitState.start(plan).materialise("weight")

    expected = merged()
    with torch.inference_mode():
        assert torch.equal(merged(), expected)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(merged(), expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_nan_propagates_to_the_merge(kernels):
    shape = (30, 40)
    sources = [drawn(shape, torch.float32, seed) for seed in (1, 2)]
    sources[0][3, 4] = float("nan")
    directions = selected([Trim(0.5)], sources, None, Site("x", ("a", "b")))
    terms = Terms(sources, None, masks=directions.masks, factors=directions.factors)
    for operator in (Linear(), DisjointMean()):
        out = torch.empty(shape)
        got = operator.combine(terms, torch.ones(2), Spread("scalar"), out)
        assert got.isnan().nonzero().tolist() == [[3, 4]]


def test_nothing_is_left_at_density_0(kernels):
    layers = [torch.nn.Linear(30, 40) for _ in range(3)]
    for scope in ("tensor", "model"):
        recipe = Recipe(
            {"a": layers[1], "b": layers[2]},
            base=layers[0],
            preprocess=[Trim([0.0, 0.5], scope)],
            init=Constant([1.0, 0.0]),
        )
        plan = open_plan(recipe, with_skeleton=False)
        got = FitState.start(plan).materialise("weight")
        assert torch.equal(got, layers[0].weight), scope


def test_a_tensor_frozen_at_the_origin_needs_no_settings():
    layers = [torch.nn.Linear(30, 40) for _ in range(2)]
    recipe = Recipe(
        {"a": layers[1]},
        base=layers[0],
        preprocess=[Trim({"weight": 0.5})],
        frozen={"bias": "origin"},
        init=Constant(1.0),
    )
    plan = open_plan(recipe, with_skeleton=False)
    assert torch.equal(FitState.start(plan).materialise("bias"), layers[0].bias)
