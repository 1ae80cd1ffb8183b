"""Rescaling by depth."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.finalisers.base import AbstractRescale, FinalSite
from gradmerge.sources.names import depth_of


@dataclass(frozen=True)
class DepthRescale(AbstractRescale):
    """`theta' = A + lambda(d) (theta - A)`, `lambda(d) = first + (last - first) d` (LiNeS after the
    merge, arXiv 2410.17146).

    Depth d is 0 at the embeddings and 1 at the head, as for the init `DepthRamp`. Shallow layers
    hold what tasks share, so they move less (first < last). With `Linear` it multiplies all
    coefficients by lambda; other operators have no such coefficient.

    Difference: the paper counts only blocks, from 0 at the first to 1 at the last.
    """

    first: float
    """The factor at the embeddings."""
    last: float
    """The factor at the head."""

    def __post_init__(self) -> None:
        """Check both ends."""
        for name in ("first", "last"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ConfigError(f"DepthRescale: {name}: expected a finite number, got {value}.")

    @override
    def factor(self, delta: Tensor, site: FinalSite) -> float:
        return self.first + (self.last - self.first) * depth_of(site.name, site.names)
