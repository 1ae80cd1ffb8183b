"""Drivers and searches from the command line, on tiny folders."""

from __future__ import annotations

import csv
import functools
import json
import logging
import re
from pathlib import Path

import lightning
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from commands import fails
from gradmerge.cli import main
from gradmerge.cli.main import learn
from gradmerge.coefficients import Scaled
from gradmerge.common.spec import from_plain
from gradmerge.drivers import Job
from gradmerge.sources import HuggingFace
from gradmerge.training.module import MergeModule
from gradmerge.training.search import SearchedStart
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def three(world, tmp_path_factory):
    """The world with a third source and task."""
    import copy
    import shutil

    root = tmp_path_factory.mktemp("three")
    found = copy.deepcopy(world)
    recipe = found["model"]["recipe"]
    folder = root / "c"
    shutil.copytree(recipe["sources"]["b"], folder)
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    recipe["sources"]["c"] = str(folder)
    found["data"]["tasks"]["c"] = found["data"]["tasks"]["a"]
    found["trainer"] |= {"default_root_dir": "run", "max_steps": 2, "limit_val_batches": 1}
    found["seed_everything"] = 3
    return found


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


PAIRWISE = {"driver": {"class_path": "Pairwise"}}
NP = {
    "class_path": "Complement",
    "init_args": {
        "inner": {"class_path": "Sigmoid", "init_args": {"inner": {"class_path": "Element"}}}
    },
}
OPTIMISER = {
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
    "lr_scheduler": {
        "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "init_args": {"T_max": 2},
    },
}


def test_a_fold_of_three_by_a_link_for_two_ends_in_a_model_folder(
    three, tmp_path, monkeypatch, capsys
):
    """NP Merge of three: the recipe is never one of all sources."""
    export = {
        "class_path": "ExportAtEnd",
        "init_args": {"output": "out", "dtype": "bfloat16", "head": "b"},
    }
    best = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"monitor": "selection/loss", "filename": "best"},
    }
    part = {"model": {"recipe": {"coefficients": NP, "private": ["^classifier"]}}}
    callbacks = {"trainer": {"callbacks": [best, export], "val_check_interval": 1}}
    config = write(tmp_path / "c.yaml", three, part, PAIRWISE, OPTIMISER, callbacks)
    fitted = []
    original = lightning.Trainer.fit

    @functools.wraps(original)
    def fit(self, module, *args, **kwargs):
        original(self, module, *args, **kwargs)
        (optimiser,) = self.optimizers
        fitted.append((type(optimiser), optimiser.param_groups[0]["lr"], self.default_root_dir))

    monkeypatch.setattr(lightning.Trainer, "fit", fit)
    assert main(["fit", "--config", config]) == 0
    # the configured optimiser and schedule, one of its own for each step
    assert [(kind, round(rate, 8)) for kind, rate, _ in fitted] == [(torch.optim.SGD, 0.0)] * 2
    assert [Path(root).name for *_, root in fitted] == ["step-1", "step-2"]

    model = transformers.BertForSequenceClassification.from_pretrained("out")
    assert model.dtype == torch.bfloat16
    for task in "abc":
        own = transformers.BertForSequenceClassification.from_pretrained(f"out/tasks/{task}")
        source = load_file(Path(three["model"]["recipe"]["sources"][task]) / "model.safetensors")
        assert torch.equal(own.classifier.weight, source["classifier.weight"].bfloat16())
    said = json.loads(Path("out/provenance.json").read_text())
    assert [step["merged"] for step in said["driver"]["steps"]] == [
        [["a"], ["b"]],
        [["a", "b"], ["c"]],
    ]
    assert said["driver"]["members"] == ["a", "b", "c"]
    assert yaml.safe_load(said["run"]["yaml"])["driver"]["class_path"].endswith("Pairwise")
    assert "Pairwise" in Path("out/gradmerge.yaml").read_text()
    for number in (1, 2):
        step = Path(f"run/driver/steps/step-{number}")
        assert (step / "checkpoints/best.ckpt").is_file()
        assert list(step.rglob("metrics.csv"))
        assert list(step.rglob("coefficients.csv"))
    # `gradmerge validate` with the driver's file says how the folder is scored
    assert "add --model FOLDER" in fails(["validate", "--config", config], capsys)
    scored = learn(["validate", "--config", config, "--model", "out"])
    scores = scored.model.results["selection"]
    for task, score in said["results"]["selection"].items():
        assert scores[task]["loss"] == pytest.approx(score["loss"], rel=1e-2)  # bfloat16
    # and nothing is done twice
    before = sorted((path, path.stat().st_mtime_ns) for path in Path().rglob("*"))
    assert main(["fit", "--config", config]) == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in Path().rglob("*")) == before


def test_the_same_command_goes_on_with_a_killed_job(three, tmp_path, monkeypatch, capsys):
    validating = {"trainer": {"val_check_interval": 1}}
    config = write(tmp_path / "c.yaml", three, OPTIMISER, validating)
    driver = ["--driver", "Pairwise", "--driver.every_n_steps", "1"]
    root = ["--trainer.default_root_dir"]
    assert main(["fit", "--config", config, *driver, *root, "whole"]) == 0
    original, steps = MergeModule.training_step, []

    def killed(self, batch, batch_idx):
        steps.append(0)
        if len(steps) == 4:
            raise KeyError("killed")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(MergeModule, "training_step", killed)
    assert main(["fit", "--config", config, *driver, *root, "run"]) == 1
    assert "KeyError: 'killed'" in capsys.readouterr().err
    assert not Path("run/merged").exists()
    assert Path("run/driver/steps/step-2/last.ckpt").is_file()
    message = fails(["fit", "--config", config, *driver, "--optimizer.lr", "0.1"], capsys)
    assert "optimizer.init_args.lr: was 0.5, is 0.1" in message
    assert "--driver.restart true" in message
    # bars and the number of workers change no result
    more = ["--data.num_workers", "0", "--trainer.enable_model_summary", "true"]
    capsys.readouterr()
    assert main(["fit", "--config", config, *driver, *root, "run", *more]) == 0
    assert len(steps) == 5
    # logs go on where they stopped, in the same folder
    logs = [f"{root}/driver/steps/step-2/logs" for root in ("whole", "run")]
    assert [path.name for path in Path(logs[1]).iterdir()] == ["version_0"]
    whole, resumed = (
        [row for row in rows_of(f"{place}/version_0/metrics.csv") if row["train/loss"]]
        for place in logs
    )
    assert [row["step"] for row in whole] == ["0", "1"]
    assert [(row["step"], row["train/loss"]) for row in resumed] == [
        (row["step"], row["train/loss"]) for row in whole
    ]
    # one table in the end, with the scores of both steps as they are on record
    out = capsys.readouterr().out
    for step in json.loads(Path("run/merged/provenance.json").read_text())["driver"]["steps"]:
        merged = " with ".join("+".join(names) for names in step["merged"])
        end = step["results"]["selection"]["average"]["accuracy"]
        assert re.search(
            rf"^{step['step']} +{re.escape(merged)} +{step['start']:.4f} +{end:.4f}$", out, re.M
        )
    for line in (r"start +\d", "each task's source ", r"time .*, 4 steps$", "model +run/merged$"):
        assert len(re.findall(f"^{line}", out, re.M)) == 1, line
    first, second = (load_file(f"{r}/merged/coefficients.st") for r in ("whole", "run"))
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.parametrize(
    ("driver", "options", "message"),
    [
        ("Pairwise", ["--data.tasks.a.label", "no_such_column"], "has no labels"),
        ("LayerWise", ["--driver.blocks", "[nothing]"], "'nothing'"),
    ],
)
def test_a_refused_job_leaves_nothing(driver, options, message, three, tmp_path, capsys):
    config = write(tmp_path / "c.yaml", three)
    text = fails(["fit", "--config", config, "--driver", driver, *options], capsys)
    assert message in text
    assert not Path("run").exists()


def test_two_jobs_do_not_run_in_one_folder(three, tmp_path, capsys):
    config = write(tmp_path / "c.yaml", three, PAIRWISE)
    with learn(["--config", config], run=False).job.alone():
        text = fails(["fit", "--config", config], capsys)
    assert "run: expected no other job at work in this folder, but another process" in text
    assert not Path("run").exists()


def test_a_random_seed_stays_the_one_that_a_job_began_with(three, tmp_path):
    part = {"seed_everything": True, "trainer": {"max_steps": 1}}
    config = write(tmp_path / "c.yaml", three, part, PAIRWISE)
    assert main(["fit", "--config", config, "--driver.keep_steps", "false"]) == 0
    seed = json.loads(Path("run/driver/job.json").read_text())["seed"]
    assert isinstance(seed, int)
    assert main(["fit", "--config", config, "--driver.keep_steps", "false"]) == 0
    assert json.loads(Path("run/driver/job.json").read_text())["seed"] == seed
    assert not list(Path("run/driver").rglob("merged"))


def test_a_driver_opens_nothing_before_it_runs(three, tmp_path, monkeypatch):

    opened = []
    monkeypatch.setattr(HuggingFace, "open", lambda *_: opened.append(0))
    found = learn(["--config", write(tmp_path / "c.yaml", three, PAIRWISE)], run=False)
    assert opened == []
    assert found.model is None
    assert list(found.job.recipe.sources) == ["a", "b", "c"]
    assert found.job.root == Path("run")


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("validate", [], "`gradmerge validate` scores one merge"),
        ("test", [], "add --model FOLDER"),
        ("fit", ["--ckpt_path", "last"], "resumes by itself when the same command runs again"),
        ("fit", ["--trainer.fast_dev_run", "1"], "--trainer.max_steps 1"),
        ("fit", ["--search", "Scales"], "search and driver: expected one of them, got both"),
        ("fit", ["--driver", "Pairwize"], "Did you mean 'Pairwise'?"),
        ("fit", ["--driver.order", "[a, b, d]"], "order: unknown source 'd'"),
    ],
)
def test_what_a_driver_has_no_use_for_is_refused(three, tmp_path, capsys, command, more, message):
    config = write(tmp_path / "c.yaml", three, PAIRWISE)
    assert message in fails([command, "--config", config, *more], capsys)


def test_help_names_drivers_and_searches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Run several fits instead of one of all sources" in text
    assert "Choose the initial coefficients of the fit" in text
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--driver.help", "Tree"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Start again instead of resuming" in text


def test_a_plain_merge_takes_a_file_with_a_driver(three, tmp_path):
    recipe = {"model": {"recipe": {"init": {"class_path": "Uniform"}}}}
    config = write(tmp_path / "c.yaml", three, PAIRWISE, recipe)
    assert main(["merge", "--config", config, "--output", "plain"]) == 0
    assert Path("plain/model.safetensors").is_file()


# ---- a search as the start ------------------------------------------------------------------


def test_a_search_is_the_start_of_a_fit(three, tmp_path):
    regularised = {
        "objective": {"terms": ["CrossEntropy"], "regularisers": [{"class_path": "L2ToInit"}]},
        "recipe": {"init": {"class_path": "Constant", "init_args": {"value": 1.0}}},
    }
    scales = {"values": [0.1, 0.4], "metric": "loss", "widen": False}
    search = {"search": {"class_path": "Scales", "init_args": scales}}
    config = write(tmp_path / "c.yaml", three, {"model": regularised}, search)
    at_rest = ["--model.learning_rate", "0"]
    found = learn(["fit", "--config", config, *at_rest])
    module = found.model
    run = module.merged.state.run["search"]
    losses = [trial["selection"]["loss"] for trial in run["trials"]]
    assert [trial["init"]["init_args"]["factor"] for trial in run["trials"]] == [0.1, 0.4]
    assert losses[0] != losses[1]
    best = (0.1, 0.4)[losses.index(min(losses))]
    chosen = from_plain(run["chosen"])
    assert isinstance(chosen, Scaled)
    assert chosen.factor == best
    assert torch.allclose(module.merged.raw["tensor"], torch.tensor(best))
    assert found.trainer.callback_metrics["train/penalty"] == 0, "it measures from the choice"
    assert module.recipe.init == chosen
    assert module.merged.state.run["initial_coefficients"] == pytest.approx(
        dict.fromkeys("abc", best)
    )
    with (Path(found.trainer.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["search/trial"]]
    assert [float(row["search/loss"]) for row in rows] == pytest.approx(losses)
    # the score before the first step is that of the choice
    (checkpoint,) = Path("run").rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["gradmerge"]["run"]["search"] == run
    assert from_plain(saved["hyper_parameters"]["recipe"]).init == chosen


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_score_says_that_a_search_was_left_out(three, tmp_path, caplog, monkeypatch, command):
    # Lightning's loggers do not hand on what they have shown
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    config = write(tmp_path / "c.yaml", three)
    said = f"search: not run by `gradmerge {command}`, which scores the coefficients of model."
    learn([command, "--config", config])
    assert said not in caplog.text
    learn([command, "--config", config, "--search", "Scales"])
    assert said in caplog.text
    learn(["fit", "--config", config, "--trainer.max_steps", "1"])
    (checkpoint,) = map(str, Path("run").rglob("*.ckpt"))
    learn([command, "--config", config, "--search", "Scales", "--ckpt_path", checkpoint])
    assert f"`gradmerge {command}`, which scores the coefficients of {checkpoint}" in caplog.text


def test_a_fit_that_goes_on_does_not_search_again(three, tmp_path, monkeypatch):
    from gradmerge.training.search import Scorer

    search = ["--search", "Scales", "--search.values", "[0.2, 0.6]", "--search.metric", "loss"]
    # what it measures from has to be the same, too
    regulariser = {"class_path": "L2ToInit", "init_args": {"weight": 10.0}}
    part = {"model": {"objective": {"regularisers": [regulariser]}, "learning_rate": 0.1}}
    config = write(tmp_path / "c.yaml", three, part)
    whole = learn(["fit", "--config", config, *search, "--trainer.max_steps", "4"]).model
    options = ["--trainer.default_root_dir", "first"]
    learn(["fit", "--config", config, *search, *options])
    (checkpoint,) = Path("first").rglob("*.ckpt")
    monkeypatch.setattr(Scorer, "search", lambda *_: pytest.fail("searched again"))
    options = ["--trainer.max_steps", "4", "--ckpt_path", str(checkpoint)]
    resumed = learn(["fit", "--config", config, *search, *options]).model
    for key, raw in whole.merged.raw.items():
        assert torch.equal(resumed.merged.raw[key], raw)
    assert resumed.recipe.init == whole.recipe.init
    run = resumed.merged.state.run
    assert run["search"] == run["before"]["search"] == whole.merged.state.run["search"]


# ---- what is refused before anything slow -----------------------------------------------------


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"output": "out"}, "out exists; give another folder, or ExportAtEnd with overwrite: true"),
        ({"output": "new", "head": "nope"}, "head: unknown task 'nope'"),
        ({"output": "new", "dtype": "int8"}, "dtype: expected one of float64, float32"),
    ],
)
def test_what_an_export_refuses_is_refused_before_a_search(
    output, message, world, tmp_path, monkeypatch, capsys
):
    Path("out").mkdir()
    export = {"class_path": "ExportAtEnd", "init_args": output}
    own = {"trainer": {"callbacks": [export], "max_steps": 1}}
    config = write(tmp_path / "c.yaml", world, own)
    monkeypatch.setattr(SearchedStart, "run", lambda *_: pytest.fail("it searched"))
    assert message in fails(["fit", "--config", config, "--search", "Draws"], capsys)
    assert not any(Path("out").iterdir())


@pytest.mark.parametrize("way", [["--driver", "Pairwise"], ["--driver", "LayerWise"], []])
def test_accumulation_that_sam_cannot_do_with_is_seen_in_the_files(
    way, three, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(HuggingFace, "open", lambda *_: pytest.fail("it opened the sources"))
    config = write(tmp_path / "c.yaml", three)
    options = ["--optimizer", "gradmerge.optimisers.SAM", "--trainer.accumulate_grad_batches", "2"]
    message = fails(["fit", "--config", config, *way, *options], capsys)
    assert "SAM evaluates the loss of a step itself, but accumulate_grad_batches 2" in message
    assert not Path("run").exists()


@pytest.mark.parametrize("driver", ["Pairwise", "LayerWise"])
def test_an_output_that_exists_is_refused_before_anything_is_read(
    driver, three, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(HuggingFace, "open", lambda *_: pytest.fail("it opened the sources"))
    monkeypatch.setattr(Job, "sources", property(lambda *_: pytest.fail("it hashed the sources")))
    Path("out").mkdir()
    callbacks = [{"class_path": "ExportAtEnd", "init_args": {"output": "out"}}]
    config = write(tmp_path / "c.yaml", three, {"trainer": {"callbacks": callbacks}})
    message = fails(["fit", "--config", config, "--driver", driver], capsys)
    assert "out exists; give another folder, or ExportAtEnd with overwrite: true" in message
    assert not Path("run").exists()


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_job_that_was_stopped_before_its_first_state_is_begun_differently(
    three, tmp_path, capsys, monkeypatch
):
    """Nothing is lost by that; a job with a state is kept from it."""
    config = write(tmp_path / "c.yaml", three, PAIRWISE, {"trainer": {"val_check_interval": 1}})
    watching = ["--trainer.callbacks", "lightning.pytorch.callbacks.EarlyStopping"]
    watching += ["--trainer.callbacks.monitor", "train/loss"]
    with monkeypatch.context() as patch:
        patch.setattr(MergeModule, "training_step", interrupted)
        assert main(["fit", "--config", config, *watching]) == 130
    capsys.readouterr()
    record = json.loads(Path("run/driver/job.json").read_text())
    watching[-1] = "selection/loss"
    assert main(["fit", "--config", config, *watching]) == 0
    now = json.loads(Path("run/driver/job.json").read_text())
    assert now["job"] == record["job"]
    assert now["content"]["config"] != record["content"]["config"]
    provenance = json.loads(Path("run/merged/provenance.json").read_text())
    assert provenance["driver"]["job"] == now["job"]
    watching[-1] = "train/loss"
    assert "holds another job" in fails(["fit", "--config", config, *watching], capsys)


def test_a_misspelt_source_of_a_task_is_refused(three, tmp_path, capsys):
    config = write(tmp_path / "c.yaml", three)
    found = "data.tasks.c.source: unknown source 'cc' (choose from a, b, c). Did you mean 'c'?"
    assert found in fails(["fit", "--config", config, "--data.tasks.c.source", "cc"], capsys)
