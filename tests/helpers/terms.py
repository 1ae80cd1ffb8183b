"""Terms of the linear operator, and its result and gradient by float64 autograd."""

from __future__ import annotations

import torch

from gradmerge.operators import Linear, Spread, Terms

SPREADS = ["scalar", "first", "last", "partition", "element"]


def spread_of(kind: str, shape: tuple[int, ...]) -> tuple[Spread, tuple[int, ...]]:
    """Return a spread and the shape of the coefficients of one source."""
    size = torch.Size(shape).numel()
    if kind == "first":
        return Spread("axis", 0), (shape[0],)
    if kind == "last":
        axis = min(1, len(shape) - 1)
        return Spread("axis", axis), (shape[axis],)
    if kind == "partition":
        count = min(3, size)
        return Spread("partition", 0, torch.arange(size) * 7 % count), (count,)
    return (Spread("scalar"), ()) if kind == "scalar" else (Spread("element"), shape)


def expand(coefficient: torch.Tensor, spread: Spread, shape: tuple[int, ...]) -> torch.Tensor:
    """`[sources, *slot]` to `[sources, *shape]`."""
    sources = len(coefficient)
    if spread.kind == "axis":
        place = [sources, *[1] * len(shape)]
        place[1 + spread.axis] = -1
        return coefficient.reshape(place).expand(sources, *shape)
    if spread.kind == "partition":
        return coefficient[:, spread.parts].reshape(sources, *shape)
    if spread.kind == "scalar":
        return coefficient.reshape(sources, *[1] * len(shape)).expand(sources, *shape)
    return coefficient


def make(shape, dtype, origin, spread_kind, sources=3):
    """Return similar terms; with origin "directions" they are small and the base is added."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator)

    base = draw(*shape)
    taken_off = origin.startswith("directions")
    near = [(base * (not taken_off) + 0.01 * draw(*shape)).to(dtype) for _ in range(sources)]
    anchor = base.to(dtype) if origin in ("base", "directions") else None
    terms = Terms(near, anchor, origin == "mean", taken_off)
    spread, slot = spread_of(spread_kind, shape)
    return terms, spread, 0.4 * draw(sources, *slot), draw(*shape)


def widened(terms):
    """Sources and origin in float64."""
    stacked = torch.stack([source.double() for source in terms.sources])
    if terms.origin is not None:
        return stacked, terms.origin.double()
    return stacked, stacked.mean(dim=0) if terms.mean_origin else torch.zeros_like(stacked[0])


def exact(terms, spread, coefficient, grad):
    """Merged tensor and `dL/dc` by float64 autograd."""
    stacked, anchor = widened(terms)
    if terms.directions:
        stacked = stacked + anchor
    leaf = coefficient.double().requires_grad_()
    spread_out = expand(leaf, spread, tuple(terms.shape))
    theta = anchor + (spread_out * (stacked - anchor)).sum(dim=0)
    theta.backward(grad.double())
    # rounding is relative to the sum of the magnitudes of the products
    bound = coefficient.double().requires_grad_()
    size = ((stacked - anchor).abs() * grad.double().abs()).detach()
    (expand(bound, spread, tuple(terms.shape)) * size).sum().backward()
    return theta.detach(), leaf.grad, bound.grad


def require_exact(terms, spread, coefficient, grad):
    """The linear operator's merge and gradient are those of float64, to float32 rounding."""
    theta, dc, bound = exact(terms, spread, coefficient, grad)
    out = Linear().combine(terms, coefficient, spread, torch.empty(terms.shape))
    # float32 sums of at most six products
    torch.testing.assert_close(out.double(), theta, rtol=1e-6, atol=2e-6)
    got = Linear().contract(terms, grad, coefficient, spread)
    assert got.shape == coefficient.shape
    if terms.mean_origin:
        # a direction is itself a sum of differences, whose rounding is relative to these
        bound += bound.max()
    assert ((got.double() - dc).abs() <= 3e-7 * bound).all()
