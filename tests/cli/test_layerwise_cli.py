"""The layer-wise driver from the command line, as the shipped files say it."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gradmerge.cli import main
from gradmerge.drivers.layerwise.scores import score
from tiny import write_yaml

pytestmark = pytest.mark.usefixtures("own_folder")

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize(
    "files",
    [["methods/prodistill.yaml"], ["methods/column.yaml", "drivers/layerwise.yaml"]],
    ids=["prodistill", "column"],
)
def test_the_shipped_files_learn_block_by_block(files, world, tmp_path, capsys):
    suite = write_yaml(tmp_path / "suite.yaml", world)
    options = [option for file in files for option in ("--config", str(CONFIGS / file))]
    command = ["fit", "--config", suite, *options, "--driver.steps", "3"]
    assert main(command) == 0
    logs = Path("outputs/driver/logs/version_0")
    with (logs / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["layer/0/loss"]) for row in rows if row["layer/0/loss"]]
    assert len(losses) == 3
    assert rows[0]["init/a"]
    assert rows[0]["init/b"]
    provenance = json.loads(Path("outputs/merged/provenance.json").read_text())
    scores = provenance["results"]["selection"]
    last = rows[-1]
    assert last["step"] == "6"
    assert float(last["selection/loss"]) == pytest.approx(scores["average"]["loss"], rel=1e-5)
    assert float(last["selection/a/accuracy"]) == pytest.approx(scores["a"]["accuracy"], rel=1e-5)
    assert {file.name for file in logs.glob("coefficients.*")} == {
        "coefficients.csv",
        "coefficients.png",
    }
    block, end = provenance["driver"]["blocks"]
    assert block["name"] == "bert.encoder.layer.0"
    assert end["name"] == "(after the last block)"
    assert block["steps"] == 3
    assert block["first_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert provenance["run"]["yaml"]
    coefficients = load_file("outputs/merged/coefficients.st")
    start = 0.3 if files[0] == "methods/prodistill.yaml" else 0.5
    moved = {name for name, c in coefficients.items() if not torch.allclose(c, torch.tensor(start))}
    assert moved
    learned = ("bert.encoder.layer.0.", "bert.pooler.", "classifier.")
    assert all(name.startswith(learned) for name in moved)
    kind = transformers.BertForSequenceClassification
    logits = kind.from_pretrained("outputs/merged")(torch.arange(6)[None]).logits
    assert logits.isfinite().all()
    if files[0] == "methods/prodistill.yaml":
        capsys.readouterr()
        assert main([*command, "--optimizer.lr", "0.5"]) == 2
        assert "holds another job" in capsys.readouterr().err


PLATEAU = ["--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.patience", "0"]


def layerwise(world, tmp_path, *options):
    """A short job of column coefficients, and its logs."""
    suite = write_yaml(tmp_path / "suite.yaml", world)
    files = ["methods/column.yaml", "drivers/layerwise.yaml"]
    given = [option for file in files for option in ("--config", str(CONFIGS / file))]
    return main(["fit", "--config", suite, *given, "--driver.epochs", "3", *options])


def test_a_schedule_may_watch_the_loss_of_each_block(world, tmp_path, capsys):
    """With `mode: max` a loss that falls is no better: the rate is cut after the second pass."""
    watched = [*PLATEAU, "--lr_scheduler.monitor", "layer/loss", "--lr_scheduler.mode", "max"]
    assert layerwise(world, tmp_path, *watched, "--lr_scheduler.factor", "1e-9") == 0
    cut = load_file("outputs/merged/coefficients.st")
    assert layerwise(world, tmp_path, "--trainer.default_root_dir", "plain") == 0
    plain = load_file("plain/merged/coefficients.st")
    assert any(not torch.equal(cut[name], plain[name]) for name in plain)
    with Path("outputs/driver/logs/version_0/metrics.csv").open() as file:
        assert "layer/loss" not in next(csv.reader(file))


def test_a_schedule_that_watches_scores_is_refused_before_anything_is_read(world, tmp_path, capsys):
    watched = ["--lr_scheduler.monitor", "selection/loss", "--lr_scheduler.factor", "0.5"]
    assert layerwise(world, tmp_path, *PLATEAU, *watched) == 2
    message = capsys.readouterr().err
    assert "lr_scheduler watches selection/loss, and a block has a loss alone" in message
    assert "--lr_scheduler.monitor layer/loss" in message
    assert not Path("outputs").exists()


def test_what_of_the_trainer_is_not_used_is_said(world, tmp_path, caplog):
    options = ["--trainer.max_time", "00:00:05:00", "--trainer.precision", "bf16-mixed"]
    options += ["--trainer.callbacks", "lightning.pytorch.callbacks.EarlyStopping"]
    options += ["--trainer.callbacks.monitor", "selection/loss"]
    with caplog.at_level("INFO"):
        assert layerwise(world, tmp_path, *options) == 0
    assert "trainer.max_time, trainer.precision, EarlyStopping: not used" in caplog.text


def test_passes_are_passes_with_accumulated_batches(world, tmp_path):
    assert layerwise(world, tmp_path) == 0
    assert (
        layerwise(
            world,
            tmp_path,
            *("--trainer.accumulate_grad_batches", "2"),
            *("--trainer.default_root_dir", "two"),
        )
        == 0
    )
    steps = []
    for folder in ("outputs", "two"):
        provenance = json.loads(Path(folder, "merged/provenance.json").read_text())
        block, end = provenance["driver"]["blocks"]
        assert end["steps"] == block["steps"]
        steps.append(block["steps"])
    assert steps[0] % 3 == 0
    assert steps[1] == 3 * -(-(steps[0] // 3) // 2)


def test_a_killed_job_goes_on_in_its_logs_and_ends_with_a_table(
    world, tmp_path, monkeypatch, capsys
):
    calls = []

    def killed(*given):
        calls.append(given)
        if len(calls) == 2:  # the first scores the start
            raise KeyError("killed")
        return score(*given)

    with monkeypatch.context() as patch:
        patch.setattr("gradmerge.drivers.layerwise.job.score", killed)
        assert layerwise(world, tmp_path) == 1
    capsys.readouterr()
    assert layerwise(world, tmp_path) == 0
    (folder,) = Path("outputs/driver/logs").iterdir()
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows if row["layer/0/loss"]]
    assert steps == list(range(len(steps)))
    total = 2 * len(steps)  # as many after the last block
    scored = [row for row in rows if row["selection/loss"]]
    assert [int(row["step"]) for row in scored] == [0, total]
    out = capsys.readouterr().out
    for label, row in zip(["start", f"last, step {total}"], scored, strict=True):
        shown = [float(text) for text in re.search(rf"^{label} +(.*)$", out, re.M)[1].split()]
        names = [f"selection/{task}/accuracy" for task in ("a", "b", "average")]
        expected = [float(row[name]) for name in (*names, "selection/loss")]
        assert shown == pytest.approx(expected, abs=1e-4)
    assert re.search(rf"^time .*, {total} steps$", out, re.M)
    assert re.search(r"^model +outputs/merged$", out, re.M)
    provenance = json.loads(Path("outputs/merged/provenance.json").read_text())
    assert "history" not in provenance["driver"]["blocks"][0]
