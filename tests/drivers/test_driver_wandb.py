"""W&B runs of a job's steps."""

from __future__ import annotations

import json

import lightning
import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from folds import (
    Kill,
    job_of,
)
from gradmerge.drivers import Pairwise
from gradmerge.drivers.wandb import finish_wandb_run
from tiny import (
    build,
    close_wandb_run,
    relatives,
)


class LookAtRun(lightning.Callback):
    def __init__(self):
        self.seen = []

    def on_fit_start(self, trainer, pl_module):
        run = trainer.logger.experiment
        self.seen.append((run.id, run.name, run.group))


def wandb_job(folder, look, monkeypatch, env, **options):
    """A job of two steps with a W&B logger, and environment variables `WANDB_*`."""
    for name in ("NAME", "RUN_GROUP", "RUN_ID", "SWEEP_ID", "LAUNCH"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    for name, value in {"MODE": "offline", "SILENT": "true", **env}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    job = job_of(folder, relatives(build(), 4), callbacks=[look])
    make = job.make_trainer

    def logging(root, callbacks, overrides):
        logger = WandbLogger(project="gradmerge", save_dir=folder, offline=True, **options)
        return make(root, callbacks, {**overrides, "logger": logger})

    job.make_trainer = logging
    return job


@pytest.fixture
def wandb_anew():
    """W&B as it is in a new process: it reads the environment anew."""
    wandb.teardown()
    yield
    close_wandb_run()  # else it stays behind, without the service that it logs to
    wandb.teardown()


@pytest.mark.parametrize("set_by_user", [False, True])
def test_runs_of_one_job_are_one_group_of_w_and_b(tmp_path, monkeypatch, wandb_anew, set_by_user):
    env = {"NAME": "mine", "RUN_GROUP": "ours"} if set_by_user else {}
    look = LookAtRun()
    job = wandb_job(tmp_path / "one", look, monkeypatch, env)
    Pairwise(keep_steps=False).run(job)
    finish_wandb_run()
    number = json.loads((job.folder / "job.json").read_text())["job"]
    start, group = ("mine-", "ours") if set_by_user else ("", f"one-{number[:8]}")
    assert [run[1:] for run in look.seen] == [(f"{start}step-1", group), (f"{start}step-2", group)]


@pytest.mark.parametrize("given", ["environment", "logger", "nothing"])
def test_each_step_has_a_w_and_b_id_of_its_own_and_keeps_it(
    tmp_path, monkeypatch, wandb_anew, given
):
    env = {"RUN_ID": "abc"} if given == "environment" else {}
    options = {"id": "abc"} if given == "logger" else {}
    look = LookAtRun()
    job = wandb_job(tmp_path / "one", look, monkeypatch, env, **options)
    make = job.make_trainer

    def killed(root, callbacks, overrides):
        return make(root, [*callbacks, Kill(1, "on_train_batch_start", 1)], overrides)

    job.make_trainer = killed
    with pytest.raises(RuntimeError, match="killed"):
        Pairwise().run(job)
    number = json.loads((job.folder / "job.json").read_text())["job"]
    own = number[:8] if given == "nothing" else "abc"
    assert wandb.run.id == f"{own}-step-1"
    job.make_trainer = make
    Pairwise().run(job)
    finish_wandb_run()
    assert [run[0] for run in look.seen] == [f"{own}-step-1", f"{own}-step-1", f"{own}-step-2"]


def test_a_job_in_a_sweep_is_the_one_run_of_its_agent(tmp_path, monkeypatch, wandb_anew):
    look = LookAtRun()
    job = wandb_job(tmp_path / "one", look, monkeypatch, {"SWEEP_ID": "s", "RUN_ID": "abc"})
    Pairwise().run(job)
    assert [run[:2] for run in look.seen] == [("abc", "one")] * 2
    assert len(list((tmp_path / "one" / "wandb").glob("offline-run-*"))) == 1
    finish_wandb_run()
    assert wandb.run.id == "abc"


def test_a_w_and_b_run_that_the_user_opened_stays_open(tmp_path, monkeypatch, wandb_anew):
    look = LookAtRun()
    job = wandb_job(tmp_path / "one", look, monkeypatch, {})
    run = wandb.init(project="gradmerge", dir=tmp_path, mode="offline")
    Pairwise().run(job)
    finish_wandb_run()
    assert wandb.run is run
    run.log({"after": 1})
    assert [seen[0] for seen in look.seen] == [run.id] * 2
