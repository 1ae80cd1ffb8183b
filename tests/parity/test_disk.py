"""One merge from folders to a folder, by mergekit's and by gradmerge's own command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("mergekit", reason="the oracle of these tests: pip install gradmerge[parity]")

from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from gradmerge.cli import main


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def test_ties_on_disk_is_bit_for_bit_the_same(family, tmp_path):
    models, _ = family("llama", 3, torch.float32)
    folders = [str(tmp_path / name) for name in ("base", "a", "b")]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    base, *sources = folders
    config = {
        "merge_method": "ties",
        "base_model": base,
        "dtype": "float32",
        "models": [
            {"model": source, "parameters": {"weight": weight, "density": 0.4}}
            for source, weight in zip(sources, (0.6, 0.3), strict=True)
        ],
    }
    LoaderCache.loaders.clear()  # a path that another test used would bring its weights back
    run_merge(
        MergeConfiguration.model_validate(config),
        str(tmp_path / "theirs"),
        MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=0),
    )
    recipe = {
        "base": base,
        "sources": dict(zip("ab", sources, strict=True)),
        "preprocess": [{"class_path": "Trim", "init_args": {"density": 0.4}}],
        "operator": {"class_path": "DisjointMean"},
        "init": {"class_path": "Constant", "init_args": {"value": [0.6, 0.3]}},
    }
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump({"recipe": recipe}))
    command = ["merge", "--config", str(tmp_path / "ours.yaml"), "--output"]
    assert main([*command, str(tmp_path / "ours")]) == 0
    theirs, ours = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
    written = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("theirs", "ours")]
    assert written[0]["hidden_size"] == written[1]["hidden_size"]
