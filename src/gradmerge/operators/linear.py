"""The linear operator: `theta = A + sum_k c_k (.) B_k`, with directions `B_k = theta_k - A`.

Directions are never stored. Forward computes

    theta = (1 - sum_k c_k) A + sum_k c_k theta_k,

which is exactly A for c = 0 and exactly theta_k for a single c_k = 1; directions changed by a
preprocess step are used as they are, with `theta = A + sum_k c_k B_k`. Backward computes one inner
product per source, `dL/dc_k = <G, theta_k - A>` over the entries that share c_k. The difference is
formed first, in the accumulation dtype: fine-tuned weights lie close to their base, and a
difference of two long inner products would lose the digits that carry the gradient.

Sums run over cache-sized blocks: each pass reads every stored byte once, no temporary grows with
the tensor, and 16-bit sources are widened one block at a time. On a CPU compiled kernels do this
(`_native`), on a GPU Triton ones (`_triton`), elsewhere torch operations (`chunks`; the choice is
in `backends`). Directions of low rank (LoRA) are not formed (`low_rank`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError, require
from gradmerge.common.typing import Origin
from gradmerge.operators import chunks, low_rank
from gradmerge.operators._native import Direction, Kernels, selection
from gradmerge.operators.backends import backend_for
from gradmerge.operators.base import AbstractOperator, Spread, Terms, width_and_inner


def combine_directions(terms: Terms, coefficient: Tensor, out: Tensor) -> Tensor:
    """Write `A + (c_1 B_1 + c_2 B_2 + ...)` into `out`, rounding each difference, product and sum.

    Args:
        terms: terms with an origin; float32 terms are computed in float32.
        coefficient: `[sources]`, one per source.
        out: result, of any dtype.
    """
    dtype = torch.promote_types(terms.accumulate_dtype, out.dtype)
    length = chunks.chunk_size(out.device)
    pieces = zip(*(term.reshape(-1).split(length) for term in terms.stored), strict=True)
    # tensors, because numbers on a device would have to be waited for
    weights = coefficient.double().unbind()
    for target, (origin, *parts) in zip(out.view(-1).split(length), pieces, strict=True):
        origin = origin.to(out.device, dtype)
        directions = origin.new_empty(len(parts), len(origin))
        for direction, part, weight in zip(directions, parts, weights, strict=True):
            if terms.directions:
                direction.copy_(part)
            else:
                torch.sub(part.to(out.device, dtype), origin, out=direction)
            direction.mul_(weight)
        # the sum over a stacked tensor, as in mergekit: torch adds up several partial sums
        target.copy_(directions.sum(dim=0).add_(origin))
    return out


@dataclass(frozen=True)
class Linear(AbstractOperator):
    """Weighted sum of directions: `theta = A + sum_k c_k (theta_k - A)` (task arithmetic, averaging
    and most learned merges).
    """

    by_entry = True
    by_rows = True

    form: Literal["weights", "directions"] = "weights"
    """Rounding of the same sum: `weights` computes `(1 - sum c) A + sum c_k theta_k`; `directions`,
    slower, `A + (c_1 B_1 + ...)` like mergekit's task_arithmetic, for bitwise equality in float32.
    The latter needs origin base and applies to tensors with one coefficient per source."""

    @override
    def require(self, num_sources: int, origin: Origin) -> None:
        known = self.form in ("weights", "directions")
        require(known, "Linear.form", "weights or directions", repr(self.form))
        if self.form == "directions" and origin != "base":
            raise ConfigError(
                f"Linear: form directions sums directions from a base, got origin {origin}. Set "
                "origin: base, or use form weights."
            )

    @override
    def combine(self, terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
        if not out.numel():
            return out
        if terms.updates is not None:
            rows = coefficient.detach().view(len(terms.updates), -1)
            return low_rank.combine(terms, rows, spread, out)
        if self.form == "directions" and spread.kind == "scalar":
            return combine_directions(terms.dense(), coefficient.detach().view(-1), out)
        coefficient = coefficient.detach().view(len(terms.sources), -1)
        backend = backend_for([*terms.stored, out])
        if isinstance(backend, Kernels) and (terms.directions or terms.masks is not None):
            return merge_directions(backend, terms, coefficient, spread, out)
        return backend.combine(terms.dense(), coefficient, spread, out)

    @override
    def contract(self, terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
        if not grad.numel():
            return torch.zeros_like(coefficient)
        if terms.updates is not None:
            return low_rank.contract(terms, grad, coefficient, spread)
        terms = terms.dense()
        backend = backend_for([*terms.stored, grad])
        return backend.contract(terms, grad, coefficient, spread)


def merge_directions(
    kernels: Kernels,
    terms: Terms,
    coefficient: Tensor,
    spread: Spread,
    out: Tensor,
    **election: Any,
) -> Tensor:
    """Merge directions that are formed block by block; `election` makes it a disjoint mean."""
    width, inner = width_and_inner(terms.shape, spread, coefficient)
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
    """Return the directions for the kernels, without their factors."""
    anchor = None if terms.origin is None or terms.directions else terms.origin.reshape(-1)
    masks = terms.masks or [None] * len(terms.sources)
    return [
        Direction(source.reshape(-1), anchor, mask)
        for source, mask in zip(terms.sources, masks, strict=True)
    ]
