"""Rescaling by the norms of matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.finalisers.base import AbstractRescale, FinalSite

_SMALL = 256
"""Smaller sides get a full decomposition."""


@dataclass(frozen=True)
class SpectralRescale(AbstractRescale):
    """`theta' = A + f (theta - A)`, `f = mean_k |theta_k - A| / |theta - A|` per matrix.

    Averaging K nearly orthogonal directions shrinks their singular values (to 1/K in the spectral
    norm, 1/sqrt(K) in the Frobenius norm), and with them the variance of the layer's outputs. No
    data are needed; `REPAIR` restores the variance that the network has on data.

    A tensor of two axes or more is taken as `[out, rest]`; vectors stay. The sources' norms are
    those of their directions before any preprocess. A delta of zero stays zero. Norms are in
    float64; above 256 on the smaller side the spectral norm is found by Lanczos steps, to 1e-9.
    """

    norm: Literal["spectral", "frobenius"] = "spectral"
    """The largest singular value, or the root of the sum of squares."""
    target: Literal["mean", "max"] = "mean"
    """The norm of the result: the mean of the sources' norms, or the largest."""

    def __post_init__(self) -> None:
        """Check the options."""
        for name, allowed in (("norm", ("spectral", "frobenius")), ("target", ("mean", "max"))):
            if getattr(self, name) not in allowed:
                got = getattr(self, name)
                raise ConfigError(
                    f"SpectralRescale: {name}: expected {' or '.join(allowed)}, got {got!r}."
                )

    @override
    def factor(self, delta: Tensor, site: FinalSite) -> float:
        if delta.dim() < 2 or not delta.numel():
            return 1.0
        own = self._norm(delta, site, "the merge")
        if own == 0:
            return 1.0
        if "target" not in site.facts:
            origin = site.origin()
            norms = []
            for k, source in enumerate(site.sources()):
                wide = source.double()
                direction = wide if origin is None else wide - origin.to(wide)
                norms.append(self._norm(direction, site, f"source {k + 1}"))
            mean = sum(norms) / len(norms)
            site.facts["target"] = mean if self.target == "mean" else max(norms)
        return site.facts["target"] / own

    def _norm(self, delta: Tensor, site: FinalSite, whose: str) -> float:
        matrix = delta.detach().cpu().double().flatten(1)
        if not matrix.isfinite().all():
            raise ConfigError(
                f"SpectralRescale: {site.name}: expected finite numbers, got NaN or infinity in "
                f"{whose}. Is that checkpoint complete?"
            )
        return float(matrix.norm()) if self.norm == "frobenius" else spectral_norm(matrix)


def spectral_norm(matrix: Tensor) -> float:
    """Return the largest singular value of a float64 matrix; for a large one by ARPACK's Lanczos
    iteration, from a start that is drawn with a fixed seed.
    """
    side = min(matrix.shape)
    if side <= _SMALL:
        return float(torch.linalg.svdvals(matrix)[0])
    if not matrix.any():
        return 0.0
    start = torch.randn(side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    from scipy.sparse.linalg import svds  # takes as long to import as a small merge

    # to the square of the tolerance, as the eigenvalue of a product with the transpose
    found = svds(matrix.numpy(), k=1, v0=start.numpy(), tol=1e-6, return_singular_vectors=False)
    return float(found[0])
