"""The compiled linear operator against the plain one, which float64 autograd vouches for."""

from __future__ import annotations

import shutil

import pytest
import torch

from gradmerge.errors import ConfigError
from gradmerge.operators import CompiledLinear, Linear, Spread, Terms

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler on this machine"
)


def terms_of(size: int, dtype: torch.dtype, origin: str) -> tuple[Terms, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(size, generator=generator)
    near = [(base + 0.01 * torch.randn(size, generator=generator)).to(dtype) for _ in range(3)]
    anchor = base.to(dtype) if origin == "base" else None
    return Terms(near, anchor, origin == "mean"), torch.randn(size, generator=generator)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("origin", ["base", "zero", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_kernels_equal_the_plain_ones(dtype, origin):
    coefficient, spread = torch.tensor([0.2, -0.1, 0.7]), Spread("scalar")
    for size in (70_000, 131_072, 100):
        terms, grad = terms_of(size, dtype, origin)
        ours, plain = CompiledLinear(), Linear()
        came = ours.combine(terms, coefficient, spread, torch.empty(size))
        expected = plain.combine(terms, coefficient, spread, torch.empty(size))
        torch.testing.assert_close(came, expected, rtol=1e-6, atol=1e-6)
        came = ours.contract(terms, grad, coefficient, spread)
        wide = Terms(
            [source.double() for source in terms.sources],
            None if terms.origin is None else terms.origin.double(),
            terms.mean_origin,
        )
        exact = plain.contract(wide, grad.double(), coefficient.double(), spread)
        # Without a base the sums cancel, and float32 rounds relative to the summands.
        scale = exact.norm() if origin == "base" else wide.sources[0].norm() * grad.norm()
        assert (came.double() - exact).norm() <= 1e-6 * scale


@needs_compiler
@pytest.mark.slow
def test_compiled_coefficients_of_zero_and_one_are_exact():
    terms, _ = terms_of(70_000, torch.float32, "base")
    for values, expected in (([0.0, 0, 0], terms.origin), ([0.0, 1, 0], terms.sources[1])):
        out = torch.empty(70_000)
        CompiledLinear().combine(terms, torch.tensor(values), Spread("scalar"), out)
        assert torch.equal(out, expected)


def test_no_compiler_is_said_at_once(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="expected a C\\+\\+ compiler"):
        CompiledLinear()
