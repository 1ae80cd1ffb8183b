"""Operators whose result lies in the span of the directions: `theta = A + sum_k w_k B_k`.

The weights `w = weights(G, c)` depend only on the coefficients and on the Gram matrix of the
directions, `G_ij = <B_i, B_j>`: K x K numbers per tensor, row or column. Spherical interpolation,
means on the sphere and Model Stock are of this kind. A merge is one pass for the Gram matrix, a few
operations on small matrices in float64, and the linear operator. The Gram matrix is constant, so
the gradient is exact:

    dL/dc = (dw/dc)^T dL/dw,    dL/dw_k = <dL/dtheta, B_k>

with the contraction of the linear operator for `dL/dw` and autograd through `weights`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.operators._native import kernels_for, selection
from gradmerge.operators.base import AbstractOperator, FlatView, Spread, Terms
from gradmerge.operators.chunks import blocks, chunk_size
from gradmerge.operators.linear import Linear, directions_of

Per = Literal["tensor", "row", "column"]
# Entries at a time where each has its own Gram matrix and weights, which are far larger in float64.
_MOST_ENTRIES = 1 << 20


class AbstractSpan(AbstractOperator):
    """Merge in the span of the directions: `theta = A + sum_k w_k B_k` with `w = weights(G, c)`.

    The Gram matrix `G_ij = <B_i, B_j>` is computed in float64, one block at a time, and cached,
    since frozen tensors never change. Coefficients may have any spread: weights are computed per
    slot, or, if Gram matrices and slots run along different axes, per entry, one block at a time.
    """

    by_rows = True

    @abstractmethod
    def weights(self, gram: Tensor, coefficient: Tensor) -> Tensor:
        """Return the weights of the directions, `[sources, n]`, differentiable in the coefficients.

        Args:
            gram: `[n or 1, sources, sources]`, float64.
            coefficient: `[sources, n or 1]`, float64.
        """

    def gram_view(self, shape: torch.Size) -> FlatView:
        """Return the view along whose width Gram matrices run; by default a single one."""
        return FlatView(1, 1, shape.numel())

    def gram(self, terms: Terms, device: torch.device) -> Tensor:
        """Return `<B_i, B_j>`, `[width, sources, sources]`, float64."""
        view = self.gram_view(terms.shape)
        key = f"gram {view} {device}"
        if key not in terms.facts:
            # a tensor created in inference mode could not be used by autograd in training
            with torch.inference_mode(False), torch.no_grad():
                gram = _gram(terms, view, device)
                # rows of the last axis are vectors of their own; other sums run over all rows
                apart = view.outer == 1 and view.width > 1
                terms.facts[key] = gram if terms.total is None or apart else terms.total(gram)
        return terms.facts[key]

    @override
    def combine(self, terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
        if not out.numel():
            return out
        terms = terms.dense()
        gram, rows = self.gram(terms, out.device), _rows(terms, coefficient, out.device)
        compact = self._compact(terms, spread)
        if compact is not None:
            terms, spread = compact
            Linear().combine(terms, self.weights(gram, rows), spread, out.view(terms.shape))
            return out
        flat = out.view(-1)
        for entries, part, matrices, slots in self._parts(terms, spread, gram):
            weights = self.weights(matrices, rows[:, slots])
            Linear().combine(part, weights, Spread("element"), flat[entries])
        return out

    @override
    def contract(self, terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
        if not grad.numel():
            return torch.zeros_like(coefficient)
        terms = terms.dense()
        gram, rows = self.gram(terms, grad.device), _rows(terms, coefficient, grad.device)
        compact = self._compact(terms, spread)
        if compact is not None:
            total = self._pulled_back(gram, rows, *compact, grad)
        else:
            total, flat = torch.zeros_like(rows), grad.reshape(-1)
            for entries, part, matrices, slots in self._parts(terms, spread, gram):
                own = self._pulled_back(
                    matrices, rows[:, slots], part, Spread("element"), flat[entries]
                )
                total.index_add_(1, slots, own)
        return total.view(coefficient.shape).to(coefficient.device, coefficient.dtype)

    def _pulled_back(
        self, gram: Tensor, rows: Tensor, terms: Terms, spread: Spread, grad: Tensor
    ) -> Tensor:
        """Return `dL/dc`, `[sources, n]`, for weights in a spread of the linear operator."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = rows.clone().requires_grad_()
            weights = self.weights(gram, leaf)
        slope = Linear().contract(terms, grad.reshape(terms.shape), weights.detach(), spread)
        (found,) = torch.autograd.grad(weights, leaf, slope)
        return found

    def _compact(self, terms: Terms, spread: Spread) -> tuple[Terms, Spread] | None:
        """Return terms and spread with fewer weights than entries, or None if there are none."""
        view = self.gram_view(terms.shape)
        if view.width == 1:
            return None if spread.kind == "element" else (terms, spread)
        along = spread.kind == "axis" and FlatView.of(terms.shape, spread) == view
        if along or spread.kind == "scalar":
            shape = view.outer, view.width, view.inner
            return _reshaped(terms, shape), Spread("axis", 1)
        return None

    def _parts(
        self, terms: Terms, spread: Spread, gram: Tensor
    ) -> Iterator[tuple[slice, Terms, Tensor, Tensor]]:
        """Iterate over blocks of the flat tensor: their position and terms, and for each entry the
        Gram matrix, `[entries or 1, sources, sources]`, and the slot, `[entries]`.
        """
        view, own = self.gram_view(terms.shape), FlatView.of(terms.shape, spread)
        size, device = terms.shape.numel(), gram.device
        whole = _reshaped(terms, (size,))
        step = max(1, min(chunk_size(device) // len(terms.sources), _MOST_ENTRIES))
        for start in range(0, size, step):
            entries = slice(start, min(start + step, size))
            place = torch.arange(entries.start, entries.stop, device=device)
            slots = place // own.inner % own.width
            if spread.kind == "partition":
                slots = spread.indices(entries)
            matrices = gram if len(gram) == 1 else gram[place // view.inner % view.width]
            yield entries, _changed(whole, itemgetter(entries)), matrices, slots


def per_view(per: Per, shape: torch.Size) -> FlatView:
    """Return the view for one angle per tensor, per row (vectors along the last axis) or per column
    (vectors along the first axis). A 1-D tensor is always one vector.
    """
    size = shape.numel()
    if per == "tensor" or len(shape) < 2:
        return FlatView(1, 1, size)
    if per == "row":
        return FlatView(1, size // max(1, shape[-1]), shape[-1])
    return FlatView(shape[0], size // max(1, shape[0]), 1)


def norms_of(gram: Tensor) -> Tensor:
    """Return `|B_k|`, `[sources, n]`, from Gram matrices `[n, sources, sources]`."""
    return gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().T


def _gram(terms: Terms, view: FlatView, device: torch.device) -> Tensor:
    num = len(terms.sources)
    kernels = None if terms.mean_origin or device.type != "cpu" else kernels_for(terms.stored)
    if kernels is not None and view.width == 1:
        return selection.gram(kernels, directions_of(terms))[None]
    total = torch.zeros(view.width, num, num, dtype=torch.float64, device=device)
    # differences are in float64, too: where directions nearly cancel, weights are large
    for block in blocks(terms, view, torch.float64, device):
        vectors = block.directions.permute(2, 0, 1, 3).flatten(2)
        total[block.columns] += vectors @ vectors.mT
    return total


def _rows(terms: Terms, coefficient: Tensor, device: torch.device) -> Tensor:
    return coefficient.detach().reshape(len(terms.sources), -1).to(device, torch.float64)


def _reshaped(terms: Terms, shape: tuple[int, ...]) -> Terms:
    return _changed(terms, lambda term: term.reshape(shape))


def _changed(terms: Terms, change: Callable[[Tensor], Tensor]) -> Terms:
    origin = None if terms.origin is None else change(terms.origin)
    sources = [change(source) for source in terms.sources]
    return Terms(sources, origin, terms.mean_origin, terms.directions)
