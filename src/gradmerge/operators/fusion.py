"""Selective merging of the most important changes (Arcee Fusion)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.typing import Origin
from gradmerge.operators.base import Terms, require_base
from gradmerge.operators.chunks import chunk_size
from gradmerge.operators.entrywise import AbstractEntrywise, Prepared

_EPSILON = 1e-8


@dataclass(frozen=True)
class ArceeFusion(AbstractEntrywise):
    """Add only the important entries of each direction: `theta = A + sum_k c_k M_k B_k` (mergekit's
    `arcee_fusion`, with one source and c = 1).

        importance = |B_k| KL(p || q),   p = softmax(theta_k) + 1e-8,  q = softmax(A) + 1e-8
        M_k        = [importance >= median + 1.5 (Q3 - Q1)]

    The softmax and the divergence are taken along the last axis, median and quartiles (Q1, Q3) of a
    tensor's importance at the ranks `floor(q (n - 1))` (over all entries, whereas mergekit samples
    a million entries of larger tensors). If a preprocess step has changed the directions, `theta_k`
    is `A + B'_k`. Linear in c: `dL/dc_k = sum G M_k B_k` with `G = dL/dtheta`. The quartiles need
    one buffer of the size of the tensor.
    """

    @override
    def require(self, num_sources: int, origin: Origin) -> None:
        require_base("ArceeFusion", origin)

    @override
    def prepare(self, terms: Terms, device: torch.device) -> Prepared:
        terms = terms.dense()
        if "divergence" not in terms.facts:
            found = [_divergence_and_threshold(terms, k) for k in range(len(terms.sources))]
            terms.facts["divergence"] = torch.stack([divergence for divergence, _ in found])
            terms.facts["threshold"] = torch.stack([threshold for _, threshold in found])
        divergence = terms.facts["divergence"].to(device)
        threshold = terms.facts["threshold"].to(device)
        length = terms.shape[-1] if len(terms.shape) else 1

        def keep(directions: Tensor, entries: slice) -> Tensor:
            rows = torch.arange(entries.start, entries.stop, device=device) // length
            importance = directions.abs().to(divergence.dtype).mul_(divergence[:, rows])
            return directions * (importance >= threshold[:, None])

        return keep

    @override
    def merge(self, directions: Tensor, coefficient: Tensor) -> Tensor:
        return (directions * coefficient).sum(dim=0)

    @override
    def slope(self, directions: Tensor, coefficient: Tensor) -> Tensor:
        return directions


def _divergence_and_threshold(terms: Terms, k: int) -> tuple[Tensor, Tensor]:
    """Return `KL(p || q)` of each row of source k, and the importance threshold."""
    assert terms.origin is not None
    dtype, device = terms.accumulate_dtype, terms.sources[k].device
    length = terms.shape[-1] if len(terms.shape) else 1
    sources, bases = terms.sources[k].reshape(-1, length), terms.origin.reshape(-1, length)
    divergences = torch.empty(len(sources), dtype=dtype, device=device)
    importance = torch.empty(sources.shape, dtype=dtype, device=device)
    step = max(1, chunk_size(device) // length)
    for start in range(0, len(sources), step):
        rows = slice(start, start + step)
        base, source = bases[rows].to(dtype), sources[rows].to(dtype)
        difference = source if terms.directions else source - base
        p = (base + source if terms.directions else source).softmax(dim=-1) + _EPSILON
        q = base.softmax(dim=-1) + _EPSILON
        divergences[rows] = (p * (p / q).log()).sum(dim=-1)
        torch.mul(difference.abs(), divergences[rows, None], out=importance[rows])
    low, middle, high = _at_ranks(importance.view(-1), (0.25, 0.5, 0.75))
    return divergences, middle + 1.5 * (high - low)


def _at_ranks(values: Tensor, shares: tuple[float, ...]) -> list[Tensor]:
    """Return the values at ranks `floor(share * (n - 1))`; reorders `values` on a CPU."""
    ranks = [int(share * (len(values) - 1)) for share in shares]
    if values.device.type != "cpu":
        return [values.kthvalue(rank + 1).values for rank in ranks]
    values.numpy().partition(ranks)  # one pass for all ranks
    return [values[rank].clone() for rank in ranks]
