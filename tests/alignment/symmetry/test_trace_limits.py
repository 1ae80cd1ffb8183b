"""Units that keep their order, and networks that the trace rejects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmerge.common.errors import ConfigError
from permutations import (
    Partly,
    same_function,
    shaken,
    sizes,
    spec_of,
)


class Odd(nn.Module):
    def __init__(self, odd: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.body = nn.Module()
        self.head = nn.Linear(6, 2)
        self.odd = odd

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.odd(self.inner(x)))


def test_an_operator_without_a_rule_is_refused_by_name() -> None:
    net = Odd(lambda x: torch.linalg.solve_triangular(torch.eye(6), x.mT, upper=True).mT)
    with pytest.raises(ConfigError, match=r"operator aten.linalg_solve_triangular.*the network"):
        spec_of(net)


def test_an_operator_is_refused_with_its_module() -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).real

    net = Odd(None)
    net.odd = Wrapped()
    net.head = nn.Linear(4, 2)
    with pytest.raises(ConfigError, match=r"aten._fft_r2c.*in module odd .*hand-written"):
        spec_of(net)


def test_what_fixes_the_order_of_units() -> None:
    constants = torch.linspace(1, 2, 6)
    breaking = {
        "a constant that differs": lambda x: x * constants,
        "a mirror": lambda x: x.flip(-1),
        "a rotation": lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1) + x,
        "a running sum": lambda x: x.cumsum(-1),
        "a unit by its place": lambda x: x + x[..., :1],
        "the largest ones": lambda x: torch.topk(x, 6).values,
        "overlapping windows": lambda x: x.as_strided((len(x), 5, 2), (6, 1, 1)).flatten(1)[:, :6],
    }
    for odd in breaking.values():
        spec = spec_of(Odd(odd))
        assert not any(6 in (g.size,) for g in spec.groups.values())
    keeping = {
        "a constant that is the same": lambda x: x * torch.full((6,), 2.0),
        "a softmax": lambda x: x.softmax(-1),
        "a norm": lambda x: x / x.norm(dim=-1, keepdim=True),
        "a column that only tells a shape": lambda x: x + torch.zeros(x[..., 0].shape)[..., None],
        "a maximum": lambda x: x - x.amax(-1, keepdim=True),
    }
    for odd in keeping.values():
        assert sizes(spec_of(Odd(odd))) == [6]


def test_units_behind_rotations_keep_what_freedom_is_left() -> None:
    # halves that trade places: pairs (i, i + 3) cannot be told apart by stretches, so all is fixed;
    # halves that only stand side by side stay free within themselves
    spec = spec_of(Odd(lambda x: torch.cat((x[..., :2].relu(), x[..., 2:].tanh()), -1)))
    assert sizes(spec) == [2, 4]


def test_what_the_run_does_not_reach_is_fixed() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)did not reach idle\.weight, idle\.bias.*`unreached`"
    ):
        spec_of(Partly())
    spec = spec_of(Partly(), unreached=["^idle"])
    assert sizes(spec) == [5]
    assert "idle.weight" not in spec.tensors


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.places = nn.Parameter(torch.randn(1, 9, 5))
        self.lift = nn.Linear(5, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.body(x) + self.lift(self.places)[:, : x.shape[1]]).relu())


def test_positions_beyond_the_example_keep_their_order() -> None:
    torch.manual_seed(0)
    net = shaken(Positions())
    spec = spec_of(net, {"x": [1, 4, 4]})
    assert sizes(spec) == [5, 6]
    assert not spec.tensors["places"][1].groups
    same_function(net, spec, {"x": torch.randn(2, 9, 4)})


class Routed(nn.Module):
    """Each row goes to the expert of its largest score; `stacked`: one tensor holds them all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.router = nn.Linear(6, 5)
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).relu()
        chosen = self.router(x).argmax(-1)
        out = torch.zeros(len(x), 3)
        for i in range(5):
            (rows,) = torch.where(chosen == i)
            if len(rows):
                out = out.index_add(0, rows, self.experts[i](x[rows]))
        return out


def test_paths_that_depend_on_weights_must_be_reached() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)did not reach experts.*values that depend on weights"
    ):
        spec_of(Routed())


class Two(nn.Module):
    """What `give` makes of the logits and of a hidden layer of 4."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head, self.side = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 5)
        self.give = give

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).relu()
        return self.give(self.head(hidden), self.side(hidden))


def test_outputs_beside_logits_keep_their_order_but_hidden_states_may_move() -> None:
    boxes = spec_of(Two(lambda logits, side: {"logits": logits, "boxes": side}))
    assert sizes(boxes) == [4]
    states = spec_of(Two(lambda logits, side: {"logits": logits, "decoder_hidden_states": (side,)}))
    assert sizes(states) == [4, 5]
    with pytest.raises(ConfigError, match="gives a Categorical among its outputs"):
        spec_of(Two(lambda logits, side: (logits, torch.distributions.Categorical(logits=side))))
