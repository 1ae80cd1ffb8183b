"""`gradmerge.merge`: a merge without training, written from Python."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import gradmerge
from gradmerge import MergedModel, Recipe, export_merged, merge
from gradmerge.coefficients import Constant
from gradmerge.common.errors import CompatibilityError, ConfigError
from tiny import build, recipe_of, relatives


def test_it_writes_what_the_export_of_a_merged_model_writes(tmp_path):
    recipe = recipe_of(relatives(build()), init=Constant(0.3))
    folder = merge(recipe, tmp_path / "merged", dtype="float32")
    assert folder == tmp_path / "merged"
    expected = export_merged(MergedModel(recipe), tmp_path / "expected", dtype="float32")
    for file in ("model.safetensors", "coefficients.st"):
        found, wanted = load_file(folder / file), load_file(expected / file)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_mistakes_are_seen_before_a_source_is_opened(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    absent = Recipe({"a": str(tmp_path / "absent")})
    with pytest.raises(ConfigError, match="full exists"):
        merge(absent, tmp_path / "full")
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        merge(absent, tmp_path / "merged", dtype="float33")


def test_problems_that_a_recipe_allows_are_warnings(tmp_path):
    a, b = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 2)
    with pytest.raises(CompatibilityError, match=r"\[extra\]"):
        merge(Recipe({"a": a, "b": b}), tmp_path / "merged")
    with pytest.warns(UserWarning, match=r"\[extra\]"):
        merge(Recipe({"a": a, "b": b}, allow=["extra"]), tmp_path / "merged")


def test_every_public_name_is_found():
    assert all(getattr(gradmerge, name) is not None for name in gradmerge.__all__)
    assert not hasattr(gradmerge, "Plan")
