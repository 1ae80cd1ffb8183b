"""Steps that zero entries and scale what is left: directions that are never stored.

Such a step says which entries it keeps, and a factor. So a static merge holds a byte an entry and
source instead of a float32 number, and reads the sources where they lie.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.operators._native import Direction, Kernels, native_kernels, selection
from gradmerge.operators._native.kernels import run_each
from gradmerge.preprocess.base import AbstractPreprocess, Site

# Draws at a time: they stay in a core's second-level cache.
_CHUNK = 1 << 16
# Entries whose ranks are sorted out at a time, where their keys are a copy.
_RANKED = 1 << 22
# For fewer entries tables of counts take longer than a selection.
_FEW = 1 << 15
# Sums of magnitudes below this are not scaled up to (mergekit's bound).
_NOTHING = 1e-7


class Selection:
    """`B_k = factor_k mask_k (.) (theta_k - A)` of one tensor, in float32.

    Args:
        sources: `theta_k`, each of the tensor's shape.
        origin: `A`; None where it is zero or has been taken off.
    """

    def __init__(self, sources: Sequence[Tensor], origin: Tensor | None) -> None:
        self.shape = sources[0].shape
        self.masks: list[Tensor | None] = [None] * len(sources)
        self.factors = [1.0] * len(sources)
        self._flat = [source.reshape(-1) for source in sources]
        self._origin = None if origin is None else origin.reshape(-1)
        self._kernels = self._find_kernels()

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def size(self) -> int:
        """Entries of the tensor."""
        return self._flat[0].numel()

    def _find_kernels(self) -> Kernels | None:
        tensors = self._flat if self._origin is None else [*self._flat, self._origin]
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return None
        kernels = native_kernels()
        return kernels if kernels is not None and kernels.take(tensors) else None

    def _lazy(self, k: int) -> Direction:
        """Without the factor, which changes no rank."""
        return Direction(self._flat[k], self._origin, self.masks[k])

    def direction(self, k: int) -> Tensor:
        """`B_k`, flat, float32, as the steps so far leave it."""
        if self._kernels is not None:
            out = torch.empty(self.size, dtype=torch.float32)
            selection.write_direction(self._kernels, self._lazy(k), out)
        else:
            out = self._flat[k].to(dtype=torch.float32, copy=True)
            if self._origin is not None:
                out.sub_(self._origin.to(out))
            mask = self.masks[k]
            if mask is not None:
                out.masked_fill_(mask == 0, 0)
        return out if self.factors[k] == 1 else out.mul_(self.factors[k])

    def mask(self, k: int) -> Tensor:
        """The mask of a direction, a byte an entry, to be written to."""
        mask = self.masks[k]
        if mask is None:
            mask = self._empty_mask(k).fill_(1)
            self.masks[k] = mask
        return mask

    def _empty_mask(self, k: int) -> Tensor:
        return torch.empty(self.size, dtype=torch.uint8, device=self._flat[k].device)

    def keep_none(self, k: int) -> None:
        """Zero a whole direction."""
        self.mask(k).zero_()

    def keep_ranks(self, k: int, first: int, last: int) -> None:
        """Zero all but the entries whose rank by magnitude, smallest first, is in [first, last)."""
        if first <= 0 and last >= self.size:
            return
        if self._kernels is not None and self.size > _FEW:
            lazy, mask = self._lazy(k), self.masks[k]
            self.masks[k] = mask = self._empty_mask(k) if mask is None else mask
            selection.keep_ranks(self._kernels, lazy, first, last, mask)
        else:
            kept = by_rank(self.direction(k), first, last)
            self.mask(k).mul_(kept)

    def keep_from(self, k: int, least: int) -> None:
        """Zero all magnitudes whose bits are less than `least`."""
        if self._kernels is not None:
            lazy, mask = self._lazy(k), self.masks[k]
            self.masks[k] = mask = self._empty_mask(k) if mask is None else mask
            selection.keep_from(self._kernels, lazy, least, mask)
        else:
            self.mask(k).mul_(magnitude_bits(self.direction(k)) >= least)

    def keep_at_random(
        self, densities: Sequence[float], generators: Sequence[torch.Generator]
    ) -> None:
        """Keep each entry with a direction's probability: where a uniform draw is below it.

        Directions with probability 1 stay as they are; the others draw side by side.
        """
        run_each(
            [
                partial(self._draw, k, density, generator)
                for k, (density, generator) in enumerate(zip(densities, generators, strict=True))
                if density < 1
            ]
        )

    def _draw(self, k: int, density: float, generator: torch.Generator) -> None:
        fresh = self.masks[k] is None
        mask = self._empty_mask(k) if fresh else self.mask(k)
        draws = torch.empty(min(_CHUNK, self.size), dtype=torch.float32)
        for part in mask.split(_CHUNK):
            drawn = draws[: len(part)].uniform_(generator=generator)
            if self._kernels is not None:
                selection.keep_below(self._kernels, part, drawn, density, fresh)
            else:
                kept = (drawn < density).to(part.device)
                part.copy_(kept if fresh else kept & (part != 0))
        self.masks[k] = mask

    def keep_by_row_rank(self, k: int, low: float, high: float, generator: torch.Generator) -> None:
        """Keep each entry with a probability that grows with its rank by magnitude in its row, from
        `low` for the smallest to `high` for the largest (their mean in a row of one entry).

        A row runs along axis 1; a tensor of one axis is one row.
        """
        length = self.shape[1] if len(self.shape) > 1 else self.size
        if len(self.shape) > 2:
            mask = self.mask(k).view(self.shape).movedim(1, -1)
            rows = self.direction(k).view(self.shape).movedim(1, -1).reshape(-1, length)
            kept = [
                torch.rand(part.shape, generator=generator, dtype=torch.float32)
                < between(row_ranks(part), length, low, high)
                for part in rows.split(max(1, _RANKED // length))
            ]
            mask.mul_(torch.cat(kept).view(mask.shape))
            return
        fresh = self.masks[k] is None
        mask = self._empty_mask(k) if fresh else self.mask(k)
        step = max(1, _CHUNK // length)
        draws = torch.empty(min(step * length, self.size), dtype=torch.float32)
        ranks = torch.empty(len(draws), dtype=torch.int32)
        scratch = torch.empty(2 * length, dtype=torch.int64)
        lazy = self._lazy(k)
        plain = None if self._kernels is not None else self.direction(k).view(-1, length)
        for first in range(0, self.size // length, step):
            part = mask[first * length : (first + step) * length]
            drawn = draws[: len(part)].uniform_(generator=generator)
            if self._kernels is not None:
                own = ranks[: len(part)].view(-1, length)
                selection.row_ranks(self._kernels, lazy, first, own, scratch)
                bounds = _low_and_slope(length, low, high)
                selection.keep_ranked(self._kernels, part, own, drawn, *bounds, fresh)
            else:
                assert plain is not None
                bound = between(row_ranks(plain[first : first + step]), length, low, high)
                keep = drawn < bound.view(-1)
                part.copy_(keep if fresh else keep & (part != 0))
        self.masks[k] = mask

    def count_magnitudes(self, k: int, upper: int | None) -> Tensor:
        """Counts of the upper 16 bits of the magnitudes, or of the lower ones below one `upper`."""
        if self._kernels is not None:
            return selection.count_magnitudes(self._kernels, self._lazy(k), upper)
        bits = magnitude_bits(self.direction(k))
        above = bits >> 16
        counted = above if upper is None else bits[above == upper] & 0xFFFF
        return torch.bincount(counted, minlength=1 << (15 if upper is None else 16))

    def sum_magnitudes(self, k: int) -> float:
        """The L1 norm of a direction."""
        if self._kernels is not None:
            found = selection.sum_magnitudes(self._kernels, self._lazy(k))
            return abs(self.factors[k]) * found
        return float(self.direction(k).abs().sum(dtype=torch.float64))

    def restore(self, k: int, before: float) -> None:
        """Scale a direction to an L1 norm, unless either is (nearly) nothing."""
        after = self.sum_magnitudes(k) if before >= _NOTHING else 0.0
        if after >= _NOTHING:
            self.factors[k] *= before / after


class AbstractSelection(AbstractPreprocess):
    """A step that zeroes entries of each direction, and may scale what is left."""

    @abstractmethod
    def select(self, directions: Selection, site: Site) -> None:
        """Zero entries; `directions` keeps which."""

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        if not directions.numel():
            return directions
        found = Selection(list(directions), None)
        self.select(found, site)
        for direction, mask, factor in zip(directions, found.masks, found.factors, strict=True):
            if mask is not None:
                direction.masked_fill_(mask.view(direction.shape) == 0, 0)
            if factor != 1:
                direction.mul_(factor)
        return directions


def by_rank(values: Tensor, first: int, last: int) -> Tensor:
    """A mask of the entries whose rank by magnitude, smallest first, is in [first, last).

    Exactly `last - first` entries; of equal ones those that stand first have the lower rank.
    Two selections, no sort.
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
    """Rank of each entry in its row by magnitude, 0 for the smallest, equals in order, int64."""
    size = rows.shape[1]
    # magnitude and place in one integer: numpy sorts those in a tenth of an argsort's time
    keys = magnitude_bits(rows).view(rows.shape).to(torch.int64).bitwise_left_shift_(32)
    keys.bitwise_or_(torch.arange(size)).numpy().sort(axis=1)
    order = keys.bitwise_and_(0xFFFFFFFF)
    return torch.empty_like(order).scatter_(1, order, torch.arange(size).expand_as(order))


def between(ranks: Tensor, length: int, low: float, high: float) -> Tensor:
    """`low` at rank 0 to `high` at the last of `length` ranks, float32."""
    start, slope = _low_and_slope(length, low, high)
    return ranks.float().mul_(slope).add_(start)


def _low_and_slope(length: int, low: float, high: float) -> tuple[float, float]:
    return ((low + high) / 2, 0.0) if length == 1 else (low, (high - low) / (length - 1))


def magnitude_bits(values: Tensor) -> Tensor:
    """Magnitudes as integers of the same order, flat: the bits of a float32 without its sign."""
    return values.reshape(-1).view(torch.int32) & 0x7FFFFFFF
