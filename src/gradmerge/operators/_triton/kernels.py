"""Triton kernels for frozen tensors on a GPU. Formulas: `linear`; caller: `launch`.

A tensor is seen as a matrix with coefficients along its rows or its columns, or one per part. A
program works on one tile of R x C entries: it reads each stored byte once, in its own dtype, and
computes in float32. Nothing is added up with atomics, so results do not vary between runs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge(
    out,
    origin,
    sources,
    coefficients,
    step,
    parts,
    rows,
    columns,
    width,
    RULE: tl.constexpr,  # noqa: N803
    BY: tl.constexpr,  # noqa: N803
    R: tl.constexpr,  # noqa: N803
    C: tl.constexpr,  # noqa: N803
):
    """Write `out = A + sum_k c_k (.) B_k`.

    Args:
        out: pointer to the result; rounded from float32 once.
        origin: pointer to A, if RULE is "base" or "directions".
        sources: tuple of pointers to theta_k, or to B_k if RULE is "directions" or "zero".
        coefficients: pointer to c, `[sources, width]`, with neighbours along the width.
        step: entries of `coefficients` from one source to the next.
        parts: pointer to the part of each entry, if BY is "part".
        rows: number of rows.
        columns: number of columns.
        width: number of coefficients of a source.
        RULE: what A is: "zero", "base", "mean", or "directions" if it has been subtracted.
        BY: "row" (coefficient `row % width`), "column" or "part".
        R: rows of a tile.
        C: columns of a tile.
    """
    across = tl.cdiv(columns, C)
    tile = tl.program_id(0)
    row = (tile // across).to(tl.int64) * R + tl.arange(0, R)[:, None]
    column = (tile % across).to(tl.int64) * C + tl.arange(0, C)[None, :]
    inside = (row < rows) & (column < columns)
    entry = row * columns + column
    if BY == "row" and R == 1:
        own, given = (tile // across) % width, (tile // across) < rows  # a single number
    elif BY == "row":
        own, given = row % width, row < rows
    elif BY == "column":
        own, given = column, column < columns
    else:
        own, given = tl.load(parts + entry, mask=inside, other=0), inside
    total = tl.zeros((R, C), tl.float32)
    share = 0.0
    if RULE != "zero":
        rest = 1.0
        if RULE != "directions":
            at = coefficients + own
            for _ in tl.static_range(len(sources)):
                rest -= tl.load(at, mask=given, other=0).to(tl.float32)
                at += step
        if RULE == "mean":
            share = rest / len(sources)
        else:
            total += rest * tl.load(origin + entry, mask=inside, other=0).to(tl.float32)
    at = coefficients + own
    for k in tl.static_range(len(sources)):
        weight = tl.load(at, mask=given, other=0).to(tl.float32) + share
        total += weight * tl.load(sources[k] + entry, mask=inside, other=0).to(tl.float32)
        at += step
    tl.store(out + entry, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def contract(
    sums,
    grad,
    anchor,
    sources,
    parts,
    rows,
    columns,
    width,
    BY: tl.constexpr,  # noqa: N803
    R: tl.constexpr,  # noqa: N803
    C: tl.constexpr,  # noqa: N803
):
    """Write the sums of `grad * (source - anchor)` over the entries of each tile.

    Args:
        sums: pointer to the result, float32: `[tiles across, sources, rows]` by row, `[tiles down,
            sources, columns]` by column, `[tiles, sources, width]` by part.
        grad: pointer to the gradient.
        anchor: pointer to what is subtracted, or None.
        sources: tuple of pointers.
        parts: pointer to the part of each entry, if BY is "part".
        rows: number of rows.
        columns: number of columns.
        width: number of parts.
        BY: what is summed: the entries of a "row", a "column" or a "part".
        R: rows of a tile.
        C: columns of a tile.
    """
    across = tl.cdiv(columns, C)
    tile = tl.program_id(0)
    row = (tile // across).to(tl.int64) * R + tl.arange(0, R)
    column = (tile % across).to(tl.int64) * C + tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    entry = row[:, None] * columns + column[None, :]
    slope = tl.load(grad + entry, mask=inside, other=0).to(tl.float32)
    if anchor is not None:
        start = tl.load(anchor + entry, mask=inside, other=0).to(tl.float32)
    if BY == "part":
        part = tl.load(parts + entry, mask=inside, other=-1)
    coming = tl.load(sources[0] + entry, mask=inside, other=0)
    for k in tl.static_range(len(sources)):
        direction = coming.to(tl.float32)
        if k + 1 < len(sources):
            # under way while this source is summed, which waits for all threads
            coming = tl.load(sources[k + 1] + entry, mask=inside, other=0)
        if anchor is not None:
            direction -= start
        product = slope * direction
        if BY == "row":
            line = (tile % across).to(tl.int64) * len(sources) + k
            tl.store(sums + line * rows + row, tl.sum(product, axis=1), mask=row < rows)
        elif BY == "column":
            line = (tile // across).to(tl.int64) * len(sources) + k
            own = line * columns + column
            if R == 1:
                tl.store(sums + own[None, :], product, mask=inside)
            else:
                tl.store(sums + own, tl.sum(product, axis=0), mask=column < columns)
        else:
            line = tile.to(tl.int64) * len(sources) + k
            for each in range(width):
                chosen = tl.where(part == each, product, 0.0)
                tl.store(sums + line * width + each, tl.sum(tl.sum(chosen, axis=1), axis=0))
