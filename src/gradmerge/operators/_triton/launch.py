"""Launches of the Triton kernels: the view of a tensor that they work on, and sums over tiles.

Coefficients stay on the device, and nothing waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gradmerge.operators import chunks
from gradmerge.operators._triton import kernels
from gradmerge.operators.base import FlatView, Spread, Terms

# Entries of a tile, which 8 warps share: 16 entries per thread. With eight sources of any dtype
# a thread's numbers fit in registers, and several tiles on a multiprocessor.
TILE = 4096
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
# Columns of a tile, at least: a cache line of 16-bit numbers.
_LINE = 64
# Neighbours that share a coefficient, from which on their sum is worth a row of its own.
_NEIGHBOURS = 32
# Parts of a tensor, at most: each takes a pass over the products of a tile.
MOST_PARTS = 64

By = Literal["row", "column", "part"]


@dataclass(frozen=True)
class Grid:
    """Tiling of a tensor that is seen as a matrix."""

    by: By
    """What shares a coefficient, or a sum."""
    rows: int
    columns: int
    down: int
    """Rows of a tile, a power of two."""
    across: int
    """Columns of a tile, a power of two."""

    @classmethod
    def of(cls, by: By, rows: int, columns: int) -> Grid:
        """Return tiles of `TILE` entries: wide ones, or tall ones if columns share something."""
        if by == "column":
            down = min(_power(rows), TILE // _LINE)
            across = min(_power(columns), TILE // down)
            return cls(by, rows, columns, min(_power(rows), TILE // across), across)
        across = min(_power(columns), TILE)
        return cls(by, rows, columns, min(_power(rows), TILE // across), across)

    @property
    def tiles(self) -> tuple[int, int]:
        """Number of tiles down and across."""
        return -(-self.rows // self.down), -(-self.columns // self.across)

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self.tiles[0] * self.tiles[1]


def _power(size: int) -> int:
    """Return the next power of two."""
    return 1 << (size - 1).bit_length()


def merging_grid(shape: torch.Size, spread: Spread) -> Grid:
    """Return the tiles of a merge."""
    view = FlatView.of(shape, spread)
    if spread.kind == "partition":
        return Grid.of("part", 1, view.width)
    if view.inner == 1 and view.width > 1:
        return Grid.of("column", view.outer, view.width)
    return Grid.of("row", view.outer * view.width, view.inner)


def contracting_grid(shape: torch.Size, spread: Spread) -> Grid:
    """Return the tiles of a contraction.

    Sums over few neighbours leave nearly as many numbers as the tensor has entries, so these are
    summed over the rows first, and by neighbours afterwards.
    """
    view = FlatView.of(shape, spread)
    grid = merging_grid(shape, spread)
    if grid.by == "row" and view.outer > 1 and view.inner < _NEIGHBOURS:
        return Grid.of("column", view.outer, view.width * view.inner)
    return grid


def launch(kernel: Any, grid: Grid, *given: Any, **constants: Any) -> None:
    """Start a kernel on every tile, on the device and stream of its first tensor."""
    with torch.cuda.device_of(given[0]):
        kernel[(grid.count,)](
            *given, BY=grid.by, R=grid.down, C=grid.across, **constants, **_OPTIONS
        )


def combine(terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
    """Merge as `AbstractOperator.combine` does, with coefficients `[sources, slot]`."""
    rule = "mean" if terms.mean_origin else "zero"
    if terms.origin is not None:
        rule = "directions" if terms.directions else "base"
    coefficient = coefficient.detach().view(len(terms.sources), -1)
    # without waiting: coefficients of fixed tensors lie on the host
    coefficient = coefficient.to(out.device, non_blocking=True)
    if coefficient.stride(1) != 1:
        coefficient = coefficient.contiguous()
    grid = merging_grid(terms.shape, spread)
    launch(
        kernels.merge,
        grid,
        out,
        None if terms.origin is None else terms.origin.contiguous(),
        tuple(source.contiguous() for source in terms.sources),
        coefficient,
        coefficient.stride(0),
        spread.parts,
        grid.rows,
        grid.columns,
        coefficient.shape[1],
        RULE=rule,
    )
    return out


def contract(terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
    """Contract as `AbstractOperator.contract` does."""
    width = coefficient.numel() // len(terms.sources)
    if spread.kind == "partition" and width > MOST_PARTS:
        return chunks.contract(terms, grad, coefficient, spread)
    sources, origin = terms.sources, None if terms.directions else terms.origin
    if terms.mean_origin:
        # differences to the first source, whose own is zero, keep digits that a mean would lose
        origin, *sources = sources
    found = _products(sources, origin, grad, spread, width)
    if terms.mean_origin:
        found = torch.cat([found.new_zeros(1, width), found])
        found -= found.mean(dim=0)
    return found.view(coefficient.shape).to(coefficient.dtype)


def _products(
    sources: list[Tensor], origin: Tensor | None, grad: Tensor, spread: Spread, width: int
) -> Tensor:
    """Return the sums of `grad * (source - origin)` by coefficient, `[sources, width]`.

    They are float32 over a tile and float64 over tiles; products of single entries are float32.
    """
    count = len(sources)
    if not sources:
        return torch.zeros(0, width, device=grad.device)
    grid = contracting_grid(grad.shape, spread)
    (down, across), by = grid.tiles, grid.by
    lines = across if by == "row" else down if by == "column" else grid.count
    length = {"row": grid.rows, "column": grid.columns, "part": width}[by]
    sums = torch.empty(lines, count, length, dtype=torch.float32, device=grad.device)
    launch(
        kernels.contract,
        grid,
        sums,
        grad.contiguous(),
        None if origin is None else origin.contiguous(),
        tuple(source.contiguous() for source in sources),
        spread.parts,
        grid.rows,
        grid.columns,
        width,
    )
    if lines == 1 and length == width:
        return sums[0]
    if by == "column":
        return sums.view(lines, count, width, -1).sum(dim=(0, 3), dtype=torch.float64)
    return sums.view(lines, count, -1, width).sum(dim=(0, 2), dtype=torch.float64)


def check(device: torch.device) -> None:
    """Run both kernels once on a few entries.

    Raises:
        RuntimeError: a result is wrong; or whatever compiling and launching them raises.
    """
    values = torch.ones(3, device=device)
    terms, half = Terms([3 * values], values), torch.full((1,), 0.5, device=device)
    merged = combine(terms, half, Spread("scalar"), torch.empty_like(values)).tolist()
    found = contract(terms, values, half, Spread("scalar")).tolist()
    if merged != [2, 2, 2] or found != [6]:
        raise RuntimeError(f"expected a merge [2, 2, 2] and a sum [6], got {merged} and {found}")
