"""The linear operator against float64 sums over expanded coefficients: both implementations."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradmerge.common.errors import ConfigError
from gradmerge.operators import Linear, Spread, Terms
from gradmerge.operators._native import build as native
from terms import SPREADS, exact, make, require_exact

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")),
    reason="no C compiler on this machine",
)
SHAPES = [(1,), (37,), (5, 1), (1, 7), (64, 65), (3, 5, 3, 3), (130, 2100)]


@pytest.fixture(params=["torch", pytest.param("native", marks=needs_compiler)])
def kernels(request, monkeypatch):
    monkeypatch.setenv("GRADMERGE_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize("origin", ["base", "zero", "mean", "directions", "directions alone"])
@pytest.mark.parametrize("kind", SPREADS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_and_contraction_equal_float64(kernels, dtype, shape, kind, origin):
    terms, spread, coefficient, grad = make(shape, dtype, origin, kind)
    require_exact(terms, spread, coefficient, grad)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SPREADS)
def test_16_bit_results_and_gradients(kernels, kind, out_dtype):
    terms, spread, coefficient, grad = make((64, 65), torch.bfloat16, "base", kind)
    grad = grad.to(out_dtype)
    theta, dc, bound = exact(terms, spread, coefficient, grad)
    out = Linear().combine(terms, coefficient, spread, torch.empty(64, 65, dtype=out_dtype))
    assert out.dtype == out_dtype
    # rounded once, from a float32 sum: at most one unit in the last place where that is a tie
    ulp = torch.finfo(out_dtype).eps
    assert ((out.double() - theta).abs() <= 0.51 * ulp * theta.abs() + 2e-6).all()
    got = Linear().contract(terms, grad, coefficient, spread)
    assert ((got.double() - dc).abs() <= 3e-7 * bound).all()


@pytest.mark.parametrize("stored", [torch.float64, torch.float32], ids=str)
def test_a_float64_result_is_merged_in_float64(kernels, stored):
    terms, spread, coefficient, grad = make((64, 65), stored, "base", "last")
    theta, dc, _ = exact(terms, spread, coefficient, grad)
    out = torch.empty(64, 65, dtype=torch.float64)
    Linear().combine(terms, coefficient.double(), spread, out)
    torch.testing.assert_close(out, theta, rtol=1e-13, atol=1e-13)
    got = Linear().contract(terms, grad.double(), coefficient.double(), spread)
    torch.testing.assert_close(got, dc, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SPREADS)
def test_terms_that_lie_awkwardly(kernels, kind):
    """Transposed terms, and terms at an address that is not a multiple of the item size."""
    terms, spread, coefficient, grad = make((64, 65), torch.float32, "base", kind)
    theta, dc, bound = exact(terms, spread, coefficient, grad)
    raw = torch.zeros(64 * 65 * 4 + 1, dtype=torch.uint8)
    odd = raw[1:].numpy().view("float32").reshape(64, 65)
    odd[:] = terms.sources[1].numpy()
    sources = [terms.sources[0].t().contiguous().t(), torch.from_numpy(odd), terms.sources[2]]
    awkward = Terms(sources, terms.origin)
    out = Linear().combine(awkward, coefficient, spread, torch.empty(64, 65))
    torch.testing.assert_close(out.double(), theta, rtol=1e-6, atol=1e-6)
    got = Linear().contract(awkward, grad.t().contiguous().t(), coefficient, spread)
    assert ((got.double() - dc).abs() <= 3e-7 * bound).all()


@pytest.mark.parametrize("kind", SPREADS)
def test_threads_share_a_tensor(kernels, kind):
    terms, spread, coefficient, grad = make((130, 4100), torch.bfloat16, "base", kind)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = Linear().combine(terms, coefficient, spread, torch.empty(terms.shape))
            found.append((out, Linear().contract(terms, grad, coefficient, spread)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    _, _, bound = exact(terms, spread, coefficient, grad)
    assert ((found[0][1] - found[1][1]).abs() <= 3e-7 * bound).all()


def test_coefficients_of_zero_and_one_are_exact(kernels):
    for kind in SPREADS:
        terms, spread, coefficient, _ = make((64, 65), torch.float32, "base", kind)
        for values, expected in (([0, 0, 0], terms.origin), ([0, 1, 0], terms.sources[1])):
            chosen = torch.tensor(values).float().view(3, *[1] * (coefficient.dim() - 1))
            chosen = chosen.expand_as(coefficient).contiguous()
            out = Linear().combine(terms, chosen, spread, torch.empty(64, 65))
            assert torch.equal(out, expected), kind


def test_bfloat16_rounds_as_torch_does(kernels):
    special = torch.tensor(
        [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, torch.inf, -torch.inf, torch.nan, 1e-40]
    )
    terms = Terms([special], None)
    out = torch.empty(len(special), dtype=torch.bfloat16)
    Linear().combine(terms, torch.ones(1), Spread("scalar"), out)
    torch.testing.assert_close(out, special.bfloat16(), rtol=0, atol=0, equal_nan=True)


# ---- building -----------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, with no library loaded."""
    native._load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GRADMERGE_KERNELS", raising=False)
    monkeypatch.delenv("CC", raising=False)
    yield tmp_path
    native._load.cache_clear()


def test_unknown_choice_of_kernels(fresh, monkeypatch):
    monkeypatch.setenv("GRADMERGE_KERNELS", "fast")
    with pytest.raises(ConfigError, match="one of auto, native, torch, triton, got 'fast'"):
        native.native_kernels()


def test_without_a_compiler_torch_does_it(fresh, monkeypatch, recwarn):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert native.native_kernels() is None
    assert not recwarn.list
    monkeypatch.setenv("GRADMERGE_KERNELS", "native")
    with pytest.raises(ConfigError, match=r"no C compiler was found\. Install a C compiler"):
        native.native_kernels()


def test_a_compiler_that_fails_is_said_and_torch_does_it(fresh, monkeypatch):
    monkeypatch.setenv("CC", "false")
    with pytest.warns(UserWarning, match=r"could not be built or loaded: .*false .*continues with"):
        assert native.native_kernels() is None
    assert not list((fresh / "gradmerge").iterdir())
    monkeypatch.setenv("GRADMERGE_KERNELS", "native")
    with pytest.raises(ConfigError, match="could not be built or loaded"):
        native.native_kernels()


BUILT = """
from gradmerge.operators._native import build as native

assert native.native_kernels() is not None
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library, compiled once."""
    return native._compile(native._compiler(), tmp_path_factory.mktemp("built"))


@pytest.fixture
def builds(library, monkeypatch):
    """Builds, each of which takes the library that is compiled already."""
    made = []

    def compile_(compiler, work):
        made.append(work)
        return Path(shutil.copy(library, work / "kernels.so"))

    monkeypatch.setattr(native, "_compile", compile_)
    return made


def cached(folder):
    """The one file in the cache, after the kernels were asked for."""
    native._load.cache_clear()
    assert native.native_kernels() is not None
    (found,) = (folder / "gradmerge").iterdir()
    return found


@needs_compiler
@pytest.mark.parametrize("damage", ["cut off", "cut to nothing", "changed", "garbage"])
def test_a_damaged_library_in_the_cache_is_built_anew(fresh, builds, damage):
    path = cached(fresh)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.unlink()  # this process has it mapped
    path.write_bytes(
        {
            "cut off": whole[:-4096],
            "cut to nothing": b"",
            "changed": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "garbage": b"not a library",
        }[damage]
    )
    path.chmod(0o700)
    assert cached(fresh).read_bytes() == whole
    assert len(builds) == 2
    cached(fresh)
    assert len(builds) == 2


@needs_compiler
@pytest.mark.parametrize("mode", [0o720, 0o702], ids=["group", "others"])
def test_a_library_that_others_can_write_is_not_loaded(fresh, builds, mode):
    cached(fresh).chmod(mode)
    assert stat.S_IMODE(cached(fresh).stat().st_mode) == 0o700
    assert len(builds) == 2


@needs_compiler
def test_a_cache_that_others_can_write_is_closed_to_them(fresh, builds):
    (fresh / "gradmerge").mkdir()
    (fresh / "gradmerge").chmod(0o777)
    assert stat.S_IMODE(cached(fresh).parent.stat().st_mode) == 0o700


@needs_compiler
def test_a_library_of_another_user_is_not_loaded(fresh, builds):
    if os.geteuid() != 0:
        pytest.skip("needs the right to give files away")
    os.chown(cached(fresh), 12345, -1)
    assert cached(fresh).stat().st_uid == os.geteuid()
    assert len(builds) == 2


@needs_compiler
def test_a_build_that_was_killed_leaves_nothing_behind_the_next(fresh, builds):
    child = os.fork()
    if child == 0:
        native._compile = lambda *_: os._exit(9)
        native.native_kernels()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list((fresh / "gradmerge").iterdir())) == 1
    assert cached(fresh).name.startswith("kernels-")


@needs_compiler
def test_kernels_are_built_once_and_by_several_processes_at_once(fresh):
    running = [subprocess.Popen([sys.executable, "-c", BUILT]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    (library,) = (fresh / "gradmerge").iterdir()
    before = library.stat().st_mtime_ns
    assert native.native_kernels() is not None
    assert library.stat().st_mtime_ns == before


@needs_compiler
def test_without_a_home_the_kernels_are_built_for_the_process(fresh, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(native.Path, "home", no_home)
    assert native.native_kernels() is not None


@needs_compiler
def test_kernels_build_without_a_cache_folder(fresh, monkeypatch):
    (fresh / "gradmerge").write_text("a file where the folder should be")
    assert native.native_kernels() is not None
