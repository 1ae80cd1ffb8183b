"""Steps towards a source that are limited by a threshold (NearSwap)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.typing import Origin
from gradmerge.operators.base import require_base
from gradmerge.operators.entrywise import AbstractEntrywise


@dataclass(frozen=True)
class NearSwap(AbstractEntrywise):
    """Move each entry towards the source, by at most a threshold:
    `theta = A + sum_k clamp(B_k, -c_k, c_k)`.

    The coefficient is the threshold, in units of the weights (mergekit's `t`, with one source;
    https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001). Differentiable almost everywhere,
    with `G = dL/dtheta`:

        dL/dc_k = sum G sign(B_k) [|B_k| > c_k]

    A negative threshold counts as 0 and has no gradient, so it can never return: to learn it, use a
    link that stays positive (`Clamp`, `Sigmoid`).
    """

    by_rows = True

    @override
    def require(self, num_sources: int, origin: Origin) -> None:
        require_base("NearSwap", origin)

    @override
    def merge(self, directions: Tensor, coefficient: Tensor) -> Tensor:
        threshold = coefficient.clamp(min=0)
        return torch.minimum(torch.maximum(directions, -threshold), threshold).sum(dim=0)

    @override
    def slope(self, directions: Tensor, coefficient: Tensor) -> Tensor:
        beyond = (directions.abs() > coefficient) & (coefficient >= 0)
        return directions.sign().mul_(beyond)
