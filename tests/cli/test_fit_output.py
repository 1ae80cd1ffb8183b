"""What a fit prints, where it writes, and what is left of one that is refused."""

from __future__ import annotations

import csv
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from commands import fails
from gradmerge.cli import main
from gradmerge.common.checkpoints import load_checkpoint
from gradmerge.training.logs import CSVLogger
from gradmerge.training.summary import places
from tiny import trainer_of
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")

BEST = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"monitor": "selection/loss", "save_last": True, "filename": "best"},
}
EXPORT = {"class_path": "ExportAtEnd", "init_args": {"output": "merged", "score_test": True}}


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_fit_ends_with_one_table_of_start_end_sources_and_places(world, tmp_path, capsys):
    part = {"trainer": {"callbacks": [BEST, EXPORT], "val_check_interval": 1}}
    assert main(["fit", "--config", write(tmp_path / "c.yaml", world, part)]) == 0
    out = capsys.readouterr().out
    (folder,) = Path("outputs/logs").iterdir()
    rows = {row["step"]: row for row in rows_of(folder / "metrics.csv") if row["selection/loss"]}
    start = re.search(r"^start +(.*)$", out, re.M)[1].split()
    own = [f"selection/{task}/accuracy" for task in (*world["data"]["tasks"], "average")]
    expected = [float(rows["0"][name]) for name in (*own, "selection/loss")]
    assert [float(value) for value in start] == pytest.approx(expected, abs=1e-4)
    provenance = json.loads(Path("merged/provenance.json").read_text())
    step, kept = re.search(r"^kept, step (\d+) +(.*)$", out, re.M).groups()
    measured = provenance["results"]["selection"]
    losses = [measured[name.split("/")[1]]["accuracy"] for name in own]
    losses.append(measured["average"]["loss"])
    assert [float(value) for value in kept.split()] == pytest.approx(losses, abs=1e-4)
    assert load_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"] == int(step)
    assert out.count("each task's source") == 1
    # the test split was asked for: table, provenance and card
    tested = provenance["results"]["test"]["average"]["accuracy"]
    assert f"{tested:.4f}" in re.search(r"^test split(.*)", out, re.M | re.S)[1]
    assert "| test |" in Path("merged/README.md").read_text()
    wanted = [r"time +\d+\.\d s, 4 steps", r"peak memory +\d+\.\d\d GB", r"model +merged"]
    wanted += [rf"checkpoint +.*{folder.name}/checkpoints/best.ckpt", rf"logs +{folder}"]
    wanted.append(rf"report +{folder}/report.html")
    assert not [place for place in wanted if not re.search(f"^{place}$", out, re.M)]


def test_a_figure_is_among_the_places(tmp_path):
    trainer = trainer_of(tmp_path)
    assert "figure" not in dict(places(trainer))
    (tmp_path / "coefficients.png").touch()
    assert dict(places(trainer))["figure"] == tmp_path / "coefficients.png"


def test_scores_are_one_table_and_are_kept_for_the_export(world, tmp_path, capsys):
    config = write(tmp_path / "c.yaml", world, {"model": {"score_start": False}})
    assert main(["fit", "--config", config]) == 0
    assert "start " not in capsys.readouterr().out
    (checkpoint,) = Path("outputs").rglob("*.ckpt")
    assert main(["test", "--config", config, "--ckpt_path", str(checkpoint)]) == 0
    header, *rows, where = capsys.readouterr().out.strip().splitlines()
    assert where == f"scores kept in {checkpoint.with_suffix('.scores.json')}"
    assert Path(where.removeprefix("scores kept in ")).is_file()
    assert header.split()[:2] == ["test", "split"]
    assert header.endswith("accuracy of its source")
    assert [row.split()[0] for row in rows] == [*world["data"]["tasks"], "average"]
    assert (
        main(["test", "--config", config, "--ckpt_path", str(checkpoint), "--verbose=false"]) == 0
    )
    assert capsys.readouterr().out == ""
    assert main(["export", str(checkpoint), "merged"]) == 0
    found = json.loads(Path("merged/provenance.json").read_text())["results"]["test"]
    columns = re.split(r" {2,}", header)
    average = re.split(r" {2,}", rows[-1].strip())
    accuracy = float(average[columns.index("accuracy")])
    assert found["average"]["accuracy"] == pytest.approx(accuracy, abs=1e-4)
    # scores of another checkpoint do not count
    saved = torch.load(checkpoint, weights_only=True)
    saved["state_dict"]["merged.raw.tensor"] += 0.1
    torch.save(saved, checkpoint)
    assert main(["export", str(checkpoint), "other"]) == 0
    assert "test" not in json.loads(Path("other/provenance.json").read_text())["results"]


def test_a_resumed_fit_continues_its_folder_without_rows_of_later_steps(world, tmp_path):
    part = {"trainer": {"callbacks": [{**BEST, "init_args": {"save_last": True}}]}}
    part["trainer"]["val_check_interval"] = 1
    config = write(tmp_path / "c.yaml", world, part)
    assert main(["fit", "--config", config, "--trainer.max_steps", "2"]) == 0
    (folder,) = Path("outputs/logs").iterdir()
    path = folder / "checkpoints" / "last.ckpt"
    with (folder / "metrics.csv").open("a") as file:  # of a step that the checkpoint has not seen
        file.write(",".join(["7"] * len(rows_of(folder / "metrics.csv")[0])) + "\n")
    before = rows_of(folder / "metrics.csv")
    assert main(["fit", "--config", config, "--ckpt_path", str(path)]) == 0
    assert list(Path("outputs/logs").iterdir()) == [folder]
    after = rows_of(folder / "metrics.csv")
    assert after[: len(before) - 1] == before[:-1]
    losses = [int(row["step"]) for row in after if row["train/loss"]]
    assert len(losses) == 4
    assert losses == sorted(set(losses))
    assert 7 not in losses
    table = [(int(row["step"]), row["tensor"]) for row in rows_of(folder / "coefficients.csv")]
    assert sorted({step for step, _ in table}) == [1, 2, 3, 4]
    assert len(table) == len(set(table))
    # with another root it is a fit of its own
    again = ["--ckpt_path", str(path), "--trainer.default_root_dir", "rest"]
    assert main(["fit", "--config", config, "--trainer.max_steps", "6", *again]) == 0
    assert [p.name for p in Path("rest/logs").iterdir()] == ["version_0"]


def test_fits_that_start_together_have_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(
            pool.map(lambda _: CSVLogger(tmp_path, name="logs").log_dir, range(24), chunksize=1)
        )
    assert len(set(folders)) == 24
    assert sorted(Path(f).name for f in folders) == sorted(f"version_{i}" for i in range(24))


def test_a_refused_fit_leaves_nothing(world, tmp_path, capsys):
    task = next(iter(world["data"]["tasks"]))
    wrong = {"data": {"tasks": {task: {"label": "no_such_column"}}}}
    text = fails(["fit", "--config", write(tmp_path / "c.yaml", world, wrong)], capsys)
    assert f"task {task}, adaptation, has no labels" in text
    assert not Path("outputs").exists()
    # a folder that was there stays
    Path("outputs/logs/version_0").mkdir(parents=True)
    fails(["fit", "--config", str(tmp_path / "c.yaml")], capsys)
    assert [p.name for p in Path("outputs/logs").iterdir()] == ["version_0"]


def test_w_and_b_has_the_whole_configuration_and_a_resumed_fit_continues_its_run(
    world, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    updates, summaries = [], []
    import wandb

    real = wandb.sdk.wandb_config.Config.update
    monkeypatch.setattr(
        wandb.sdk.wandb_config.Config,
        "update",
        lambda self, d, *a, **k: (updates.append(d), real(self, d, *a, **k))[1],
    )
    summary = wandb.sdk.wandb_summary.SummaryDict.update
    monkeypatch.setattr(
        wandb.sdk.wandb_summary.SummaryDict,
        "update",
        lambda self, d: (summaries.append(d), summary(self, d))[1],
    )
    part = {
        "trainer": {"callbacks": [BEST, EXPORT], "val_check_interval": 1, "logger": True},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
    }
    config = write(tmp_path / "c.yaml", world, part)
    assert main(["fit", "--config", config, "--trainer.max_steps", "2"]) == 0
    wandb.finish()
    found = {key: value for update in updates for key, value in update.items()}
    assert found["optimizer"]["init_args"]["lr"] == 0.5
    assert found["trainer"]["max_steps"] == 2
    assert found["data"]["tasks"].keys() == world["data"]["tasks"].keys()
    assert found["model"]["recipe"]["sources"] == world["model"]["recipe"]["sources"]
    assert "seed_everything" in found
    last = {key: value for update in summaries for key, value in update.items()}
    assert {"start/selection/loss", "kept/selection/loss", "kept/step"} <= last.keys()
    assert "test/average/accuracy" in last
    (run,) = Path("outputs/wandb").glob("offline-run-*")
    identity = run.name.rpartition("-")[2]
    (checkpoint,) = Path("outputs").rglob("last.ckpt")
    assert load_checkpoint(checkpoint)["gradmerge"]["run"]["wandb"]["id"] == identity
    export = yaml.safe_load(Path(config).read_text())
    export["trainer"]["callbacks"][1]["init_args"]["overwrite"] = True
    Path(config).write_text(yaml.safe_dump(export))
    assert main(["fit", "--config", config, "--ckpt_path", str(checkpoint)]) == 0
    wandb.finish()
    runs = {path.name.rpartition("-")[2] for path in Path("outputs/wandb").glob("offline-run-*")}
    assert runs == {identity}
