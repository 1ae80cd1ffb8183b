"""Masked directions: directions of which entries are zeroed and the rest is scaled, never stored.

A static merge holds one byte per entry and source (the mask) instead of a float32 number, and reads
the sources in place. On a CPU the compiled kernels do the work; elsewhere, and without a compiler,
torch operations give the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from gradmerge.operators._native import Direction, kernels_for, run_each, selection

# Draws per chunk: they fit in a core's second-level cache.
_CHUNK = 1 << 16
# Entries that are ranked at a time where their sort keys are a copy.
_RANKED = 1 << 22
# Below this size, counting magnitudes in tables is slower than selecting by value.
_FEW = 1 << 15
# Directions whose sum of magnitudes is smaller are not rescaled (mergekit's bound).
_NOTHING = 1e-7


class MaskedDirections:
    """Directions of one tensor: `B_k = factor_k mask_k (.) (theta_k - A)`, in float32.

    Methods that keep entries update `masks`; `restore` updates `factors`.

    Args:
        sources: `theta_k`, each with the shape of the tensor.
        origin: `A`; None if it is zero or already subtracted.
    """

    def __init__(self, sources: Sequence[Tensor], origin: Tensor | None) -> None:
        self.shape = sources[0].shape
        self.masks: list[Tensor | None] = [None] * len(sources)
        self.factors = [1.0] * len(sources)
        self._flat = [source.reshape(-1) for source in sources]
        self._origin = None if origin is None else origin.reshape(-1)
        stored = self._flat if self._origin is None else [*self._flat, self._origin]
        self._kernels = kernels_for(stored)

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def size(self) -> int:
        """Number of entries of the tensor."""
        return self._flat[0].numel()

    def direction(self, k: int) -> Tensor:
        """Return `B_k`, flat and in float32, with the current mask and factor applied."""
        if self._kernels is not None:
            out = torch.empty(self.size, dtype=torch.float32)
            selection.write_direction(self._kernels, self._unscaled(k), out)
        else:
            out = self._flat[k].to(dtype=torch.float32, copy=True)
            if self._origin is not None:
                out.sub_(self._origin.to(out))
            mask = self.masks[k]
            if mask is not None:
                out.masked_fill_(mask == 0, 0)
        return out if self.factors[k] == 1 else out.mul_(self.factors[k])

    def keep_none(self, k: int) -> None:
        """Zero a whole direction."""
        self._mask(k).zero_()

    def keep_ranks(self, k: int, first: int, last: int) -> None:
        """Keep the entries whose rank by magnitude, smallest first, is in [first, last)."""
        if first <= 0 and last >= self.size:
            return
        if self._kernels is not None and self.size > _FEW:
            selection.keep_ranks(self._kernels, self._unscaled(k), first, last, self._target(k))
        else:
            self._mask(k).mul_(rank_mask(self.direction(k), first, last))

    def keep_from(self, k: int, least: int) -> None:
        """Keep the entries whose magnitude, as the bits of a float32, is at least `least`."""
        if self._kernels is not None:
            selection.keep_from(self._kernels, self._unscaled(k), least, self._target(k))
        else:
            self._mask(k).mul_(magnitude_bits(self.direction(k)) >= least)

    def keep_at_random(
        self, densities: Sequence[float], generators: Sequence[torch.Generator]
    ) -> None:
        """Keep each entry of direction k with probability `densities[k]`; 1 keeps all.

        An entry is kept if a uniform draw is below the probability. Directions are drawn in
        parallel.
        """
        pairs = enumerate(zip(densities, generators, strict=True))
        run_each([partial(self._draw, k, p, own) for k, (p, own) in pairs if p < 1])

    def keep_by_row_rank(
        self,
        bounds: Sequence[tuple[float, float] | None],
        generators: Sequence[torch.Generator],
    ) -> None:
        """Keep each entry with a probability that is linear in its rank by magnitude in its row.

        A row runs along axis 1 of the tensor; a tensor with one axis is one row. Directions are
        drawn in parallel.

        Args:
            bounds: probabilities of the smallest and the largest entry of a row, for each
                direction (their mean applies to rows of one entry); None keeps all.
            generators: random numbers for each direction.
        """
        draw = self._draw_rows if len(self.shape) < 3 else self._draw_strided
        pairs = enumerate(zip(bounds, generators, strict=True))
        run_each([partial(draw, k, own[0], own[1], g) for k, (own, g) in pairs if own is not None])

    def count_magnitudes(self, k: int, upper: int | None) -> Tensor:
        """Count the upper 16 bits of the magnitudes, or the lower 16 below one value of `upper`."""
        if self._kernels is not None:
            return selection.count_magnitudes(self._kernels, self._unscaled(k), upper)
        bits = magnitude_bits(self.direction(k))
        above = bits >> 16
        counted = above if upper is None else bits[above == upper] & 0xFFFF
        return torch.bincount(counted, minlength=1 << (15 if upper is None else 16))

    def sum_magnitudes(self, k: int) -> float:
        """Return the L1 norm of a direction."""
        if self._kernels is not None:
            total = selection.sum_magnitudes(self._kernels, self._unscaled(k))
            return abs(self.factors[k]) * total
        return float(self.direction(k).abs().sum(dtype=torch.float64))

    def restore(self, k: int, before: float) -> None:
        """Scale a direction to the L1 norm `before`, unless either norm is (nearly) zero."""
        after = self.sum_magnitudes(k) if before >= _NOTHING else 0.0
        if after >= _NOTHING:
            self.factors[k] *= before / after

    def _unscaled(self, k: int) -> Direction:
        """Return a direction without its factor, which changes no rank."""
        return Direction(self._flat[k], self._origin, self.masks[k])

    def _mask(self, k: int) -> Tensor:
        """Return the mask of a direction to update, one byte per entry."""
        mask = self.masks[k]
        if mask is None:
            mask = self._target(k).fill_(1)
        return mask

    def _target(self, k: int) -> Tensor:
        """Return the mask of a direction to overwrite, uninitialised if there was none."""
        mask = self.masks[k]
        if mask is None:
            mask = torch.empty(self.size, dtype=torch.uint8, device=self._flat[k].device)
            self.masks[k] = mask
        return mask

    def _draw(self, k: int, density: float, generator: torch.Generator) -> None:
        def keep(first: int, part: Tensor, draws: Tensor, fresh: bool) -> None:
            if self._kernels is not None:
                selection.keep_below(self._kernels, part, draws, density, fresh)
            else:
                _write(part, draws < density, fresh)

        self._for_draws(k, _CHUNK, generator, keep)

    def _draw_rows(self, k: int, low: float, high: float, generator: torch.Generator) -> None:
        length = self.shape[1] if len(self.shape) > 1 else self.size
        step = max(1, _CHUNK // length) * length
        current = self._unscaled(k)
        rows = self.direction(k).view(-1, length) if self._kernels is None else None
        ranks = torch.empty(min(step, self.size), dtype=torch.int32)
        scratch = torch.empty(2 * length, dtype=torch.int64)

        def keep(first: int, part: Tensor, draws: Tensor, fresh: bool) -> None:
            row = first // length
            if self._kernels is not None:
                found = ranks[: len(part)].view(-1, length)
                selection.row_ranks(self._kernels, current, row, found, scratch)
                line = _start_and_slope(length, low, high)
                selection.keep_ranked(self._kernels, part, found, draws, *line, fresh)
            else:
                assert rows is not None
                found = row_ranks(rows[row : row + len(part) // length])
                _write(part, draws < linear_in_rank(found, length, low, high).view(-1), fresh)

        self._for_draws(k, step, generator, keep)

    def _for_draws(
        self,
        k: int,
        step: int,
        generator: torch.Generator,
        keep: Callable[[int, Tensor, Tensor, bool], None],
    ) -> None:
        """Call `keep(first entry, part of the mask, draws, whether it is new)` chunk by chunk."""
        fresh = self.masks[k] is None
        mask = self._target(k)
        draws = torch.empty(min(step, self.size), dtype=torch.float32)
        for first in range(0, self.size, step):
            part = mask[first : first + step]
            keep(first, part, draws[: len(part)].uniform_(generator=generator), fresh)

    def _draw_strided(self, k: int, low: float, high: float, generator: torch.Generator) -> None:
        """Draw the rows of a tensor with more than two axes, whose entries are not neighbours."""
        length = self.shape[1]
        mask = self._mask(k).view(self.shape).movedim(1, -1)
        rows = self.direction(k).view(self.shape).movedim(1, -1).reshape(-1, length)
        kept = [
            torch.rand(part.shape, generator=generator, dtype=torch.float32)
            < linear_in_rank(row_ranks(part), length, low, high)
            for part in rows.split(max(1, _RANKED // length))
        ]
        mask.mul_(torch.cat(kept).view(mask.shape))


def rank_mask(values: Tensor, first: int, last: int) -> Tensor:
    """Return a mask of the entries whose rank by magnitude, smallest first, is in [first, last).

    It selects exactly `last - first` entries: among equal magnitudes, earlier entries rank lower.
    Two selections replace a sort.
    """
    bits = magnitude_bits(values)
    mask = torch.ones_like(bits, dtype=torch.bool)
    if first >= last:
        return mask.zero_().view(values.shape)
    for rank, above in ((first, True), (last, False)):
        if rank in (0, len(bits)):
            continue
        threshold = bits.kthvalue(rank).values  # the largest of the `rank` smallest
        below = bits < threshold
        equal = (bits == threshold).nonzero().flatten()[: rank - int(below.sum())]
        below[equal] = True
        mask &= ~below if above else below
    return mask.view(values.shape)


def row_ranks(rows: Tensor) -> Tensor:
    """Return the rank by magnitude of each entry in its row, 0 for the smallest, int64.

    Among equal magnitudes, earlier entries rank lower.
    """
    size = rows.shape[1]
    # magnitude and position in one integer, which numpy sorts in a tenth of the time of argsort
    keys = magnitude_bits(rows).view(rows.shape).to(torch.int64).bitwise_left_shift_(32)
    keys.bitwise_or_(torch.arange(size)).numpy().sort(axis=1)
    order = keys.bitwise_and_(0xFFFFFFFF)
    return torch.empty_like(order).scatter_(1, order, torch.arange(size).expand_as(order))


def linear_in_rank(ranks: Tensor, length: int, low: float, high: float) -> Tensor:
    """Return `low` for rank 0 to `high` for the last of `length` ranks, float32."""
    start, slope = _start_and_slope(length, low, high)
    return ranks.float().mul_(slope).add_(start)


def magnitude_bits(values: Tensor) -> Tensor:
    """Return float32 magnitudes as integers of the same order (bits without the sign), flat."""
    return values.reshape(-1).view(torch.int32) & 0x7FFFFFFF


def _start_and_slope(length: int, low: float, high: float) -> tuple[float, float]:
    return ((low + high) / 2, 0.0) if length == 1 else (low, (high - low) / (length - 1))


def _write(mask: Tensor, keep: Tensor, fresh: bool) -> None:
    keep = keep.to(mask.device)
    mask.copy_(keep if fresh else keep & (mask != 0))
