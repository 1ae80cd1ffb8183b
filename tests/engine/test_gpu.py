"""Gradients and kernels on a CUDA device; skipped where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from architectures import logits_of
from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import (
    Column,
    Component,
    Constant,
    Element,
    HardMask,
    LeadingComponents,
    Partition,
    Tensor,
)
from gradmerge.common.memory import PageLocked
from gradmerge.engine.placement import PLACES, Item, Items, Transfers
from gradmerge.operators import (
    ArceeFusion,
    Components,
    DisjointMean,
    Karcher,
    Linear,
    ModelStock,
    MultiSlerp,
    NearSwap,
    Slerp,
    Spread,
    Terms,
    backends,
    chunks,
)
from gradmerge.training.placing import place
from terms import SPREADS, exact, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("place", [None, *PLACES])
@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize(
    "granularity", [Tensor(), Column(), Partition(3), Element()], ids=lambda g: type(g).__name__
)
def test_gradients_on_a_gpu_equal_those_on_the_cpu(family, granularity, memory, place):
    models, inputs = family("llama-tied")
    recipe = Recipe(
        sources={"a": models[1], "b": models[2]}, base=models[0], coefficients=granularity
    )
    grads = []
    for device in ("cpu", "cuda"):
        merged = MergedModel(recipe, memory=memory, dtype=torch.float64).to(device)
        if device == "cuda" and place:
            merged.plan.place(dict.fromkeys(merged.plan.owners, place), merged.device)
        moved = {key: value.to(device) for key, value in inputs.items()}
        for _ in range(3):  # what comes next is known from the second step on
            merged.zero_grad()
            loss, _ = merged.accumulate(
                [lambda m=merged, x=moved: logits_of(m(**x)).log_softmax(-1)[..., 0].mean()]
            )
            loss.backward()
        grads.append({key: raw.grad.cpu() for key, raw in merged.raw.items()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("place", ["mapped", "device"])
@pytest.mark.parametrize("granularity", [Tensor(), Element()], ids=lambda g: type(g).__name__)
@pytest.mark.parametrize(
    "operator",
    [
        Slerp(),
        Slerp("column"),
        MultiSlerp(),
        Karcher(),
        ModelStock("row"),
        DisjointMean(),
        NearSwap(),
        ArceeFusion(),
    ],
    ids=lambda operator: type(operator).__name__,
)
def test_operators_on_a_gpu_equal_those_on_the_cpu(family, operator, granularity, place):
    models, inputs = family("llama-tied")
    recipe = Recipe(
        sources={"a": models[1], "b": models[2]},
        base=models[0],
        coefficients=granularity,
        operator=operator,
        init=Constant(0.02 if isinstance(operator, NearSwap) else [0.3, 0.4]),
    )
    grads = []
    for device in ("cpu", "cuda"):
        merged = MergedModel(recipe, dtype=torch.float64).to(device)
        if device == "cuda" and place:
            merged.plan.place(dict.fromkeys(merged.plan.owners, place), merged.device)
        moved = {key: value.to(device) for key, value in inputs.items()}
        logits_of(merged(**moved)).log_softmax(-1)[..., 0].mean().backward()
        grads.append({key: raw.grad.cpu() for key, raw in merged.raw.items()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("place", ["mapped", "device"])
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_components_on_a_gpu_equal_those_on_the_cpu(family, memory, place):
    models, inputs = family("llama-tied")
    recipe = Recipe(
        sources={"a": models[1], "b": models[2]},
        base=models[0],
        coefficients=HardMask(Component()),
        operator=Components(0.3),
        init=LeadingComponents(0.5),
    )
    grads = []
    for device in ("cpu", "cuda"):
        merged = MergedModel(recipe, memory=memory, dtype=torch.float64).to(device)
        if device == "cuda" and place:
            merged.plan.place(dict.fromkeys(merged.plan.owners, place), merged.device)
        moved = {key: value.to(device) for key, value in inputs.items()}
        logits_of(merged(**moved)).log_softmax(-1)[..., 0].mean().backward()
        grads.append({key: raw.grad.cpu() for key, raw in merged.raw.items()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-8, atol=1e-11)


# ---- the Triton kernels -------------------------------------------------------------------------


def moved(terms: Terms, spread: Spread) -> tuple[Terms, Spread]:
    """The same terms on the device."""
    origin = None if terms.origin is None else terms.origin.cuda()
    parts = None if spread.parts is None else spread.parts.cuda()
    sources = [source.cuda() for source in terms.sources]
    return replace(terms, sources=sources, origin=origin), replace(spread, parts=parts)


@pytest.fixture(params=["triton", "torch"])
def kernels(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("GRADMERGE_KERNELS", request.param)
    found = backends.backend_for([torch.ones(1, device="cuda")])
    assert (found is chunks) == (request.param == "torch")
    return request.param


@pytest.mark.parametrize("origin", ["base", "zero", "mean", "directions", "directions alone"])
@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize(
    ("shape", "sources", "dtype"),
    [
        ((37,), 1, torch.float32),
        ((5, 9, 3, 3), 2, torch.float16),
        ((130, 2100), 5, torch.bfloat16),
        ((2048, 512), 9, torch.bfloat16),
    ],
    ids=str,
)
def test_merge_and_contraction_equal_float64(kernels, shape, sources, dtype, kind, origin):
    terms, spread, coefficient, grad = make(shape, dtype, origin, kind, sources)
    grad = grad.to(dtype)
    theta, dc, bound = exact(terms, spread, coefficient, grad)
    on_device, placed = moved(terms, spread)
    own, slope = coefficient.cuda(), grad.cuda()
    out = Linear().combine(on_device, own, placed, torch.empty(shape, device="cuda"))
    torch.testing.assert_close(out.cpu().double(), theta, rtol=1e-6, atol=4e-6)
    got = Linear().contract(on_device, slope, own, placed)
    if origin == "mean":
        bound += bound.max()
    assert ((got.cpu().double() - dc).abs() <= 1e-6 * bound).all()
    narrow = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    Linear().combine(on_device, own, placed, narrow)
    # rounded once, from a float32 sum: at most one unit in the last place where that is a tie
    limit = 0.51 * torch.finfo(torch.bfloat16).eps * theta.abs() + 4e-6
    assert ((narrow.cpu().double() - theta).abs() <= limit).all()


@pytest.mark.parametrize("kind", SPREADS)
def test_steps_do_not_wait_for_the_device_and_are_reproducible(kernels, kind):
    terms, spread, coefficient, grad = make((1000, 700), torch.bfloat16, "base", kind)
    terms, spread = moved(terms, spread)
    coefficient, grad = coefficient.cuda(), grad.cuda()
    out = torch.empty(1000, 700, device="cuda", dtype=torch.bfloat16)
    merges, sums = [], []
    for mode in ("default", "error", "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            merges.append(Linear().combine(terms, coefficient, spread, out).clone())
            sums.append(Linear().contract(terms, grad, coefficient, spread))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(merges[0], other) for other in merges[1:])
    if (kernels, kind) != ("torch", "partition"):  # torch adds to parts in any order
        assert all(torch.equal(sums[0], other) for other in sums[1:])


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_tensors_of_more_than_two_billion_entries(kernels):
    """Offsets beyond 32 bits."""
    size = (1 << 31) + 4099
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of device memory")
    source = torch.full((size,), 2.0, dtype=torch.bfloat16, device="cuda")
    terms, spread = Terms([source], torch.zeros_like(source)), Spread("scalar")
    half = torch.full((1,), 0.5, device="cuda")
    out = Linear().combine(terms, half, spread, torch.zeros_like(source))
    assert bool((out == 1).all())
    # every sum of a tile is exact in float32, and their sum in float64
    assert Linear().contract(terms, out, half.double(), spread).item() == 2 * size


# ---- places of sources --------------------------------------------------------------------------


def test_what_is_sent_ahead_is_what_was_page_locked():
    """Copies that are reused and overwritten on another stream must not reach their users."""
    device = torch.device("cuda", torch.cuda.current_device())
    memory, transfers = PageLocked(), Transfers(device, streams=True)
    tokens = [Items((Item("a", str(i)),)) for i in range(6)]
    pinned = {item: memory.copy(torch.full((1 << 20,), float(item.tensor))) for (item,) in tokens}
    assert all(tensor.is_pinned() for tensor in pinned.values())
    busy, totals = torch.randn(2048, 2048, device=device), []
    for turn in range(30):
        copy = transfers.take(tokens[turn % 6]).get(tokens[turn % 6].each[0])
        transfers.expect([tokens[(turn + 1) % 6], tokens[(turn + 2) % 6]], pinned)
        busy = (busy @ busy).clamp(-1, 1)  # the device is behind the host
        totals.append(None if copy is None else copy.sum())
    transfers.end()
    found = [None if total is None else total.item() for total in totals]
    assert found[0] is None
    assert found[1:] == [float(turn % 6) * (1 << 20) for turn in range(1, 30)]


def test_a_fit_chooses_the_device_and_frees_it(family):
    models, _ = family("llama-tied")
    merged = MergedModel(Recipe(dict(zip("ab", models[1:3], strict=True)), models[0])).cuda()
    before = torch.cuda.memory_allocated()
    place(merged.plan, "auto", merged.device)
    assert torch.cuda.memory_allocated() - before >= sum(merged.plan.sizes()[0].values())
    merged.plan.unload()
    assert torch.cuda.memory_allocated() == before
