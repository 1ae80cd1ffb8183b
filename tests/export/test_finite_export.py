"""Nothing that is not finite is written: weights, casts that overflow, and JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gradmerge import MergedModel, merge
from gradmerge.coefficients import Constant
from gradmerge.common.errors import NonFiniteError
from gradmerge.export.folder import export_merged, export_state, write_config
from gradmerge.export.writer import Entry, write_safetensors
from gradmerge.sources.files import write_json
from tiny import build, recipe_of, relatives


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_cast_that_overflows(tmp_path, dtype):
    models = relatives(build())
    for model in models:
        with torch.no_grad():
            model.head.bias[1] = 70000.0
    recipe = recipe_of(models, init=Constant(0.5))
    if dtype == "float32":
        merge(recipe, tmp_path / "out", dtype=dtype)
        return
    message = r"head.bias: expected values that float16 can hold, up to 65504, got 70000.*bfloat16"
    with pytest.raises(NonFiniteError, match=r"(?s)" + message):
        merge(recipe, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()
    written = merge(recipe, tmp_path / "out", dtype="bfloat16")
    assert load_file(written / "model.safetensors")["head.bias"].isfinite().all()


def test_eight_bits(tmp_path):
    entry = Entry("w", (2,), torch.float8_e5m2, lambda: torch.tensor([1.0, 1e6]))
    with pytest.raises(NonFiniteError, match=r"w: expected values that float8_e5m2 can hold"):
        write_safetensors(tmp_path / "x", [entry])


def test_a_merge_that_overflows_by_itself(tmp_path):
    models = relatives(build())
    recipe = recipe_of(models, init=Constant(3e38))
    with pytest.raises(
        NonFiniteError, match=r"(?s)body.weight: expected finite values.*coefficients"
    ):
        merge(recipe, tmp_path / "out")


def test_coefficients_that_are_nan(tmp_path):
    merged = MergedModel(recipe_of(relatives(build())))
    with torch.no_grad():
        merged.raw["tensor"][0, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"coefficients: expected finite numbers"):
        export_merged(merged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scores_that_are_nan_become_null(tmp_path):
    models = relatives(build())
    merged = MergedModel(recipe_of(models), models[1])
    results = {"selection": {"a": {"loss": 0.5, "accuracy": math.nan, "other": math.inf}}}
    folder = export_state(merged.state, tmp_path / "out", results=results)
    found = strict((folder / "provenance.json").read_text())["results"]
    assert found == {"selection": {"a": {"loss": 0.5, "accuracy": None, "other": None}}}
    assert "| a | 0.5000 | n/a | n/a |" in (folder / "README.md").read_text()


def test_every_file_is_valid_json(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1.5, math.nan], "b": (-math.inf, "NaN")})
    assert strict((tmp_path / "x.json").read_text()) == {"a": [1.5, None], "b": [None, "NaN"]}


def test_infinity_in_a_config_survives_as_transformers_spells_it(tmp_path):
    config = transformers.Mamba2Config(num_hidden_layers=1).to_dict()
    assert config["time_step_limit"][1] == math.inf
    write_config(tmp_path, None, config)
    strict((tmp_path / "config.json").read_text())
    again = transformers.Mamba2Config.from_pretrained(tmp_path)
    assert list(again.time_step_limit) == [0.0, math.inf]
