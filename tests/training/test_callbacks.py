"""What callbacks leave behind: coefficient files, the exported folder, W&B's offline run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from safetensors.torch import load_file

import tiny
from gradmerge import MergeModule
from gradmerge.coefficients import Column, Mixup, Sigmoid
from gradmerge.common.errors import ConfigError
from gradmerge.common.spec import to_plain
from gradmerge.export.folder import export_merged
from gradmerge.export.plots import CoefficientTable
from gradmerge.export.provenance import mean_coefficients
from gradmerge.training.callbacks import CoefficientLogger, ExportAtEnd
from tiny import (
    Normalised,
    Perceptron,
    build,
    raws,
    recipe_of,
    recomputed,
    relatives,
    trainer_of,
    vectors,
)


def module_of(kind=Perceptron, learning_rate=0.1, **recipe):
    return MergeModule(recipe_of(relatives(build(kind)), **recipe), learning_rate=learning_rate)


def fit(path, module, *callbacks, data=None, **options):
    options.setdefault("enable_checkpointing", False)
    trainer = trainer_of(path, callbacks=list(callbacks), **options)
    trainer.fit(module, datamodule=data or vectors())
    return trainer


class Remember(lightning.Callback):
    """The coefficient table at each validation of a fit."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            table = CoefficientTable.of(pl_module.merged.state)
            self.seen.append((trainer.global_step, table.names, table.mean))


# ---- coefficients ---------------------------------------------------------------------------


def test_the_table_is_the_mean_coefficient_of_each_tensor_and_source():
    module = module_of(coefficients=Sigmoid(Column()), frozen={"head.bias": 0.2})
    with torch.no_grad():
        for raw in module.merged.raw.values():
            raw.add_(torch.randn(raw.shape, generator=torch.Generator().manual_seed(1)))
    found = CoefficientTable.of(module.merged.state)
    table = found.mean
    assert found.names == ["body.weight", "body.bias", "head.weight", "head.bias"]
    expected = [
        raws(module)[f"body/{n}"].sigmoid().reshape(2, -1).mean(1) for n in ("weight", "bias")
    ]
    torch.testing.assert_close(table[:2], torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert table[3].tolist() == pytest.approx([0.2, 0.2])


@pytest.mark.usefixtures("figures")
def test_each_validation_adds_its_coefficients_to_a_csv_file(tmp_path):
    remember = Remember()
    trainer = fit(
        tmp_path,
        module_of(),
        CoefficientLogger(),
        remember,
        max_steps=7,
        num_sanity_val_steps=1,
        logger=CSVLogger(tmp_path, name="logs"),
    )
    path = Path(trainer.log_dir) / "coefficients.csv"
    with path.open() as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "tensor", "a", "b"]
    expected = [
        (step, name, *values.tolist())
        for step, names, table in remember.seen
        for name, values in zip(names, table, strict=True)
    ]
    assert [step for step, *_ in remember.seen] == [3, 6]
    assert [(int(row[0]), row[1]) for row in rows] == [row[:2] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        # six digits are written
        assert [float(x) for x in row[2:]] == pytest.approx(wanted[2:], rel=1e-5)
    with Image.open(Path(trainer.log_dir) / "coefficients.png") as image:
        image.load()
        assert min(image.size) > 200


def test_every_other_validation_can_be_logged(tmp_path):
    logger = CoefficientLogger(every_n_validations=2)
    trainer = fit(tmp_path, module_of(), logger, max_steps=12)
    with (Path(trainer.log_dir) / "coefficients.csv").open() as file:
        assert sorted({int(row["step"]) for row in csv.DictReader(file)}) == [3, 9]


def test_a_plain_validation_logs_no_coefficients(tmp_path):
    trainer = trainer_of(tmp_path, callbacks=[CoefficientLogger()], enable_checkpointing=False)
    trainer.validate(module_of(), datamodule=vectors(), verbose=False)
    assert not list(tmp_path.rglob("coefficients.csv"))


# ---- export at the end ----------------------------------------------------------------------


def exported(folder):
    return load_file(folder / "model.safetensors"), json.loads(
        (folder / "provenance.json").read_text()
    )


def test_the_best_checkpoint_is_exported(tmp_path):
    module, remember = module_of(learning_rate=3.0), Remember()
    best = ModelCheckpoint(tmp_path / "checkpoints", "best-{step}", monitor="selection/loss")
    losses = []

    class Losses(lightning.Callback):
        def on_validation_end(self, trainer, pl_module):
            losses.append(trainer.callback_metrics["selection/loss"].item())

    export = ExportAtEnd(str(tmp_path / "merged"))
    fit(tmp_path, module, remember, Losses(), best, export, max_steps=12, enable_checkpointing=True)
    place = losses.index(min(losses))
    assert place < len(losses) - 1  # else the last would be the best
    tensors, provenance = exported(tmp_path / "merged")
    step, _, table = remember.seen[place]
    assert provenance["checkpoint"] == f"best-step={step}.ckpt"
    found = load_file(tmp_path / "merged" / "coefficients.st")
    for i, name in enumerate(module.merged.plan.tensors):
        torch.testing.assert_close(found[name], table[i], rtol=1e-6, atol=1e-7)
    models = relatives(build())
    base, a, b = (dict(m.named_parameters())["head.weight"].detach() for m in models)
    c = found["head.weight"]
    expected = base + c[0] * (a - base) + c[1] * (b - base)
    torch.testing.assert_close(tensors["head.weight"], expected, rtol=1e-5, atol=1e-6)
    loss = provenance["results"]["selection"]["average"]["loss"]
    assert loss == pytest.approx(min(losses), rel=1e-6)


def test_without_a_watched_metric_the_last_state_is_exported(tmp_path):
    module = module_of(Normalised)
    data = vectors()
    fit(tmp_path, module, ExportAtEnd(str(tmp_path / "merged")), data=data, limit_val_batches=0)
    tensors, provenance = exported(tmp_path / "merged")
    assert (provenance["checkpoint"], provenance["steps"]) == ("last state", 4)
    # the exported statistics are those of the exported weights
    twin = build(Normalised)
    twin.load_state_dict(tensors)
    expected = recomputed(twin, data).running_mean
    torch.testing.assert_close(tensors["norm.running_mean"], expected, rtol=1e-5, atol=1e-6)


def test_an_existing_output_is_refused_before_training(tmp_path):
    (tmp_path / "merged").mkdir()
    module = module_of()
    start = raws(module)["tensor"]
    with pytest.raises(ConfigError, match=r"merged exists; give another folder"):
        fit(tmp_path, module, ExportAtEnd(str(tmp_path / "merged")))
    assert torch.equal(raws(module)["tensor"], start)
    fit(tmp_path, module, ExportAtEnd(str(tmp_path / "merged"), overwrite=True, dtype="bfloat16"))
    tensors, _ = exported(tmp_path / "merged")
    assert tensors["head.weight"].dtype == torch.bfloat16


def test_an_existing_output_below_the_home_folder_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "merged").mkdir()
    module = module_of()
    start = raws(module)["tensor"]
    with pytest.raises(ConfigError, match=r"merged exists; give another folder"):
        fit(tmp_path, module, ExportAtEnd("~/merged"))
    assert torch.equal(raws(module)["tensor"], start)
    (tmp_path / "merged").rmdir()
    fit(tmp_path, module, ExportAtEnd("~/merged"))
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("dtype", "int8", "dtype: expected one of"), ("head", "c", "head: unknown task 'c'")],
)
def test_options_that_the_export_would_refuse_are_refused_before_training(
    tmp_path, option, value, message
):
    module = module_of()
    start = raws(module)["tensor"]
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, module, ExportAtEnd(str(tmp_path / "merged"), **{option: value}))
    assert torch.equal(raws(module)["tensor"], start)


def test_a_trial_run_exports_nothing(tmp_path):
    fit(tmp_path, module_of(), ExportAtEnd(str(tmp_path / "merged")), fast_dev_run=True)
    assert not (tmp_path / "merged").exists()


# ---- how it was learned ---------------------------------------------------------------------


def test_a_fit_from_python_leaves_its_settings_in_the_provenance(tmp_path, monkeypatch):
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # what `seed_everything` leaves behind
        monkeypatch.setenv(name, "0")
    lightning.seed_everything(11, verbose=False)
    module = module_of(learning_rate=0.2, init=Mixup(seed=5))
    start = module.merged.state.coefficient("head.bias").tolist()
    data = vectors(seed=4, batch_size=3)
    fit(tmp_path, module, ExportAtEnd(str(tmp_path / "one")), data=data, max_steps=5)
    _, provenance = exported(tmp_path / "one")
    run = provenance["run"]
    assert run["seed"] == 11
    assert run["versions"] == provenance["versions"]
    assert run["versions"]["lightning"] == lightning.__version__
    (optimiser,) = run["optimizers"]
    assert optimiser["class_path"] == "torch.optim.adam.Adam"
    assert optimiser["init_args"]["lr"] == 0.2
    assert (run["trainer"]["max_steps"], run["trainer"]["max_epochs"]) == (5, -1)
    assert (run["data"]["seed"], run["data"]["batch_size"]) == (4, 3)
    assert run["data"]["tasks"]["a"]["init_args"]["path"] == "in memory"
    assert run["model"]["objective"] == to_plain(module.objective)
    assert run["initial_coefficients"] == pytest.approx(dict(zip("ab", start, strict=True)))
    assert "yaml" not in run
    assert not (tmp_path / "one" / "gradmerge.yaml").exists()
    # an export by hand says the same
    export_merged(module.merged, tmp_path / "two")
    assert exported(tmp_path / "two")[1]["run"] == run


def test_a_merge_that_was_not_learned_has_no_run(tmp_path):
    export_merged(module_of().merged, tmp_path / "merged")
    assert "run" not in exported(tmp_path / "merged")[1]


def test_initial_coefficients_are_logged(tmp_path):
    module = module_of(init=Mixup(seed=5), frozen={"body": 0.25})
    start = module.merged.state.coefficient("head.bias").tolist()
    trainer = fit(tmp_path, module, logger=CSVLogger(tmp_path, name="logs"))
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("init/a")]
    assert [row["step"] for row in rows] == ["0"]
    assert [float(rows[0][f"init/{name}"]) for name in "ab"] == pytest.approx(start)


def test_a_resumed_fit_keeps_what_it_started_from_and_the_run_before(tmp_path):
    recipe = recipe_of(relatives(build()), init=Mixup(seed=5))
    first = MergeModule(recipe, learning_rate=0.1)
    trainer = fit(tmp_path, first, max_steps=3)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    run = torch.load(tmp_path / "one.ckpt", weights_only=True)["gradmerge"]["run"]
    assert run == first.merged.state.run
    second = MergeModule(recipe, learning_rate=0.1)
    again = trainer_of(tmp_path, max_steps=5)
    again.fit(second, datamodule=vectors(), ckpt_path=tmp_path / "one.ckpt")
    found = second.merged.state.run
    assert found["before"] == run
    assert found["trainer"]["max_steps"] == 5
    assert found["initial_coefficients"] == run["initial_coefficients"]
    assert run["initial_coefficients"] != mean_coefficients(second.merged.state)


# ---- W&B ------------------------------------------------------------------------------------


OFFLINE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from gradmerge import MergeModule
from gradmerge.training.callbacks import CoefficientLogger
from gradmerge.cli.defaults import default_loggers
import tiny
from tiny import build, recipe_of, relatives, trainer_of, vectors

folder = Path(sys.argv[2])
loggers = default_loggers(str(folder))
assert [type(logger).__name__ for logger in loggers] == ["CSVLogger", "LastingWandbLogger"]
logged = []
run = loggers[1].experiment
original = run.log
run.log = lambda data, *a, **k: (logged.append(data), original(data, *a, **k))
trainer = trainer_of(folder, logger=loggers, callbacks=[CoefficientLogger()],
                     enable_checkpointing=False)
trainer.fit(MergeModule(recipe_of(relatives(build()))), datamodule=vectors())
kinds = {k: type(v).__name__ for data in logged for k, v in data.items()}
print({k: v for k, v in kinds.items() if k.startswith("coefficients/")})
"""


@pytest.mark.usefixtures("figures")
def test_an_offline_run_of_wandb_neither_asks_nor_waits(tmp_path):
    """No key, no network, no terminal: it must go on by itself."""
    hidden = ("WANDB_MODE", "WANDB_API_KEY", "NETRC")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(Path(tiny.__file__).parent), str(tmp_path)],
        env={**environment, "HOME": str(tmp_path), "WANDB_SILENT": "true"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "'coefficients/heat_map': 'Image'" in done.stdout
    assert "'coefficients/a': 'Histogram'" in done.stdout
    assert "'coefficients/b': 'Histogram'" in done.stdout
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert list(runs[0].glob("*.wandb"))
    assert list(runs[0].rglob("*.png"))
