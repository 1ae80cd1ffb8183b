"""The linear operator: `theta = A + sum_k c_k (.) B_k`, with directions `B_k = theta_k - A`.

The directions are never stored. Forward uses

    theta = (1 - sum_k c_k) A + sum_k c_k theta_k,

which gives A exactly for c = 0 and theta_k exactly for a single c_k = 1. Backward is one inner
product a source, `dL/dc_k = <G, theta_k - A>` restricted to the entries that share c_k. Here the
difference is formed first, in the accumulation dtype: fine-tuned weights lie close to their base,
and the difference of two long inner products would lose the digits that carry the gradient.

Both run over cache-sized chunks, so that each stored byte is read from memory once a pass and no
temporary grows with the tensor: 16-bit sources are widened a chunk at a time. One call a source and
chunk beats gathering a chunk of all sources for one matrix-vector product: its arithmetic hides
behind the reads, where a gather waits for memory first and computes afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmerge.operators.base import AbstractOperator, Spread, Terms

# Entries a chunk on the CPU, a thread: gradient, origin and one source in float32 stay in a core's
# second-level cache (docs/benchmarks.md has the sweep). A GPU wants few, large kernels.
_CPU_CHUNK = 65_536
_GPU_CHUNK = 1 << 26


@dataclass(frozen=True)
class _View:
    """A tensor seen as `[outer, width, inner]`, with coefficients along `width`.

    `width` is 1 for a scalar coefficient and all entries for one a weight.
    """

    outer: int
    width: int
    inner: int


def _view(shape: torch.Size, spread: Spread) -> _View:
    size = shape.numel()
    if spread.kind == "axis":
        outer = shape[: spread.axis].numel()
        return _View(outer, shape[spread.axis], shape[spread.axis + 1 :].numel())
    if spread.kind == "scalar":
        return _View(1, 1, size)
    return _View(1, size, 1)


def _chunks(view: _View, size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks as (entries of the flat tensor, coefficients along the width)."""
    row = view.width * view.inner
    if view.width == 1:
        for start in range(0, view.outer * row, size):
            yield slice(start, min(start + size, view.outer * row)), slice(0, 1)
    elif view.outer > 1:
        step = max(1, size // row)
        for start in range(0, view.outer, step):
            stop = min(start + step, view.outer)
            yield slice(start * row, stop * row), slice(0, view.width)
    else:
        step = max(1, size // view.inner)
        for start in range(0, view.width, step):
            stop = min(start + step, view.width)
            yield slice(start * view.inner, stop * view.inner), slice(start, stop)


def _chunk_size(device: torch.device) -> int:
    return _CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else _GPU_CHUNK


_Buffers = dict[tuple[str, torch.dtype, torch.device], Tensor]


class _Kept(threading.local):
    """Buffers that stay from call to call: fresh ones would fault their pages in at each.

    A set a thread, because backward may run in another thread than forward.
    """

    def __init__(self) -> None:
        self.buffers: _Buffers = {}


_kept = _Kept()


class _Scratch:
    """Reused buffers; a term that already has the right dtype and device is used as it is."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        # A GPU's allocator reuses its own memory, and its chunks are too large to hold on to.
        self._buffers: _Buffers = _kept.buffers if device.type == "cpu" else {}

    def empty(self, name: str, size: int) -> Tensor:
        """A buffer of `size` entries under a name, contents undefined."""
        key = (name, self.dtype, self.device)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._buffers[key][:size]

    def widen(self, name: str, part: Tensor) -> Tensor:
        """`part` in the accumulation dtype on the device."""
        if part.dtype == self.dtype and part.device == self.device:
            return part
        return self.empty(name, part.numel()).copy_(part)


@dataclass(frozen=True)
class Linear(AbstractOperator):
    """`theta = A + sum_k c_k (theta_k - A)` (task arithmetic, averaging, and all learned sums)."""

    def combine(self, terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
        """See `AbstractOperator.combine`; differentiable through `contract`."""
        view = _view(terms.shape, spread)
        stored = terms.sources if terms.origin is None else [terms.origin, *terms.sources]
        flat = [term.reshape(-1) for term in stored]
        dtype = terms.accumulate_dtype
        coefficient = coefficient.detach().view(len(terms.sources), -1)
        size = min(_chunk_size(out.device), max(1, terms.shape.numel()))
        scratch = _Scratch(dtype, out.device)
        target = out.view(-1)
        scalar = spread.kind == "scalar"
        scalars = _weights(terms, coefficient.double()).flatten().tolist() if scalar else []
        for entries, columns in _chunks(view, size):
            direct = target.dtype == dtype
            length = entries.stop - entries.start
            total = target[entries] if direct else scratch.empty("total", length)
            if scalar:
                torch.mul(scratch.widen("term", flat[0][entries]), scalars[0], out=total)
                for term, weight in zip(flat[1:], scalars[1:], strict=True):
                    total.add_(scratch.widen("term", term[entries]), alpha=weight)
            else:
                block = total.view(-1, columns.stop - columns.start, view.inner)
                along = _along(terms, coefficient, columns, spread, dtype)
                for k, term in enumerate(flat):
                    part = scratch.widen("term", term[entries]).view(block.shape)
                    if k == 0:
                        torch.mul(part, along[k], out=block)
                    else:
                        block.addcmul_(part, along[k])
            if not direct:
                target[entries] = total
        return out

    def contract(self, terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
        """See `AbstractOperator.contract`."""
        view = _view(terms.shape, spread)
        flat = [source.reshape(-1) for source in terms.sources]
        origin = None if terms.origin is None else terms.origin.reshape(-1)
        size = min(_chunk_size(grad.device), max(1, terms.shape.numel()))
        dtype = terms.accumulate_dtype
        scratch = _Scratch(dtype, grad.device)
        flat_grad = grad.reshape(-1)
        total = torch.zeros(
            coefficient.shape,
            # Chunk sums of a shared coefficient are added up in float64; an entry's own is exact.
            dtype=dtype if spread.kind == "element" else torch.float64,
            device=grad.device,
        ).view(len(flat), -1)
        scalar_sums: list[Tensor] = []
        for entries, columns in _chunks(view, size):
            piece = scratch.widen("grad", flat_grad[entries])
            anchor = _anchor(scratch, flat, origin, terms.mean_origin, entries)
            for k, source in enumerate(flat):
                part = source[entries]
                if anchor is not None:
                    difference = scratch.empty("difference", piece.numel())
                    if part.dtype == dtype and part.device == grad.device:
                        torch.sub(part, anchor, out=difference)
                    else:
                        difference.copy_(part).sub_(anchor)
                    part = difference
                else:
                    part = scratch.widen("difference", part)
                if spread.kind == "scalar":
                    scalar_sums.append(torch.dot(part, piece))
                    continue
                product = torch.mul(part, piece, out=scratch.empty("product", piece.numel()))
                if spread.kind == "element":
                    total[k, columns] = product
                elif spread.kind == "partition":
                    assert spread.parts is not None
                    total[k].index_add_(0, spread.parts[entries], product.double())
                else:
                    block = product.view(-1, columns.stop - columns.start, view.inner)
                    total[k, columns] += block.sum(dim=(0, 2)).double()
        if scalar_sums:
            total = torch.stack(scalar_sums).view(-1, len(flat)).double().sum(dim=0)
        return total.view(coefficient.shape).to(coefficient.dtype)


def _weights(terms: Terms, coefficient: Tensor) -> Tensor:
    """Weights of the stored tensors, `[stored, ...]`, from coefficients `[sources, ...]`."""
    rest = 1 - coefficient.sum(dim=0, keepdim=True)
    if terms.origin is not None:
        return torch.cat([rest, coefficient])
    return coefficient + rest / len(coefficient) if terms.mean_origin else coefficient


def _along(
    terms: Terms, coefficient: Tensor, columns: slice, spread: Spread, dtype: torch.dtype
) -> Tensor:
    """A block's weights, `[stored, 1, columns, 1]`, to broadcast over `[outer, columns, inner]`."""
    if spread.kind == "partition":
        assert spread.parts is not None
        chosen = coefficient[:, spread.parts[columns]]
    else:
        chosen = coefficient[:, columns]
    weights = _weights(terms, chosen.to(dtype))
    return weights.view(len(weights), 1, -1, 1)


def _anchor(
    scratch: _Scratch,
    flat: list[Tensor],
    origin: Tensor | None,
    mean_origin: bool,
    entries: slice,
) -> Tensor | None:
    """The origin's chunk that directions are measured from, or None where it is zero."""
    if origin is not None:
        return scratch.widen("anchor", origin[entries])
    if not mean_origin:
        return None
    total = scratch.empty("anchor", entries.stop - entries.start).copy_(flat[0][entries])
    for source in flat[1:]:
        total.add_(scratch.widen("difference", source[entries]))
    return total.div_(len(flat))
