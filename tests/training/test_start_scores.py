"""Scores before the first step, and the record of all scores of a fit."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gradmerge.common.checkpoints import load_checkpoint
from gradmerge.training.callbacks import ExportAtEnd
from gradmerge.training.logs import CSVLogger
from tiny import fit, module_of, raws, trainer_of, validate, vectors


class Steps(lightning.Callback):
    def __init__(self):
        self.validations = []

    def on_validation_end(self, trainer, pl_module):
        self.validations.append(trainer.global_step)


def test_the_start_is_scored_as_a_validation_would_and_logged_as_step_zero(tmp_path):
    expected = validate(trainer_of(tmp_path), module_of(), vectors())
    steps = Steps()
    logger = CSVLogger(tmp_path, name="logs")
    module, _ = fit(tmp_path, module_of(), logger=logger, callbacks=[steps], max_steps=6)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    (first,) = [row for row in rows if row["selection/loss"] and int(row["step"]) == 0]
    for name in ("selection/loss", "selection/a/accuracy", "selection/average/accuracy"):
        assert float(first[name]) == pytest.approx(expected[name], rel=1e-6)
    assert module.history.points("selection/loss")[0] == (
        0,
        pytest.approx(expected["selection/loss"], rel=1e-6),
    )
    assert steps.validations == [3, 6]  # no callback is told of the start


def test_a_fit_learns_the_same_with_and_without_the_scores_of_its_start(tmp_path):
    torch.manual_seed(3)
    scored, _ = fit(tmp_path, module_of(), max_steps=6)
    torch.manual_seed(3)
    plain, _ = fit(tmp_path, module_of(score_start=False), max_steps=6)
    assert torch.equal(raws(scored)["tensor"], raws(plain)["tensor"])
    assert plain.history.points("selection/loss")[0][0] == 3


def test_results_are_those_of_the_learned_coefficients_only(tmp_path):
    module, _ = fit(tmp_path, module_of(), max_steps=1)  # ends before a validation
    assert module.results == {}
    assert module.history.points("selection/loss")[0][0] == 0
    unscored, _ = fit(tmp_path, module_of(), max_steps=1, limit_val_batches=0)
    assert unscored.history.points("selection/loss") == []


def test_limits_of_the_validation_hold_for_the_start(tmp_path):
    limited = validate(trainer_of(tmp_path, limit_val_batches=1), module_of(), vectors())
    module, _ = fit(tmp_path, module_of(), max_steps=1, limit_val_batches=1)
    first = module.history.points("selection/loss")[0]
    assert first == (0, pytest.approx(limited["selection/loss"], rel=1e-6))


def test_a_resumed_fit_continues_its_history_and_has_one_start(tmp_path):
    module, trainer = fit(tmp_path, module_of(), max_steps=6, callbacks=[ModelCheckpoint(tmp_path)])
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    saved = load_checkpoint(path)["gradmerge"]["history"]
    assert [step for step, _ in saved["curves"]["selection/loss"]] == [0, 3, 6]
    resumed = module_of()
    trainer_of(tmp_path, max_steps=9).fit(resumed, datamodule=vectors(), ckpt_path=path)
    steps = [step for step, _ in resumed.history.points("selection/loss")]
    assert steps == [0, 3, 6, 9]
    assert resumed.history.experts.keys() == {"a", "b", "average"}
    assert module.history.points("train/loss") == resumed.history.points("train/loss")[:6]


@pytest.mark.usefixtures("figures")
def test_the_export_of_the_best_checkpoint_keeps_the_curves_of_the_whole_fit(tmp_path):
    module = module_of(learning_rate=3.0)
    best = ModelCheckpoint(tmp_path / "checkpoints", "best-{step}", monitor="selection/loss")
    export = ExportAtEnd(str(tmp_path / "merged"))
    fit(tmp_path, module, callbacks=[best, export], max_steps=12, enable_checkpointing=True)
    points = dict(module.history.points("selection/loss"))
    assert list(points) == [0, 3, 6, 9, 12]
    later = {step: loss for step, loss in points.items() if step}
    assert module.history.step == min(later, key=later.get)
    page = (tmp_path / "merged" / "report.html").read_text()
    assert "Learning curves" in page
