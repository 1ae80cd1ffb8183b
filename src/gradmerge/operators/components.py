"""Coefficients on the singular components of each direction (AdaRank, arXiv 2503.22178).

    B_k = U_k diag(s_k) V_k^T,  theta = A + scale * sum_k U_k diag(c_k s_k) V_k^T

A merge is one matrix product per source, over the components with a coefficient other than 0. With
`G = dL/dtheta` the gradient is one number per component,

    dL/dc_kr = scale * s_kr u_kr^T G v_kr,

the column sums of `(G V_k S_k) (.) U_k`: no product with the size of the tensor is formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.common.memory import in_file
from gradmerge.operators.base import AbstractOperator, Spread, Terms
from gradmerge.operators.linear import Linear


@dataclass(frozen=True)
class Components(AbstractOperator):
    """Sum of directions with one coefficient per singular component (AdaRank, arXiv 2503.22178).

        B_k = U_k diag(s_k) V_k^T,  theta = A + scale * sum_k U_k diag(c_k s_k) V_k^T

    Use it with granularity `Component`. Tensors with more than two axes are matrices `[out, rest]`.
    Tensors with one coefficient per source (one axis, or frozen) and all other granularities use
    the linear sum `A + scale * sum_k c_k B_k`.

    In training each tensor is decomposed once, in float64. `U_k` and `S_k V_k^T` are kept in
    float32 (float64 if a tensor is): on a CPU in memory-mapped files (in `TMPDIR`), on a GPU in its
    memory. They need `4 (out + rest) min(out, rest)` bytes per source, twice as much as a square
    direction in float32. A static merge keeps none.
    """

    scale: float = 1.0
    """Factor on the sum of directions (as in task arithmetic; AdaRank uses 0.3 over a base)."""
    by_component = True

    @override
    def combine(self, terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
        if spread.kind != "component":
            wide = self.scale * coefficient.detach().double()
            return Linear().combine(terms, wide, spread, out)
        if not out.numel():
            return out
        terms = terms.dense()
        num = len(terms.sources)
        left, right = factors(terms, out.device)
        merged = left.new_zeros(len(left), right.shape[1])
        weights = self.scale * coefficient.detach().reshape(num, -1).to(left)
        for u, v, own in zip(left.chunk(num, dim=1), right.chunk(num), weights, strict=True):
            kept = own.nonzero().flatten()
            if 2 * len(kept) <= len(own):  # a mask removes most
                u, v, own = u[:, kept], v[kept], own[kept]
            merged.addmm_(u * own, v)
        merged = merged.view(terms.shape)
        origin = _origin(terms, merged)
        return out.copy_(merged if origin is None else merged.add_(origin))

    @override
    def contract(self, terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
        if spread.kind != "component":
            slope = Linear().contract(terms, grad, self.scale * coefficient, spread)
            return self.scale * slope
        if not grad.numel():
            return torch.zeros_like(coefficient)
        left, right = factors(terms.dense(), grad.device)
        matrix, num = grad.reshape(len(left), -1).to(left), len(terms.sources)
        slopes = [
            (matrix @ v.T).mul_(u).sum(dim=0, dtype=torch.float64)
            for u, v in zip(left.chunk(num, dim=1), right.chunk(num), strict=True)
        ]
        total = torch.cat(slopes).mul_(self.scale).view(coefficient.shape)
        return total.to(coefficient.device, coefficient.dtype)


def factors(terms: Terms, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `U_k`, `[out, sources * r]`, and `S_k V_k^T`, `[sources * r, rest]`, of all sources.

    Components are sorted by singular value, largest first; r is `min(out, rest)`.

    Raises:
        ConfigError: a direction contains NaN or infinity.
    """
    keys = f"left components {device}", f"right components {device}"
    if keys[0] not in terms.facts:
        # tensors created in inference mode could not be used by autograd in training
        with torch.inference_mode(False), torch.no_grad():
            found = _decompose(terms, device)
            terms.facts.update(zip(keys, found, strict=True))
    return terms.facts[keys[0]], terms.facts[keys[1]]


def _decompose(terms: Terms, device: torch.device) -> tuple[Tensor, Tensor]:
    out, rest = terms.shape[0], math.prod(terms.shape[1:])
    num, rank, dtype = len(terms.sources), min(out, rest), terms.accumulate_dtype
    shapes = (out, num * rank), (num * rank, rest)
    if device.type == "cpu":
        left, right = (in_file(shape, dtype) for shape in shapes)
    else:
        left, right = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    origin = None if terms.directions else _origin(terms, terms.sources[0].double())
    for k, source in enumerate(terms.sources):
        direction = source.to(device, torch.float64)
        if origin is not None:
            direction = direction - origin.to(direction)
        if not direction.isfinite().all():
            raise ConfigError(
                f"Components: expected finite numbers, but source {k + 1} of {num} has NaN or "
                f"infinity in a tensor of shape {tuple(terms.shape)}. Is that checkpoint complete?"
            )
        u, s, v = torch.linalg.svd(direction.view(out, rest), full_matrices=False)
        own = slice(k * rank, (k + 1) * rank)
        left[:, own] = u
        right[own] = s[:, None] * v
    return left, right


def _origin(terms: Terms, like: Tensor) -> Tensor | None:
    """Return `A` in the dtype and on the device of another tensor; None for zero."""
    if terms.origin is not None:
        return terms.origin.to(like)
    if not terms.mean_origin:
        return None
    total = torch.zeros_like(like)
    for source in terms.sources:
        total.add_(source.to(like))
    return total.div_(len(terms.sources))
