"""Model Stock: how far to go from the base, from the angle between fine-tuned weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge._typing import Origin
from gradmerge.errors import ConfigError
from gradmerge.operators.base import View, require_base
from gradmerge.operators.span import AbstractSpan, norms_of, per_view

_SMALLEST = 1e-6


@dataclass(frozen=True)
class ModelStock(AbstractSpan):
    """`theta = A + t sum_k c_k B_k` with Model Stock's ratio (arXiv 2403.19522).

        t = K cos / (1 + (K - 1) cos),   cos = mean over pairs of <B_i, B_j> / (|B_i| |B_j|)

    With `c = 1/K` (init `Uniform`) this is the paper's and mergekit's; other coefficients take
    their place in the average. Products of norms count as 1e-6 at least; where the denominator
    vanishes (below 1e-6) there is no estimate, and the base is kept. Linear in c.
    """

    per: Literal["tensor", "row"] = "tensor"
    """One ratio a tensor, or one for each vector along the last axis (mergekit's `filter_wise`)."""

    @override
    def require(self, num_sources: int, origin: Origin) -> None:
        require_base("ModelStock", origin)
        if num_sources < 2:
            raise ConfigError(
                f"ModelStock: expected two sources or more, whose angle it takes; got "
                f"{num_sources}."
            )

    @override
    def gram_view(self, shape: torch.Size) -> View:
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
