"""The examples of the mergekit guide are read as they stand; its lists are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from gradmerge import Recipe
from gradmerge.cli import main
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.mergekit.init import FromMergekit
from gradmerge.mergekit.methods import METHODS, REFUSED

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "guides" / "from-mergekit.md").read_text()
FILE, RECIPE = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    names = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("mlp", "attn")]
    for model in ("base", "code", "plays"):
        folder = tmp_path / "models" / model
        folder.mkdir(parents=True)
        save_file({n: torch.randn(2, 2).bfloat16() for n in names}, folder / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    Path("mergekit.yaml").write_text(FILE)
    assert main(["merge", "--config", "mergekit.yaml", "--output", "merged"]) == 0
    assert "code (models/code): coefficient 0.18 to 0.72" in capsys.readouterr().out
    fields = yaml.safe_load(RECIPE)["model"]["recipe"]
    init = FromMergekit(**fields["init"]["init_args"])
    recipe = Recipe(sources=fields["sources"], base=fields["base"], init=init)
    plan = open_plan(recipe, with_skeleton=False)
    first = FitState.start(plan).coefficient("model.layers.0.mlp.weight")
    last = FitState.start(plan).coefficient("model.layers.2.mlp.weight")
    assert first.tolist() == pytest.approx([0.18, 0.27])
    assert last.tolist() == pytest.approx([0.72, 0.27])


def test_every_method_is_in_the_table_or_among_what_is_refused():
    rows = "\n".join(line for line in TEXT.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([a-z_]+)`", rows)) >= set(METHODS)
    assert all(f"`{name}`" in TEXT for name in REFUSED)
