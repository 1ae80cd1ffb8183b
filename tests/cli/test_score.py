"""`gradmerge test --model FOLDER` scores a folder as the fit that wrote it was scored."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from gradmerge.cli import main
from gradmerge.cli.arguments import with_model_folder
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")


def scores(folder: str) -> dict[str, float]:
    """The test scores of the last run in a folder."""
    (path,) = Path(folder).glob("logs/version_*/metrics.csv")
    rows = list(csv.DictReader(path.open()))
    found = {k: v for row in rows for k, v in row.items() if k.startswith("test/") and v}
    return {key: float(value) for key, value in found.items()}


def merged(world, tmp_path, **recipe):
    export = {"class_path": "ExportAtEnd", "init_args": {"output": "merged"}}
    more = {"trainer": {"callbacks": [export], "default_root_dir": "fit"}}
    method = {"recipe": recipe, "objective": {"terms": ["KLToSource"]}}
    return write(tmp_path / "fit.yaml", world, {"model": method}, more)


TRAINED = {
    "private": ["^classifier"],
    "trained": ["^classifier"],
    "adapters": {"query": 2},
}


@pytest.mark.parametrize("own", [{}, TRAINED], ids=["one head", "trained heads"])
def test_a_folder_scores_as_the_checkpoint_that_it_was_exported_from(world, tmp_path, own):
    config = merged(world, tmp_path, **own)
    rates = ["--optimizer", "Adam", "--optimizer.lr", "0.02"]
    rates += ["--model.private_learning_rate", "0.05"] if own else []
    assert main(["fit", "--config", config, *rates]) == 0
    (checkpoint,) = Path("fit").glob("**/*.ckpt")
    groups = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == ([0.02, 0.05] if own else [0.02])
    root = ["--trainer.default_root_dir"]
    assert main(["test", "--config", config, "--ckpt_path", str(checkpoint), *root, "one"]) == 0
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump({"data": world["data"]}))
    alone = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["test", "--config", str(data), "--model", "merged", *alone, *root, "two"]) == 0
    assert main(["test", "--config", config, "--model=merged", *root, "three"]) == 0
    expected, alone, again = scores("one"), scores("two"), scores("three")
    names = {name for name in expected if name.endswith(("accuracy", "macro_f1"))}
    assert len(names) >= 4
    for name in names:
        assert alone[name] == again[name] == pytest.approx(expected[name], abs=1e-6)
    # they are in the records of the folder, as those of its fit are
    records = json.loads(Path("merged/provenance.json").read_text())
    kept = records["results"]["test"]
    for name in names:
        _, task, metric = name.split("/")
        assert kept[task][metric] == pytest.approx(again[name], abs=1e-6)
    assert "selection" in records["results"]
    assert records["evaluation"]["test"]["versions"]["gradmerge"]
    card = ModelCard.load("merged/README.md")
    listed = {(r.dataset_split, r.dataset_name, r.metric_type) for r in card.data.eval_results}
    assert {("test", "a", "accuracy"), ("test", "b", "accuracy")} <= listed
    assert f"| a | {kept['a']['accuracy']:.4f} |" in card.text.partition("| test |")[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["test", "--ckpt_path", "x.ckpt", "--model", "merged"], "expected one of them, got both"),
        (["fit", "--model_folder", "merged"], "`gradmerge fit` learns a merge"),
    ],
)
def test_what_does_not_go_together_is_refused(world, tmp_path, capsys, options, message):
    config = write(tmp_path / "c.yaml", world)
    assert main([options[0], "--config", config, *options[1:]]) == 2
    assert message in capsys.readouterr().err


def test_a_task_without_a_head_is_named(world, tmp_path, capsys):
    config = merged(world, tmp_path, private=["^classifier"])
    assert main(["fit", "--config", config]) == 0
    capsys.readouterr()
    tasks = {"c": world["data"]["tasks"]["a"]}
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump({"data": {"tasks": tasks}}))
    assert main(["test", "--config", str(data), "--model", "merged"]) == 2
    assert "no head for the tasks c; the folder has heads for a, b" in capsys.readouterr().err


def test_only_a_folder_is_taken_for_a_model():
    for arguments in (
        ["test", "--model", "model.yaml"],
        ["test", "--model={recipe: {}}"],
        ["fit", "--model", "merged"],
        ["test", "--model"],
        [],
    ):
        assert with_model_folder(arguments) == arguments
    assert with_model_folder(["test", "--model", "merged", "-c", "x"]) == [
        "test",
        "--model_folder=merged",
        '--model.recipe.sources={"model": "merged"}',
        "-c",
        "x",
    ]
