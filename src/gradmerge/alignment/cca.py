"""CCA Merge: units through their canonical correlations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.alignment.base import assign
from gradmerge.alignment.mixing import MixingOnData, kept_apart
from gradmerge.alignment.moments import Pairing, correlation, covariances
from gradmerge.alignment.symmetry.spec import LinearMap, Map, UnitGroup
from gradmerge.common.errors import ConfigError, require


@dataclass(frozen=True)
class CCA(MixingOnData):
    """Units through their canonical correlations (CCA Merge, arXiv 2407.05385).

    With x the reference's units, y the source's, covariances with `gamma` added to their diagonals,
    and `U S V^T = svd(S_xx^-1/2 S_xy S_yy^-1/2)`, a group's map and its inverse are

        T    = S_xx^1/2 U V^T S_yy^-1/2        (the paper's, transposed: units are columns here)
        T^-1 = S_yy^1/2 V U^T S_xx^-1/2

    in float64. `y -> T y` turns y's canonical variates onto x's, in x's own basis; where `y = M x`
    with M orthogonal, `T = M^T` as gamma goes to 0. T passes through no element-wise function
    exactly, so the mapped source is near its own function, not equal to it. Of BatchNorm, shifts
    and running means are mapped by T, gains are means weighted with T's squared entries (T itself
    may cancel them, or turn their sign), and running variances are mapped by these: have the
    statistics recomputed (`buffers: recompute`, the default). Attention heads, units that are
    multiplied one by one with others (gated MLPs) and those of a residual stream with LayerNorm or
    RMSNorm gains keep a permutation, by correlations; the report names them.
    """

    gamma: float = 0.1
    """Term added to the variances, in their own units."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        require(self.gamma >= 0, "CCA.gamma", "0 or more", self.gamma)

    @override
    def match_group(self, units: Pairing) -> tuple[Map, float]:
        moments = units.moments_of_mean()
        if kept_apart(units.context.spec, units.group.name) is not None:
            return assign(correlation(moments))
        xx, yy, xy = covariances(moments)
        root_x, inverse_x = self._roots(units.group, xx)
        root_y, inverse_y = self._roots(units.group, yy)
        u, s, vh = torch.linalg.svd(inverse_x @ xy @ inverse_y)
        turn = u @ vh
        return LinearMap(root_x @ turn @ inverse_y, root_y @ turn.mT @ inverse_x), float(s.sum())

    def _roots(self, group: UnitGroup, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """`S^1/2` and `S^-1/2` of a covariance with gamma."""
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp(min=0) + self.gamma
        if not values[0] > 1e-12 * values[-1]:
            raise ConfigError(
                f"CCA: the covariance of the {group.size} units of {group.name} has no inverse "
                f"(eigenvalues from {float(values[0]):.1e} to {float(values[-1]):.1e}): some never "
                f"vary, or there are fewer rows than units.\ngamma is {self.gamma}; take a larger "
                "one, or more data."
            )
        roots = values.sqrt()
        return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
