"""Units that are multiplied one by one with others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from permutations import (
    spec_of,
)


class SingleHead(nn.Module):
    """Attention with one head, by products or by the fused operator; a gate by channels."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 5)
        self.out, self.squeeze, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.fused:
            seen = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        else:
            seen = (q @ k.mT / 6**0.5).softmax(dim=-1) @ v
        x = self.out(seen)
        return self.head(x * self.squeeze(x.mean(dim=1, keepdim=True)).sigmoid().expand_as(x))


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0])


class Standardised(nn.Linear):
    """Weights that are multiplied with weights, and functions of one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)
        return x * x.sigmoid() * (1 + torch.tanh(x**3)) / x.square().mean(-1, keepdim=True)


class Gated(nn.Module):
    """Two layers of 6 units, `joined` in one way or another."""

    def __init__(self, joined: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.joined = joined
        self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.joined(self.one(x), self.two(x).sigmoid()))


class Halves(nn.Module):
    """A gated linear unit whose halves are taken by `half`."""

    def __init__(self, half: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.half, self.both, self.head = half, nn.Linear(4, 12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.both(x)
        return self.head(self.half(x, 0) * self.half(x, 6).sigmoid())


@pytest.mark.parametrize(
    ("joined", "multiplied"),
    [
        (lambda a, b: torch.lerp(torch.zeros_like(a), a, b), True),
        (lambda a, b: torch.lerp(a, torch.ones_like(a), b), True),
        (lambda a, b: torch.lerp(a, b, 0.3), False),
        (lambda a, b: torch.lerp(a, b, torch.tensor(0.3)), False),
        (lambda a, b: torch.lerp(a, a.tanh(), a.sigmoid()) + b, False),
        (lambda a, b: a.lerp_(b.tanh(), b), True),
        (lambda a, b: a.addcmul_(b, b.tanh()), False),
        (lambda a, b: torch.stack([a, b]).prod(0), True),
        (lambda a, b: torch.stack([a, b], dim=1).cumprod(1)[:, 1], True),
        (lambda a, b: torch.stack([a, b]).sum(0), False),
        (lambda a, b: (a + b).prod(-1, keepdim=True) + a, True),
    ],
    ids=[
        *("end", "self", "number", "constant", "own", "lerp in place", "own in place"),
        *("prod", "cumprod", "sum", "prod of units"),
    ],
)
def test_gates_by_other_operators_are_products_too(
    joined: Callable[[Tensor, Tensor], Tensor], multiplied: bool
) -> None:
    groups = spec_of(Gated(joined), {"x": [2, 4]}).groups
    assert {group.size: group.multiplied for group in groups.values()} == {6: multiplied}


@pytest.mark.parametrize(
    "half",
    [
        lambda x, at: x[:, at : at + 6],
        lambda x, at: x.narrow(1, at, 6),
        lambda x, at: x.view(-1, 2, 6)[:, torch.tensor([at // 6])].flatten(1),
        lambda x, at: x.view(-1, 2, 6).index_select(1, torch.tensor([at // 6])).flatten(1),
    ],
    ids=["slice", "narrow", "index", "index_select"],
)
def test_halves_taken_by_place_or_index_are_two(half: Callable[[Tensor, int], Tensor]) -> None:
    groups = spec_of(Halves(half), {"x": [2, 4]}).groups
    assert {group.size: group.multiplied for group in groups.values()} == {6: True}


@pytest.mark.parametrize(
    ("make", "shape", "multiplied", "free"),
    [
        (lambda: SingleHead(False), (2, 3, 4), {"q", "out"}, {"v"}),
        (lambda: SingleHead(True), (2, 3, 4), {"q", "out"}, {"v"}),
        (Cells, (2, 3, 4), {"cells.0"}, set()),
        (lambda: nn.Sequential(Standardised(4, 6), nn.Linear(6, 2)), (2, 4), set(), {"0"}),
        (
            lambda: nn.Sequential(
                nn.Conv1d(2, 6, 1), nn.Conv1d(6, 6, 2, groups=6), nn.ReLU(), nn.Conv1d(6, 3, 1)
            ),
            (2, 2, 5),
            {"0"},
            set(),
        ),
        (
            lambda: nn.Sequential(
                nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(), nn.Linear(6, 2)
            ),
            (2, 4),
            set(),
            {"0"},
        ),
    ],
    ids=["products", "fused attention", "lstm", "own function", "depthwise", "norm"],
)
def test_units_that_are_multiplied_with_others_are_told(
    make: Callable[[], nn.Module], shape: tuple[int, ...], multiplied: set[str], free: set[str]
) -> None:
    module = make()
    name = "input" if isinstance(module, nn.Sequential) else "x"
    groups = spec_of(module, {name: list(shape)}).groups
    assert {n for n, group in groups.items() if group.multiplied} == multiplied
    assert {n for n, group in groups.items() if not group.multiplied} == free
