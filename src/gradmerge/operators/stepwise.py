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
        total = torch.empty_like(origin)
        product = torch.empty_like(origin)
        for k, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            into = product if k else total
            part = part.to(out.device, dtype)
            if terms.directions:
                torch.mul(part, weight, out=into)
            else:
                torch.sub(part, origin, out=into).mul_(weight)
            if k:
                total.add_(product)
        target.copy_(total.add_(origin))
    return out
