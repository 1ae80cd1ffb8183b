"""The linear operator: `theta = A + sum_k c_k (.) B_k`, with directions `B_k = theta_k - A`.

The directions are never stored. Forward uses

    theta = (1 - sum_k c_k) A + sum_k c_k theta_k,

which gives A exactly for c = 0 and theta_k exactly for a single c_k = 1; directions that a
preprocess has changed come as they are, with `theta = A + sum_k c_k B_k`. Backward is one inner
product a source, `dL/dc_k = <G, theta_k - A>` restricted to the entries that share c_k. Here the
difference is formed first, in the accumulation dtype: fine-tuned weights lie close to their base,
and the difference of two long inner products would lose the digits that carry the gradient.

Sums run over blocks that a processor's cache holds: each stored byte is read from memory once a
pass, no temporary grows with the tensor, and 16-bit sources are widened a block at a time. On a
CPU compiled kernels do it (`native`); elsewhere, and without a compiler, torch's own operations
(`chunks`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge._typing import Origin
from gradmerge.errors import ConfigError
from gradmerge.operators import chunks
from gradmerge.operators._native import (
    FROM_BASE,
    FROM_DIRECTIONS,
    FROM_MEAN,
    FROM_ZERO,
    GIVEN,
    Direction,
    Kernels,
    native_kernels,
    selection,
)
from gradmerge.operators.base import AbstractOperator, Spread, Terms, View

# Entries at once: differences, products and their sum stay in the second-level cache.
_CPU_CHUNK = 65_536
_GPU_CHUNK = 1 << 26


def combine_directions(terms: Terms, coefficient: Tensor, out: Tensor) -> Tensor:
    """Write `A + (c_1 B_1 + c_2 B_2 + ...)` into `out`: every difference, product and sum rounded.

    Args:
        terms: with an origin; float32 is computed in float32.
        coefficient: `[sources]`; one per source.
        out: of any dtype.
    """
    dtype = torch.promote_types(terms.accumulate_dtype, out.dtype)
    length = _CPU_CHUNK * torch.get_num_threads() if out.device.type == "cpu" else _GPU_CHUNK
    assert terms.origin is not None
    stored = [terms.origin, *terms.sources]
    pieces = zip(*(term.reshape(-1).split(length) for term in stored), strict=True)
    weights = coefficient.double().tolist()
    for target, (origin, *parts) in zip(out.view(-1).split(length), pieces, strict=True):
        origin = origin.to(out.device, dtype)
        directions = origin.new_empty(len(parts), len(origin))
        for direction, part, weight in zip(directions, parts, weights, strict=True):
            if terms.directions:
                direction.copy_(part)
            else:
                torch.sub(part.to(out.device, dtype), origin, out=direction)
            direction.mul_(weight)
        # torch's own sum over stacked tensors: of many it adds up several partial sums
        target.copy_(directions.sum(dim=0).add_(origin))
    return out


@dataclass(frozen=True)
class Linear(AbstractOperator):
    """`theta = A + sum_k c_k (theta_k - A)` (task arithmetic, averaging, and all learned sums)."""

    by_entry = True

    form: Literal["weights", "directions"] = "weights"
    """How the same sum is rounded: `(1 - sum c) A + sum c_k theta_k`, or, slower, `A + (c_1 B_1 +
    ...)` as mergekit's task_arithmetic, to be equal bit for bit in float32. The latter wants origin
    base, and acts where a tensor has one coefficient per source."""

    @override
    def require(self, num_sources: int, origin: Origin) -> None:
        if self.form not in ("weights", "directions"):
            raise ConfigError(f"Linear: form: expected weights or directions, got {self.form!r}.")
        if self.form == "directions" and origin != "base":
            raise ConfigError(
                f"Linear: form directions sums directions from a base, got origin {origin}. Set "
                "origin: base, or take form weights."
            )

    def combine(self, terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
        """See `AbstractOperator.combine`; differentiable through `contract`."""
        if not out.numel():
            return out
        if self.form == "directions" and spread.kind == "scalar":
            return combine_directions(terms.dense(), coefficient.detach().view(-1), out)
        coefficient = coefficient.detach().view(len(terms.sources), -1)
        kernels = kernels_for(terms, out)
        if kernels is not None and (terms.directions or terms.masks is not None):
            return merge_directions(kernels, terms, coefficient, spread, out)
        terms = terms.dense()
        if kernels is None:
            return chunks.combine(terms, coefficient, spread, out)
        rule, weights = GIVEN, coefficient
        if spread.kind == "element" and out.numel() > 1:
            # weights of all entries at once would take as much as the stored tensors
            rule = FROM_MEAN if terms.mean_origin else FROM_ZERO
            if terms.origin is not None:
                rule = FROM_DIRECTIONS if terms.directions else FROM_BASE
        else:
            weights = chunks.stored_weights(terms, coefficient.double())
        width, inner = width_and_inner(terms, spread, weights)
        flat = [term.reshape(-1) for term in _stored(terms)]
        kernels.merge(out.view(-1), flat, weights, rule, width, inner, spread.parts)
        return out

    @override
    def contract(self, terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
        if not grad.numel():
            return torch.zeros_like(coefficient)
        terms = terms.dense()
        kernels = kernels_for(terms, grad)
        if kernels is None:
            return chunks.contract(terms, grad, coefficient, spread)
        rows = coefficient.view(len(terms.sources), -1)
        width, inner = width_and_inner(terms, spread, rows)
        total = kernels.contract(
            grad.reshape(-1),
            [source.reshape(-1) for source in terms.sources],
            None if terms.origin is None or terms.directions else terms.origin.reshape(-1),
            terms.mean_origin,
            width,
            inner,
            spread.parts,
            products=spread.kind == "element",
        )
        return total.view(coefficient.shape).to(coefficient.dtype)


def merge_directions(
    kernels: Kernels,
    terms: Terms,
    coefficient: Tensor,
    spread: Spread,
    out: Tensor,
    **election: Any,
) -> Tensor:
    """Merge directions that are formed on the way; `election` makes it a disjoint mean."""
    width, inner = width_and_inner(terms, spread, coefficient)
    selection.merge_directions(
        kernels,
        out.view(-1),
        None if terms.origin is None else terms.origin.reshape(-1),
        directions_of(terms),
        terms.factors or [1.0] * len(terms.sources),
        coefficient,
        width,
        inner,
        spread.parts,
        **election,
    )
    return out


def directions_of(terms: Terms) -> list[Direction]:
    """The directions as kernels form them, without their factors."""
    anchor = None if terms.origin is None or terms.directions else terms.origin.reshape(-1)
    masks = terms.masks or [None] * len(terms.sources)
    return [
        Direction(source.reshape(-1), anchor, mask)
        for source, mask in zip(terms.sources, masks, strict=True)
    ]


def _stored(terms: Terms) -> list[Tensor]:
    return terms.sources if terms.origin is None else [terms.origin, *terms.sources]


def kernels_for(terms: Terms, tensor: Tensor | None) -> Kernels | None:
    """The compiled kernels, where they take these tensors."""
    tensors = _stored(terms) if tensor is None else [*_stored(terms), tensor]
    if any(each.device.type != "cpu" for each in tensors):
        return None
    kernels = native_kernels()
    return kernels if kernels is not None and kernels.take(tensors) else None


def width_and_inner(terms: Terms, spread: Spread, weights: Tensor) -> tuple[int, int]:
    """Weights along the tensor, and neighbours that share one (see `merging.c`)."""
    width = weights.shape[1]
    if width == 1:
        return 1, terms.shape.numel()
    return width, View.of(terms.shape, spread).inner if spread.kind == "axis" else 1
