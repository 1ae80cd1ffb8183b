"""A fit whose tasks run in step learns what a fit of tasks in turn does."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from gradmerge import MergeModule
from gradmerge.objectives import CrossEntropy, KLToSource, Objective
from tiny import build, fit, module_of, raws, relatives


@pytest.mark.parametrize("scale", [None, 1.5], ids=["plain", "logit_scale"])
def test_coefficients_are_those_of_tasks_in_turn(tmp_path, scale):
    models, found = [model.double() for model in relatives(build())], []
    for count in (1, 2):
        module = module_of(
            deepcopy(models),
            Objective([CrossEntropy(), KLToSource()]),
            memory="streamed",
            dtype="float64",
            tasks_at_once=count,
            logit_scale=scale,
        )
        fit(tmp_path, module)
        assert module.merged.tasks_at_once == count
        found.append(raws(module))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-9, atol=1e-12)


def test_a_checkpoint_keeps_the_number(tmp_path):
    module, trainer = fit(tmp_path, module_of(memory="streamed", tasks_at_once=2))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = MergeModule.load_from_checkpoint(
        tmp_path / "x.ckpt", recipe=module.recipe, weights_only=False
    )
    assert loaded.merged.tasks_at_once == 2
