"""A link and an operator together, part by part: the same bits as all at once."""

from __future__ import annotations

import pytest
import torch

from gradmerge.coefficients import (
    Clamp,
    Complement,
    Element,
    HardMask,
    Sigmoid,
    Softmax,
    Tanh,
)
from gradmerge.coefficients.link import AbstractLink
from gradmerge.engine import contraction
from gradmerge.operators import DisjointMean, Linear, Spread, Terms, chunks

SHAPE = (37, 29)
COEFFICIENTS = {
    "identity": (Element(), 2),
    "sigmoid": (Sigmoid(Element()), 2),
    "complement": (Complement(Sigmoid(Element())), 1),
    "softmax": (Softmax(Element()), 2),
    "tanh": (Tanh(Element()), 2),
    "clamp": (Clamp(Element(), -0.5, 0.5), 2),
    "mask": (HardMask(Element()), 2),
}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def terms_of(origin: str, dtype: torch.dtype) -> Terms:
    sources = [draw(k, *SHAPE, dtype=dtype) for k in range(2)]
    base = draw(7, *SHAPE, dtype=dtype)
    if origin == "masked":
        masks = [(draw(k, base.numel()) > 0).to(torch.uint8) for k in (8, 9)]
        return Terms(sources, base, masks=[masks[0], None], factors=[1.5, 0.5])
    return Terms(
        sources,
        base if origin in ("base", "directions") else None,
        mean_origin=origin == "mean",
        directions=origin == "directions",
    )


@pytest.fixture(params=["native", "torch"])
def short_parts(request, monkeypatch):
    """Parts of 256 entries (as in earnest a multiple of all vector registers, else the last bit may
    differ): neither rows nor the tensor are a multiple of them."""
    monkeypatch.setenv("GRADMERGE_KERNELS", "auto" if request.param == "native" else "torch")
    monkeypatch.setattr(contraction, "_length", lambda tensor: 256)
    monkeypatch.setattr(chunks, "_kept", chunks._Kept())  # longer buffers of other tests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("origin", ["zero", "base", "mean", "directions", "masked"])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_parts_give_the_bits_of_the_whole(name, origin, dtype, short_parts, monkeypatch):
    coefficients, rows = COEFFICIENTS[name]
    terms, spread = terms_of(origin, dtype), Spread("element")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    raw, grad = draw(3, rows, *SHAPE, dtype=wide), draw(4, *SHAPE, dtype=wide)
    found = contraction.combine(coefficients, Linear(), terms, raw, spread, torch.empty_like(grad))
    slope, none = contraction.contract(coefficients, Linear(), terms, raw, spread, grad)
    again, by_coefficient = contraction.contract(
        coefficients, Linear(), terms, raw, spread, grad, slopes=True
    )
    monkeypatch.setattr(contraction, "_length", lambda tensor: 1 << 30)
    whole = contraction.combine(coefficients, Linear(), terms, raw, spread, torch.empty_like(grad))
    expected, _ = contraction.contract(coefficients, Linear(), terms, raw, spread, grad)
    torch.testing.assert_close(found, whole, rtol=0, atol=0)
    torch.testing.assert_close(slope, expected, rtol=0, atol=0)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    assert none is None
    assert by_coefficient.shape == (2, *SHAPE)


class _Normalised(AbstractLink):
    """Of all entries together, which no part knows."""

    def link(self, raw):
        return raw / raw.norm()

    def pull_back(self, coefficient):
        return coefficient


@pytest.mark.parametrize(
    ("coefficients", "operator"),
    [
        (_Normalised(Element()), Linear()),
        (Sigmoid(_Normalised(Element())), Linear()),
        (Sigmoid(Element()), DisjointMean()),
    ],
    ids=["a link over entries", "within another", "an operator that does not say so"],
)
def test_what_reads_other_entries_is_taken_whole(coefficients, operator, short_parts, monkeypatch):
    seen = []
    link = type(coefficients).link
    monkeypatch.setattr(
        type(coefficients), "link", lambda self, raw: seen.append(raw.shape) or link(self, raw)
    )
    terms, spread, raw = terms_of("base", torch.float32), Spread("element"), draw(3, 2, *SHAPE)
    contraction.combine(coefficients, operator, terms, raw, spread, torch.empty(SHAPE))
    contraction.contract(coefficients, operator, terms, raw, spread, draw(4, *SHAPE))
    assert seen == [raw.shape] * 2


def test_no_temporary_grows_with_the_tensor(short_parts):
    """Every intermediate tensor of a merge is of a part; the gradient alone is whole."""
    coefficients = Complement(Sigmoid(Element()))
    terms, spread, raw = terms_of("zero", torch.float32), Spread("element"), draw(3, 1, *SHAPE)
    grad, out = draw(4, *SHAPE), torch.empty(SHAPE)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            known = {t.untyped_storage().data_ptr() for t in (raw, grad, out, *terms.sources)}
            for one in made if isinstance(made, (tuple, list)) else [made]:
                if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in known:
                    largest.append((one.untyped_storage().nbytes() // 4, str(func)))
            return made

    with Watch():
        contraction.combine(coefficients, Linear(), terms, raw, spread, out)
        assert max(largest)[0] <= 512  # two rows of a part
        contraction.contract(coefficients, Linear(), terms, raw, spread, grad)
    assert {size for size, _ in largest if size > 512} == {grad.numel()}
