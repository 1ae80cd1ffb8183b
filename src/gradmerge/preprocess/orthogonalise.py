"""Projection of each direction onto the complement of the earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import require
from gradmerge.preprocess.base import AbstractPreprocess, Passes, Site, Step
from gradmerge.preprocess.matrices import decompose, matrices_of


@dataclass(frozen=True)
class Orthogonalise(AbstractPreprocess):
    """Project each direction off the merge of the earlier ones, in the order of the sources (OPCM,
    arXiv 2501.09522).

        M_1 = B_1,  M_k = M_{k-1} + P_k,  P_1 = B_1
        M_{k-1} = U S V^T,  Q = U^T B_k V,  r + 1 = least n with S_1 + ... + S_n > alpha sum S
        P_k  = B_k - U (Q restricted to its diagonal and its block i, j <= r) V^T
        B'_k = P_k / lambda,  lambda = |M_K| / mean_k |B_k|

    The sum of the directions is OPCM's final delta, whose norm is the mean of the sources' norms.
    The paper divides by a lambda at each step; all but the last cancel. Tensors with more than two
    axes are matrices `[out, rest]`; vectors are not projected. (FusionBench projects the weights of
    linear layers only.) Singular values of zero are ignored.

    If the first direction is itself such a merge, of n sources with `lambda_n`, the others continue
    it: `M_1 = lambda_n B_1`, and its norm counts n times in the mean.
    """

    alpha: float = 0.5
    """Share of the sum of singular values whose directions are protected, in [0, 1]; larger values
    protect more of the earlier directions."""
    scope: Literal["model", "tensor"] = "model"
    """Norms of the whole model (the paper; each tensor is projected twice, once to measure the
    norms), or of each tensor."""
    earlier_scale: float = 1.0
    """`lambda_n` of the first direction, if it is such a merge itself."""
    earlier_sources: int = 1
    """Number n of sources that the first direction is a merge of."""

    def __post_init__(self) -> None:
        """Validate alpha and the description of the first direction."""
        scale, sources = self.earlier_scale, self.earlier_sources
        require(scale > 0, "Orthogonalise.earlier_scale", "a positive number", scale)
        require(sources >= 1, "Orthogonalise.earlier_sources", "at least 1", sources)
        require(0 <= self.alpha <= 1, "Orthogonalise.alpha", "a share in [0, 1]", self.alpha)

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        norms = _squares(directions).sqrt()
        merged = self._project(directions, site)
        return self._scale(directions, norms, float(_squares(merged[None])))

    @override
    def survey(self, passes: Passes) -> Step:
        if self.scope == "tensor":
            return self
        squares: Tensor | float = 0.0
        merged = 0.0
        for site, directions in passes():
            squares = squares + _squares(directions)
            merged += float(_squares(self._project(directions, site)[None]))

        def orthogonalise(directions: Tensor, site: Site) -> Tensor:
            self._project(directions, site)
            return self._scale(directions, torch.as_tensor(squares).sqrt(), merged)

        return orthogonalise

    def _project(self, directions: Tensor, site: Site) -> Tensor:
        if self.earlier_scale != 1:
            directions[0].mul_(self.earlier_scale)
        return _project(directions, site, self.alpha)

    def _scale(self, directions: Tensor, norms: Tensor, merged: float) -> Tensor:
        """Scale the sum of the directions to the mean of the norms, unless it is zero."""
        counts = torch.ones_like(norms)
        counts[0] = self.earlier_sources
        mean = float((counts * norms).sum() / counts.sum())
        return directions.mul_(mean / merged**0.5) if merged else directions


def _project(directions: Tensor, site: Site, alpha: float) -> Tensor:
    """Overwrite `B_k` by `P_k` and return their sum."""
    matrices = matrices_of(directions, site)
    parts = directions if matrices is None else matrices
    merged = parts[0].clone()
    for matrix in parts[1:]:
        if matrices is not None:
            left, values, right = decompose(merged)
            used = left.T @ matrix.double() @ right.T
            reached = values.cumsum(0) > alpha * values.sum()
            rank = int((~reached).sum())
            diagonal = used.diagonal().clone()
            used[rank:] = 0
            used[:, rank:] = 0
            used.diagonal().copy_(diagonal)
            matrix.sub_((left @ used @ right).to(matrix.dtype))
        merged.add_(matrix)
    return merged


def _squares(directions: Tensor) -> Tensor:
    """Return `|B_k|^2`, `[sources]`, float64."""
    found = [direction.square().sum(dtype=torch.float64) for direction in directions]
    return torch.stack(found)
