"""Checkpoints of strangers: plain data from a local file, whatever the address."""

from __future__ import annotations

import http.server
import os
import re
import threading
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import gradmerge
from gradmerge import MergeDataModule, MergeModule
from gradmerge.cli import main
from gradmerge.common.checkpoints import load_checkpoint
from gradmerge.common.errors import ConfigError
from tiny import module_of, trainer_of, vectors
from tiny import write_yaml as write

SOURCE = Path(gradmerge.__file__).parent


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def hostile(tmp_path):
    """A checkpoint whose unpickling is seen, at every kind of address."""
    state = {
        "gradmerge": {},
        "hyper_parameters": {},
        "state_dict": {"x": torch.zeros(1)},
        "pytorch-lightning_version": lightning.__version__,
        "own": Hostile(tmp_path / "ran"),
    }
    torch.save(state, tmp_path / "x.ckpt")
    shards = tmp_path / "shards"
    shards.mkdir()
    torch.save(state, shards / "meta.pt")
    for name in ("shards/.metadata", "hpc_ckpt_3.ckpt"):
        (tmp_path / name).write_bytes((tmp_path / "x.ckpt").read_bytes())
    return tmp_path / "x.ckpt"


@pytest.fixture
def server(tmp_path):
    """Address of a server on this machine that serves the test's folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            asked.append(args)

    asked: list[object] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()
        thread.join()


def addresses(path, server):
    """The same checkpoint by all kinds of address, with what the error says of each."""
    remote, code = "expected a checkpoint as a local file", "because unpickling can run code"
    return {
        str(path): code,
        f"file://{path}": remote,
        f"local://{path}": remote,
        f"filecache::file://{path}": remote,
        f"{server}/x.ckpt": remote,
        "s3://bucket/x.ckpt": remote,
        "memory://x.ckpt": remote,
        "hf://owner/name/x.ckpt": remote,
        str(path.parent / "shards"): "got a folder. Shards of a distributed",
        str(path.parent / "shards/.metadata"): code,
        str(path.parent / "none.ckpt"): "no such checkpoint",
    }


def test_no_address_is_unpickled_from_python(hostile, server, tmp_path):
    address, asked = server
    for where, text in addresses(hostile, address).items():
        with pytest.raises(ConfigError, match=text):
            MergeModule.load_from_checkpoint(where, weights_only=True)
        for command in ("fit", "validate", "test"):
            run = getattr(trainer_of(tmp_path), command)
            for options in ({}, {"weights_only": False}):
                with pytest.raises(ConfigError, match=text):
                    run(module_of(), datamodule=vectors(), ckpt_path=where, **options)
    assert not (tmp_path / "ran").exists()
    assert asked == []


def test_a_signals_checkpoint_is_not_unpickled(hostile, tmp_path):
    with pytest.raises(ConfigError, match="because unpickling can run code"):
        trainer_of(tmp_path).fit(module_of(), datamodule=vectors(), ckpt_path="hpc")
    assert not (tmp_path / "ran").exists()


def test_the_best_checkpoint_is_not_unpickled(hostile, tmp_path):
    class Exchange(lightning.Callback):
        """Puts the hostile checkpoint in the place of the best."""

        def on_train_end(self, trainer, pl_module):
            trainer.checkpoint_callback.best_model_path = str(hostile)

    from gradmerge.training import ExportAtEnd

    best = ModelCheckpoint(tmp_path / "kept", monitor="selection/loss")
    callbacks = [Exchange(), best, ExportAtEnd(str(tmp_path / "out"))]
    with pytest.raises(ConfigError, match="because unpickling can run code"):
        trainer_of(tmp_path, callbacks=callbacks).fit(module_of(), datamodule=vectors())
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("own_folder")
def test_no_address_is_unpickled_from_the_command_line(hostile, server, world, tmp_path, capsys):
    address, asked = server
    config = write(tmp_path / "c.yaml", world)
    for where, text in addresses(hostile, address).items():
        commands = [["export", where, "out"]]
        commands += [[c, "--config", config, "--ckpt_path", where] for c in ("fit", "test")]
        for command in commands:
            assert main(command) == 2
            assert text in capsys.readouterr().err
    options = ["fit", "--config", config, "--trainer.default_root_dir", str(tmp_path)]
    for name in ("last", "best", "hpc"):
        assert main([*options, "--ckpt_path", name]) == 2
        assert "because unpickling can run code" in capsys.readouterr().err
    assert main([*options, "--weights_only", "false"]) == 2
    assert "weights_only: expected true" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert asked == []


def test_a_strategy_that_reads_checkpoints_by_itself_is_refused(tmp_path):
    class Own(lightning.pytorch.strategies.SingleDeviceStrategy):
        def load_checkpoint(self, *args, **options):
            raise AssertionError("asked")

    trainer = trainer_of(tmp_path, strategy=Own(), accelerator="auto")
    with pytest.raises(ConfigError, match="Own reads checkpoints in a way that can run code"):
        trainer.fit(module_of(), datamodule=vectors(), ckpt_path=tmp_path / "x.ckpt")


def test_checkpoints_are_not_saved_where_they_cannot_be_loaded(tmp_path):
    remote = ModelCheckpoint("memory://kept", monitor="selection/loss")
    with pytest.raises(ConfigError, match=r"dirpath: expected a local folder, got memory://kept"):
        trainer_of(tmp_path, callbacks=[remote]).fit(module_of(), datamodule=vectors())


def test_data_modules_are_not_loaded_at_all(hostile, server, tmp_path):
    for where in (str(hostile), f"{server[0]}/x.ckpt"):
        with pytest.raises(ConfigError, match="a checkpoint of a fit holds no data"):
            MergeDataModule.load_from_checkpoint(where, weights_only=False)
    assert not (tmp_path / "ran").exists()
    assert server[1] == []


# ---- damaged ones -------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path):
    module, trainer = module_of(), trainer_of(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=vectors())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    return module.recipe, torch.load(tmp_path / "one.ckpt", weights_only=True)


def circle():
    """A list that holds itself, twice."""
    found: list[object] = []
    found += [found, found]
    return found


def bomb():
    """A list of few bytes with a billion entries."""
    found: list[object] = ["x"]
    for _ in range(30):
        found = [found, found]
    return found


DAMAGES = {
    "circle": (("gradmerge", "run"), circle(), "entries nested without end"),
    "bomb": (("callbacks", "x"), bomb(), "entries nested without end"),
    "version": (("pytorch-lightning_version",), 3, "version of type int"),
    "parts": (("state_dict",), [1], "state_dict of type list"),
    "address": (("callbacks", "x"), {"best_model_path": "s3://b/x"}, "address 's3://b/x'"),
    "chain": (("callbacks", "x"), {"simplecache::s3://b/x": 1}, "address 'simplecache::"),
    "option": (("hyper_parameters", "memory"), ["x"], "memory is"),
    "learning rate": (("hyper_parameters", "learning_rate"), "fast", "learning_rate is 'fast'"),
    "fixed": (("gradmerge", "fixed"), {"absent": 1.0}, "was changed"),
    "buffers": (("gradmerge", "buffers"), 7, "buffers: expected a mapping, got 7"),
    "tasks": (
        ("gradmerge", "tasks"),
        {"../../x": "a"},
        "tasks: expected keys that are names",
    ),
    "results": (("gradmerge", "results"), {"test": 1}, "results.test: expected a mapping"),
    "shape": (("state_dict", "merged.raw.tensor"), torch.zeros(2, 9), "size mismatch"),
    "name": (("state_dict", "other"), torch.zeros(1), "Unexpected key"),
    "value": (("state_dict", "merged.raw.tensor"), "x", "was changed"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named(whole, tmp_path, name):
    recipe, state = whole
    place, value, text = DAMAGES[name]
    holder = state
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match=text):
        MergeModule.load_from_checkpoint(tmp_path / "x.ckpt", recipe=recipe)
    if "hyper_parameters" not in place:  # a fit takes its own
        module = MergeModule(recipe)
        with pytest.raises(ConfigError, match=text):
            trainer_of(tmp_path).fit(module, datamodule=vectors(), ckpt_path=tmp_path / "x.ckpt")


def test_an_open_file_loads_like_its_path(whole, tmp_path):
    with (tmp_path / "one.ckpt").open("rb") as file:
        assert load_checkpoint(file).keys() == whole[1].keys()
        file.seek(0)
        module = MergeModule.load_from_checkpoint(file, recipe=whole[0])
    assert torch.equal(module.merged.raw["tensor"], whole[1]["state_dict"]["merged.raw.tensor"])


# ---- the door -----------------------------------------------------------------------------------

DOORS = {
    r"torch\.load\(": {"common/checkpoints.py", "sources/files.py"},
    r"\b(pickle|dill|cloudpickle|joblib|shelve|marshal)\.(loads?|open)": set(),
    r"\bpickle\.Unpickler": {"sources/distributed.py"},  # of the format's own classes alone
    r"\byaml\.(unsafe_load|full_load|load)\b": set(),
    r"allow_pickle=True|weights_only=False|load_state_dict_from_url|torch\.hub\b": set(),
    r"\b(eval|exec)\(": set(),
}


@pytest.mark.parametrize("pattern", DOORS)
def test_pickles_have_one_door_per_kind(pattern):
    files = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
    found = {
        name
        for name, path in files.items()
        if re.search(rf"(?<![\w.]){pattern}", path.read_text(encoding="utf-8"))
    }
    assert found == DOORS[pattern]
    for name in found if "load" in pattern else ():
        lines = files[name].read_text(encoding="utf-8").splitlines()
        assert all("weights_only=True" in line for line in lines if re.search(pattern, line))
