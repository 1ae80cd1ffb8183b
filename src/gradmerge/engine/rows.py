"""A run of rows of a tensor, merged apart from the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradmerge.coefficients.base import Slot
from gradmerge.common.low_rank import LowRank
from gradmerge.operators import Spread, Terms


@dataclass(frozen=True)
class Rows:
    """The rows `start` to `stop` of a tensor: positions along its first axis."""

    start: int
    stop: int
    shape: torch.Size
    """Shape of the whole tensor."""
    total: Callable[[Tensor], Tensor] | None = None
    """Adds up numbers over all runs of rows, for operators that need sums over the tensor."""

    @classmethod
    def share(cls, shape: torch.Size, index: int, count: int) -> Rows:
        """Return the share of one of `count` processes, equal in length to within one."""
        return cls(index * shape[0] // count, (index + 1) * shape[0] // count, shape)

    @property
    def of_shape(self) -> torch.Size:
        """Shape of these rows."""
        return torch.Size((self.stop - self.start, *self.shape[1:]))

    def of(self, tensor: Tensor) -> Tensor:
        """Return these rows of a tensor, as a view."""
        return tensor[self.start : self.stop]

    @property
    def _entries(self) -> slice:
        inner = self.shape[1:].numel()
        return slice(self.start * inner, self.stop * inner)

    def of_terms(self, terms: Terms) -> Terms:
        """Return these rows of all tensors (dense ones, without masks)."""
        return replace(
            terms,
            sources=[self.of(source) for source in terms.sources],
            origin=None if terms.origin is None else self.of(terms.origin),
            total=self.total,
        )

    def of_updates(self, updates: Sequence[LowRank | None]) -> list[LowRank | None]:
        """Return these rows of directions of low rank."""
        return [u and replace(u, left=self.of(u.left)) for u in updates]

    @staticmethod
    def runs_along(spread: Spread | Slot) -> bool:
        """Return True if coefficients differ between rows."""
        return spread.kind == "element" or (
            spread.kind == "axis" and (spread.axis == 0 or bool(spread.experts))
        )

    def of_spread(self, spread: Spread) -> Spread:
        """Return the mapping of these rows' coefficients to their entries."""
        parts = None if spread.parts is None else spread.parts[self._entries]
        experts = self.stop - self.start if spread.experts else 0
        return replace(spread, parts=parts, experts=experts)

    def of_coefficients(self, z: Tensor, spread: Spread) -> Tensor:
        """Return these rows' coefficients `[rows, *slot]`, as a view: all if rows share them."""
        if not self.runs_along(spread):
            return z
        if spread.experts:
            return z.view(len(z), spread.experts, -1)[:, self.start : self.stop].flatten(1)
        return z[:, self.start : self.stop]

    def whole(self, own: Tensor, spread: Spread, slot: Sequence[int]) -> Tensor:
        """Return numbers of these rows' coefficients among zeros for the others, `[..., *slot]`."""
        if not self.runs_along(spread):
            return own
        found = torch.zeros((len(own), *slot), dtype=own.dtype, device=own.device)
        if spread.experts:
            by_expert = found.view(len(own), spread.experts, -1)
            by_expert[:, self.start : self.stop] = own.view(len(own), self.stop - self.start, -1)
        else:
            found[:, self.start : self.stop] = own
        return found
