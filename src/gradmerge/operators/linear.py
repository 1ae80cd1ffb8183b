"""The linear operator: `theta = A + sum_k c_k (.) B_k`, with directions `B_k = theta_k - A`.

The directions are never stored. Forward uses

    theta = (1 - sum_k c_k) A + sum_k c_k theta_k,

which gives A exactly for c = 0 and theta_k exactly for a single c_k = 1. Backward is one inner
product a source, `dL/dc_k = <G, theta_k - A>` restricted to the entries that share c_k. Here the
difference is formed first, in the accumulation dtype: fine-tuned weights lie close to their base,
and the difference of two long inner products would lose the digits that carry the gradient.

Both run over cache-sized chunks, so that each stored byte is read from memory once a pass and no
temporary grows with the tensor: 16-bit sources are widened a chunk at a time. Gathering a chunk of
all sources for one matrix-vector product was slower when measured over a whole model, but for
merging many 16-bit sources.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

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


def _chunks(view: _View, size: int) -> tuple[int, Iterator[slice]]:
    """Length of a chunk of the flat tensor, and the coefficients along the width of each chunk.

    Chunks hold whole rows of the view where they span the width, and about `size` entries; all
    but the last have the same length.
    """
    row = view.width * view.inner
    if view.width == 1:
        length = max(1, min(size, view.outer * row))
        return length, (slice(0, 1) for _ in range(0, view.outer * row, length))
    if view.outer > 1:
        step = max(1, size // max(1, row))
        return step * row, (slice(0, view.width) for _ in range(0, view.outer, step))
    step = max(1, min(size // max(1, view.inner), view.width))
    columns = (slice(i, min(i + step, view.width)) for i in range(0, view.width, step))
    return step * view.inner, columns


def _chunk_size(device: torch.device) -> int:
    return _CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else _GPU_CHUNK


class _Kept(threading.local):
    """Buffers that stay from call to call: fresh ones would fault their pages in at each.

    A set a thread, because backward may run in another thread than forward.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


class _Scratch:
    """Reused buffers of a chunk's length; a term of the right dtype and device is used as it is."""

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length, self.dtype, self.device = length, dtype, device
        self._buffers: dict[str, Tensor] = {}

    def empty(self, name: str, size: int) -> Tensor:
        """A buffer of `size` entries under a name, contents undefined."""
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = self._allocate(name)
        return buffer if size == self.length else buffer[:size]

    def _allocate(self, name: str) -> Tensor:
        if self.device.type != "cpu":
            # a GPU's allocator reuses its own memory, and its chunks are too large to hold on to
            return torch.empty(self.length, dtype=self.dtype, device=self.device)
        kept = _kept.buffers.get((name, self.dtype))
        if kept is None or kept.numel() < self.length:
            # made in inference mode it could not be written to in training
            with torch.inference_mode(False):
                kept = torch.empty(self.length, dtype=self.dtype)
            _kept.buffers[name, self.dtype] = kept
        return kept[: self.length]

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
        if not out.numel():
            return out
        view = _view(terms.shape, spread)
        stored = terms.sources if terms.origin is None else [terms.origin, *terms.sources]
        flat = [term.reshape(-1) for term in stored]
        dtype = terms.accumulate_dtype
        coefficient = coefficient.detach().view(len(terms.sources), -1)
        length, chunks = _chunks(view, _chunk_size(out.device))
        scratch = _Scratch(length, dtype, out.device)
        scalar = spread.kind == "scalar"
        scalars = stored_weights(terms, coefficient.double()).flatten().tolist() if scalar else []
        targets = out.view(-1).split(length)
        for target, columns, *parts in zip(targets, chunks, *_split(flat, length), strict=True):
            total = target if out.dtype == dtype else scratch.empty("total", target.numel())
            if scalar:
                torch.mul(scratch.widen("term", parts[0]), scalars[0], out=total)
                for part, weight in zip(parts[1:], scalars[1:], strict=True):
                    total.add_(scratch.widen("term", part), alpha=weight)
            else:
                block = total.view(-1, columns.stop - columns.start, view.inner)
                along = _along(terms, coefficient, columns, spread, dtype)
                for k, part in enumerate(parts):
                    wide = scratch.widen("term", part).view(block.shape)
                    if k == 0:
                        torch.mul(wide, along[k], out=block)
                    else:
                        block.addcmul_(wide, along[k])
            if total is not target:
                target.copy_(total)
        return out

    def contract(self, terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
        """See `AbstractOperator.contract`."""
        if not grad.numel():
            return torch.zeros_like(coefficient)
        view = _view(terms.shape, spread)
        flat = [source.reshape(-1) for source in terms.sources]
        dtype = terms.accumulate_dtype
        length, chunks = _chunks(view, _chunk_size(grad.device))
        scratch = _Scratch(length, dtype, grad.device)
        pieces = grad.reshape(-1).split(length)
        origins: Iterator[Tensor | None] = repeat(None, len(pieces))
        if terms.origin is not None:
            origins = iter(terms.origin.reshape(-1).split(length))
        total = torch.zeros(
            coefficient.shape,
            # Chunk sums of a shared coefficient are added up in float64; an entry's own is exact.
            dtype=dtype if spread.kind == "element" else torch.float64,
            device=grad.device,
        ).view(len(flat), -1)
        scalar_sums: list[Tensor] = []
        start = 0
        for piece, columns, origin, *parts in zip(
            pieces, chunks, origins, *_split(flat, length), strict=True
        ):
            piece = scratch.widen("grad", piece)
            anchor = _anchor(scratch, parts, origin, terms.mean_origin)
            for k, part in enumerate(parts):
                if anchor is None:
                    direction = scratch.widen("direction", part)
                elif part.dtype == dtype and part.device == grad.device:
                    direction = scratch.empty("direction", part.numel())
                    torch.sub(part, anchor, out=direction)
                else:
                    direction = scratch.widen("direction", part).sub_(anchor)
                if spread.kind == "scalar":
                    scalar_sums.append(torch.dot(direction, piece))
                    continue
                product = scratch.empty("product", piece.numel())
                torch.mul(direction, piece, out=product)
                if spread.kind == "element":
                    total[k, columns] = product
                elif spread.kind == "partition":
                    assert spread.parts is not None
                    own = spread.parts[start : start + piece.numel()]
                    total[k].index_add_(0, own, product.double())
                else:
                    block = product.view(-1, columns.stop - columns.start, view.inner)
                    total[k, columns] += block.sum(dim=(0, 2)).double()
            start += piece.numel()
        if scalar_sums:
            total = torch.stack(scalar_sums).view(-1, len(flat)).double().sum(dim=0)
        return total.view(coefficient.shape).to(coefficient.dtype)


def stored_weights(terms: Terms, coefficient: Tensor) -> Tensor:
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
    weights = stored_weights(terms, chosen.to(dtype))
    return weights.view(len(weights), 1, -1, 1)


def _split(flat: Sequence[Tensor], length: int) -> list[tuple[Tensor, ...]]:
    return [term.split(length) for term in flat]


def _anchor(
    scratch: _Scratch, parts: Sequence[Tensor], origin: Tensor | None, mean_origin: bool
) -> Tensor | None:
    """The origin's chunk that directions are measured from, or None where it is zero."""
    if origin is not None:
        return scratch.widen("anchor", origin)
    if not mean_origin:
        return None
    total = scratch.empty("anchor", parts[0].numel()).copy_(parts[0])
    for part in parts[1:]:
        total.add_(scratch.widen("direction", part))
    return total.div_(len(parts))
