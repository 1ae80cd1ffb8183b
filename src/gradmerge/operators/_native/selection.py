"""Calls of the kernels that work on masked directions."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradmerge.operators._native.kernels import (
    TYPES,
    Kernels,
    address,
    integers,
    ranges,
    run_shared,
)

_UPPER, _LOWER = 1 << 15, 1 << 16
_LARGEST = 0x7FFFFFFF
_RULES = {None: 0, "sum": 1, "count": 2}


class _Direction(ctypes.Structure):
    _fields_ = (
        ("term", ctypes.c_void_p),
        ("anchor", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("anchor_type", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Direction:
    """Difference `term - anchor` in float32, 0 where the mask is 0; flat, contiguous, on a CPU."""

    term: Tensor
    anchor: Tensor | None = None
    mask: Tensor | None = None
    """One byte per entry."""

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that kernels must be able to take."""
        return [self.term] if self.anchor is None else [self.term, self.anchor]

    def plain(self) -> _Direction:
        """Return the C struct."""
        return _Direction(
            self.term.data_ptr(),
            None if self.anchor is None else self.anchor.data_ptr(),
            None if self.mask is None else self.mask.data_ptr(),
            TYPES[self.term.dtype],
            0 if self.anchor is None else TYPES[self.anchor.dtype],
        )


def write_direction(kernels: Kernels, direction: Direction, out: Tensor) -> None:
    """Write a direction into `out`, float32."""
    plain = direction.plain()

    def run(begin: int, end: int) -> None:
        kernels.library.gradmerge_direction(
            address(out), ctypes.byref(plain), *integers(begin, end)
        )

    run_shared(run, out.numel())


def sum_magnitudes(kernels: Kernels, direction: Direction) -> float:
    """Return the sum of magnitudes, in float64."""
    plain = direction.plain()
    kernels.library.gradmerge_sum_magnitudes.restype = ctypes.c_double
    sums: list[float] = []

    def run(begin: int, end: int) -> None:
        found = kernels.library.gradmerge_sum_magnitudes(ctypes.byref(plain), *integers(begin, end))
        sums.append(found)

    run_shared(run, direction.term.numel())
    return sum(sorted(sums))  # threads finish in any order


def keep_ranks(kernels: Kernels, direction: Direction, first: int, last: int, kept: Tensor) -> None:
    """Set `kept` to 1 where the rank by magnitude, smallest first, is in [first, last), else 0.

    Among equal magnitudes, earlier entries rank lower. Two passes count the bits of the magnitudes
    and the third writes, without a sort or a temporary of the size of the tensor. `kept` has one
    byte per entry and may be the mask of the direction itself.
    """
    size = direction.term.numel()
    if first >= last:
        kept.zero_()
        return
    # magnitudes of the last entry that is dropped below, and of the last that is kept
    wanted = [rank for rank in (first, last) if 0 < rank < size]
    shares = ranges(size)
    bounds = _magnitudes_of_rank(kernels, direction, wanted, shares)
    found = dict(zip(wanted, bounds, strict=True))
    low = found.get(first, _Bound(-1, 0, []))
    high = found.get(last, _Bound(_LARGEST, 0, []))
    _keep_between(kernels, direction, low, high, kept)


def keep_from(kernels: Kernels, direction: Direction, least: int, kept: Tensor) -> None:
    """Set `kept` to 1 where the bits of the magnitude are at least `least`, else 0."""
    low, high = _Bound(least - 1, 1 << 62, []), _Bound(_LARGEST, 0, [])
    _keep_between(kernels, direction, low, high, kept)


def count_magnitudes(kernels: Kernels, direction: Direction, upper: int | None) -> Tensor:
    """Count the upper 16 bits of the magnitudes, or the lower 16 below one value of `upper`."""
    shares = ranges(direction.term.numel())
    if upper is None:
        return _count_upper(kernels, direction, shares).sum(dim=0)
    return _count_lower(kernels, direction, [upper], shares).sum(dim=0)[0]


def keep_below(kernels: Kernels, kept: Tensor, draws: Tensor, density: float, fresh: bool) -> None:
    """Set `kept = draw < density`, and-ed with its previous value unless `fresh`."""
    kernels.library.gradmerge_keep_below(
        address(kept),
        address(draws),
        ctypes.c_float(density),
        int(fresh),
        ctypes.c_int64(draws.numel()),
    )


def row_ranks(
    kernels: Kernels, direction: Direction, first_row: int, ranks: Tensor, scratch: Tensor
) -> None:
    """Rank entries by magnitude in their row, 0 for the smallest, equal ones in order.

    Args:
        kernels: loaded library.
        direction: direction of the whole tensor.
        first_row: first row to rank.
        ranks: result, int32 `[rows, size]`.
        scratch: int64, at least `2 * size`.
    """
    rows, size = ranks.shape
    plain = direction.plain()
    kernels.library.gradmerge_row_ranks(
        address(ranks),
        address(scratch),
        *integers(rows, size),
        ctypes.byref(plain),
        *integers(first_row),
    )


def keep_ranked(
    kernels: Kernels,
    kept: Tensor,
    ranks: Tensor,
    draws: Tensor,
    low: float,
    slope: float,
    fresh: bool,
) -> None:
    """Set `kept = draw < low + slope * rank`, and-ed with its previous value unless `fresh`."""
    kernels.library.gradmerge_keep_ranked(
        address(kept),
        address(ranks),
        address(draws),
        ctypes.c_float(low),
        ctypes.c_float(slope),
        int(fresh),
        ctypes.c_int64(draws.numel()),
    )


def merge_directions(
    kernels: Kernels,
    out: Tensor,
    origin: Tensor | None,
    directions: list[Direction],
    factors: list[float],
    weights: Tensor,
    width: int,
    inner: int,
    parts: Tensor | None,
    elect: Literal["sum", "count"] | None = None,
    normalise: bool = False,
    scale: float = 1.0,
) -> None:
    """Write `origin + sum_k weight_k factor_k B_k`, or the disjoint mean (see `selection.c`)."""
    weights = weights.to(torch.float32).contiguous()
    plain = (_Direction * len(directions))(*(direction.plain() for direction in directions))
    multiplied = (ctypes.c_float * len(factors))(*factors)
    failed: list[int] = []

    def run(begin: int, end: int) -> None:
        if kernels.library.gradmerge_merge_directions(
            address(out),
            TYPES[out.dtype],
            address(origin),
            0 if origin is None else TYPES[origin.dtype],
            plain,
            len(directions),
            multiplied,
            address(weights),
            *integers(width, inner),
            address(parts),
            _RULES[elect],
            int(normalise),
            ctypes.c_float(scale),
            *integers(begin, end),
        ):
            failed.append(begin)

    run_shared(run, out.numel())
    if failed:
        raise MemoryError(f"out of memory for a block of {len(directions)} directions")


def gram(kernels: Kernels, directions: list[Direction]) -> Tensor:
    """Return `<B_i, B_j>`, `[directions, directions]`: float32 differences summed in float64."""
    num = len(directions)
    plain = (_Direction * num)(*(direction.plain() for direction in directions))
    size = directions[0].term.numel()
    shares = ranges(size)
    total = torch.zeros(len(shares), num, num, dtype=torch.float64)
    failed: list[int] = []

    def run(begin: int, end: int) -> None:
        own = total[shares.index((begin, end))]
        if kernels.library.gradmerge_gram(address(own), plain, num, *integers(begin, end)):
            failed.append(begin)

    run_shared(run, size)
    if failed:
        raise MemoryError(f"out of memory for a block of {num} directions")
    return total.sum(dim=0)


@dataclass(frozen=True)
class _Bound:
    bits: int
    """Magnitude as an integer."""
    equal: int
    """Number of entries of this magnitude below the rank."""
    seen: list[int]
    """Number of entries of this magnitude in the share of each thread."""


def _keep_between(
    kernels: Kernels, direction: Direction, low: _Bound, high: _Bound, kept: Tensor
) -> None:
    """Set `kept` to 1 above the first `low.equal` of `low` and up to `high.equal` of `high`."""
    shares = ranges(direction.term.numel())
    plain = direction.plain()

    def run(begin: int, end: int) -> None:
        share = shares.index((begin, end))
        kernels.library.gradmerge_keep_between(
            address(kept),
            *integers(low.bits, low.equal, sum(low.seen[:share])),
            *integers(high.bits, high.equal, sum(high.seen[:share])),
            ctypes.byref(plain),
            *integers(begin, end),
        )

    run_shared(run, len(kept))


def _magnitudes_of_rank(
    kernels: Kernels, direction: Direction, wanted: list[int], shares: list[tuple[int, int]]
) -> list[_Bound]:
    """Return the magnitude of the `rank`th smallest entry, for each rank."""
    if not wanted:
        return []
    upper = _count_upper(kernels, direction, shares).sum(dim=0).cumsum(0)
    # the first table entry that reaches the rank, and the number of entries below it
    places = [int(torch.searchsorted(upper, rank)) for rank in wanted]
    below = [int(upper[place - 1]) if place else 0 for place in places]
    lower = _count_lower(kernels, direction, places, shares)
    bounds = []
    for j, rank in enumerate(wanted):
        within = lower[:, j].sum(dim=0).cumsum(0)
        place = int(torch.searchsorted(within, rank - below[j]))
        before = int(within[place - 1]) if place else 0
        seen = lower[:, j, place].tolist()
        bounds.append(_Bound((places[j] << 16) + place, rank - below[j] - before, seen))
    return bounds


def _count_upper(kernels: Kernels, direction: Direction, shares: list[tuple[int, int]]) -> Tensor:
    counts = torch.zeros(len(shares), _UPPER, dtype=torch.int64)
    plain = direction.plain()

    def run(begin: int, end: int) -> None:
        own = counts[shares.index((begin, end))]
        kernels.library.gradmerge_count_upper(
            address(own), ctypes.byref(plain), *integers(begin, end)
        )

    run_shared(run, direction.term.numel())
    return counts


def _count_lower(
    kernels: Kernels, direction: Direction, places: list[int], shares: list[tuple[int, int]]
) -> Tensor:
    counts = torch.zeros(len(shares), len(places), _LOWER, dtype=torch.int64)
    plain = direction.plain()
    upper = (ctypes.c_int32 * len(places))(*places)

    def run(begin: int, end: int) -> None:
        own = counts[shares.index((begin, end))]
        kernels.library.gradmerge_count_lower(
            address(own), upper, len(places), ctypes.byref(plain), *integers(begin, end)
        )

    run_shared(run, direction.term.numel())
    return counts
