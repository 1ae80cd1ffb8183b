"""Alignments on data from the command line: on the fly, kept, and refused, by calling `main`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gradmerge.cli import main
from gradmerge.cli.main import learn
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")

UP, DOWN = "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"
HALF = {"coefficients": "Model", "init": "Uniform", "base": None, "origin": "zero"}
METHODS = ["ActivationMatching", "CCA", "OptimalTransport"]


@pytest.fixture
def moved(world, tmp_path):
    """A suite whose source b is source a with the hidden units of its MLP in another order."""
    a = Path(world["model"]["recipe"]["sources"]["a"])
    shutil.copytree(a, tmp_path / "moved")
    tensors = load_file(a / "model.safetensors")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"][order].contiguous()
    tensors[f"{UP}.bias"] = tensors[f"{UP}.bias"][order].contiguous()
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"][:, order].contiguous()
    save_file(tensors, tmp_path / "moved" / "model.safetensors", {"format": "pt"})
    sources = {"a": str(a), "b": str(tmp_path / "moved")}
    return write(tmp_path / "suite.yaml", world, {"model": {"recipe": {"sources": sources}}})


def files_of(suite, path, method, **more):
    recipe = {**HALF, "alignment": method, **more}
    return ["--config", suite, "--config", write(path / "m.yaml", {"model": {"recipe": recipe}})]


def tensors_of(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize(
    "method", [*METHODS, {"class_path": "OptimalTransport", "init_args": {"regularisation": 0.0}}]
)
def test_a_merge_collects_and_undoes_a_planted_permutation(moved, tmp_path, capsys, method):
    files = files_of(moved, tmp_path, method)
    assert main(["merge", *files, "--output", "direct"]) == 0
    text = capsys.readouterr()
    assert "from 12 examples through 2 sources, in 1 readings of the data" in text.err
    assert main(["collect", *files, "--output", "statistics"]) == 0
    assert "statistics written to statistics" in capsys.readouterr().out
    assert main(["merge", *files, "--recipe.statistics", "statistics", "--output", "kept"]) == 0
    assert "readings" not in capsys.readouterr().err
    direct, kept = tensors_of("direct"), tensors_of("kept")
    assert all(torch.equal(direct[name], kept[name]) for name in kept)
    recipe = yaml.safe_load(Path(moved).read_text())["model"]["recipe"]
    expected = tensors_of(recipe["sources"]["a"])
    exact = method == "ActivationMatching" or isinstance(method, dict)
    for name, tensor in direct.items() if exact else ():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    plain = sum(tensors_of(folder)[f"{UP}.weight"] for folder in recipe["sources"].values()) / 2
    assert not torch.allclose(plain, expected[f"{UP}.weight"], atol=1e-3)
    provenance = json.loads(Path("direct/provenance.json").read_text())
    assert provenance["recipe"]["init_args"]["statistics"] is None
    found = provenance["statistics"]["collected"]["activations"]
    assert found["pairs"] == [["a", "b"]]
    assert found["groups"] > 0
    assert {name: source["examples"] for name, source in found["sources"].items()} == {
        "a": 12,
        "b": 12,
    }


def test_a_fit_starts_from_kept_statistics_and_says_how_to_get_them(moved, tmp_path, capsys):
    files = files_of(moved, tmp_path, "ActivationMatching")
    assert main(["fit", *files]) == 2
    text = capsys.readouterr().err
    assert "ActivationMatching needs the sources' activations on data" in text
    assert "gradmerge collect" in text
    assert main(["collect", *files, "--output", "statistics"]) == 0
    found = learn(["fit", *files, "--model.recipe.statistics", "statistics"])
    assert found.trainer.global_step == 4


def test_statistics_of_other_weights_or_another_reference_are_refused(moved, tmp_path, capsys):
    method = {"class_path": "ActivationMatching", "init_args": {"reference": "b"}}
    files = files_of(moved, tmp_path, method)
    assert main(["collect", *files, "--output", "statistics"]) == 0
    files = files_of(moved, tmp_path, method, statistics="statistics")
    tensors = tensors_of("moved")
    tensors[f"{UP}.bias"] = tensors[f"{UP}.bias"] + 1
    kept = Path("moved/model.safetensors").read_bytes()
    save_file(tensors, "moved/model.safetensors", {"format": "pt"})
    assert main(["merge", *files, "--output", "merged"]) == 2
    assert "is of other weights of b; collect again with these" in capsys.readouterr().err
    Path("moved/model.safetensors").write_bytes(kept)
    assert main(["merge", *files, "--output", "merged"]) == 0
    steps = [{"class_path": "RegMean"}]
    both = files_of(moved, tmp_path, method, statistics="statistics", preprocess=steps)
    capsys.readouterr()
    assert main(["merge", *both, "--output", "again"]) == 2
    assert "holds activations, expected gram; collect again" in capsys.readouterr().err


def test_steps_on_data_are_of_aligned_sources(moved, tmp_path, capsys):
    """b is a in another order, so aligned both are a, and so is any mean of them."""
    steps = [{"class_path": "RegMean"}]
    ones = {"init": {"class_path": "Constant", "init_args": {"value": 1.0}}}
    files = files_of(moved, tmp_path, "ActivationMatching", preprocess=steps, **ones)
    assert main(["merge", *files, "--output", "merged"]) == 0
    text = capsys.readouterr().err
    assert text.index("readings of the data") < text.index("Gram matrices of")
    recipe = yaml.safe_load(Path(moved).read_text())["model"]["recipe"]
    expected = tensors_of(recipe["sources"]["a"])
    for name, tensor in tensors_of("merged").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4, msg=name)
