"""The Triton kernels, in Triton's interpreter and compiled without a GPU; no waiting for a device.

On a GPU `tests/engine/test_gpu.py` runs them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from architectures import logits_of
from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import Chunks, Column, Element, Partition, Sigmoid, Tensor
from gradmerge.common.errors import ConfigError
from gradmerge.engine import contraction
from gradmerge.engine.opening import open_plan
from gradmerge.operators import Linear, Spread, Terms, backends, chunks
from terms import SPREADS, exact, make, require_exact
from tiny import build, recipe_of, relatives

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
SHAPES = {(37,): 1, (5, 9, 3): 2, (37, 70): 5}  # and the number of sources
FORMATS = [torch.bfloat16, torch.float32, torch.float16]


@pytest.fixture
def triton(monkeypatch):
    """The Triton kernels on a CPU, with tiles of 1,024 entries, so that small tensors have many."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the GPU here; tests/engine/test_gpu.py runs its kernels")
    from gradmerge.operators._triton import launch

    monkeypatch.setenv("GRADMERGE_KERNELS", "triton")
    monkeypatch.setattr(launch, "TILE", 1024)
    return launch


def mixed(terms: Terms) -> Terms:
    """The same terms, each in another dtype than the one before it."""
    sources = [source.to(FORMATS[k % 3]) for k, source in enumerate(terms.sources)]
    origin = None if terms.origin is None else terms.origin.bfloat16()
    return replace(terms, sources=sources, origin=origin)


@needs_triton
@pytest.mark.parametrize("origin", ["base", "zero", "mean", "directions", "directions alone"])
@pytest.mark.parametrize(
    ("shape", "sources", "kind"),
    [
        *((shape, k, kind) for kind in SPREADS for shape, k in SHAPES.items()),
        *(((), 3, kind) for kind in ("scalar", "element")),
    ],
    ids=str,
)
def test_merge_and_contraction_equal_float64(triton, shape, sources, kind, origin):
    terms, spread, coefficient, grad = make(shape, torch.float32, origin, kind, sources)
    terms, grad = mixed(terms), grad.half()
    assert backends.backend_for([*terms.stored, grad]) is triton
    require_exact(terms, spread, coefficient, grad)


@needs_triton
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_coefficients_along_any_axis_of_a_convolution(triton, axis):
    """Neighbours that share a coefficient: few (summed by column) and many (by row)."""
    shape = (4, 3, 5, 40)
    terms, _, _, grad = make(shape, torch.bfloat16, "base", "scalar")
    spread, slot = Spread("axis", axis), (3, shape[axis])
    coefficient = torch.randn(slot, generator=torch.Generator().manual_seed(1))
    theta, dc, bound = exact(terms, spread, coefficient, grad)
    out = Linear().combine(terms, coefficient, spread, torch.empty(shape))
    torch.testing.assert_close(out.double(), theta, rtol=1e-6, atol=2e-6)
    got = Linear().contract(terms, grad, coefficient, spread)
    assert ((got.double() - dc).abs() <= 3e-7 * bound).all()


@needs_triton
@pytest.mark.parametrize("kind", SPREADS)
def test_coefficients_of_zero_and_one_are_exact_and_results_rounded_once(triton, kind):
    terms, spread, coefficient, grad = make((9, 33), torch.bfloat16, "base", kind)
    for values, expected in (([0, 0, 0], terms.origin), ([0, 1, 0], terms.sources[1])):
        chosen = torch.tensor(values).double().view(3, *[1] * (coefficient.dim() - 1))
        out = torch.empty(9, 33, dtype=torch.bfloat16)
        Linear().combine(terms, chosen.expand_as(coefficient).contiguous(), spread, out)
        assert torch.equal(out, expected), values
    theta, _, _ = exact(terms, spread, coefficient, grad)
    Linear().combine(terms, coefficient, spread, out)
    # the interpreter cuts off where a GPU rounds to the nearest
    assert ((out.double() - theta).abs() <= torch.finfo(out.dtype).eps * theta.abs() + 2e-6).all()


@needs_triton
def test_empty_tensors_and_coefficients_that_are_views(triton):
    for shape in ((0,), (0, 5), (3, 0)):
        terms, spread, coefficient, grad = make(shape, torch.bfloat16, "base", "element")
        assert Linear().combine(terms, coefficient, spread, torch.empty(shape)).shape == shape
        assert Linear().contract(terms, grad, coefficient, spread).shape == (3, *shape)
    terms, spread, coefficient, grad = make((9, 33), torch.bfloat16, "base", "last")
    theta, dc, bound = exact(terms, spread, coefficient, grad)
    for view in (coefficient.t().contiguous().t(), torch.cat([coefficient] * 2, dim=1)[:, :33]):
        out = Linear().combine(terms, view, spread, torch.empty(9, 33))
        torch.testing.assert_close(out.double(), theta, rtol=1e-6, atol=2e-6)
        got = Linear().contract(terms, grad.t().contiguous().t(), view, spread)
        assert ((got.double() - dc).abs() <= 3e-7 * bound).all()


@needs_triton
def test_many_parts_are_summed_by_torch(triton, monkeypatch):
    terms, _, _, grad = make((9, 33), torch.bfloat16, "base", "scalar")
    spread = Spread("partition", 0, torch.arange(297) * 7 % 65)
    coefficient = torch.randn(3, 65, generator=torch.Generator().manual_seed(1))
    theta, dc, bound = exact(terms, spread, coefficient, grad)
    out = Linear().combine(terms, coefficient, spread, torch.empty(9, 33))
    torch.testing.assert_close(out.double(), theta, rtol=1e-6, atol=2e-6)
    monkeypatch.setattr(triton.kernels, "contract", None)
    got = Linear().contract(terms, grad, coefficient, spread)
    assert ((got.double() - dc).abs() <= 3e-7 * bound).all()


@needs_triton
@pytest.mark.parametrize("granularity", [Chunks(2.0), Sigmoid(Element())], ids=["chunks", "each"])
def test_a_network_has_the_gradients_of_the_c_kernels(triton, family, granularity, monkeypatch):
    models, inputs = family("llama-tied", dtype=torch.float32)
    recipe = Recipe({"a": models[1], "b": models[2]}, base=models[0], coefficients=granularity)
    launched, launch = [], triton.launch
    monkeypatch.setattr(triton, "launch", lambda *a, **k: launched.append(a[0]) or launch(*a, **k))
    monkeypatch.setattr(triton, "TILE", 4096)
    grads = []
    for kernels in ("auto", "triton"):
        monkeypatch.setenv("GRADMERGE_KERNELS", kernels)
        merged = MergedModel(recipe)
        assert not launched
        logits_of(merged(**inputs)).log_softmax(-1)[..., 0].mean().backward()
        grads.append({key: raw.grad for key, raw in merged.raw.items()})
    assert len(launched) == 2 * len(merged.plan.layout.slots)  # a merge and a contraction each
    for key, grad in grads[0].items():
        size = grad.abs().max().item()
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-5 * size)


@needs_triton
@pytest.mark.parametrize("choice", ["triton", "torch"])
def test_parts_in_one_byte_are_parts(triton, choice, monkeypatch):
    """As on a device, where they are kept during a fit."""
    monkeypatch.setenv("GRADMERGE_KERNELS", choice)
    terms, spread, coefficient, grad = make((37, 70), torch.bfloat16, "base", "partition")
    small = replace(spread, parts=spread.parts.to(torch.uint8))
    theta, dc, bound = exact(terms, spread, coefficient, grad)
    out = Linear().combine(terms, coefficient, small, torch.empty(37, 70))
    torch.testing.assert_close(out.double(), theta, rtol=1e-6, atol=2e-6)
    got = Linear().contract(terms, grad, coefficient, small)
    assert ((got.double() - dc).abs() <= 3e-7 * bound).all()


# ---- nothing waits for the device ---------------------------------------------------------------

GRANULARITIES = {
    "scalar": Tensor(),
    "axis": Column(),
    "partition": Partition(3),
    "element": Sigmoid(Element()),
}


def on_meta(kind: str, sources: int = 4, dtype: torch.dtype = torch.bfloat16):
    """Terms, raw coefficients, spread and gradient without data: reading a number fails."""
    shape = (96, 128)
    slot = {"scalar": (), "axis": (128,), "partition": (3,), "element": shape}[kind]
    with torch.device("meta"):
        stored = [torch.empty(shape, dtype=dtype) for _ in range(sources + 1)]
        parts = torch.empty(96 * 128, dtype=torch.uint8) if kind == "partition" else None
        raw, grad = torch.empty(sources, *slot), torch.empty(shape, dtype=dtype)
    return Terms(stored[1:], stored[0]), raw, Spread(kind, 1, parts), grad


@pytest.mark.parametrize("kind", GRANULARITIES)
def test_torch_operations_do_not_wait_for_a_device(kind):
    terms, raw, spread, grad = on_meta(kind)
    found = contraction.combine(
        GRANULARITIES[kind], Linear(), terms, raw, spread, torch.empty_like(grad)
    )
    slope, _ = contraction.contract(GRANULARITIES[kind], Linear(), terms, raw, spread, grad)
    assert (found.shape, slope.shape) == (grad.shape, raw.shape)
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        raw.sum().item()  # what waiting would look like


@pytest.mark.parametrize(
    ("count", "kind"), [(256, torch.uint8), (257, torch.int16), (40_000, torch.int32)]
)
def test_parts_are_drawn_once_for_a_device(count, kind):
    recipe = recipe_of(relatives(build()), coefficients=Partition(count))
    plan, meta = open_plan(recipe), torch.device("meta")
    slot = replace(plan.layout.slots["body.weight"], shape=(count,))
    assert slot.parts(5, meta).dtype == kind
    assert slot.parts(5, torch.device("cpu")).dtype == torch.int64
    first = plan._spread("body.weight", meta).parts
    assert plan._spread("body.weight", meta).parts is not first  # a static merge keeps nothing
    plan.prepare_learning()
    first = plan._spread("body.weight", meta).parts
    assert plan._spread("body.weight", meta).parts is first
    assert plan._spread("body.weight", torch.device("cpu")).parts is not first


def test_sums_of_directions_do_not_wait_for_a_device():
    terms, raw, spread, grad = on_meta("scalar", dtype=torch.float32)
    out = torch.empty_like(grad)
    assert Linear("directions").combine(terms, raw, spread, out) is out


@pytest.mark.parametrize("kind", GRANULARITIES)
def test_coefficients_as_tensors_give_what_numbers_give(kind, monkeypatch):
    """As on a device: the numbers of a merge are multiplied as tensors."""
    terms, spread, coefficient, _ = make((64, 65), torch.bfloat16, "base", "scalar")
    plain = chunks.combine(terms, coefficient.view(3, 1), spread, torch.empty(64, 65))
    monkeypatch.setattr(chunks, "_is_number", lambda *_: False)
    monkeypatch.setattr(chunks, "chunk_size", lambda device: 1000)
    found = chunks.combine(terms, coefficient.view(3, 1), spread, torch.empty(64, 65))
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("kind", GRANULARITIES)
def test_launches_do_not_wait_for_a_device(triton, kind, monkeypatch):
    """Launches need no number from the device, and no tensor of the size of a source."""
    terms, raw, spread, grad = on_meta(kind)
    launched = []
    monkeypatch.setattr(triton, "launch", lambda kernel, grid, *a, **k: launched.append((grid, a)))
    monkeypatch.setattr(triton, "TILE", 4096)
    rows, out = raw.view(4, -1), torch.empty_like(grad)
    assert triton.combine(terms, rows, spread, out) is out
    assert triton.contract(terms, grad, raw, spread).shape == raw.shape
    (_, merged), (grid, summed) = launched
    assert merged[0] is out
    assert all(a is b for a, b in zip(merged[2], terms.sources, strict=True))
    assert grid.count == {"axis": 4}.get(kind, 3)
    # partial sums: at most an eighth of the bytes of a source, where they are not the result
    assert kind == "element" or summed[0].numel() * 4 <= 4 * grad.numel() * 2 / 8


# ---- compiled -----------------------------------------------------------------------------------

# for NVIDIA's Ampere and Hopper, four bf16 sources and a base; prints bytes per entry and program
COMPILED = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gradmerge.operators._triton import kernels, launch

POINTERS = ("out", "origin", "coefficients", "parts", "sums", "grad", "anchor")

def bytes_per_entry(kernel, capability, by, down, across, **given):
    signature, constants, known = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in given and given[name] is None or name in ("RULE", "BY", "R", "C"):
            value = {"RULE": "base", "BY": by, "R": down, "C": across}.get(name)
            signature[name], constants[place,] = "constexpr", value
            continue
        kind = given.get(name, "*bf16" if name in POINTERS else "i32")
        signature[name] = ("*bf16",) * 4 if name == "sources" else kind
        places = [(place, k) for k in range(4)] if name == "sources" else [(place,)]
        known.update({one: [["tt.divisibility", 16]] for one in places if name != "rows"})
    built = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=known),
        target=GPUTarget("cuda", capability, 32),
        options=launch._OPTIONS,
    )
    moves = r"(?:ld|st)\\.global(?:\\.\\w+)*?(?:\\.v(\\d))?\\.[bfu](\\d+)"
    moved = re.findall(moves, built.asm["ptx"])
    threads = 32 * launch._OPTIONS["num_warps"]
    return sum(int(n or 1) * int(bits) // 8 for n, bits in moved) * threads / (down * across)

for capability, by, down, across in (
    (80, "row", 1, 4096), (90, "row", 1, 4096), (90, "column", 64, 64), (90, "column", 1, 4096),
    (90, "part", 1, 4096),
):
    tile = capability, by, down, across
    parts = "*u8" if by == "part" else None
    merge = bytes_per_entry(kernels.merge, *tile, coefficients="*fp32", parts=parts)
    contract = bytes_per_entry(kernels.contract, *tile, sums="*fp32", parts=parts)
    print(json.dumps([by, down, merge, contract]))
"""


@needs_triton
def test_compiled_kernels_move_each_stored_byte_once(tmp_path):
    """Loads and stores in the compiled code, times the threads of a tile, per entry."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 5
    least = 2 * (4 + 2)  # four sources, a base and a result or gradient in bfloat16
    for by, down, merge, contract in found:
        if (by, down) == ("column", 1):  # a float32 coefficient, or slope, per entry and source
            assert (merge, contract) == (least + 4 * 4, least + 4 * 4)
            continue
        # beyond that: parts in a byte, sums, and coefficients, which are in the cache: four float32
        # per entry by part; by column, as many for each of a thread's 8 columns, per 16 entries
        cached = {"row": 0, "part": 16, "column": 8}[by]
        assert least <= contract <= 1.25 * least, (by, contract)
        assert least <= merge - cached <= 1.25 * least, (by, merge)


# ---- choice -------------------------------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch):
    """The choice of kernels, made anew, for tensors on a CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("GRADMERGE_KERNELS", "triton")
    backends._load.cache_clear()
    yield monkeypatch
    backends._load.cache_clear()


def test_without_triton_the_choice_is_refused_or_torch(unloaded):
    unloaded.setitem(sys.modules, "gradmerge.operators._triton", None)
    with pytest.raises(ConfigError, match=r"Triton cannot be imported.*\. Install Triton"):
        backends.backend_for([torch.ones(1)])
    assert backends._load("auto", torch.device("cpu")) is None


@needs_triton
def test_kernels_that_fail_are_said_and_torch_does_it(unloaded):
    from gradmerge.operators._triton import launch

    def fail(device):
        raise OSError("no Python.h")

    unloaded.setattr(launch, "check", fail)
    with pytest.warns(UserWarning, match=r"kernels failed on cpu: no Python.h. Merging continues"):
        assert backends._load("auto", torch.device("cpu")) is None
    with pytest.raises(ConfigError, match="GRADMERGE_KERNELS=triton: the Triton kernels failed"):
        backends.backend_for([torch.ones(1)])


@needs_triton
def test_wrong_results_of_a_first_run_are_noticed(triton, monkeypatch):
    monkeypatch.setattr(triton, "launch", lambda kernel, grid, out, *_, **__: out.zero_())
    with pytest.raises(RuntimeError, match=r"expected a merge \[2, 2, 2\] and a sum \[6\], got"):
        triton.check(torch.device("cpu"))


def test_what_the_kernels_cannot_read_is_left_to_others(unloaded):
    def load(*_):
        raise AssertionError("not asked")

    unloaded.setattr(backends, "_load", load)
    load.cache_clear = lambda: None

    class Other(torch.Tensor):
        pass

    ones = torch.ones(3)
    for other in (ones.double(), ones.to("meta"), ones.to_sparse(), ones.as_subclass(Other)):
        assert backends.backend_for([ones, other]) is not None
    unloaded.setenv("GRADMERGE_KERNELS", "torch")
    assert backends.backend_for([ones]) is chunks
