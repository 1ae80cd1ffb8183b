"""Base class of operators on separate entries: `theta_e = A_e + f(B_1e, ..., B_Ke; c)`.

A subclass defines `f` and its slopes `df/dc_k` by a few torch operations on a block of entries. The
iteration over blocks and the sums over entries that share a coefficient are implemented here. No
temporary grows with the tensor.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.operators.base import AbstractOperator, FlatView, Spread, Terms
from gradmerge.operators.chunks import blocks, collect, select

Prepared = Callable[[Tensor, slice], Tensor]


class AbstractEntrywise(AbstractOperator):
    """Merge of separate entries: `theta = A + merge(B, c)`.

    Differences, products and sums over sources are in float32 (float64 if a tensor or the result
    is), sums over entries in float64. The gradient is `dL/dc_k = sum_e G_e slope_k,e` over the
    entries e that share `c_k`, with `G = dL/dtheta`.
    """

    @abstractmethod
    def merge(self, directions: Tensor, coefficient: Tensor) -> Tensor:
        """Return what is added to the origin, `[outer, columns, inner]`.

        Args:
            directions: `[sources, outer, columns, inner]`.
            coefficient: `[sources, 1, columns, 1]`.
        """

    @abstractmethod
    def slope(self, directions: Tensor, coefficient: Tensor) -> Tensor:
        """Return `d merge / dc_k` of each entry, `[sources, outer, columns, inner]`."""

    def prepare(self, terms: Terms, device: torch.device) -> Prepared:
        """Return a function that is applied to each block of directions first.

        It maps directions `[sources, entries]` and their position in the flat tensor to new ones.
        """
        return _unchanged

    @override
    def combine(self, terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
        if not out.numel():
            return out
        dtype = torch.promote_types(terms.accumulate_dtype, out.dtype)
        rows = coefficient.detach().reshape(len(terms.sources), -1).to(out.device, dtype)
        prepared, target = self.prepare(terms, out.device), out.view(-1)
        for block in blocks(terms, FlatView.of(terms.shape, spread), dtype, out.device):
            directions = _prepared(prepared, block.directions, block.entries)
            merged = self.merge(directions, select(rows, block.columns, spread)).reshape(-1)
            target[block.entries] = merged if block.origin is None else block.origin + merged
        return out

    @override
    def contract(self, terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
        dtype = torch.promote_types(terms.accumulate_dtype, grad.dtype)
        rows = coefficient.detach().reshape(len(terms.sources), -1).to(grad.device, dtype)
        # a coefficient per entry needs no sum
        total = torch.zeros_like(rows, dtype=dtype if spread.kind == "element" else torch.float64)
        if grad.numel():
            prepared, flat = self.prepare(terms, grad.device), grad.reshape(-1)
            for block in blocks(terms, FlatView.of(terms.shape, spread), dtype, grad.device):
                directions = _prepared(prepared, block.directions, block.entries)
                slope = self.slope(directions, select(rows, block.columns, spread))
                piece = flat[block.entries].to(dtype).view(slope.shape[1:])
                collect(total, slope * piece, block.columns, spread)
        return total.view(coefficient.shape).to(coefficient.dtype)


def _unchanged(directions: Tensor, entries: slice) -> Tensor:
    return directions


def _prepared(prepared: Prepared, directions: Tensor, entries: slice) -> Tensor:
    return prepared(directions.view(len(directions), -1), entries).view(directions.shape)
