"""`--ckpt_path last` and `best`, and `--sources` for folders that have moved."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import fails
from gradmerge import MergeModule
from gradmerge.cli import main
from gradmerge.cli.arguments import with_sources
from gradmerge.cli.resume import find_checkpoint
from gradmerge.common.errors import ConfigError, SourceError
from gradmerge.common.spec import from_plain, to_plain
from gradmerge.engine.recipe import Recipe
from gradmerge.sources import HuggingFace, Lora
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")

MONITOR = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"monitor": "selection/loss", "save_last": True, "filename": "best-{step}"},
}


@pytest.fixture(scope="module")
def fitted(world, tmp_path_factory):
    """Two fits, the second with a watched score, in one root."""
    root = tmp_path_factory.mktemp("fitted")
    before = Path.cwd()
    os.chdir(root)
    os.environ["WANDB_MODE"] = "disabled"
    try:
        shutil.copytree(world["model"]["recipe"]["base"], root / "models/base")
        for name, place in world["model"]["recipe"]["sources"].items():
            shutil.copytree(place, root / "models" / name)
        own = copy.deepcopy(world)
        own["model"]["recipe"]["base"] = str(root / "models/base")
        own["model"]["recipe"]["sources"] = {n: str(root / "models" / n) for n in "ab"}
        own["trainer"].update(max_steps=3, val_check_interval=1, check_val_every_n_epoch=None)
        config = write(root / "c.yaml", own)
        part = {"trainer": {"callbacks": [MONITOR]}, "model": {"learning_rate": 3.0}}
        watched = write(root / "watched.yaml", own, part)
        for file in (config, watched):
            assert main(["fit", "--config", file]) == 0
    finally:
        os.chdir(before)
        os.environ["WANDB_MODE"] = "offline"
    return root


@pytest.fixture
def here(fitted, tmp_path, monkeypatch):
    """A copy of the fits in the current folder."""
    shutil.copytree(fitted, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_last_and_best_are_those_of_the_newest_fit(here, capsys):
    folder = Path("outputs/logs/version_1/checkpoints")
    (best,) = folder.glob("best-*.ckpt")
    assert find_checkpoint("last", {}) == folder / "last.ckpt"
    assert find_checkpoint("best", {}) == best
    assert main(["test", "--config", "c.yaml", "--ckpt_path", "last"]) == 0
    assert f"ckpt_path last: {folder / 'last.ckpt'}" in capsys.readouterr().err
    first = next(Path("outputs/logs/version_0/checkpoints").iterdir())
    os.utime(first)
    assert find_checkpoint("last", {}) == first
    assert "watched no score" in fails(
        ["test", "--config", "c.yaml", "--ckpt_path", "best"], capsys
    )


def test_the_best_is_found_in_a_folder_that_moved(here):
    Path("outputs").rename("moved")
    folder = Path("moved/logs/version_1/checkpoints")
    (best,) = folder.glob("best-*.ckpt")
    assert find_checkpoint("best", {"default_root_dir": "moved"}) == best
    best.unlink()
    with pytest.raises(ConfigError, match=r"ckpt_path best: the fit that wrote .* lost outputs"):
        find_checkpoint("best", {"default_root_dir": "moved"})


def test_a_name_without_a_fit_is_an_error(here, capsys):
    shutil.rmtree("outputs")
    step = Path("outputs/driver/steps/step-1")
    step.mkdir(parents=True)
    (step / "last.ckpt").write_bytes(b"a driver's")
    for name in ("last", "best", "hpc"):
        for command in ("fit", "validate", "test"):
            text = fails([command, "--config", "c.yaml", "--ckpt_path", name], capsys)
            assert f"ckpt_path {name}: expected a checkpoint of an earlier fit below" in text
    root = ["--trainer.default_root_dir", "elsewhere"]
    assert "below elsewhere" in fails(
        ["fit", "--config", "c.yaml", "--ckpt_path", "last", *root], capsys
    )


def test_moved_sources_are_named(here, fitted, capsys, monkeypatch):
    hidden = fitted / "models"
    hidden.rename(fitted / "hidden")
    try:
        assert "expected" in fails(
            ["export", "outputs/logs/version_1/checkpoints/last.ckpt", "out"], capsys
        )
        places = [f"--sources={name}=models/{name}" for name in ("base", "a", "b")]
        checkpoint = "outputs/logs/version_1/checkpoints/last.ckpt"
        assert main(["export", checkpoint, "out", *places]) == 0
        given = ["--sources", "a=models/a", "b=models/b", "--sources", "base=models/base"]
        assert main(["export", *given, checkpoint, "again"]) == 0
        first, second = (load_file(f"{f}/model.safetensors") for f in ("out", "again"))
        assert all(torch.equal(first[name], second[name]) for name in first)
        for command in ("test", "fit"):
            options = ["--config", "c.yaml", "--ckpt_path", "last", *given]
            assert main([command, *options, "--trainer.max_steps", "5"]) == 0
        assert "unknown name 'c' (choose from a, b, base)" in fails(
            ["export", checkpoint, "new", "--sources", "c=models/a"], capsys
        )
        assert "unknown name 'c' (choose from a, b, base)" in fails(
            ["test", "--config", "c.yaml", "--sources", "c=models/a"], capsys
        )
        assert "expected NAME=PLACE" in fails(
            ["export", checkpoint, "new", "--sources", "models/a"], capsys
        )
        assert "trained on other weights of: a" in fails(
            ["export", checkpoint, "new", *places, "--sources", "a=models/b"], capsys
        )
    finally:
        (fitted / "hidden").rename(hidden)


def test_sources_become_one_option():
    for given in (
        ["--sources", "a=x=1", "--sources=b=/y"],
        ["--sources", "a=x=1", "b=/y"],
    ):
        found = with_sources(["export", *given, "x.ckpt", "--overwrite=true"])
        assert found == [
            "export",
            "x.ckpt",
            "--overwrite=true",
            '--sources={"a": "x=1", "b": "/y"}',
        ]
    for given in (["--sources", '{"a": "x"}'], ["--config", "x.yaml"], []):
        assert with_sources(given) == given
    for given in (["--sources"], ["--sources", "a="], ["--sources", "=x"], ["--sources=x"]):
        if given != ["--sources"]:
            with pytest.raises(ConfigError, match="expected NAME=PLACE"):
                with_sources(given)


def test_an_adapter_that_moved_keeps_its_base():
    old, new = HuggingFace("own/old"), HuggingFace("own/new")
    recipe = Recipe({"a": Lora("x", old), "b": "y"}, old, heads={"c": Lora("z", old)})
    moved = recipe.with_sources({"a": "w", "base": "own/new"})
    assert moved.sources == {"a": Lora("w", new), "b": "y"}
    assert moved.base == "own/new"
    assert moved.heads == {"c": Lora("z", new)}
    assert recipe.with_sources({}) == recipe
    with pytest.raises(ConfigError, match=r"unknown name 'bas'.*Did you mean 'base'"):
        recipe.with_sources({"bas": "x"})


# ---- permissions --------------------------------------------------------------------------------


def test_a_checkpoint_gives_itself_no_permission(here, capsys):
    """Neither code of its sources' folders, nor modules, nor downloads."""
    for name in ("base", "a", "b"):
        config = json.loads(Path(f"models/{name}/config.json").read_text())
        config |= {
            "model_type": "own",
            "architectures": ["M"],
            "auto_map": {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"},
        }
        Path(f"models/{name}/config.json").write_text(json.dumps(config))
        Path(f"models/{name}/code.py").write_text(
            "import pathlib\n"
            f"pathlib.Path({str(here / 'ran')!r}).touch()\n"
            "from transformers import BertConfig, BertForSequenceClassification\n"
            "class C(BertConfig):\n    model_type = 'own'\n"
            "class M(BertForSequenceClassification):\n    config_class = C\n"
        )
    path = "outputs/logs/version_1/checkpoints/last.ckpt"
    state = torch.load(path, weights_only=True)
    fields = state["hyper_parameters"]["recipe"]["init_args"]
    fields["trust_remote_code"] = True
    fields["base"] = "models/base"
    fields["sources"] = {name: f"models/{name}" for name in ("a", "b")}
    state["hyper_parameters"] |= {"trust_remote_code": True, "allow_modules": ["subprocess"]}
    del state["gradmerge"]["files"]  # else the configs that changed are noticed
    torch.save(state, "hostile.ckpt")
    text = fails(["export", "hostile.ckpt", "out"], capsys)
    assert "trust_remote_code" in text
    with pytest.raises(SourceError, match="trust_remote_code"):
        MergeModule.load_from_checkpoint("hostile.ckpt")
    assert not Path("ran").exists()
    assert main(["export", "hostile.ckpt", "out", "--trust_remote_code", "true"]) == 0
    assert Path("ran").exists()


def test_a_checkpoint_allows_no_modules(here):
    state = torch.load("outputs/logs/version_1/checkpoints/last.ckpt", weights_only=True)
    state["hyper_parameters"]["allow_modules"] = ["own_steps"]
    state["hyper_parameters"]["recipe"]["init_args"]["init"] = {"class_path": "own_steps.X"}
    torch.save(state, "hostile.ckpt")
    with pytest.raises(ConfigError, match=r"uses own_steps\.X, a class outside gradmerge"):
        MergeModule.load_from_checkpoint("hostile.ckpt")


def test_plain_data_hold_no_permissions():
    recipe = Recipe({"a": HuggingFace("x", token="hf_x")}, trust_remote_code=True)
    found = from_plain({**to_plain(recipe)})
    assert not found.trust_remote_code
    assert found.sources["a"].token is None


def test_what_a_checkpoint_names_is_not_downloaded(here, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, **options):
        asked.append((name, options["local_files_only"]))
        if options["local_files_only"]:
            raise FileNotFoundError(name)
        return str(Path("models") / name.rpartition("/")[2])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    state = torch.load("outputs/logs/version_1/checkpoints/last.ckpt", weights_only=True)
    fields = state["hyper_parameters"]["recipe"]["init_args"]
    fields["base"] = {
        "class_path": "gradmerge.sources.HuggingFace",
        "init_args": {"path": "own/base"},
    }
    fields["sources"] = {"a": "own/a", "b": "own/b@v1"}
    torch.save(state, "hub.ckpt")
    with pytest.raises(
        SourceError, match=r"only what you name yourself is downloaded; hub\.ckpt names it"
    ):
        MergeModule.load_from_checkpoint("hub.ckpt")
    assert asked == [("own/base", True)]
    asked.clear()
    given = {"base": HuggingFace("own/base"), "a": "own/a@main", "b": "models/b"}
    module = MergeModule.load_from_checkpoint("hub.ckpt", sources=given)
    assert set(asked) == {("own/base", False), ("own/a", False)}
    assert module.recipe.sources == {"a": "own/a@main", "b": "models/b"}
