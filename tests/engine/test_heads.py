"""Heads with buffers: each task's running statistics stay its own, like its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gradmerge import MergedModel, MergeModule
from gradmerge.coefficients import Constant
from gradmerge.engine.outputs import rows_of
from gradmerge.engine.predict import expert_rows
from gradmerge.export.folder import export_merged
from tiny import build, recipe_of, relatives, trainer_of, vectors


class NormalisedHead(nn.Module):
    """A shared layer and BatchNorm, and a head with BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)).relu())


def family():
    """Base and two sources whose head statistics differ a lot."""
    models = relatives(build(NormalisedHead))
    for number, model in enumerate(models):
        model.head[0].running_mean.fill_(0.5 * number)
        model.head[0].running_var.fill_(1.0 + number)
        model.head[0].num_batches_tracked.fill_(300 + number)
    return models


def merged_of(models, **options):
    recipe = recipe_of(models, private=[r"^head\."], buffers="mean", init=Constant(0.3))
    return MergedModel(recipe, **options)


def expected(models, source):
    """The merged body with one source's head, in plain torch."""
    twin = copy.deepcopy(models[source]).eval()
    base, a, b = (dict(model.named_parameters()) for model in models)
    with torch.no_grad():
        for name, own in twin.named_parameters():
            if not name.startswith("head."):
                own.copy_(0.4 * base[name] + 0.3 * a[name] + 0.3 * b[name])
    for name in ("running_mean", "running_var"):
        own = [getattr(model.norm, name) for model in models[1:]]
        getattr(twin.norm, name).copy_(sum(own) / 2)
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_each_task_runs_with_its_own_statistics(memory, dtype):
    models = family()
    merged = merged_of(models, memory=memory, dtype=dtype)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    for source, task in enumerate("ab", start=1):
        for training in (True, False):
            merged.train(training)
            found = merged(x, task=task)
            torch.testing.assert_close(found, expected(models, source).to(dtype)(x))


def test_the_teacher_has_the_statistics_of_its_own_head():
    models = family()
    merged = merged_of(models)
    batch = {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(1))}
    for source, task in enumerate("ab", start=1):
        found = expert_rows(merged, task, batch)
        torch.testing.assert_close(found, models[source](batch["x"]).detach())
        again = rows_of(merged, task, batch)[0]
        torch.testing.assert_close(again, expected(models, source)(batch["x"]))


def test_losses_of_several_tasks_have_one_backward_pass():
    """Statistics that change in place between two forward passes would spoil the first."""
    models = family()
    merged = merged_of(models, dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sum(merged(x, task=task).square().sum() for task in "ab").backward()
    grads = {key: raw.grad.clone() for key, raw in merged.raw.items()}
    merged.zero_grad()
    for task in "ab":
        merged(x, task=task).square().sum().backward()
    for key, raw in merged.raw.items():
        torch.testing.assert_close(raw.grad, grads[key])


def test_statistics_of_a_head_are_not_recomputed(tmp_path):
    models = family()
    module = MergeModule(recipe_of(models, private=[r"^head\."]))
    data = vectors()
    trainer_of(tmp_path, max_steps=2).fit(module, datamodule=data)
    module.refresh_buffers(data)
    merged = module.merged
    assert [module.num_features for module in merged.network_buffers.batch_norms] == [8]
    assert "norm.running_mean" in merged.network_buffers.values()
    assert not any(name.startswith("head.") for name in merged.network_buffers.values())
    for source, task in enumerate("ab", start=1):
        merged(torch.zeros(2, 6), task=task)
        head = merged.skeleton.head[0]
        assert torch.equal(head.running_mean, models[source].head[0].running_mean)
        assert torch.equal(head.running_var, models[source].head[0].running_var)
        assert head.num_batches_tracked == 300 + source


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_export_has_each_task_s_own(tmp_path, dtype):
    models = family()
    export_merged(merged_of(models), tmp_path / "out", dtype=dtype)
    for source, task in enumerate("ab", start=1):
        head = load_file(tmp_path / "out" / "tasks" / task / "model-00002-of-00002.safetensors")
        own = models[source].head[0]
        assert torch.equal(
            head["head.0.running_mean"], own.running_mean.to(head["head.1.bias"].dtype)
        )
        count = head["head.0.num_batches_tracked"]
        assert count.dtype == torch.int64
        assert count == 300 + source
