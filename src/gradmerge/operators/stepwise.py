"""Sums of directions in the order in which mergekit rounds: for equality bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmerge.operators.base import Terms

# Entries at once: differences, products and their sum stay in the second-level cache.
_CPU_CHUNK = 65_536
_GPU_CHUNK = 1 << 26


def combine_directions(terms: Terms, coefficient: Tensor, out: Tensor) -> Tensor:
    """Write `A + (c_1 B_1 + c_2 B_2 + ...)` into `out`: every difference, product and sum rounded.

    Args:
        terms: with an origin; float32 is computed in float32.
        coefficient: `[sources]`; one a source.
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
