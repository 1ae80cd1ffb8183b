"""Merging and contracting with torch operations, one cache-sized chunk at a time.

This works on every device and dtype; formulas and precision are those of `linear`. Gathering a
chunk of all sources for one matrix-vector product was measured to be slower over a whole model,
except when merging many 16-bit sources.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from gradmerge.operators.base import FlatView, Spread, Terms

# Entries per chunk and CPU thread: gradient, origin and one source in float32 fit in a core's
# second-level cache (docs/benchmarks.md has the sweep). A GPU needs few, large kernels.
_CPU_CHUNK = 65_536
_GPU_CHUNK = 1 << 26


def chunks_of(view: FlatView, size: int) -> tuple[int, Iterator[slice]]:
    """Return the length of a chunk of the flat tensor, and the columns that each chunk spans.

    Chunks have about `size` entries, and consist of whole rows of the view if they span its width;
    all but the last have the same length.
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


def chunk_size(device: torch.device) -> int:
    """Return the number of entries per chunk on a device."""
    return _CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else _GPU_CHUNK


class _Kept(threading.local):
    """Buffers that are kept between calls, because new ones would cause page faults at each call.

    There is one set per thread, because backward may run in a different thread than forward.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


class _Scratch:
    """Reusable buffers of the length of a chunk, by name."""

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length, self.dtype, self.device = length, dtype, device
        self._buffers: dict[str, Tensor] = {}

    def empty(self, name: str, size: int) -> Tensor:
        """Return the uninitialised buffer `name` with `size` entries."""
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = self._allocate(name)
        return buffer if size == self.length else buffer[:size]

    def _allocate(self, name: str) -> Tensor:
        if self.device.type != "cpu":
            # a GPU's allocator reuses memory itself, and chunks there are too large to keep
            return torch.empty(self.length, dtype=self.dtype, device=self.device)
        kept = _kept.buffers.get((name, self.dtype))
        if kept is None or kept.numel() < self.length:
            # a buffer created in inference mode could not be written to in training
            with torch.inference_mode(False):
                kept = torch.empty(self.length, dtype=self.dtype)
            _kept.buffers[name, self.dtype] = kept
        return kept[: self.length]

    def widen(self, name: str, part: Tensor) -> Tensor:
        """Return `part` in the accumulation dtype on the device, copied only if necessary."""
        part = part.to(self.device)  # in its own dtype: the host would widen it first
        return part if part.dtype == self.dtype else self.empty(name, part.numel()).copy_(part)


def combine(terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
    """Merge as `AbstractOperator.combine` does, with coefficients `[sources, slot]`."""
    view = FlatView.of(terms.shape, spread)
    flat = [term.reshape(-1) for term in terms.stored]
    dtype = torch.promote_types(terms.accumulate_dtype, out.dtype)
    length, chunks = chunks_of(view, chunk_size(out.device))
    scratch = _Scratch(length, dtype, out.device)
    scalar = _is_number(coefficient, spread)
    scalars = stored_weights(terms, coefficient.double()).flatten().tolist() if scalar else []
    targets = out.view(-1).split(length)
    for target, columns, *parts in zip(targets, chunks, *_split(flat, length), strict=True):
        total = target if out.dtype == dtype else scratch.empty("total", target.numel())
        if scalar:
            torch.mul(scratch.widen("term", parts[0]), scalars[0], out=total)
            for part, weight in zip(parts[1:], scalars[1:], strict=True):
                total.add_(scratch.widen("term", part), alpha=weight)
        else:
            width = columns.stop - columns.start
            block = total.view((1, 1, -1) if view.width == 1 else (-1, width, view.inner))
            along = stored_weights(terms, select(coefficient, columns, spread).to(dtype))
            for k, part in enumerate(parts):
                wide = scratch.widen("term", part).view(block.shape)
                if k == 0:
                    torch.mul(wide, along[k], out=block)
                else:
                    block.addcmul_(wide, along[k])
        if total is not target:
            target.copy_(total)
    return out


def _is_number(coefficient: Tensor, spread: Spread) -> bool:
    """Return whether coefficients are used as numbers; those of a device must be waited for."""
    return spread.kind == "scalar" and coefficient.device.type == "cpu"


def contract(terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
    """Contract as `AbstractOperator.contract` does."""
    view = FlatView.of(terms.shape, spread)
    flat = [source.reshape(-1) for source in terms.sources]
    dtype = torch.promote_types(terms.accumulate_dtype, grad.dtype)
    length, chunks = chunks_of(view, chunk_size(grad.device))
    scratch = _Scratch(length, dtype, grad.device)
    pieces = grad.reshape(-1).split(length)
    origins: Iterator[Tensor | None] = repeat(None, len(pieces))
    if terms.origin is not None:
        origins = iter(terms.origin.reshape(-1).split(length))
    total = torch.zeros(
        coefficient.shape,
        # sums over chunks are in float64; a coefficient per entry needs no sum
        dtype=dtype if spread.kind == "element" else torch.float64,
        device=grad.device,
    ).view(len(flat), -1)
    scalar_sums: list[Tensor] = []
    for piece, columns, origin, *parts in zip(
        pieces, chunks, origins, *_split(flat, length), strict=True
    ):
        piece = scratch.widen("grad", piece)
        first = parts[0] if terms.mean_origin else None if terms.directions else origin
        anchor = None if first is None else scratch.widen("anchor", first)
        shift = _shift(scratch, parts, anchor) if terms.mean_origin and anchor is not None else None
        for k, part in enumerate(parts):
            direction = _direction(scratch, part, anchor, shift)
            if spread.kind == "scalar":
                scalar_sums.append(torch.dot(direction, piece))
                continue
            product = scratch.empty("product", piece.numel())
            torch.mul(direction, piece, out=product)
            _accumulate(total[k], product, columns, spread, view)
    if scalar_sums:
        total = torch.stack(scalar_sums).view(-1, len(flat)).double().sum(dim=0)
    return total.view(coefficient.shape).to(coefficient.dtype)


def _accumulate(
    total: Tensor, product: Tensor, columns: slice, spread: Spread, view: FlatView
) -> None:
    """Add the products of one source and chunk, in the accumulation dtype, to `total`, `[slot]`."""
    if spread.kind == "element":
        total[columns] = product
    elif spread.kind == "partition":
        total.index_add_(0, spread.indices(columns), product.double())
    else:
        block = product.view(-1, columns.stop - columns.start, view.inner)
        total[columns] += block.sum(dim=(0, 2)).double()


def stored_weights(terms: Terms, coefficient: Tensor) -> Tensor:
    """Return weights of the stored tensors, `[stored, ...]`, for coefficients `[sources, ...]`."""
    if terms.directions:
        one = torch.ones_like(coefficient[:1])
        return coefficient if terms.origin is None else torch.cat([one, coefficient])
    rest = 1 - coefficient.sum(dim=0, keepdim=True)
    if terms.origin is not None:
        return torch.cat([rest, coefficient])
    return coefficient + rest / len(coefficient) if terms.mean_origin else coefficient


def _split(flat: Sequence[Tensor], length: int) -> list[tuple[Tensor, ...]]:
    return [term.split(length) for term in flat]


def _shift(scratch: _Scratch, parts: Sequence[Tensor], anchor: Tensor) -> Tensor:
    """Return the mean over the sources of `source - anchor`, whose differences are small."""
    total = scratch.empty("shift", parts[0].numel()).zero_()
    for part in parts:
        total.add_(_direction(scratch, part, anchor, None))
    return total.div_(len(parts))


def _direction(
    scratch: _Scratch, part: Tensor, anchor: Tensor | None, shift: Tensor | None
) -> Tensor:
    """Return a chunk of a source minus that of the origin, which is `anchor + shift`."""
    if anchor is None:
        return scratch.widen("direction", part)
    if part.dtype == scratch.dtype and part.device == scratch.device:
        direction = scratch.empty("direction", part.numel())
        torch.sub(part, anchor, out=direction)
    else:
        direction = scratch.widen("direction", part).sub_(anchor)
    return direction if shift is None else direction.sub_(shift)


@dataclass(frozen=True)
class Block:
    """Contiguous entries of the flat tensor."""

    entries: slice
    """Position in the flat tensor."""
    columns: slice
    """Columns of the view that the block spans."""
    directions: Tensor
    """`B_k`, `[sources, outer, columns, inner]`; the next block overwrites this buffer."""
    origin: Tensor | None
    """`A`, `[entries]`; None for zero."""


def blocks(
    terms: Terms, view: FlatView, dtype: torch.dtype, device: torch.device
) -> Iterator[Block]:
    """Iterate over the blocks of a tensor in order; differences are formed in `dtype`."""
    num, size = len(terms.sources), terms.shape.numel()
    length, along = chunks_of(view, max(1, chunk_size(device) // num))
    flat = [source.reshape(-1) for source in terms.sources]
    anchor = None if terms.origin is None else terms.origin.reshape(-1)
    buffer = torch.empty(num, min(length, size), dtype=dtype, device=device)
    for start, columns in zip(range(0, size, length), along, strict=True):
        entries = slice(start, min(start + length, size))
        directions = buffer[:, : entries.stop - start]
        for row, source in zip(directions, flat, strict=True):
            row.copy_(source[entries].to(device))
        origin = None
        if anchor is not None:
            origin = anchor[entries].to(device).to(dtype)
        elif terms.mean_origin:
            origin = directions[0].clone()
        if origin is not None and not terms.directions:
            directions.sub_(origin)
        if terms.mean_origin and origin is not None:
            # means of differences to the first source keep digits that means of weights would lose
            shift = directions.mean(dim=0)
            directions.sub_(shift)
            origin.add_(shift)
        if terms.masks is not None and terms.factors is not None:
            for row, mask, factor in zip(directions, terms.masks, terms.factors, strict=True):
                if mask is not None:
                    row.masked_fill_(mask[entries].to(device) == 0, 0)
                row.mul_(factor)
        width = columns.stop - columns.start
        shape = (num, 1, 1, -1) if view.width == 1 else (num, -1, width, view.inner)
        yield Block(entries, columns, directions.view(shape), origin)


def select(coefficient: Tensor, columns: slice, spread: Spread) -> Tensor:
    """Return the coefficients of a block, `[sources, 1, columns, 1]`, from `[sources, slot]`."""
    if spread.kind == "partition":
        chosen = coefficient[:, spread.indices(columns)]
    else:
        chosen = coefficient[:, columns]
    return chosen.reshape(len(chosen), 1, -1, 1)


def collect(total: Tensor, products: Tensor, columns: slice, spread: Spread) -> None:
    """Add products `[sources, outer, columns, inner]` of a block to `total`, `[sources, slot]`."""
    if spread.kind == "element":
        total[:, columns] = products.reshape(len(products), -1)
    elif spread.kind == "partition":
        flat = products.reshape(len(products), -1).to(total.dtype)
        total.index_add_(1, spread.indices(columns), flat)
    else:
        total[:, columns] += products.sum(dim=(1, 3), dtype=total.dtype)
