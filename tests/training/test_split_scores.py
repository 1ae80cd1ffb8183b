"""Scores of the evaluation splits, stopping on them, and the messages of a fit that cannot run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.nn.functional import cross_entropy

from gradmerge.coefficients import Constant, Sigmoid, Tensor
from gradmerge.common.errors import ConfigError
from gradmerge.engine.predict import by_task
from gradmerge.objectives import CrossEntropy, Entropy, KLToSource, Objective
from tiny import build, fit, module_of, raws, relatives, trainer_of, validate, vectors

# ---- scores ---------------------------------------------------------------------------------


def test_scores_equal_those_of_the_merged_network_and_the_expert(tmp_path):
    models = relatives(build())
    module = module_of(models, coefficients=Sigmoid(Tensor()), init=Constant(0.4))
    found = validate(trainer_of(tmp_path), module, vectors())
    merged = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            a, b = (dict(m.named_parameters())[name] for m in models[1:])
            parameter.add_(0.4 * (a - parameter) + 0.4 * (b - parameter))
    losses = []
    for task, expert in zip("ab", models[1:], strict=True):
        rows = vectors().tasks[task].path["selection"]
        x, labels = (torch.stack([row[key] for row in rows]) for key in ("x", "labels"))
        with torch.no_grad():
            own, best = merged(x), expert(x)
        right, best_right = ((o.argmax(1) == labels).float().mean().item() for o in (own, best))
        losses.append(cross_entropy(own, labels).item())
        assert found[f"selection/{task}/accuracy"] == pytest.approx(right, abs=1e-6)
        assert found[f"selection/{task}/normalised"] == pytest.approx(right / best_right, abs=1e-6)
        assert found[f"selection/{task}/loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert found["selection/loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    average = module.results["selection"]["average"]["loss"]
    assert average == pytest.approx(found["selection/loss"], rel=1e-6)


def test_the_selection_loss_weighs_tasks_as_training_does(tmp_path):
    module = module_of(objective=Objective([CrossEntropy()], task_weights={"a": 3.0}))
    found = validate(trainer_of(tmp_path), module, vectors())
    expected = 0.75 * found["selection/a/loss"] + 0.25 * found["selection/b/loss"]
    assert found["selection/loss"] == pytest.approx(expected, rel=1e-6)


def test_fit_stops_early_on_the_selection_loss(tmp_path):
    stop = EarlyStopping("selection/loss", patience=1)
    _, trainer = fit(
        tmp_path,
        module_of(learning_rate=3.0),
        max_steps=60,
        callbacks=[stop],
        enable_checkpointing=False,
    )
    assert trainer.global_step < 60
    assert stop.stopped_epoch > 0


# ---- messages -------------------------------------------------------------------------------


def test_a_term_that_needs_labels_says_which_task_has_none(tmp_path):
    data = vectors()
    for task in "ab":
        for rows in data.tasks[task].path.values():
            for row in rows:
                row.pop("labels")
    with pytest.raises(
        ConfigError, match=r"task a has no labels, but CrossEntropy needs them; name its"
    ):
        fit(tmp_path, data=data)
    _module, trainer = fit(tmp_path, module_of(objective=Entropy()), data)
    assert trainer.callback_metrics["selection/loss"] > 0


def test_weights_of_unknown_tasks_are_refused_before_training(tmp_path):
    module = module_of(objective=Objective([CrossEntropy()], task_weights={"aa": 2.0}))
    with pytest.raises(ConfigError, match=r"unknown task 'aa' .*a, b\)\. Did you mean 'a'"):
        fit(tmp_path, module)


def test_tasks_without_a_source_are_refused_where_one_is_needed(tmp_path):
    with pytest.raises(ConfigError, match=r"sources of tasks: c -> c \(choose from a, b\)"):
        fit(tmp_path, module_of(objective=KLToSource()), vectors(("a", "c")))
    module, _ = fit(tmp_path, data=vectors(("a", "c")))
    assert module.tasks == ("a", "c")


def test_batches_that_are_not_by_task_are_explained(tmp_path):
    module = module_of()
    with pytest.raises(
        ConfigError, match=r"expected batches by task \(.*\), got the keys x, labels"
    ):
        by_task(module.merged, {"x": torch.zeros(1), "labels": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"unknown tasks 'z' \(choose from a, b\)"):
        by_task(module.merged, {"z": {"x": torch.zeros(1)}})


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match=r"dtype: expected .*bfloat16.* got 'bf17'"):
        module_of(dtype="bf17")


# ---- missing labels -------------------------------------------------------------------------


def hide(data, task, stage, rows):
    """Take the labels of some examples away."""
    split = data.tasks[task].path[stage]
    for i in rows:
        split[i] = {**split[i], "labels": torch.tensor(-100)}


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_task_s_batch_without_any_label_does_not_move_the_fit(tmp_path, memory):
    data = vectors(batch_size=12, check_disjoint=False)
    hide(data, "b", "adaptation", range(12))
    weights = Objective([CrossEntropy(label_smoothing=0.1)], task_weights={"a": 1.0, "b": 1.0})
    module, trainer = fit(tmp_path, module_of(objective=weights, memory=memory), data, max_steps=2)
    assert trainer.callback_metrics["train/b/loss"] == 0
    raw = raws(module)["tensor"]
    assert torch.isfinite(raw).all()
    # what it would have learned had b a loss of zero: half of a's gradient, which Adam normalises
    alone = Objective([CrossEntropy(label_smoothing=0.1)], task_weights={"a": 1.0, "b": 0.0})
    other, _ = fit(tmp_path, module_of(objective=alone), vectors(batch_size=12), max_steps=2)
    torch.testing.assert_close(raw, raws(other)["tensor"], rtol=0, atol=1e-5)


def test_scores_leave_out_examples_without_a_label(tmp_path):
    data = vectors(eval_batch_size=4, check_disjoint=False)
    hidden = [0, 4, 5, 6, 7, 11]  # the whole second batch, and some of the others
    hide(data, "a", "selection", hidden)
    found = validate(trainer_of(tmp_path), module_of(), data)
    data = vectors(eval_batch_size=12)
    split = data.tasks["a"].path
    split["selection"] = [row for i, row in enumerate(split["selection"]) if i not in hidden]
    expected = validate(trainer_of(tmp_path), module_of(), data)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_split_without_any_label_has_no_score_and_no_nan(tmp_path):
    data = vectors(check_disjoint=False)
    hide(data, "a", "selection", range(12))
    found = validate(trainer_of(tmp_path), module_of(), data)
    assert not [name for name in found if name.startswith("selection/a/")]
    assert all(math.isfinite(value) for value in found.values())
