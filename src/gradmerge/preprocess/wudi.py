"""A merged delta with the least interference with the sources, found without data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradmerge.common.errors import require
from gradmerge.preprocess.base import AbstractPreprocess, Site
from gradmerge.preprocess.matrices import averaged, shared


@dataclass(frozen=True)
class WUDI(AbstractPreprocess):
    """Minimise the interference of the merged delta with the sources (WUDI-Merging, arXiv
    2503.08099).

        tau  = argmin sum_k | (tau - B_k) B_k^T |_F^2 / |B_k|_F^2   by Adam from sum_k B_k
        B'_k = tau / K

    This applies to tensors with two axes, `[out, in]` as stored; all others are averaged. The rows
    of `B_k` stand in for the inputs of the layer on task k, so no data are needed. The result has
    no parts of single sources, so all directions are equal. Directions of zero are ignored.

    The gradient is `g_0 + 2 (tau - tau_0) G`, where `tau_0` is the start, `g_0` the gradient there
    and `G = sum_k B_k^T B_k / |B_k|_F^2`. A step costs one matrix product, and no large terms
    cancel, which matters because Adam's steps do not shrink with the gradient.
    """

    steps: int = 300
    """Number of Adam steps."""
    lr: float = 1e-5
    """Learning rate of Adam, roughly the largest change of an entry per step."""

    def __post_init__(self) -> None:
        """Validate steps and lr."""
        require(self.steps >= 0, "WUDI.steps", "at least 0", self.steps)
        require(self.lr > 0, "WUDI.lr", "a positive number", self.lr)

    @override
    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        if directions.dim() != 3 or not directions.numel():
            return averaged(directions)
        return shared(least_interference(directions, self.steps, self.lr), directions)


@torch.no_grad()
def least_interference(directions: Tensor, steps: int, lr: float) -> Tensor:
    """Return `tau`, `[out, in]`, from directions `[sources, out, in]`, in their dtype."""
    num, out, inputs = directions.shape
    start = directions.sum(dim=0)
    norms = directions.flatten(1).norm(dim=1)
    units = directions / norms.where(norms > 0, 1).view(-1, 1, 1)  # zeros stay zero
    first = torch.zeros_like(start)
    for direction, unit in zip(directions, units, strict=True):
        first += (start - direction) @ unit.T @ unit
    rows = units.view(num * out, inputs)
    # G, or its factors if their product is cheaper
    gram = rows.T @ rows if inputs < 2 * num * out else None
    moved = nn.Parameter(torch.zeros_like(start))
    adam = torch.optim.Adam([moved], lr=lr)
    for _ in range(steps):
        product = moved @ gram if gram is not None else moved @ rows.T @ rows
        moved.grad = product.add_(first).mul_(2)
        adam.step()
    return start + moved
