"""The linear operator on directions of low rank, which are never formed: `B_k = L_k R_k`.

A weight `[m, n]` with K adapters of rank r is merged by one product of rank `K r`,

    theta = A + [c_1 L_1, ..., c_K L_K] [R_1; ...; R_K],

and its gradient G is contracted by another, `dL/dc_k = <G, L_k R_k> = <L_k^T G, R_k>`. Both take
`2 m n K r` multiplications and additions, and read the origin or the gradient once. Coefficients
along rows scale the left factors, along columns the right ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradmerge.operators.base import Spread, Terms

# Entries that are widened at a time, where the result has 16 bits.
_BLOCK = 1 << 20


def combine(terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
    """Merge as `AbstractOperator.combine` does; `coefficient` is `[sources, slot]`."""
    assert terms.origin is not None
    dtype = torch.promote_types(terms.accumulate_dtype, out.dtype)
    left, right = merged_factors(terms, coefficient, spread, dtype, out.device)
    matrix, origin = out.view(len(left), -1), terms.origin.reshape(len(left), -1)
    for rows in _blocks(matrix, whole=out.dtype == dtype):
        if out.dtype == dtype:
            matrix[rows].copy_(origin[rows]).addmm_(left[rows], right)
        else:
            wide = origin[rows].to(out.device, dtype, copy=True)
            matrix[rows].copy_(wide.addmm_(left[rows], right))
    return out


def merged_factors(
    terms: Terms, coefficient: Tensor, spread: Spread, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return `[c_1 L_1, ..., c_K L_K]`, `[rows, K r]`, and `[R_1; ...; R_K]`, `[K r, rest]`."""
    lefts, rights = [], []
    for (left, right), c in zip(_factors(terms, dtype, device), coefficient, strict=True):
        along = c.to(left)
        if spread.kind == "scalar":
            lefts.append(left * along)
            rights.append(right)
        elif spread.axis == 0:
            lefts.append(left * along[:, None])
            rights.append(right)
        else:
            lefts.append(left)
            rights.append((_by_axis(right, terms, spread) * along[:, None]).view(right.shape))
    return torch.cat(lefts, dim=1), torch.cat(rights)


def contract(terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
    """Contract as `AbstractOperator.contract` does."""
    dtype = torch.promote_types(terms.accumulate_dtype, grad.dtype)
    factors = list(_factors(terms, dtype, grad.device))
    left = torch.cat([left for left, _ in factors], dim=1)
    right = torch.cat([right for _, right in factors])
    matrix = grad.reshape(len(left), -1)
    by_row = spread.kind == "axis" and spread.axis == 0
    seen = torch.zeros_like(left if by_row else right)
    for rows in _blocks(matrix, whole=grad.dtype == dtype):
        part = matrix[rows].to(dtype)
        if by_row:
            seen[rows] = part @ right.T
        else:
            seen.addmm_(left[rows].T, part)
    products = seen.mul_(left if by_row else right).double()
    total, first = [], 0
    for own, _ in factors:
        ranks = slice(first, first := first + own.shape[1])
        if spread.kind == "scalar":
            total.append(products[ranks].sum())
        elif by_row:
            total.append(products[:, ranks].sum(dim=1))
        else:
            total.append(_by_axis(products[ranks], terms, spread).sum(dim=(0, 1, 3)))
    return torch.stack(total).view(coefficient.shape).to(coefficient)


def _factors(
    terms: Terms, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the factors of each direction; those of a zero one have rank 0."""
    assert terms.updates is not None
    rows = terms.shape[0]
    for update in terms.updates:
        if update is None:
            yield (
                torch.zeros(rows, 0, dtype=dtype, device=device),
                torch.zeros(0, terms.shape[1:].numel(), dtype=dtype, device=device),
            )
        else:
            yield update.left.to(device, dtype), update.right.to(device, dtype)


def _by_axis(right: Tensor, terms: Terms, spread: Spread) -> Tensor:
    """Return a right factor as `[rank, outer, width, inner]` around the coefficients' axis."""
    shape = terms.shape
    outer, inner = shape[1 : spread.axis].numel(), shape[spread.axis + 1 :].numel()
    return right.view(len(right), outer, shape[spread.axis], inner)


def _blocks(matrix: Tensor, whole: bool) -> Iterator[slice]:
    """Yield slices of rows."""
    step = len(matrix) if whole else max(1, _BLOCK // max(1, matrix.shape[1]))
    return (slice(i, i + step) for i in range(0, len(matrix), max(1, step)))
