"""Directions of a tensor, a cache-sized block at a time, in the accumulation dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmerge.operators.base import Spread, Terms, View
from gradmerge.operators.chunks import chunk_size, chunks_of


@dataclass(frozen=True)
class Block:
    """A run of neighbouring entries of the flat tensor."""

    entries: slice
    """Where it lies."""
    columns: slice
    """The part of the view's width that it spans."""
    directions: Tensor
    """`B_k`, `[sources, outer, columns, inner]`; the buffer is written over for the next block."""
    origin: Tensor | None
    """`A`, `[entries]`; None for zero."""


def blocks(terms: Terms, view: View, dtype: torch.dtype, device: torch.device) -> Iterator[Block]:
    """All of a tensor's blocks, in order; differences are formed in `dtype`."""
    num, size = len(terms.sources), terms.shape.numel()
    length, along = chunks_of(view, max(1, chunk_size(device) // num))
    flat = [source.reshape(-1) for source in terms.sources]
    anchor = None if terms.origin is None else terms.origin.reshape(-1)
    buffer = torch.empty(num, min(length, size), dtype=dtype, device=device)
    for start, columns in zip(range(0, size, length), along, strict=True):
        entries = slice(start, min(start + length, size))
        directions = buffer[:, : entries.stop - start]
        for row, source in zip(directions, flat, strict=True):
            row.copy_(source[entries])
        origin = None
        if anchor is not None:
            origin = anchor[entries].to(device=device, dtype=dtype)
        elif terms.mean_origin:
            origin = directions[0].clone()
        if origin is not None and not terms.directions:
            directions.sub_(origin)
        if terms.mean_origin and origin is not None:
            # from differences to the first source, whose digits a sum of the whole would lose
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
    """A block's coefficients, `[sources, 1, columns, 1]`, from all `[sources, slot]`."""
    if spread.kind == "partition":
        assert spread.parts is not None
        chosen = coefficient[:, spread.parts[columns]]
    else:
        chosen = coefficient[:, columns]
    return chosen.reshape(len(chosen), 1, -1, 1)


def collect(total: Tensor, products: Tensor, columns: slice, spread: Spread) -> None:
    """Add a block's products `[sources, outer, columns, inner]` up in its coefficients' slots,
    `[sources, slot]`.
    """
    if spread.kind == "element":
        total[:, columns] = products.reshape(len(products), -1)
    elif spread.kind == "partition":
        assert spread.parts is not None
        flat = products.reshape(len(products), -1).to(total.dtype)
        total.index_add_(1, spread.parts[columns], flat)
    else:
        total[:, columns] += products.sum(dim=(1, 3), dtype=total.dtype)
