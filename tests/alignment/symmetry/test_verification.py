"""The check of a specification, in several sizes of the input, and its example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmerge.alignment import WeightMatching
from gradmerge.alignment.symmetry.example import at_other_sizes
from gradmerge.alignment.symmetry.spec import PermutationSpec, Place, UnitGroup
from gradmerge.alignment.symmetry.verify import verify
from gradmerge.common.errors import ConfigError
from permutations import (
    Partly,
    plain_axis,
    same_function,
    sizes,
    spec_of,
)


class BySize(nn.Module):
    """What it does with its units depends on the size of the input, where `turns` says so."""

    def __init__(self, turns: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.turns = turns
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if self.turns(x):
            hidden = hidden.roll(1, dims=-1)
        return self.second(hidden)


@pytest.mark.parametrize(
    ("turns", "got"),
    [
        (lambda x: len(x) == 1, r"x \[1, 3, 5\]"),
        (lambda x: len(x) > 2, r"x \[3, 13, 5\]"),
        (lambda x: x.shape[1] < 6, r"x \[1, 3, 5\]"),
        (lambda x: x.shape[1] > 6, r"x \[3, 13, 5\]"),
    ],
)
def test_a_course_that_depends_on_the_size_is_refused(
    turns: Callable[[Tensor], bool], got: str
) -> None:
    """Units are free on the example alone: batches of 1 and 3, lengths of 3 and 13 turn them."""
    match = rf"changes what BySize computes .* with {got}\).*by themselves: first\."
    with pytest.raises(ConfigError, match=match):
        spec_of(BySize(turns), {"x": [2, 6, 5]})
    assert spec_of(BySize(lambda x: False), {"x": [2, 6, 5]}).groups["first"].size == 8


@pytest.mark.parametrize("fixed", ["batch", "length", "both"])
def test_a_network_that_refuses_other_sizes_is_checked_on_those_it_takes(fixed: str) -> None:
    taken = []

    class Fixed(BySize):
        def forward(self, x: Tensor) -> Tensor:
            if (fixed != "length" and len(x) != 2) or (fixed != "batch" and x.shape[1] != 6):
                raise ValueError("not this size")
            found = super().forward(x)
            taken.append(tuple(x.shape))
            return found

    spec = spec_of(Fixed(lambda x: False), {"x": [2, 6, 5]})
    assert spec.groups["first"].size == 8
    assert spec.checked is not None
    others = {"batch": {(2, 3, 5), (2, 13, 5)}, "length": {(1, 6, 5), (3, 6, 5)}, "both": set()}
    assert set(taken) == {(2, 6, 5), *others[fixed]}
    if fixed != "both":
        turned = Fixed(lambda x: tuple(x.shape) != (2, 6, 5))
        with pytest.raises(ConfigError, match="permuting units changes what Fixed computes"):
            spec_of(turned, {"x": [2, 6, 5]})


def test_a_network_that_keeps_the_smallest_size_it_saw_is_checked_on_one_size_at_a_time() -> None:
    class Windowed(BySize):
        window = 99

        def forward(self, x: Tensor) -> Tensor:
            self.window = min(self.window, x.shape[1])
            if x.shape[1] % self.window:
                raise ValueError("no whole number of windows")
            return super().forward(x)

    spec = spec_of(Windowed(lambda x: False), {"x": [2, 7, 5]})
    assert spec.groups["first"].size == 8
    assert spec.checked is not None


class Folded(nn.Module):
    """Heads share an axis with examples, which vary slowest (or fastest)."""

    def __init__(self, heads_first: bool) -> None:
        super().__init__()
        self.heads_first = heads_first
        self.query, self.act, self.out = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query(x).view(-1, 4, 2)
        if self.heads_first:
            heads = heads.transpose(0, 1)
        folded = self.act(heads.reshape(-1, 2)).view(heads.shape)
        if self.heads_first:
            folded = folded.transpose(0, 1)
        return self.out(folded.reshape(-1, 8))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads_first", [False, True])
def test_units_are_not_looked_for_where_they_share_an_axis_with_examples(
    heads_first: bool, batch: int
) -> None:
    """A stretch of fixed length would show those of the first examples alone."""
    module = Folded(heads_first)
    spec = spec_of(module, {"x": [batch, 6]})
    heads = [group for group in spec.groups.values() if group.size == 4]
    width = [group for group in spec.groups.values() if group.size == 2]
    assert [group.places for group in heads] == [(Place("query", -1, 0, (4, 2), 0),)]
    assert [p.module for p in width[0].places] == ["query", "act"]
    same_function(module, spec, {"x": torch.randn(5, 6)})
    (place,) = heads[0].places
    assert place.units(module.query(torch.randn(5, 6))).shape == (5 * 2, 4)


def test_other_sizes_keep_ids_masks_and_pictures_consistent() -> None:
    def sizes(example: dict[str, Tensor]) -> list[dict[str, list[int]]]:
        found = at_other_sizes(example, lambda other: None)
        return [{k: list(v.shape) for k, v in other.items()} for other, _ in found]

    ids = torch.arange(6).expand(1, 6)
    text = {"input_ids": ids, "mask": torch.ones(1, 1, 6, 6), "decoder_input_ids": ids[:, :5]}
    assert sizes(text) == [
        {"input_ids": [2, 3], "mask": [2, 1, 3, 3], "decoder_input_ids": [2, 2]},
        {"input_ids": [3, 13], "mask": [3, 1, 13, 13], "decoder_input_ids": [3, 11]},
    ]
    assert sizes({"x": torch.ones(1, 3, 32, 32)}) == [{"x": [2, 3, 24, 24]}, {"x": [3, 3, 32, 32]}]
    assert sizes({"x": torch.ones(2, 7)}) == [{"x": [1, 7]}, {"x": [3, 7]}]
    longest = [other for other, _ in at_other_sizes({"x": ids}, lambda other: None)][-1]["x"]
    assert longest.tolist() == [[*range(6), *range(6), 0]] * 3


@pytest.mark.parametrize(
    ("shape", "whole", "found"),
    [
        ([1, 512], False, [[2, 7], [3, 5]]),
        ([3, 512], False, [[1, 7], [2, 5]]),
        ([8, 32], False, [[1, 7], [3, 5]]),
        ([1, 80, 3000], False, [[2, 7, 3000], [3, 5, 3000]]),
        ([2, 3, 64, 64], False, [[1, 3, 48, 48], [3, 3, 32, 32]]),
        ([1, 512], True, [[2, 512]]),
        ([8, 512], True, [[1, 512], [3, 512]]),
    ],
)
def test_a_large_example_is_only_cut(shape: list[int], whole: bool, found: list[list[int]]) -> None:
    """A network that takes a length alone (`whole`) is run on two of a single one, never more."""
    tried = []

    def attempt(other: Mapping[str, Tensor]) -> None:
        tried.append(other["x"].numel())
        if whole and other["x"].shape[1] != shape[1]:
            raise ValueError("not this length")

    x = torch.zeros(shape, dtype=torch.int64 if len(shape) == 2 else torch.float32)
    others = at_other_sizes({"x": x}, attempt)
    assert [list(other["x"].shape) for other, _ in others] == found
    assert max(tried) <= (2 * x.numel() if whole and shape[0] == 1 else x.numel())


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input": [-1, 3]}, r"example: input: expected a shape .*got \[-1, 3\]"),
        ({"input": [True, 3]}, r"example: input: expected a shape .*got \[True, 3\]"),
        (
            {"input": [10**9, 10**4, 3]},
            r"example: input: a tensor of shape \[1000000000, .* cannot",
        ),
        ({3: [1, 3]}, r"example: expected names of arguments of Linear, got 3. It takes input"),
    ],
)
def test_an_example_that_is_no_shape_is_named(example: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(nn.Linear(3, 4), example)


def test_options_of_a_matching_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match=r"WeightMatching.example: expected shapes .*got '\[1"):
        WeightMatching(example=[1, 3])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"WeightMatching.unreached: invalid regular expression"):
        WeightMatching(unreached=["("])


def test_a_network_that_does_not_run_asks_for_an_example() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x) + y

    with pytest.raises(ConfigError, match=r"does not run on .*Give `example`"):
        spec_of(Two())
    with pytest.raises(ConfigError, match=r"not called with 'z'.*It takes x, y"):
        spec_of(Two(), {"z": [1, 3]})
    assert sizes(spec_of(Two(), {"x": [1, 3], "y": [1, 4]})) == []


def test_a_network_too_large_to_check_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = spec_of(Partly(), unreached=["^idle"])
    assert checked.checked is not None
    assert checked.checked <= 1e-8
    monkeypatch.setattr("gradmerge.alignment.symmetry.verify.LIMIT", 10)
    unchecked = spec_of(Partly(), unreached=["^idle"])
    assert unchecked.checked is None
    assert unchecked == checked


def test_a_wrong_specification_is_seen_with_two_units_masks_and_nan() -> None:
    groups = {"h": UnitGroup("h", 2)}
    for seed in range(20):
        assert PermutationSpec(groups, {}).random(seed)["h"].tolist() == [1, 0]

    class Masked(nn.Module):
        def __init__(self, fill: float) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fill = nn.Linear(3, 2), nn.Linear(2, 4), fill

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.tensor([False, False, True, True])
            return self.fc2(self.fc1(x).relu()).masked_fill(mask, self.fill)

    names = {f"fc{i}.{kind}": f"fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    out = plain_axis([2], ["h"])
    wrong = PermutationSpec(
        groups, {"fc1.weight": (out, plain_axis([3], [None])), "fc1.bias": (out,)}
    )
    for fill in (0.0, -1e9, torch.finfo(torch.float32).min, float("-inf")):
        right = spec_of(Masked(fill))
        assert sizes(right) == [2]
        assert right.checked is not None
        with pytest.raises(ConfigError, match="the specification is wrong for it"):
            verify(wrong, Masked(fill), names, {"x": torch.randn(2, 3)})
    with pytest.raises(ConfigError, match="gives no finite output"):
        verify(wrong, Masked(0.0), names, {"x": torch.empty(0, 3)})
