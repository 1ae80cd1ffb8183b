"""One unified vector for all sources, with a mask and a scale for each (EMR-Merging)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.preprocess.base import AbstractPreprocess, Passes, Site, Step


@dataclass(frozen=True)
class Unify(AbstractPreprocess):
    """Elect one vector, then mask and rescale it for each source (EMR-Merging, arXiv 2405.17461).

        s    = sign(sum_j B_j), - where it is 0
        u    = s max_k |B_k| over the sources with sign(B_k) = s, 0 if there are none
        M_k  = [B_k u > 0],  r_k = sum |B_k| / sum |M_k (.) u|  over all tensors that are not frozen
        B'_k = r_k M_k (.) u

    EMR-Merging runs each task with its own model `A + B'_k`: `gradmerge merge --outputs tasks`
    writes these models, `--outputs compact` a single `u` with a mask and a scale per task. All
    tensors are read once before the first one is merged.
    """

    rescale: Literal["sums", "means"] = "sums"
    """Sums over all entries (the paper), or over the means of all tensors (the authors' code),
    in which a bias counts as much as a weight matrix."""

    def __call__(self, directions: Tensor, site: Site) -> Tensor:
        """Process a single tensor as if it were the whole model."""
        return self.survey(lambda: iter([(site, directions)]))(directions, site)

    @override
    def survey(self, passes: Passes) -> Step:
        scales = self.scales(passes)

        def unify(directions: Tensor, site: Site) -> Tensor:
            unified, masks = elect(directions)
            for direction, mask, scale in zip(directions, masks, scales, strict=True):
                direction.copy_(masked(unified, mask, scale))
            return directions

        return unify

    def scales(self, passes: Passes) -> list[float]:
        """Return `r_k` of each source; 1 if its mask is empty."""
        own: list[float] = []
        left: list[float] = []
        for site, directions in passes():
            own = own or [0.0] * len(directions)
            left = left or [0.0] * len(directions)
            if not directions.numel() or not site.takes_part:
                continue
            size = 1 if self.rescale == "sums" else directions[0].numel()
            unified, masks = elect(directions)
            unified.abs_()
            for k, (direction, mask) in enumerate(zip(directions, masks, strict=True)):
                own[k] += float(direction.abs().sum(dtype=torch.float64)) / size
                left[k] += float((unified * mask).sum(dtype=torch.float64)) / size
        return [a / b if b else 1.0 for a, b in zip(own, left, strict=True)]


def elect(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unified vector `u`, `[*shape]`, and boolean masks `M_k`, `[sources, *shape]`."""
    positive = directions.sum(dim=0) > 0
    masks = torch.stack(
        [torch.where(positive, direction > 0, direction < 0) for direction in directions]
    )
    unified = torch.zeros_like(directions[0])
    for direction, mask in zip(directions, masks, strict=True):
        torch.maximum(unified, direction.abs().mul_(mask), out=unified)
    return torch.where(positive, unified, -unified), masks


def masked(unified: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return `r_k M_k (.) u`."""
    return torch.where(mask, unified, 0.0).mul_(scale)
