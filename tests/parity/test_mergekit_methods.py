"""The table of merge methods against mergekit's own declarations."""

from __future__ import annotations

from typing import Any

import pytest

from gradmerge.mergekit.methods import METHODS, REFUSED, REQUIRED

pytest.importorskip("mergekit", reason="mergekit, the oracle, is not installed")

from mergekit.merge_methods.base import BasePolicy, ParameterScope
from mergekit.merge_methods.registry import get, registered_methods


def test_every_method_of_mergekit_has_a_row_or_is_refused():
    theirs = {method.spec.name for method in registered_methods()}
    assert theirs == {*METHODS, *REFUSED}


@pytest.mark.parametrize("name", METHODS)
def test_a_row_has_the_parameters_types_defaults_and_scopes_of_mergekit(name):
    theirs: dict[str, Any] = {
        p.name: (None if p.required else p.default, p.value_type, p.scope != ParameterScope.SHARED)
        for p in get(name).spec.parameters
    }
    if name == "passthrough":
        assert theirs["scale"][:2] == (None, float | None)
        theirs["scale"] = (1.0, float, True)  # no scale is a scale of 1
    ours = {
        p.name: (
            None if p.default is REQUIRED else p.default,
            float if p.default is REQUIRED else type(p.default),
            p.scope == "model",
        )
        for p in METHODS[name].parameters
    }
    assert ours == theirs


@pytest.mark.parametrize("name", METHODS)
def test_a_row_has_the_inputs_of_mergekit(name):
    contract, row = get(name).spec.contract, METHODS[name]
    assert row.base == ("input" if contract.base is BasePolicy.IGNORED else contract.base.value)
    bases = int(contract.base is BasePolicy.REQUIRED)  # mergekit counts it among the inputs
    fewest = max(contract.min_inputs - bases, contract.min_non_base or 1)
    most = contract.max_non_base
    if contract.max_inputs is not None:
        most = contract.max_inputs - bases
    assert row.num_models == (fewest, most)
