"""A fit that is told to end saves its state, and checkpoints are whole or not there."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from folds import job_of, tensors
from gradmerge import MergeModule
from gradmerge.common.errors import ConfigError, OutputError
from gradmerge.drivers import Pairwise
from gradmerge.preprocess import Trim
from gradmerge.training import ExportAtEnd
from gradmerge.training.logs import CSVLogger
from tiny import build, fit, module_of, raws, recipe_of, relatives, save_family, trainer_of, vectors

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")


class Ends(lightning.Callback):
    """Sends SIGTERM to this process at the n-th call of a hook."""

    def __init__(self, hook: str, count: int) -> None:
        self.left = count
        setattr(self, hook, self.count)

    def count(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def ended(folder: Path, hook: str, count: int, **options: object) -> Path:
    """A fit that is told to end at the n-th call of a hook; returns its last checkpoint."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        fit(folder, callbacks=[Ends(hook, count)], **options)
    assert signal.getsignal(signal.SIGTERM) is before
    (found,) = folder.rglob("last.ckpt")
    return found


@pytest.mark.parametrize(
    ("hook", "count", "options"),
    [
        ("on_train_batch_start", 2, {}),
        ("on_train_batch_end", 1, {"accumulate_grad_batches": 2}),
        ("on_validation_start", 1, {"val_check_interval": 2}),
        ("on_validation_batch_start", 2, {"val_check_interval": 2, "num_sanity_val_steps": 1}),
        ("on_train_batch_start", 4, {"limit_val_batches": 0}),  # the last
    ],
)
def test_a_fit_that_is_told_to_end_resumes_bitwise(tmp_path, hook, count, options):
    whole, _ = fit(tmp_path / "whole", **options)
    path = ended(tmp_path / "part", hook, count, **options)
    step = torch.load(path, weights_only=True)["global_step"]
    assert 0 < step <= 4
    rest = module_of()
    trainer_of(tmp_path / "rest", **options).fit(rest, datamodule=vectors(), ckpt_path=path)
    for key, value in raws(whole).items():
        assert torch.equal(raws(rest)[key], value)


def test_the_last_checkpoint_lies_beside_the_others(tmp_path):
    keep = ModelCheckpoint(tmp_path / "mine")
    with pytest.raises(SystemExit, match="143"):
        fit(tmp_path, callbacks=[keep, Ends("on_train_batch_start", 2)])
    assert (tmp_path / "mine" / "last.ckpt").is_file()


def test_a_second_signal_does_not_wait(tmp_path):
    with pytest.raises(SystemExit, match="143"):
        fit(tmp_path, callbacks=[Ends("on_train_batch_start", 2), Ends("on_before_zero_grad", 2)])
    assert not list(tmp_path.rglob("last.ckpt"))


def test_nothing_is_exported_by_a_fit_that_was_ended(tmp_path):
    export = ExportAtEnd(str(tmp_path / "merged"))
    with pytest.raises(SystemExit, match="143"):
        fit(tmp_path, callbacks=[export, Ends("on_train_batch_start", 4)])
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("place", [("on_train_batch_start", 2), ("on_validation_start", 1)])
def test_a_driver_that_was_told_to_end_resumes_bitwise(tmp_path, place):
    models = relatives(build())
    whole = Pairwise().run(job_of(tmp_path / "whole", models, learning_rate=0.1))
    with pytest.raises(SystemExit, match="143"):
        Pairwise().run(
            job_of(tmp_path / "part", models, learning_rate=0.1, callbacks=[Ends(*place)])
        )
    (state,) = (tmp_path / "part").rglob("last.ckpt")
    assert torch.load(state, weights_only=True)["global_step"] > 0
    again = Pairwise().run(job_of(tmp_path / "part", models, learning_rate=0.1))
    expected = tensors(whole)
    assert all(torch.equal(value, expected[key]) for key, value in tensors(again).items())


# ---- disks ---------------------------------------------------------------------------------------


def fill(disk: Path) -> None:
    """Leave no page of a disk free."""
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


class Fills(lightning.Callback):
    """Fills a disk after so many steps."""

    def __init__(self, disk: Path, step: int) -> None:
        self.disk, self.step = disk, step

    def on_train_batch_start(self, trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            fill(self.disk)


def test_a_full_disk_keeps_the_last_good_checkpoint(disk, tmp_path, caplog):
    keep = ModelCheckpoint(
        disk, filename="last", every_n_train_steps=1, enable_version_counter=False
    )
    full = r"last\.ckpt: cannot be written: the disk is full.* The earlier last\.ckpt is as it was"
    said = caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero")
    with said, pytest.raises(OutputError, match=full):
        fit(tmp_path, callbacks=[Fills(disk, 2), keep])
    assert f"kept: {disk / 'last.ckpt'}; resume with --ckpt_path" in caplog.text
    assert {path.name for path in disk.iterdir()} == {"filler", "last.ckpt"}
    assert torch.load(disk / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_log_on_a_full_disk_is_named(disk):
    logger = CSVLogger(disk, name="logs")
    logger.log_metrics({"loss": 1.0}, step=0)
    fill(disk)
    with pytest.raises(OutputError, match=r"version_0: cannot be written: .*checkpoints .* kept"):
        logger.save()


def test_logs_and_checkpoints_are_not_written_into_a_source(tmp_path):
    import transformers

    from networks import seeded

    models = relatives(seeded(transformers.BertForSequenceClassification, num_labels=3))
    paths = save_family(tmp_path, models, tokenizer=False)
    module = module_of([paths[name] for name in ("base", "a", "b")])
    inside = Path(paths["a"]) / "checkpoints"
    with pytest.raises(ConfigError, match=r"apart from the input, got one in .*a, which is read"):
        fit(tmp_path, module, callbacks=[ModelCheckpoint(inside)])
    assert not inside.exists()


def test_folders_that_cannot_be_written_are_found_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file.*cannot be written: Not a directory"):
        fit(tmp_path / "file" / "outputs", callbacks=[])
    with pytest.raises(OutputError, match=r"cannot be written: Not a directory \(.*file\)"):
        fit(tmp_path, callbacks=[ExportAtEnd(str(tmp_path / "file" / "merged"))])


def test_an_export_without_room_is_found_before_training(disk, tmp_path):
    torch.manual_seed(0)
    models = relatives(torch.nn.Sequential(torch.nn.Linear(6, 2000), torch.nn.Linear(2000, 3)))
    module = module_of(models)
    expected = r"expected 80\.0 kB of free space for the merged model, got 32\.8 kB"
    with pytest.raises(OutputError, match=expected):
        fit(tmp_path, module, callbacks=[ExportAtEnd(str(disk / "merged"))])
    half = ExportAtEnd(str(disk / "merged"), dtype="bfloat16")
    with pytest.raises(OutputError, match=r"expected 40\.0 kB of free space"):
        fit(tmp_path, module, callbacks=[half])


def test_preprocessed_directions_without_room_are_found_before_they_are_made(disk, monkeypatch):
    models = relatives(torch.nn.Sequential(torch.nn.Linear(6, 2000), torch.nn.Linear(2000, 3)))
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    expected = r"expected 160\.0 kB of free space for the preprocessed .* set it to a folder"
    with pytest.raises(OutputError, match=expected):
        MergeModule(recipe_of(models, preprocess=[Trim(0.5)]))
