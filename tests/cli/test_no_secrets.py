"""No file, no log and no error holds a secret of the configuration."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import wandb

from commands import fails
from gradmerge.cli import main
from gradmerge.common import secrets
from tiny import close_wandb_run
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")

MARK = "MARKED"
KEY = f"{MARK}{'0' * 34}"  # as long as W&B's
UPLOADER = """
from lightning.pytorch import Callback


class Uploader(Callback):
    def __init__(self, api_key: str, address: str, storage_options: dict | None = None):
        pass
"""


@pytest.fixture
def secret(world, tmp_path, monkeypatch):
    """A configuration with secrets in all places, outside the folder that is searched."""
    inputs, outputs = tmp_path / "inputs", tmp_path / "outputs-of-the-test"
    inputs.mkdir()
    outputs.mkdir()
    monkeypatch.chdir(outputs)
    monkeypatch.setattr(secrets, "_known", set())
    wandb.teardown()  # its process writes below the folder where another test started it
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", f"hf_{MARK}FROMENVIRONMENT")
    (inputs / "uploading.py").write_text(UPLOADER)
    monkeypatch.syspath_prepend(inputs)
    recipe = world["model"]["recipe"]
    folders = recipe["sources"]
    arguments = {"path": folders["a"], "token": f"hf_{MARK}SECRET"}
    sources = {"a": {"class_path": "HuggingFace", "init_args": arguments}, "b": folders["b"]}
    uploader = {
        "api_key": f"{MARK}key",
        "address": f"https://me:{MARK}word@host/x?token={MARK}query",
        "storage_options": {"key": f"{MARK}id", "secret": f"{MARK}stored"},
    }
    callbacks = [
        {"class_path": "uploading.Uploader", "init_args": uploader},
        {"class_path": "ExportAtEnd", "init_args": {"output": "merged"}},
    ]
    model = {"recipe": {**recipe, "sources": sources}}
    return inputs, {
        **world,
        "model": model,
        "trainer": {**world["trainer"], "callbacks": callbacks, "max_steps": 1},
    }


def marked(folder=Path()):
    """Files that hold a secret."""
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and MARK.encode() in path.read_bytes()
    ]


def test_nothing_that_a_fit_and_an_export_write_holds_a_secret(secret, monkeypatch, capfd):
    inputs, content = secret
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ["--config", write(inputs / "c.yaml", content), "--allow_modules", "uploading"]
    # W&B records the arguments of the process
    token = f"--model.recipe.sources.a.init_args.token=hf_{MARK}ARGUMENT"
    monkeypatch.setattr(sys, "argv", ["gradmerge", "fit", *options, token])
    assert main() == 0
    close_wandb_run()
    assert list(Path().rglob("run-*.wandb"))
    assert len(list(Path().rglob("config.yaml"))) > 0
    assert Path("merged/gradmerge.yaml").is_file()
    (checkpoint,) = Path().rglob("*.ckpt")
    monkeypatch.setattr(sys, "argv", ["gradmerge"])
    assert main(["export", str(checkpoint), "again"]) == 0
    assert marked() == []
    said = capfd.readouterr()
    assert MARK not in said.out + said.err
    found = json.loads(Path("again/provenance.json").read_text())
    assert found["recipe"]["init_args"]["sources"]["a"]["init_args"]["token"] is None
    assert "https://***@host/x?token=***" in found["run"]["yaml"]


def test_nothing_that_a_driver_writes_holds_a_secret(secret, monkeypatch, capfd):
    inputs, content = secret
    content = {**content, "driver": {"class_path": "Pairwise"}}
    monkeypatch.setenv("WANDB_MODE", "disabled")
    options = ["fit", "--config", write(inputs / "c.yaml", content), "--allow_modules", "uploading"]
    assert main(options) == 0
    assert list(Path().rglob("job.json"))
    assert list(Path().rglob("step.json"))
    assert main(options) == 0  # the same job
    assert marked() == []
    said = capfd.readouterr()
    assert MARK not in said.out + said.err


def test_nothing_that_static_commands_write_holds_a_secret(secret, capfd):
    inputs, content = secret
    recipe = {**content["model"]["recipe"], "init": {"class_path": "Uniform"}}
    config = write(inputs / "m.yaml", {"recipe": recipe})
    assert main(["merge", "--config", config, "--output", "out"]) == 0
    unified = {**recipe, "preprocess": [{"class_path": "Unify"}], "private": ["classifier"]}
    config = write(inputs / "e.yaml", {"recipe": unified})
    for form in ("tasks", "compact"):
        assert main(["merge", "--config", config, "--outputs", form, "--output", form]) == 0
    assert main(["unpack", "compact", "unpacked"]) == 0
    assert marked() == []
    said = capfd.readouterr()
    assert MARK not in said.out + said.err


GIVEN = {"token": f"{MARK}x", "pathh": "a"}
UNKNOWN, WRONG = ({"class_path": c, "init_args": GIVEN} for c in ("Absent", "HuggingFace"))
FAULTS = {
    "option": {"trainer": {"max_stepz": 3}},
    "class": {"model": {"recipe": {"sources": {"a": UNKNOWN}}}},
    "argument": {"model": {"recipe": {"sources": {"a": WRONG}}}},
    "file": {"data": {"tasks": {"a": {"data_files": f"nowhere://me:{MARK}@127.0.0.1:9/x.json"}}}},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_show_no_secret(secret, capsys, fault):
    inputs, content = secret
    config = write(inputs / "c.yaml", content, FAULTS[fault])
    text = fails(["fit", "--config", config, "--allow_modules", "uploading"], capsys)
    assert MARK not in text


def test_errors_of_static_commands_show_no_secret(secret, capsys):
    recipe = json.dumps({**secret[1]["model"]["recipe"], "unknown": 1})
    assert MARK not in fails(["merge", "--recipe", recipe, "--output", "out"], capsys)
