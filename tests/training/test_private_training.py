"""Fits that train private tensors and adapters per task: optimisers, checkpoints and averages."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from gradmerge import MergeModule
from gradmerge.common.errors import ConfigError
from gradmerge.drivers import Job, Pairwise
from gradmerge.objectives import KLToSource, Objective
from gradmerge.optimisers import SAM
from gradmerge.training.data import TaskData
from gradmerge.training.summary import fit_table
from tiny import fit, module_of, trainer_of, vectors

PARTS = {"private": ["^head"], "trained": ["^head"], "adapters": {"^body": 2}}
TASKS = {"one": "a", "two": "a", "three": "b"}
MEMORY = pytest.mark.parametrize("memory", ["resident", "streamed"])


def data_of():
    """Three tasks, two of which have the same source."""
    data = vectors(tuple(TASKS))
    for name, source in TASKS.items():
        old = data.tasks[name]
        data.tasks[name] = TaskData(path=old.path, kind="tensors", source=source)
    return data


def learning(**options):
    objective = Objective([KLToSource()])
    return module_of(objective=objective, learning_rate=0.05, **{**PARTS, **options})


def values(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@MEMORY
def test_a_fit_that_resumes_ends_where_one_run_would(tmp_path, memory):
    def run(folder, steps, **options):
        torch.manual_seed(1)
        module = learning(memory=memory, private_learning_rate=0.2)
        states = ModelCheckpoint(tmp_path / folder, every_n_train_steps=3, save_top_k=-1)
        trainer = trainer_of(tmp_path, max_steps=steps, callbacks=[states])
        trainer.fit(module, datamodule=data_of(), **options)
        return module

    whole = run("whole", 6)
    run("half", 3)
    (path,) = (tmp_path / "half").glob("*.ckpt")
    resumed = run("rest", 6, ckpt_path=path, weights_only=True)
    assert values(resumed).keys() == values(whole).keys()
    torch.testing.assert_close(values(resumed), values(whole), rtol=0, atol=0)
    assert resumed.experts == whole.experts
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved["merged.private.values.two:head/weight"].shape == (3, 8)
    assert sum(value.numel() for value in saved.values()) == 2 * 2 + 3 * (27 + 2 * 14)
    loaded = MergeModule.load_from_checkpoint(path, recipe=whole.recipe)
    assert loaded.merged.tasks == TASKS
    torch.testing.assert_close(values(loaded), values(run("again", 3)), rtol=0, atol=0)


def test_private_parts_have_a_learning_rate_of_their_own(tmp_path):
    module = learning(private_learning_rate=0.1)
    module.learning_rate = 0.0
    module.take_tasks(data_of().tasks)
    before = values(module)
    fit(tmp_path, module, data_of(), max_steps=1)
    after = values(module)
    own = [name for name in after if "private" in name]
    assert len(own) == 3 * 4
    for name in after:
        moved = (after[name] - before[name]).abs()
        if name.endswith(":A"):  # B = 0 at the start, so A has no gradient in the first step
            assert moved.max() == 0
        elif name in own:  # Adam's first step is its rate
            assert float(moved.max()) == pytest.approx(0.1, rel=1e-3)
        else:
            assert moved.max() == 0
    with pytest.raises(ConfigError, match="private_learning_rate: expected a recipe with"):
        module_of(private_learning_rate=0.1)
    with pytest.raises(ConfigError, match="private_learning_rate: expected at least 0"):
        learning(private_learning_rate=-1.0)


def test_an_average_of_weights_holds_private_parts(tmp_path):
    class Recorder(WeightAveraging):
        steps: list[torch.Tensor]

        def on_train_batch_end(self, trainer, module, *rest):
            super().on_train_batch_end(trainer, module, *rest)
            self.steps.append(values(module)["merged.private.values.three:head/bias"])

    recorder = Recorder(avg_fn=lambda mean, new, _: 0.5 * mean + 0.5 * new)
    recorder.steps = []
    module = learning()
    fit(tmp_path, module, data_of(), max_steps=3, callbacks=[recorder])
    mean = recorder.steps[0]
    for step in recorder.steps[1:]:
        mean = 0.5 * mean + 0.5 * step
    assert not torch.allclose(mean, recorder.steps[-1], atol=1e-4)
    found = values(module)["merged.private.values.three:head/bias"]
    torch.testing.assert_close(found, mean, rtol=1e-6, atol=1e-7)


def test_experts_and_their_scores_are_those_of_a_fit_without_private_training(tmp_path):
    scored = []
    for parts in ({"trained": [], "adapters": {}}, {}):
        module, trainer = fit(tmp_path, learning(**parts), data_of(), max_steps=4)
        trainer.test(module, datamodule=data_of(), verbose=False)
        scored.append((module.experts["test"], module.results["test"]["average"]["loss"]))
    assert scored[0][0] == scored[1][0] != {}
    assert abs(scored[0][1] - scored[1][1]) > 1e-3
    table = fit_table(trainer, module, 1.0)
    assert "4 coefficients" in table
    assert "head.weight, head.bias and LoRA of rank 2 on 1 matrices (55 parameters" in table


def test_sam_climbs_over_private_parts_too(tmp_path):
    module = learning()
    module.configure_optimizers = lambda: SAM(module.parameter_groups(), lr=0.05, rho=0.1)
    module.take_tasks(data_of().tasks)
    before = values(module)
    fit(tmp_path, module, data_of(), max_steps=3)
    after = values(module)
    assert all(not torch.equal(after[name], before[name]) for name in after)


def test_after_a_fit_there_are_no_other_tasks(tmp_path):
    module, trainer = fit(tmp_path, learning(), data_of(), max_steps=1)
    kept = values(module)
    only = data_of()
    only.tasks = {"two": only.tasks["two"]}
    trainer.test(module, datamodule=only, verbose=False)
    assert set(module.results["test"]) == {"two", "average"}
    trainer.test(module, datamodule=data_of(), verbose=False)
    torch.testing.assert_close(values(module), kept, rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"tasks: expected those of the fit.*got a, b"):
        trainer.test(module, datamodule=vectors(), verbose=False)


def test_drivers_refuse_private_training(tmp_path):
    recipe = learning().recipe
    job = Job(recipe, vectors(), tmp_path / "job", trainer_of)
    with pytest.raises(ConfigError, match=r"Pairwise: expected a recipe that trains coefficients"):
        Pairwise().run(job)
