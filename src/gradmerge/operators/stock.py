"""Model Stock: interpolation ratio from the angle between fine-tuned weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.common.typing import Origin
from gradmerge.operators.base import FlatView, require_base
from gradmerge.operators.span import AbstractSpan, norms_of, per_view

_SMALLEST = 1e-6


@dataclass(frozen=True)
class ModelStock(AbstractSpan):
    """Scaled average of directions with the ratio of Model Stock (arXiv 2403.19522).

        theta = A + t sum_k c_k B_k
        t = K cos / (1 + (K - 1) cos),   cos = mean over pairs of <B_i, B_j> / (|B_i| |B_j|)

    `c = 1/K` (init `Uniform`) gives the method of the paper and of mergekit; other coefficients
    weigh the average. Products of norms are at least 1e-6; where the denominator is below 1e-6
    there is no estimate and the base is kept. Linear in c. Needs origin base and two or more
    sources.
    """

    per: Literal["tensor", "row"] = "tensor"
    """One ratio per tensor, or one per vector along the last axis (mergekit's `filter_wise`)."""

    @override
    def require(self, num_sources: int, origin: Origin) -> None:
        require_base("ModelStock", origin)
        if num_sources < 2:
            raise ConfigError(
                f"ModelStock: expected two sources or more, to measure their angle, got "
                f"{num_sources}."
            )

    @override
    def gram_view(self, shape: torch.Size) -> FlatView:
        return per_view(self.per, shape)

    @override
    def weights(self, gram: Tensor, coefficient: Tensor) -> Tensor:
        num, norms = gram.shape[-1], norms_of(gram)
        first, second = torch.triu_indices(num, num, 1, device=gram.device)
        size = (norms[first] * norms[second]).clamp(min=_SMALLEST)
        cosine = (gram[:, first, second].T / size).clamp(-1, 1).mean(dim=0)
        denominator = 1 + (num - 1) * cosine
        singular = denominator.abs() < _SMALLEST
        ratio = torch.where(singular, 0, num * cosine / torch.where(singular, 1, denominator))
        return ratio * coefficient
