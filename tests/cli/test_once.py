"""One command opens each checkpoint, binds a network, traces and solves an alignment once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gradmerge.alignment import ActivationMatching
from gradmerge.cli import main
from gradmerge.engine import opening
from gradmerge.sources import HuggingFace, skeleton, ties
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")

HALF = {"coefficients": "Model", "init": "Uniform", "base": None, "origin": "zero"}


@pytest.fixture
def counted(monkeypatch):
    """How often each folder was opened, networks were traced, and alignments were solved."""
    counts: Counter[str] = Counter()

    def watch(owner, name, label):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[label(*args)] += 1
            del counts["output"]  # its headers are read before it gets its name
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    def folder(source):
        return "output" if source.path.endswith(".partial") else Path(source.path).name

    watch(HuggingFace, "open", folder)
    watch(ActivationMatching, "align", lambda *_: "solved")
    watch(opening, "find_spec", lambda *_: "traced")
    watch(ties, "build_skeleton", lambda *_: "built")
    watch(skeleton, "bind", lambda *_: "bound")
    return counts


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"preprocess": ["RegMean"]},
        {"search": {"class_path": "Scales", "init_args": {"values": [0.5, 1.0]}}},
    ],
    ids=["alignment", "and statistics", "and a search"],
)
def test_a_merge_with_data_and_an_alignment_does_everything_once(world, tmp_path, counted, more):
    search = {key: value for key, value in more.items() if key == "search"}
    steps = {key: value for key, value in more.items() if key != "search"}
    recipe = {**HALF, "alignment": "ActivationMatching", **steps}
    config = write(tmp_path / "merge.yaml", world, {"model": {"recipe": recipe}}, search)
    assert main(["merge", "--config", config, "--output", "merged"]) == 0
    assert dict(counted) == {"a": 1, "b": 1, "solved": 1, "traced": 1, "built": 1, "bound": 1}


def test_a_plain_merge_opens_each_checkpoint_once(world, tmp_path, counted):
    config = write(tmp_path / "merge.yaml", world)
    assert main(["merge", "--config", config, "--output", "merged"]) == 0
    assert dict(counted) == {"base": 1, "a": 1, "b": 1}


def test_a_fit_opens_each_checkpoint_once(world, tmp_path, counted):
    config = write(tmp_path / "fit.yaml", world, {"trainer": {"max_steps": 1}})
    assert main(["fit", "--config", config]) == 0
    assert dict(counted) == {"base": 1, "a": 1, "b": 1, "built": 1, "bound": 1}


def test_a_mergekit_file_is_merged_as_one_recipe(world, tmp_path, counted, capsys):
    sources = world["model"]["recipe"]["sources"]
    models = [{"model": path, "parameters": {"weight": 0.5}} for path in sources.values()]
    path = tmp_path / "mk.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    assert main(["merge", "--config", str(path), "--output", "merged"]) == 0
    assert "mergekit linear" in capsys.readouterr().out
    assert dict(counted) == {"a": 1, "b": 1}
    # later arguments win, as everywhere: a suite before the file, an option after it
    suite = ["--config", write(tmp_path / "suite.yaml", world)]
    options = ["--recipe.init.value", "0.25", "--output", "quarter"]
    assert main(["merge", *suite, "--config", str(path), *options]) == 0
    half, quarter = (load_file(f"{folder}/model.safetensors") for folder in ("merged", "quarter"))
    assert all(torch.equal(quarter[name], half[name] / 2) for name in half)


def test_a_mergekit_file_has_no_statistics_to_collect(world, tmp_path, capsys):
    sources = world["model"]["recipe"]["sources"]
    models = [{"model": path, "parameters": {"weight": 0.5}} for path in sources.values()]
    path = tmp_path / "mk.yaml"
    path.write_text(
        yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "bfloat16"})
    )
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump({"data": world["data"]}))
    files = ["--config", str(data), "--config", str(path)]
    assert main(["collect", *files, "--output", "statistics"]) == 2
    assert "no step of this recipe needs statistics" in capsys.readouterr().err
