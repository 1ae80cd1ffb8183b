"""Changes of a matrix by a product of two small ones, as LoRA adapters store them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A tensor that differs by `left @ right` from a stored one, as `[rows, entries per row]`."""

    left: Tensor
    """`[rows, rank]`."""
    right: Tensor
    """`[rank, entries per row]`."""
    stored: Hashable
    """Identity of the stored tensor (see `Checkpoint.stored_as`)."""
