"""The linear operator with kernels that torch.compile fuses: faster, for the price of compiling."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmerge.errors import ConfigError
from gradmerge.operators.base import AbstractOperator, Spread, Terms
from gradmerge.operators.linear import Linear, stored_weights

# Products are summed over rows of this length in float32, and the row sums in float64.
_ROW = 4096
# Smaller tensors are not worth a kernel's guards.
_SMALL = 1 << 16


def _merge(out: Tensor, weights: Tensor, terms: Sequence[Tensor]) -> None:
    total = weights[0] * terms[0].to(weights.dtype)
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = total + weight * term.to(weights.dtype)
    out.copy_(total)


def _contract(grad: Tensor, anchor: Tensor | None, sources: Sequence[Tensor]) -> list[Tensor]:
    wide = grad.to(torch.float32)
    parts = [source.to(torch.float32) for source in sources]
    if anchor is not None:
        parts = [part - anchor.to(torch.float32) for part in parts]
    return [(part * wide).view(-1, _ROW).sum(dim=1) for part in parts]


@functools.cache
def _kernel(function: Callable[..., object]) -> Callable[..., object]:
    """Compiled once a process; lengths are symbolic, so one kernel serves all tensors."""
    return torch.compile(function, dynamic=True)


@dataclass(frozen=True)
class CompiledLinear(AbstractOperator):
    """`Linear`, reading each stored byte once a pass in one fused kernel over all sources.

    For coefficients that a whole tensor shares (Model, Group, Tensor) and sources in 32 or 16 bits;
    all else is `Linear`'s. The first step compiles, which takes about half a minute.

    Raises:
        ConfigError: there is no C++ compiler, which torch.compile needs on a CPU.
    """

    def __post_init__(self) -> None:
        """Check that kernels can be built."""
        compilers = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
        if not any(name and shutil.which(name) for name in compilers):
            raise ConfigError(
                "CompiledLinear: expected a C++ compiler (g++ or clang++, or CXX), found none. "
                "Install one, or use the operator Linear, which needs none."
            )

    def combine(self, terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
        """See `AbstractOperator.combine`."""
        if not _fits(terms, spread):
            return Linear().combine(terms, coefficient, spread, out)
        stored = terms.sources if terms.origin is None else [terms.origin, *terms.sources]
        weights = stored_weights(terms, coefficient.detach().double().view(-1, 1)).view(-1).float()
        flat = [term.reshape(-1).to(out.device) for term in stored]
        _kernel(_merge)(out.view(-1), weights.to(out.device), flat)
        return out

    def contract(self, terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
        """See `AbstractOperator.contract`."""
        if not _fits(terms, spread) or terms.mean_origin:
            return Linear().contract(terms, grad, coefficient, spread)
        whole = grad.numel() - grad.numel() % _ROW
        flat = grad.reshape(-1)
        anchor = None if terms.origin is None else terms.origin.reshape(-1).to(grad.device)
        sources = [source.reshape(-1).to(grad.device) for source in terms.sources]
        head = None if anchor is None else anchor[:whole]
        sums = _kernel(_contract)(flat[:whole], head, [source[:whole] for source in sources])
        total = torch.stack([row.double().sum() for row in sums])  # type: ignore[attr-defined]
        if whole < grad.numel():
            rest = torch.stack([source[whole:].double() for source in sources])
            if anchor is not None:
                rest = rest - anchor[whole:].double()
            total = total + rest @ flat[whole:].double()
        return total.view(coefficient.shape).to(coefficient.dtype)


def _fits(terms: Terms, spread: Spread) -> bool:
    return (
        spread.kind == "scalar"
        and terms.shape.numel() >= _SMALL
        and terms.accumulate_dtype == torch.float32
    )
