"""Directions inside an earlier merge."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.preprocess.base import AbstractPreprocess, Site
from gradmerge.sources.coefficients import CoefficientFile


@dataclass(frozen=True)
class EarlierCoefficients(AbstractPreprocess):
    """Multiply the directions by the coefficients of an earlier merge of the same sources.

        B'_k = c_k (.) B_k

    Coefficients of 1 are then the earlier merge, inside which coarser ones are learned: after a
    mask per weight, a coefficient per tensor (Concrete AdaMerging, arXiv 2312.06173). The earlier
    merge has a coefficient per tensor, row, column or weight, and no other preprocess steps than
    those before this one.
    """

    path: str
    """Exported folder of the earlier merge, or its file coefficients.st."""

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        who = type(self).__name__
        found, spread = CoefficientFile(self.path, who).read(site.name, site.sources)
        shape, kind = directions.shape[1:], spread or "scalar"
        place = [1] * len(shape)
        if kind == "element":
            place = list(shape)
        elif kind.startswith("axis ") and kind[5:].isdigit():
            place[int(kind[5:])] = -1
        elif kind != "scalar" or found.dim() > 1:
            raise ConfigError(
                f"{who}: {self.path}: expected coefficients of {site.name} per tensor, row, column "
                f"or weight, got {kind} of shape {list(found.shape[1:])}. Other granularities "
                "cannot be continued."
            )
        if kind == "element" and found.shape[1:] != shape:
            raise ConfigError(
                f"{who}: {self.path}: expected coefficients of {site.name} of shape {list(shape)}, "
                f"got {list(found.shape[1:])}. The earlier merge was of another network."
            )
        return directions.mul_(found.reshape(len(found), *place).to(directions.dtype))
