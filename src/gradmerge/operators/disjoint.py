"""Mean over the sources that agree in sign."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.typing import Origin
from gradmerge.operators._native import kernels_for
from gradmerge.operators.base import Spread, Terms
from gradmerge.operators.entrywise import AbstractEntrywise
from gradmerge.operators.linear import merge_directions


@dataclass(frozen=True)
class DisjointMean(AbstractEntrywise):
    """Disjoint mean: average the values that agree with the elected sign of an entry (TIES, arXiv
    2306.01708).

        D_k   = c_k B_k
        sign  = + where sum_k D_k >= 0 (by sum) or sum_k sign(D_k) >= 0 (by count), else -
        M_k   = 1 where sign(D_k) = sign, else 0
        S     = sum_k M_k c_k  (1 where that is 0, or without `normalize`)
        theta = A + scale * sum_k M_k D_k / S

    After the preprocess step `Trim` this is TIES. It is differentiable almost everywhere, with the
    elected signs held constant. With `G = dL/dtheta` and `m = sum_k M_k D_k / S`:

        dL/dc_k = scale * sum G M_k (B_k - m) / S   normalised (m = 0 where S was 0)
        dL/dc_k = scale * sum G M_k B_k             otherwise

    A coefficient of exactly 0 contributes to no entry, so it has no gradient and stays 0. With
    `normalize`, a common factor of the coefficients cancels: `scale` sets the size of the merge.

    With origin mean the directions sum to zero. Under equal coefficients the sum over sources that
    all keep an entry is then rounding error, and so is the elected sign; this raises a warning.
    """

    by_rows = True

    normalize: bool = True
    """Divide each sum by the coefficients that contribute to it."""
    elect: Literal["sum", "count"] = "sum"
    """Elect signs by the sum of the values, or by counting signs alone."""
    scale: float = 1.0
    """Factor on the merged direction (the paper's lambda)."""

    @override
    def require(self, num_sources: int, origin: Origin) -> None:
        if origin == "mean" and self.elect == "sum":
            warnings.warn(
                "DisjointMean: directions from the mean of the sources sum to zero, so with equal "
                "coefficients rounding elects the sign of every entry that all sources keep. Use "
                "elect: count, or another origin.",
                stacklevel=2,
            )

    @override
    def combine(self, terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
        kernels = None if terms.mean_origin else kernels_for([*terms.stored, out])
        if kernels is None or not out.numel():
            return super().combine(terms, coefficient, spread, out)
        rows = coefficient.detach().view(len(terms.sources), -1)
        return merge_directions(
            kernels,
            terms,
            rows,
            spread,
            out,
            elect=self.elect,
            normalise=self.normalize,
            scale=self.scale,
        )

    def _agreeing(self, directions: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
        """Return `D_k`, and `M_k` in the same dtype."""
        weighted = directions * coefficient
        signs = weighted.sign()
        votes = weighted if self.elect == "sum" else signs
        # maps -1, 0, 1 to -1, 1, 1, faster than comparisons and conversions of their results
        elected = votes.sum(dim=0).sign_().add_(0.5).sign_()
        return weighted, signs.mul_(elected).clamp_(min=0)

    def _divisor(self, coefficient: Tensor, agree: Tensor) -> tuple[Tensor, Tensor]:
        """Return `S`, and a mask of the entries where it was 0."""
        divisor = (coefficient * agree).sum(dim=0)
        nothing = divisor == 0
        return divisor.masked_fill_(nothing, 1), nothing

    @override
    def merge(self, directions: Tensor, coefficient: Tensor) -> Tensor:
        weighted, agree = self._agreeing(directions, coefficient)
        merged = weighted.mul_(agree).sum(dim=0)
        if self.normalize:
            merged.div_(self._divisor(coefficient, agree)[0])
        return merged if self.scale == 1 else merged.mul_(self.scale)

    @override
    def slope(self, directions: Tensor, coefficient: Tensor) -> Tensor:
        weighted, agree = self._agreeing(directions, coefficient)
        if not self.normalize:
            return agree.mul_(directions).mul_(self.scale)
        divisor, nothing = self._divisor(coefficient, agree)
        mean = weighted.mul_(agree).sum(dim=0).div_(divisor).masked_fill_(nothing, 0)
        return torch.sub(directions, mean).mul_(agree).div_(divisor).mul_(self.scale)
