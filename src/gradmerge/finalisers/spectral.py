"""Rescaling by the norms of matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.errors import ConfigError
from gradmerge.finalisers.base import AbstractRescale, FinalSite

_SMALL = 256
"""Smaller sides get a full decomposition."""
_MOST_STEPS = 300
"""Products with a matrix and its transpose; the value converges long before."""


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
    """Return the largest singular value of a float64 matrix.

    For a large matrix by Lanczos steps on `M^T M` with full reorthogonalisation, from a start that
    is drawn with a fixed seed.
    """
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    width = matrix.shape[1]
    if width <= _SMALL:
        return float(torch.linalg.svdvals(matrix)[0])
    scale = float(matrix.abs().max())
    if scale == 0:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(width, generator=generator, dtype=torch.float64)
    basis = [vector / vector.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    value = 0.0
    for _ in range(min(_MOST_STEPS, width)):
        product = matrix.T @ (matrix @ basis[-1])
        diagonal.append(float(product @ basis[-1]))
        before, value = value, _largest(diagonal, beside)
        if value - before <= 1e-12 * value:
            break
        stacked = torch.stack(basis)
        for _ in range(2):  # rounding puts some of it back the first time
            product -= stacked.T @ (stacked @ product)
        beside.append(float(product.norm()))
        if beside[-1] <= 1e-14 * scale * scale:
            break
        basis.append(product / beside[-1])
    return value**0.5


def _largest(diagonal: list[float], beside: list[float]) -> float:
    """Return the largest eigenvalue of a symmetric tridiagonal matrix."""
    wide = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        side = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
        wide = wide + torch.diag(side, 1) + torch.diag(side, -1)
    return float(torch.linalg.eigvalsh(wide)[-1])
