"""Failures of files, options and machines end in a line; faults of gradmerge keep their trace."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commands import fails
from gradmerge.cli import main
from gradmerge.cli.early import require_options
from gradmerge.common.errors import ConfigError, SourceError
from gradmerge.common.failures import expected, reading
from gradmerge.sources import HuggingFace
from gradmerge.training.data import MergeDataModule
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")


# ---- anything that stops a command ----------------------------------------------------------


def stopped_by(error, monkeypatch, capsys):
    """The status and the messages of a command in which something is raised."""

    def stop(*_):
        raise error

    monkeypatch.setattr(sys.modules["gradmerge.cli.main"], "_plain", stop)
    status = main(["inspect", "a"])
    return status, capsys.readouterr().err


def out_of_memory():
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        torch.empty(2**50)
    return caught.value


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", b"x"), "x: Permission denied. Check"),
        (ConnectionError("the hub does not answer at all"), "the hub does not answer at all."),
        (SourceError("a: expected a folder"), "a: expected a folder"),
        (MemoryError(), "not enough memory: MemoryError."),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory"),
        (ModuleNotFoundError("No module named 'bits'", name="bits.x"), "bits is not installed"),
    ],
)
def test_what_is_not_our_fault_is_said_in_a_line(error, message, monkeypatch, capsys):
    status, text = stopped_by(error, monkeypatch, capsys)
    assert status == 2
    assert text.startswith(f"gradmerge inspect: {message}")
    assert "Traceback" not in text


def test_memory_of_the_machine_is_no_fault_of_ours(monkeypatch, capsys):
    status, text = stopped_by(out_of_memory(), monkeypatch, capsys)
    assert status == 2
    assert "Use a smaller data.batch_size" in text


def test_a_fault_of_ours_keeps_its_trace_and_says_so(monkeypatch, capsys):
    status, text = stopped_by(KeyError("weights"), monkeypatch, capsys)
    assert status == 1
    assert "Traceback" in text
    assert "KeyError: 'weights'" in text
    assert "gradmerge inspect: an unexpected error" in text.splitlines()[-1]


@pytest.mark.parametrize("by_trainer", [False, True])
def test_an_interrupt_is_one_line(by_trainer, monkeypatch, capsys):
    def stop(*_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if by_trainer:
                sys.exit(1)  # as lightning ends the process
            raise

    monkeypatch.setattr(sys.modules["gradmerge.cli.main"], "_plain", stop)
    assert main(["inspect", "a"]) == 130
    assert capsys.readouterr().err == "gradmerge inspect: interrupted\n"


def test_a_closed_pipe_is_quiet(monkeypatch, capsys):
    class Closed:
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def flush(self):
            self.write("")

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys.modules["gradmerge.cli.main"], "_plain", lambda *_: print("x"))
    assert main(["inspect", "a"]) == 141
    monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_fault_and_no_place_for_files(closed, tmp_path):
    """The first file would get the number of a closed stream, and with it what is printed."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\n"
        "from gradmerge.cli import main\n"
        "status = main(['--version'])\n"
        "number = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n"
        "os.system('echo from a child; echo and its errors >&2; cat')\n"
        "sys.exit(status + 10 * number)\n"
    )
    command = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, str(script)]
    done = subprocess.run(
        [*command, str(tmp_path / "file")], input=b"", capture_output=True, check=False
    )
    assert done.returncode >= 30, done.stderr
    assert done.returncode % 10 == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == b""
    assert b"Bad file descriptor" not in done.stderr


def test_reading_names_the_file_and_keeps_our_own_errors():
    found = r"c\.json: it cannot be read: KeyError: 'x'\. Do\."
    with pytest.raises(SourceError, match=found), reading("c.json", "it cannot be read", "Do."):
        {}["x"]
    for error in (ConfigError("as it is"), MemoryError("as it is")):
        with pytest.raises(type(error), match="as it is"), reading("c.json", "no"):
            raise error
    assert expected(KeyError("x")) is None


# ---- configs that transformers refuses ------------------------------------------------------


def damaged(world, folder, **fields):
    """The recipe of copies of the sources whose configs all have other fields."""
    recipe = {"sources": {}}
    for name, path in {"base": world["base"], **world["sources"]}.items():
        copy = Path(shutil.copytree(path, folder / name))
        settings = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**settings, **fields}))
        (recipe if name == "base" else recipe["sources"])[name] = str(copy)
    return recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", "sixteen"), ("num_attention_heads", 0), ("hidden_act", "nope")],
)
def test_a_config_that_transformers_refuses_is_named(field, value, world, tmp_path, capsys):
    recipe = damaged(world["model"]["recipe"], tmp_path / "m", **{field: value})
    config = write(tmp_path / "c.yaml", {**world, "model": {"recipe": recipe}})
    text = fails(["fit", "--config", config], capsys)
    assert text.startswith(f"gradmerge fit: {tmp_path}/m/base")
    assert text.count("\n") <= 3


# ---- options of the trainer, the optimiser and callbacks ------------------------------------


NUMBERS = {
    "max_steps": -5,
    "max_epochs": -4,
    "min_steps": -1,
    "gradient_clip_val": -1.0,
    "accumulate_grad_batches": 0,
    "check_val_every_n_epoch": 0,
    "log_every_n_steps": -1,
    "num_sanity_val_steps": -5,
    "num_nodes": 0,
    "val_check_interval": 1.5,
    "limit_train_batches": 0,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [*NUMBERS.items(), ("gradient_clip_val", math.nan), ("val_check_interval", 0)],
)
def test_numbers_that_the_trainer_would_misread_are_refused(name, value):
    given = {f"trainer.{name}": value}
    with pytest.raises(ConfigError, match=rf"trainer\.{name}: expected .*, got {value}"):
        require_options(given.get, fits=True)
    sound = {f"trainer.{name}": 1 for name in NUMBERS}
    require_options(sound.get, fits=True)


def test_processes_without_end_are_refused():
    given = {"trainer.devices": "5000", "trainer.accelerator": "cpu"}
    with pytest.raises(ConfigError, match=r"trainer\.devices: expected at most \d+ processes"):
        require_options(given.get, fits=True)


EARLY = [
    ("--seed_everything=-1", "seed_everything: expected 0 to 4294967295"),
    ("--trainer.max_steps=-5", "trainer.max_steps: expected a number of at least -1, got -5"),
    ("--trainer.devices=0", "trainer: it cannot be set up"),
    ("--trainer.accelerator=qpu", "invalid accelerator name: `accelerator='qpu'`"),
    ("--trainer.strategy=fsdp", "trainer: it cannot be set up: The strategy `fsdp` requires"),
    ("--data.num_workers=-1", "data.num_workers: expected 0 to"),
    ("--model.learning_rate=-1", "learning_rate: expected"),
]


@pytest.fixture
def unopened(monkeypatch):
    """Nothing is opened or loaded."""
    monkeypatch.setattr(HuggingFace, "open", lambda *_: pytest.fail("it opened the sources"))
    monkeypatch.setattr(MergeDataModule, "setup", lambda *_: pytest.fail("it loaded the data"))


@pytest.mark.parametrize(("option", "message"), EARLY)
def test_options_are_refused_before_anything_is_opened(
    option, message, world, tmp_path, capsys, unopened
):
    config = write(tmp_path / "c.yaml", world)
    assert message in fails(["fit", "--config", config, option], capsys)


SGD = "torch.optim.SGD"
OPTIMISERS = [
    (SGD, {"lr": -1}, None, "optimizer: SGD rejects its options: Invalid learning rate: -1"),
    (SGD, {"lr": math.nan}, None, "finite number, got nan"),
    ("torch.optim.Adam", {"betas": [2, 3]}, None, "Adam rejects its options: Invalid beta"),
    (SGD, {"lr": 1}, ("CosineAnnealingLR", {"T_max": 0}), "CosineAnnealingLR rejects its options"),
    (SGD, {"lr": 1}, ("StepLR", {"step_size": 0}), "StepLR rejects its options"),
    (SGD, {"lr": 1}, ("OneCycleLR", {"max_lr": 1, "total_steps": 2}), "OneCycleLR rejects"),
    (None, {}, ("StepLR", {"step_size": 1}), "lr_scheduler: expected an `optimizer` beside it"),
]


@pytest.mark.parametrize(("kind", "options", "schedule", "message"), OPTIMISERS)
def test_optimisers_and_schedules_are_tried_first(kind, options, schedule, message):
    given = {"trainer.max_steps": 4}
    if kind is not None:
        given["optimizer"] = {"class_path": kind, "init_args": options}
    if schedule is not None:
        name, arguments = schedule
        path = f"torch.optim.lr_scheduler.{name}"
        given["lr_scheduler"] = {"class_path": path, "init_args": arguments}
    with pytest.raises(ConfigError, match=re.escape(message)):
        require_options(given.get, fits=True)


def test_a_schedule_with_an_optimiser_that_wants_a_closure_is_no_fault(world, tmp_path):
    part = {
        "optimizer": {"class_path": "torch.optim.LBFGS", "init_args": {"max_iter": 1}},
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.StepLR",
            "init_args": {"step_size": 1},
        },
        "trainer": {"max_steps": 1, "limit_val_batches": 0},
    }
    assert main(["fit", "--config", write(tmp_path / "c.yaml", world, part)]) == 0


def watching(kind, monitor):
    return {"class_path": kind, "init_args": {"monitor": monitor}}


STOPPING = "lightning.pytorch.callbacks.EarlyStopping"
KEEPING = "lightning.pytorch.callbacks.ModelCheckpoint"
MONITORS = [
    (STOPPING, "selection/los", "Did you mean 'selection/loss'?"),
    (KEEPING, "selection/los", "Did you mean 'selection/loss'?"),
    (KEEPING, "val_loss", "ModelCheckpoint: expected a score that the fit logs"),
    (STOPPING, "selection/c/accuracy", "Did you mean 'selection/"),
]


@pytest.mark.parametrize(("kind", "monitor", "message"), MONITORS)
def test_scores_that_a_fit_does_not_log_are_refused_first(
    kind, monitor, message, world, tmp_path, capsys, unopened
):
    part = {"trainer": {"callbacks": [watching(kind, monitor)]}}
    assert message in fails(["fit", "--config", write(tmp_path / "c.yaml", world, part)], capsys)


def test_drivers_and_schedules_watch_scores_of_every_fit(world, tmp_path, capsys, unopened):
    plateau = watching("lightning.pytorch.cli.ReduceLROnPlateau", "selection/los")
    optimiser = {"class_path": SGD, "init_args": {"lr": 1}}
    config = write(tmp_path / "c.yaml", world, {"optimizer": optimiser, "lr_scheduler": plateau})
    assert "ReduceLROnPlateau: expected a score" in fails(["fit", "--config", config], capsys)
    part = {"trainer": {"callbacks": [watching(STOPPING, "selection/a/loss")]}}
    config = write(tmp_path / "c.yaml", world, part)
    text = fails(["fit", "--config", config, "--driver", "Pairwise"], capsys)
    assert "EarlyStopping: expected a score that the fit logs" in text


def test_scores_of_another_kind_of_network_are_refused_before_data_are_loaded(
    world, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(MergeDataModule, "setup", lambda *_: pytest.fail("it loaded the data"))
    part = {"trainer": {"callbacks": [watching(STOPPING, "selection/average/perplexity")]}}
    text = fails(["fit", "--config", write(tmp_path / "c.yaml", world, part)], capsys)
    assert "EarlyStopping: expected a score" in text


def test_more_steps_between_validations_than_an_epoch_has_are_refused(world, tmp_path, capsys):
    config = write(tmp_path / "c.yaml", world)
    options = ["fit", "--config", config, "--trainer.val_check_interval=4"]
    text = fails(options, capsys)
    assert "trainer.val_check_interval: expected at most 3, the steps of an epoch" in text
    assert main([*options, "--trainer.check_val_every_n_epoch=null"]) == 0


@pytest.mark.parametrize("content", [bytes(range(256)), "a: 1".encode("utf-16"), b"a: \xe9"])
@pytest.mark.parametrize("command", ["fit", "merge", "inspect"])
def test_a_configuration_in_another_encoding_is_named(command, content, tmp_path, capsys):
    Path("odd.yaml").write_bytes(content)
    text = fails([command, "--config", "odd.yaml"], capsys)
    assert text.startswith(f"gradmerge {command}: odd.yaml: expected YAML in UTF-8, got byte 0x")
