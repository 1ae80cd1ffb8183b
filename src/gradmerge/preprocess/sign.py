"""Sign election (TIES)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.preprocess.base import AbstractPreprocess, Site


@dataclass(frozen=True)
class ElectSign(AbstractPreprocess):
    """Zero the values that disagree with the elected sign of their entry (TIES, arXiv 2306.01708).

        sign = + where sum_k B_k >= 0 (by sum) or sum_k sign(B_k) >= 0 (by count), else -
        B'_k = B_k where sign(B_k) = sign, else 0

    After `Trim`, with one coefficient per tensor, these are the directions of AdaMerging++ (arXiv
    2310.02575).
    """

    by: Literal["sum", "count"] = "sum"
    """Elect signs by the sum of the values, or by counting signs alone."""

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        votes = directions if self.by == "sum" else directions.sign()
        elected = torch.where(votes.sum(dim=0) >= 0, 1.0, -1.0)
        for direction in directions:
            direction.mul_(direction.sign() == elected)
        return directions
