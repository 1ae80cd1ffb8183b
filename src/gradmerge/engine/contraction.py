"""A link and an operator combined: `theta = combine(terms, link(z))` and its gradient `dL/dz`.

With one coefficient per weight, the raw coefficients, the coefficients and the gradients of both
are each as large as all sources together. If link and operator treat every entry independently,
such a tensor is merged and contracted in parts that fit into the processor's cache: no temporary
grows with the tensor, and each stored byte is read once per pass. Results are bitwise equal.

Experts that are stacked in one tensor, each with coefficients along an axis, are merged one by one,
as experts that are stored apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gradmerge.coefficients import AbstractCoefficients, linked
from gradmerge.operators import AbstractOperator, Spread, Terms
from gradmerge.operators.chunks import chunk_size

# Length of a part in operator chunks; shorter parts are dominated by call overhead.
_CHUNKS = 4


def combine(
    coefficients: AbstractCoefficients,
    operator: AbstractOperator,
    terms: Terms,
    raw: Tensor,
    spread: Spread,
    out: Tensor,
) -> Tensor:
    """Write `combine(terms, link(raw))` into `out` without recording a gradient."""
    with torch.no_grad():
        raw = raw.detach()
        if spread.experts:
            whole = linked(coefficients, raw, terms.count)
            for one, own, part in _experts(terms, whole, spread):
                operator.combine(part, own, replace(spread, experts=0), out[one])
            return out
        if not _goes_by_parts(coefficients, operator, spread, out):
            own = spread.expanded(linked(coefficients, raw, terms.count))
            return operator.combine(terms, own, spread, out)
        flat = out.view(-1)
        for here, own, part in _parts(terms, raw, out):
            operator.combine(part, linked(coefficients, own, terms.count), spread, flat[here])
        return out


def contract(
    coefficients: AbstractCoefficients,
    operator: AbstractOperator,
    terms: Terms,
    raw: Tensor,
    spread: Spread,
    grad: Tensor,
    slopes: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return `dL/dz` for `grad = dL/dtheta` and, with `slopes`, `dL/dc` (`[sources, *slot]`)."""
    grad = grad.detach()
    if slopes or not _goes_by_parts(coefficients, operator, spread, grad):
        found, slope = _contract(coefficients, operator, terms, raw, spread, grad)
        return found, slope if slopes else None
    flat = grad.reshape(-1)
    total = torch.empty(raw.shape, dtype=raw.dtype, device=raw.device)
    rows = total.view(len(raw), -1)
    for here, own, part in _parts(terms, raw.detach(), grad):
        rows[:, here], _ = _contract(coefficients, operator, part, own, spread, flat[here])
    return total, None


def _contract(
    coefficients: AbstractCoefficients,
    operator: AbstractOperator,
    terms: Terms,
    raw: Tensor,
    spread: Spread,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = raw.detach().requires_grad_()
        coefficient = linked(coefficients, leaf, terms.count)
    with torch.no_grad():
        fixed = coefficient.detach()
        if spread.experts:
            slope, plain = torch.empty_like(fixed), replace(spread, experts=0)
            for one, own, part in _experts(terms, fixed, spread):
                found = operator.contract(part, grad[one], own, plain)
                slope.view(len(slope), spread.experts, -1)[:, one] = found
        else:
            slope = operator.contract(terms, grad, spread.expanded(fixed), spread)
            slope = spread.summed(slope, fixed.shape[-1])
    if coefficient is leaf:
        return slope.to(raw.dtype), slope
    (found,) = torch.autograd.grad(coefficient, leaf, slope.to(coefficient.dtype))
    return found, slope


def _experts(
    terms: Terms, coefficient: Tensor, spread: Spread
) -> Iterator[tuple[int, Tensor, Terms]]:
    """Yield each expert's number, coefficients `[sources, slot]` and terms."""
    shape = terms.shape
    masks = terms.masks
    by_expert = coefficient.view(len(coefficient), spread.experts, -1)
    for i in range(spread.experts):
        own = replace(
            terms,
            sources=[source[i] for source in terms.sources],
            origin=None if terms.origin is None else terms.origin[i],
            masks=masks and [None if m is None else m.view(shape)[i].reshape(-1) for m in masks],
            facts={},
        )
        yield i, by_expert[:, i], own


def _length(tensor: Tensor) -> int:
    """Return the number of entries per part."""
    return _CHUNKS * chunk_size(tensor.device)


def _goes_by_parts(
    coefficients: AbstractCoefficients, operator: AbstractOperator, spread: Spread, tensor: Tensor
) -> bool:
    return (
        spread.kind == "element"
        and operator.by_entry
        and coefficients.by_entry
        and tensor.numel() > _length(tensor)
    )


def _parts(terms: Terms, raw: Tensor, tensor: Tensor) -> Iterator[tuple[slice, Tensor, Terms]]:
    """Yield each part's slice of the flat tensor, raw coefficients `[rows, part]`, and terms."""
    sources = [source.reshape(-1) for source in terms.sources]
    origin = None if terms.origin is None else terms.origin.reshape(-1)
    masks = terms.masks
    rows = raw.reshape(len(raw), -1)
    size, length = tensor.numel(), _length(tensor)
    for begin in range(0, size, length):
        here = slice(begin, min(begin + length, size))
        own = replace(
            terms,
            sources=[source[here] for source in sources],
            origin=None if origin is None else origin[here],
            masks=masks and [None if mask is None else mask[here] for mask in masks],
            facts={},
        )
        yield here, rows[:, here], own
