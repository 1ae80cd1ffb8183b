"""Specifications: what maps do to tensors, and the form written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from gradmerge.alignment import WeightMatching
from gradmerge.alignment.align import find_spec, traced_spec
from gradmerge.alignment.symmetry.handwritten import read_spec
from gradmerge.alignment.symmetry.spec import (
    Axis,
    Factor,
    LinearMap,
    PermutationSpec,
    Place,
    Segment,
    UnitGroup,
    as_linear,
    same_maps,
    share_moved,
)
from gradmerge.alignment.symmetry.units import fresh, regroup, sliced, unify
from gradmerge.common.errors import ConfigError
from gradmerge.sources import InMemory
from gradmerge.sources.in_memory import persistent_tensors
from gradmerge.sources.skeleton import Network
from permutations import compose, compose_all, invert, invert_all, plain_axis

GROUPS = {"h": UnitGroup("h", 3), "d": UnitGroup("d", 4), "r": UnitGroup("r", 5)}
FUSED = Axis(
    (
        Segment((Factor(3, "h"), Factor(4, "d"))),
        Segment((Factor(2),)),
        Segment((Factor(3, "h"), Factor(2))),
    )
)
SPEC = PermutationSpec(
    GROUPS,
    {
        "w": (FUSED, plain_axis((5,), ("r",), "in")),
        "variance": (plain_axis((5,), ("r",), "square"),),
        "rows": (plain_axis((5,), ("r",)), plain_axis((2,), (None,))),
    },
)


def by_hand(tensor: torch.Tensor, maps: dict[str, torch.Tensor]) -> torch.Tensor:
    """The fused axis entry by entry."""
    out = torch.empty_like(tensor)
    h, d, r = (maps[name].tolist() for name in "hdr")
    for column in range(5):
        for i in range(3):
            for j in range(4):
                out[i * 4 + j, column] = tensor[h[i] * 4 + d[j], r[column]]
            for j in range(2):
                out[14 + i * 2 + j, column] = tensor[14 + h[i] * 2 + j, r[column]]
        for j in range(2):
            out[12 + j, column] = tensor[12 + j, r[column]]
    return out


def test_permutations_move_entries_of_products_and_stretches() -> None:
    tensor, maps = torch.randn(20, 5), SPEC.random(2)
    assert torch.equal(SPEC.apply(maps, "w", tensor), by_hand(tensor, maps))  # type: ignore[arg-type]
    assert SPEC.apply({}, "w", tensor) is tensor
    assert SPEC.apply(maps, "unknown", tensor) is tensor


def test_a_permutation_is_the_linear_map_of_its_matrix() -> None:
    maps = SPEC.random(3)
    linear = {name: as_linear(change) for name, change in maps.items()}
    for name, shape in {"w": (20, 5), "variance": (5,), "rows": (5, 2)}.items():
        tensor = torch.randn(shape, dtype=torch.float64)
        moved = SPEC.apply(maps, name, tensor)
        torch.testing.assert_close(SPEC.apply(linear, name, tensor), moved, rtol=0, atol=1e-14)
    mixed = {"r": linear["r"], "h": maps["h"], "d": maps["d"]}
    tensor = torch.randn(20, 5)
    assert torch.equal(SPEC.apply(mixed, "w", tensor), SPEC.apply(maps, "w", tensor))


def test_linear_maps_take_the_matrix_where_units_are_written_and_the_inverse_where_read() -> None:
    matrix = torch.randn(5, 5, dtype=torch.float64) + 3 * torch.eye(5)
    maps = {"r": LinearMap(matrix, torch.linalg.inv(matrix))}
    read, written = (
        torch.randn(20, 5, dtype=torch.float64),
        torch.randn(5, 2, dtype=torch.float64),
    )
    torch.testing.assert_close(SPEC.apply(maps, "w", read), read @ maps["r"].inverse)
    torch.testing.assert_close(SPEC.apply(maps, "rows", written), matrix @ written)
    product = SPEC.apply(maps, "w", read) @ SPEC.apply(maps, "rows", written)
    torch.testing.assert_close(product, read @ written)
    variance = torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(SPEC.apply(maps, "variance", variance), matrix**2 @ variance)
    half = SPEC.apply(maps, "rows", written.bfloat16())
    assert half.dtype == torch.bfloat16
    expected = (matrix.float() @ written.bfloat16().float()).bfloat16()
    assert torch.equal(half, expected)


def test_maps_compose_and_invert() -> None:
    one, two = SPEC.random(4), SPEC.random(5)
    tensor = torch.randn(20, 5)
    both = SPEC.apply(two, "w", SPEC.apply(one, "w", tensor))
    assert torch.equal(SPEC.apply(compose_all(one, two), "w", tensor), both)
    back = SPEC.apply(invert_all(one), "w", SPEC.apply(one, "w", tensor))
    assert torch.equal(back, tensor)
    linear = compose(as_linear(one["r"]), two["r"])
    assert isinstance(linear, LinearMap)
    torch.testing.assert_close(linear, as_linear(compose(one["r"], two["r"])))
    assert same_maps({"r": compose(one["r"], invert(one["r"]))}, {})
    assert not same_maps(one, two)
    assert share_moved(torch.tensor([0, 2, 1, 3])) == 0.5
    assert share_moved(as_linear(torch.tensor([0, 2, 1, 3]))) == 0.5


def test_exposed_rows_are_the_units_of_one_use() -> None:
    tensor = torch.randn(20, 5)
    uses = {(use.segment, use.position): use for use in SPEC.uses["h"]}
    first = SPEC.expose(uses[0, 0], tensor)
    assert torch.equal(first, tensor[:12].reshape(3, 20))
    last = SPEC.expose(uses[2, 0], tensor)
    assert torch.equal(last, tensor[14:].reshape(3, 10))
    (read,) = (use for use in SPEC.uses["r"] if use.tensor == "w")
    assert torch.equal(SPEC.expose(read, tensor), tensor.T)
    maps = SPEC.random(6)
    left_out = SPEC.apply(maps, "w", tensor, skip=read)
    assert torch.equal(left_out, SPEC.apply({k: maps[k] for k in "hd"}, "w", tensor))


def test_a_place_shows_units_of_any_axis() -> None:
    heads = Place("v", -1, 2, (3, 4), 0)
    output = torch.randn(2, 7, 14)
    expected = output[..., 2:].reshape(2, 7, 3, 4).permute(0, 1, 3, 2).reshape(-1, 3)
    assert torch.equal(heads.units(output), expected)
    channels = Place("conv", -3, 0, (6,), 0)
    picture = torch.randn(2, 6, 4, 4)
    assert torch.equal(channels.units(picture), picture.permute(0, 2, 3, 1).reshape(-1, 6))


# ---- symbols ------------------------------------------------------------------------------------


def test_units_are_refined_to_what_both_sides_allow() -> None:
    whole, split = fresh(24), regroup([fresh(24)], [4, 6])
    joint = regroup(split, [24])[0]
    unify(whole, joint)
    assert [u.size for u in whole.units()] == [4, 6]
    other = regroup(regroup([fresh(24)], [2, 12]), [24])[0]
    unify(whole, other)
    assert [u.size for u in whole.units()] == [2, 2, 6]
    assert whole.units() == joint.units()
    assert not any(unit.pinned for unit in joint.units())


def test_factors_that_do_not_fit_are_fixed() -> None:
    one = regroup(regroup([fresh(24)], [4, 6]), [24])[0]
    two = regroup(regroup([fresh(24)], [3, 8]), [24])[0]
    unify(one, two)
    assert one.is_fixed
    assert two.is_fixed


def test_stretches_within_a_factor_are_fixed_wherever_they_stand() -> None:
    outer, inner = regroup([fresh(24)], [4, 6])
    whole = regroup([outer, inner], [24])[0]
    first = sliced(inner, 0, 2)
    assert [u.size for u in whole.units() if not u.pinned] == [4]
    assert first.is_fixed
    alone = fresh(6)
    assert not sliced(alone, 0, 2).is_fixed
    assert [u.size for u in alone.units()] == [2, 4]


# ---- written by hand ----------------------------------------------------------------------------

NET = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))
WRITTEN = {
    "tensors": {
        "0.weight": ["first", None],
        "0.bias": ["first"],
        "2.weight": ["second", "first"],
        "2.bias": ["second"],
        "4.weight": [None, "second"],
    }
}


def shapes(module: nn.Module = NET) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in persistent_tensors(module).items()}


def test_a_written_specification_equals_the_traced_one(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(WRITTEN))
    written = read_spec(str(path), shapes())
    assert written == read_spec(WRITTEN, shapes())
    traced = traced_spec(Network.bound(NET, list(shapes())))
    names = {"first": "0", "second": "2"}
    renamed = {
        tensor: tuple(
            Axis(
                tuple(
                    Segment(
                        tuple(
                            Factor(f.size, None if f.group is None else names[f.group])
                            for f in s.factors
                        )
                    )
                    for s in axis.segments
                ),
                axis.role if axis.groups else "out",
            )
            for axis in axes
        )
        for tensor, axes in written.tensors.items()
    }
    theirs = {
        tensor: tuple(Axis(a.segments, a.role if a.groups else "out") for a in axes)
        for tensor, axes in traced.tensors.items()
    }
    assert renamed == theirs
    assert {names[n]: g.size for n, g in written.groups.items()} == {
        n: g.size for n, g in traced.groups.items()
    }


def test_products_stretches_and_inferred_sizes() -> None:
    given = {
        "tensors": {
            "qkv": ["stream", [["heads", "width"], ["heads", "width"], ["heads", 4]]],
            "out": [["heads", 4], "stream"],
        },
        "sizes": {"width": 4},
        "roles": {"qkv": ["in", "out"]},
        "places": {"heads": [["v", -1]]},
    }
    spec = read_spec(given, {"qkv": (6, 36), "out": (12, 6)})
    assert {n: g.size for n, g in spec.groups.items()} == {"stream": 6, "heads": 3, "width": 4}
    assert [s.sizes for s in spec.tensors["qkv"][1].segments] == [(3, 4)] * 3
    assert spec.tensors["qkv"][0].role == "in"
    assert spec.groups["heads"].places == (Place("v", -1, 0, (3,), 0),)


def test_every_problem_of_a_written_specification_is_named_at_once() -> None:
    given: dict[str, Any] = {
        "tensors": {
            "0.weights": ["first"],
            "0.weight": ["first", None, None],
            "0.bias": ["first"],
            "2.weight": ["second", "second"],
            "4.weight": [None, ["a", "b"]],
        },
        "sizes": {"first": 8, "nobody": 3},
    }
    with pytest.raises(ConfigError, match="problem") as caught:
        read_spec(given, shapes())
    text = str(caught.value)
    for part in (
        "0.weights: the checkpoint has no such tensor. Did you mean '0.weight'?",
        "0.weight: expected a list of at most 2 axes",
        "0.bias: expected axes of [7], got [['first']] with {'first': 8}",
        "2.weight: expected axes of [9, 7]",
        "4.weight: the size of a, b cannot be inferred",
        "sizes: unknown group 'nobody'",
    ):
        assert part in text
    with pytest.raises(ConfigError, match="unknown field 'tensor'"):
        read_spec({"tensor": {}, "tensors": {}}, shapes())
    with pytest.raises(ConfigError, match="expected a mapping with `tensors`"):
        read_spec({"groups": {}}, shapes())
    with pytest.raises(ConfigError, match="cannot be read"):
        read_spec("/nowhere/spec.yaml", shapes())


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sizes", True, r"sizes: expected a mapping such as \{heads: 12\}, got 'True'"),
        ("roles", ["out"], r"roles: expected a mapping such as \{fc1.weight: \[out, in\]\}"),
        ("places", "0", r"places: expected a mapping such as \{hidden"),
        ("multiplied", "first", "multiplied: expected a list of groups such as .*'first'"),
        ("multiplied", ["fist"], "multiplied: unknown group 'fist'. Did you mean 'first'"),
        ("sizes", {"first": True}, "sizes: first: expected a positive number, got True"),
        ("tensors", {"0.bias": [True]}, "0.bias: expected names of groups and positive sizes"),
        ("places", {"first": 3}, "places: first: expected modules, or pairs .*; got 3"),
        ("places", {"first": True}, "places: first: expected modules, or pairs .*; got True"),
        ("places", {"first": [[]]}, r"places: first: expected modules, or pairs .*; got \[\]"),
        ("places", {"first": [["0", -1, 2]]}, r"or pairs .*; got \['0', -1, 2\]"),
        ("places", {"first": [["0", "y"]]}, r"or pairs .*; got \['0', 'y'\]"),
        ("places", {"first": [["0", 1]]}, r"or pairs .*; got \['0', 1\]"),
        ("places", {"first": [{"a": 1}]}, r"or pairs .*; got \{'a': 1\}"),
    ],
)
def test_fields_of_another_type_are_named(name: str, given: Any, message: str) -> None:
    tensors = {"0.weight": ["first", None], "0.bias": ["first"]}
    fields = {"tensors": tensors, name: {**tensors, **given} if name == "tensors" else given}
    with pytest.raises(ConfigError, match=message):
        read_spec(fields, {"0.weight": (8, 4), "0.bias": (8,)})


def test_one_place_needs_no_list() -> None:
    fields = {"tensors": {"0.bias": ["first"]}, "places": {"first": "0"}, "multiplied": ["first"]}
    spec = read_spec(fields, {"0.bias": (8,)})
    assert spec.groups["first"].multiplied
    assert spec.groups["first"].places == (Place("0", -1, 0, (8,), 0),)


@pytest.mark.parametrize(
    ("place", "gives"),
    [("2", r"2 gives \[1, 3\]"), (["0", -2], r"0 gives \[1, 8\]"), ("3", "3 gives no tensor")],
)
def test_a_written_place_has_to_show_its_group(place: Any, gives: str) -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    network.add_module("3", nn.Sequential())
    network.forward = nn.Sequential(*network[:3]).forward  # type: ignore[method-assign]
    tensors = {"0.weight": ["h", None], "0.bias": ["h"], "2.weight": [None, "h"]}
    method = WeightMatching(spec={"tensors": tensors, "places": {"h": ["1", place]}})
    match = rf"1 problem.*\n.*places: h: expected a module whose output has 8 entries .*{gives}"
    source = InMemory(network).open()
    bound = Network.bound(network, list(source.infos))
    with pytest.raises(ConfigError, match=match):
        find_spec(method, {"a": source}, bound)
