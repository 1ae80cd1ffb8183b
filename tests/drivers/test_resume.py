"""Jobs that are killed, resumed, finished, changed or damaged."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from lightning.pytorch.callbacks import EarlyStopping
from safetensors.torch import load_file

import tiny
from folds import (
    NAMES,
    Kill,
    files,
    job_of,
    provenance,
    tensors,
)
from gradmerge import MergeModule, TaskData
from gradmerge.common.errors import ConfigError
from gradmerge.drivers import Continual, Pairwise, Tree
from gradmerge.drivers.fold import FoldedRecipe
from gradmerge.training import ExportAtEnd
from tiny import (
    SPLITS,
    build,
    relatives,
    save_family,
    vectors,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    folder = Pairwise(every_n_steps=1).run(job_of(root, relatives(build(), 4), learning_rate=0.3))
    return tensors(folder), load_file(folder / "coefficients.st")


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 0),
        ("on_train_batch_start", 2),
        ("on_validation_start", 2),
        ("on_validation_epoch_end", 4),
        ("on_train_batch_end", 3),
        ("on_train_end", 5),
    ],
)
def test_a_killed_job_resumes_bitwise(tmp_path, uninterrupted, hook, step):
    models = relatives(build(), 4)
    driver = Pairwise(every_n_steps=1)
    options = {"learning_rate": 0.3}
    with pytest.raises(RuntimeError, match="killed"):
        driver.run(job_of(tmp_path, models, callbacks=[Kill(2, hook, step)], **options))
    assert not (tmp_path / "merged").exists()
    first = tmp_path / "driver/steps/step-1"
    before = files(first)
    went_on = (tmp_path / "driver/steps/step-2/last.ckpt").is_file()
    assert went_on == (step > 0)
    folder = driver.run(job_of(tmp_path, models, **options))
    assert files(first) == before, "a finished step is not touched again"
    merged, coefficients = uninterrupted
    found = load_file(folder / "coefficients.st")
    assert all(torch.equal(found[name], value) for name, value in coefficients.items())
    assert all(torch.equal(tensors(folder)[name], value) for name, value in merged.items())
    assert not torch.allclose(coefficients["body.weight"], torch.tensor([2 / 3, 1 / 3]), atol=1e-2)


FOLDS = {  # driver, its sources, step of the kill, of how many, where the first one starts
    "tree": (Tree, {}, "abcde", 3, 4, [1 / 2, 1 / 2]),
    "continual": (Continual, {}, "cd", 2, 2, [2 / 3, 1 / 3]),
    "continual, projected": (Continual, {"projection": True}, "cd", 2, 2, [1.0, 1.0]),
}


@pytest.mark.parametrize("name", FOLDS)
def test_every_killed_fold_resumes_bitwise(tmp_path, name):
    kind, options, names, number, count, start = FOLDS[name]
    models = relatives(build(), 6)
    if kind is Continual:
        two = FoldedRecipe(dict(zip("ab", models[1:3], strict=True)), base=models[0])
        earlier = Tree().run(job_of(tmp_path / "first", models, learning_rate=0.3, recipe=two))
        options = {**options, "earlier": str(earlier)}
    sources = {source: models[1 + NAMES.index(source)] for source in names}

    def run(root, *callbacks):
        recipe = FoldedRecipe(sources, base=models[0])
        own = {"learning_rate": 0.3, "callbacks": callbacks, "recipe": recipe}
        driver = kind(every_n_steps=1, **options)
        return driver.run(job_of(tmp_path / root, models, **own))

    whole = run("whole")
    with pytest.raises(RuntimeError, match="killed"):
        run("parts", Kill(number, "on_train_batch_start", 2))
    steps = tmp_path / "parts/driver/steps"
    before = {i: files(steps / f"step-{i}") for i in range(1, number)}
    assert (steps / f"step-{number}/last.ckpt").is_file()
    assert not (tmp_path / "parts/merged").exists()
    found = run("parts")
    for i, content in before.items():
        assert files(steps / f"step-{i}") == content, "a finished step is not touched again"
    for file in ("coefficients.st", "model.safetensors"):
        assert (found / file).read_bytes() == (whole / file).read_bytes()
    said = [provenance(folder)["steps"] for folder in (whole, found)]
    assert len(said[0]) == count
    for first, second in zip(*said, strict=True):
        assert ("lambda" in first) == ("projection" in options)
        for key in ("steps", "coefficients", "results", "lambda"):
            assert first.get(key) == second.get(key), key
    learned = list(said[0][0]["coefficients"].values())
    assert learned != pytest.approx(start, abs=1e-2), "something must have been learned"


def test_a_fit_that_was_told_to_stop_early_stays_stopped(tmp_path):
    """Killed between the last validation, which stops it, and the end of the step."""

    def job(*more):
        early = EarlyStopping("selection/loss", stopping_threshold=1e9)  # at the first validation
        return job_of(tmp_path, relatives(build(), 3), learning_rate=0.3, callbacks=[early, *more])

    with pytest.raises(RuntimeError, match="killed"):
        Pairwise(every_n_steps=1).run(job(Kill(1, "on_train_end", 2)))
    said = []
    again = job()
    again.say = said.append
    folder = Pairwise(every_n_steps=1).run(again)
    (step,) = provenance(folder)["steps"]
    assert (step["steps"], step["checkpoint"]) == (2, "best.ckpt")
    assert f"resuming from {tmp_path}/driver/steps/step-1/last.ckpt" in said


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
def test_a_job_that_validates_at_the_end_of_epochs_resumes(tmp_path, hook):
    """Callbacks that watch a score act before the save: a resumed fit has no score."""

    def job(root, *more):
        models = relatives(build(), 3)
        found = job_of(root, models, learning_rate=1.5, callbacks=more)
        make = found.make_trainer

        def by_epochs(folder, callbacks, overrides):
            early = EarlyStopping("selection/loss", patience=1)
            settings = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1, "max_steps": 12}
            return make(folder, [early, *callbacks], {**overrides, **settings})

        found.make_trainer = by_epochs
        return found

    whole = provenance(Pairwise().run(job(tmp_path / "whole")))["steps"][0]
    with pytest.raises(RuntimeError, match="killed"):
        Pairwise().run(job(tmp_path / "killed", Kill(1, hook, 3)))
    folder = Pairwise().run(job(tmp_path / "killed"))
    again = provenance(folder)["steps"][0]
    for name in ("steps", "checkpoint", "coefficients", "results"):
        assert again[name] == whole[name], name


def test_an_output_that_was_moved_is_written_again(tmp_path):
    models = relatives(build(), 4)
    folder = Pairwise().run(job_of(tmp_path, models, learning_rate=0.3))
    kept = tensors(folder)
    folder.rename(tmp_path / "elsewhere")
    assert Pairwise().run(job_of(tmp_path, models, learning_rate=0.3)) == folder
    assert all(torch.equal(value, kept[name]) for name, value in tensors(folder).items())


SCRIPT = """
import os, signal, sys
import lightning
from folds import job_of
from gradmerge.drivers import Pairwise
from tiny import build, relatives

class Die(lightning.Callback):
    fits = 0
    def on_fit_start(self, *_):
        Die.fits += 1
    def on_train_batch_start(self, trainer, *_):
        if Die.fits == 2 and trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

models = relatives(build(), 4)
Pairwise(every_n_steps=1).run(job_of(sys.argv[1], models, learning_rate=0.3, callbacks=[Die()]))
"""


@pytest.mark.slow
def test_a_job_killed_by_a_signal_resumes(tmp_path, uninterrupted):
    path = os.pathsep.join([str(Path(tiny.__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == -signal.SIGKILL, done.stderr
    job = job_of(tmp_path, relatives(build(), 4), learning_rate=0.3)
    folder = Pairwise(every_n_steps=1).run(job)
    found = load_file(folder / "coefficients.st")
    assert all(torch.equal(found[name], value) for name, value in uninterrupted[1].items())


def test_a_finished_job_does_nothing(tmp_path):
    models = relatives(build(), 3)
    folder = Pairwise().run(job_of(tmp_path, models))
    before = files(tmp_path)
    said = []
    job = job_of(tmp_path, models)
    job.say = said.append
    assert Pairwise().run(job) == folder
    assert files(tmp_path) == before
    assert said == [f"this job is finished: {folder}"]


def test_another_job_in_the_folder_is_rejected_with_the_differences(tmp_path):
    models = relatives(build(), 4)
    Pairwise().run(job_of(tmp_path, models))
    changed = copy.deepcopy(models)
    with torch.no_grad():
        changed[2].head.bias[0] += 1
    for job, driver, message in (
        (
            job_of(tmp_path, models, learning_rate=0.1),
            Pairwise(),
            r"learning_rate: was 0.0, is 0.1",
        ),
        (job_of(tmp_path, models), Pairwise(tasks="all"), 'tasks: was "members", is "all"'),
        (job_of(tmp_path, models), Tree(), "Pairwise.*Tree"),
        (job_of(tmp_path, changed), Pairwise(), "fingerprints.b: was"),
        (
            job_of(tmp_path, models, vectors("abc", batch_size=3, check_disjoint=False)),
            Pairwise(),
            "batch_size: was 4, is 3",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            driver.run(job)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("job.json", "{}", "job: expected text, got none"),
        ("job.json", "[]", "expected a JSON object, got list"),
        ("job.json", '{"job": "x", "seed": 0', "expected JSON, got: Expecting"),
        (
            "job.json",
            '{"job": "x", "seed": 0, "content": null}',
            "content: expected a mapping, got None",
        ),
        ("steps/step-1/step.json", "{}", "step: expected a mapping, got none"),
        ("steps/step-1/step.json", '{"step": {}}', "result: expected a mapping, got none"),
    ],
)
def test_a_damaged_record_is_rejected_by_name(tmp_path, name, content, message):
    models = relatives(build(), 3)
    folder = Pairwise().run(job_of(tmp_path, models))
    folder.rename(tmp_path / "elsewhere")
    path = tmp_path / "driver" / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"(?s){name}.*{message}.*record from which.*restart"):
        Pairwise().run(job_of(tmp_path, models))
    assert path.read_text() == content
    assert Pairwise(restart=True).run(job_of(tmp_path, models)) == folder


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"driver": 1}', '{"driver": {"job": 1}}'])
def test_a_folder_with_other_provenance_is_not_the_job_s_output(tmp_path, content):
    models = relatives(build(), 3)
    folder = Pairwise().run(job_of(tmp_path, models))
    (folder / "provenance.json").write_text(content)
    with pytest.raises(ConfigError, match="merged exists; give another folder"):
        Pairwise().run(job_of(tmp_path, models))


def test_a_restart_moves_the_earlier_job_aside(tmp_path):
    models = relatives(build(), 3)
    Pairwise().run(job_of(tmp_path, models))
    before = files(tmp_path / "driver")
    with pytest.raises(ConfigError, match="merged exists; give another folder"):
        Pairwise(restart=True).run(job_of(tmp_path, models, learning_rate=0.1))
    assert files(tmp_path / "driver") == before
    output = ExportAtEnd(str(tmp_path / "merged"), overwrite=True)
    Pairwise(restart=True).run(job_of(tmp_path, models, learning_rate=0.1, output=output))
    assert files(tmp_path / "driver.before-1") == before
    assert files(tmp_path / "driver").keys() == before.keys()


def test_a_foreign_output_is_rejected_before_any_step(tmp_path):
    (tmp_path / "merged").mkdir()
    with pytest.raises(ConfigError, match="merged exists; give another folder"):
        Pairwise().run(job_of(tmp_path, relatives(build(), 3)))
    assert not (tmp_path / "driver").exists()


def test_a_step_s_last_state_is_an_ordinary_checkpoint(tmp_path, family, monkeypatch):
    """It holds the step's recipe with its heads, and loads without the job."""
    monkeypatch.chdir(tmp_path)
    models, _ = family("bert", 4, dtype=torch.float32)
    paths = save_family(tmp_path, models)
    recipe = FoldedRecipe({k: paths[k] for k in "abc"}, base=paths["base"], private=["classifier"])
    generator = torch.Generator().manual_seed(3)

    def rows():
        tokens = torch.randint(32, (6, 5), generator=generator)
        return [{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(tokens)]

    data = vectors("abc", check_disjoint=False)
    for name in "abc":
        data.tasks[name] = TaskData({split: rows() for split in SPLITS}, kind="tensors")
    job = job_of(tmp_path, models, data, learning_rate=0.1, recipe=recipe)
    Pairwise(every_n_steps=1).run(job)
    module = MergeModule.load_from_checkpoint(tmp_path / "driver/steps/step-2/last.ckpt")
    assert list(module.recipe.sources) == ["step-1", "c"]
    assert list(module.recipe.heads) == ["a", "b"]
    tokens = torch.arange(10).view(2, 5)
    own = transformers.BertForSequenceClassification.from_pretrained("merged/tasks/a")
    assert torch.equal(own.classifier.weight, models[1].classifier.weight)
    with torch.no_grad():
        for task in "abc":
            assert module.merged(task=task, input_ids=tokens).logits.isfinite().all()


def test_a_missing_model_of_an_earlier_step_is_named(tmp_path):
    models = relatives(build(), 4)
    folder = Pairwise(keep_steps=False).run(job_of(tmp_path, models))
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"step step-2 merges this model.*start again"):
        Pairwise(keep_steps=False).run(job_of(tmp_path, models))
    moved.rename(folder)
    assert Pairwise(keep_steps=False).run(job_of(tmp_path, models)) == folder
