"""Tensors that are the base's in all sources: found, kept, and without coefficients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from gradmerge import MergedModel, MergeModule, Recipe, inspect
from gradmerge.cli import main
from gradmerge.coefficients import Column, Constant, DepthRamp, Group, Tensor
from gradmerge.common.errors import ConfigError
from gradmerge.engine.opening import open_plan
from gradmerge.finalisers import REPAIR
from gradmerge.sources import InMemory
from gradmerge.sources.sharing import shared_tensors
from gradmerge.training.summary import fit_table
from networks import seeded
from tiny import build, fit, module_of, recipe_of, relatives, save_family, trainer_of, vectors

BODY = ["body.weight", "body.bias"]


def family(same=BODY):
    """A base and two sources that changed all tensors but some."""
    models = relatives(build())
    for model in models[1:]:
        own = dict(model.named_parameters())
        for name in same:
            own[name].data = models[0].get_parameter(name).detach().clone()
    return models


def earlier(monkeypatch):
    """Give coefficients to all tensors, as earlier versions did."""
    monkeypatch.setattr("gradmerge.engine.plan.find_unchanged", lambda *_: frozenset())


def test_they_have_no_coefficients_and_stay_as_they_are():
    models = family()
    merged = MergedModel(recipe_of(models, coefficients=Column(), init=Constant(0.4)), models[0])
    assert merged.plan.unchanged == set(BODY)
    assert set(merged.raw) == {"head/weight", "head/bias"}
    assert merged.plan.unchanged_note == (
        "2 of 4 tensors (67% of the parameters) are the same in all sources and the base"
    )
    weights = [dict(model.named_parameters()) for model in models]
    for name, base in weights[0].items():
        found = merged.state.materialise(name)
        expected = base + 0.4 * sum(other[name] - base for other in weights[1:])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert name not in BODY or torch.equal(found, base)


def test_values_count_and_not_dtypes():
    models = family()
    for model in models:
        for parameter in model.parameters():
            parameter.data = parameter.bfloat16().float()
    models[1].bfloat16()
    assert open_plan(recipe_of(models), models[0]).unchanged == set(BODY)
    models[0].body.bias.data[0] += 1e-4  # between two numbers of bfloat16
    assert open_plan(recipe_of(models), models[0]).unchanged == {"body.weight"}


def test_a_difference_in_the_last_entry_counts():
    base = {"w": torch.zeros(5000), "x": torch.zeros(2)}
    other = copy.deepcopy(base)
    other["w"][-1] = 1e-30
    opened = [InMemory(tensors).open() for tensors in (base, other, copy.deepcopy(base))]
    assert shared_tensors(base, opened) == ["x"]
    assert shared_tensors(base, [opened[0], opened[2]]) == ["w", "x"]


def test_only_the_first_entries_are_compared_of_what_differs_there():
    class Compared(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.equal.default:
                self.entries += args[0].numel()
            return func(*args, **(kwargs or {}))

    tensors = [{"w": torch.full((1 << 22,), value)} for value in (1.0, 2.0)]
    opened = [InMemory(each).open() for each in tensors]
    with Compared() as compared:
        assert shared_tensors(["w"], opened) == []
    assert 0 < compared.entries <= 1 << 12


@pytest.mark.parametrize("options", [{"origin": "zero"}, {"origin": "mean"}, {"base": None}])
def test_other_origins_merge_them(options):
    models = family()
    given = {"sources": {"a": models[1], "b": models[2]}, "base": models[0], **options}
    assert not open_plan(Recipe(**given), models[0]).unchanged


def test_repair_may_still_correct_them():
    assert not open_plan(recipe_of(family(), finalisers=[REPAIR()]), build()).unchanged


def test_nothing_to_merge():
    models = [build() for _ in range(3)]
    with pytest.raises(ConfigError, match="the very same tensors from every source"):
        open_plan(recipe_of(models), models[0])


def test_depth_counts_blocks_that_stay():
    base = {f"layers.{i}.weight": torch.zeros(2, 2) for i in range(4)}
    tuned = {name: value + (name > "layers.1") for name, value in base.items()}
    recipe = Recipe({"a": tuned}, base=base, init=DepthRamp(0, 1), coefficients=Tensor())
    found = open_plan(recipe, with_skeleton=False).initial_raw()["tensor"]
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.6, 0.8]])[:, -found.shape[1] :])


@pytest.mark.usefixtures("own_folder")
def test_inspect_and_merge_name_them(capsys):
    base = seeded(transformers.BertForSequenceClassification, num_hidden_layers=1)
    models = relatives(base)
    for model in models[1:]:
        model.bert.embeddings.load_state_dict(base.bert.embeddings.state_dict())
    save_family(Path(), models, tokenizer=False)
    assert main(["inspect", "a", "b", "--base", "base"]) == 0
    count = sum(1 for _ in base.parameters())
    same = [n for n, _ in base.named_parameters() if "embeddings" in n]
    shown = next(line for line in capsys.readouterr().out.splitlines() if "the same in" in line)
    assert shown.startswith(f"the same in all sources and the base: 5 of {count} tensors (")
    assert "word_embeddings" in shown
    assert set(inspect({"a": "a", "b": "b"})["unchanged"]["tensors"]) == set(same)
    sources = ["--recipe.sources", "{a: a, b: b}", "--recipe.base", "base"]
    assert main(["merge", *sources, "--output", "merged"]) == 0
    assert f"5 of {count} tensors (" in capsys.readouterr().out
    text = Path("merged/README.md").read_text()
    assert "are the same in all sources and the base." in text
    assert "tensors are fixed" not in text
    assert "| a | 0.3000 | 0.3000 | 0.3000 |" in text


GRANULARITIES = [Tensor(), Column(), Group((r"bias", r"weight"))]


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: type(g).__name__)
def test_checkpoints_of_earlier_versions_load_and_resume(tmp_path, monkeypatch, granularity):
    models, path = family(["body.bias"]), tmp_path / "before.ckpt"
    if isinstance(granularity, Group):  # the first group becomes the second
        models = family(["body.weight"])
    with monkeypatch.context() as patched:
        earlier(patched)
        module, trainer = fit(
            tmp_path, module_of(models, coefficients=granularity, learning_rate=0.1),
            enable_checkpointing=True,
        )  # fmt: skip
        trainer.save_checkpoint(path)
        expected = {n: module.merged.state.materialise(n) for n in module.merged.plan.tensors}
    with pytest.warns(UserWarning, match="coefficients of 1 tensors that are the same in all"):
        loaded = MergeModule.load_from_checkpoint(
            path, recipe=recipe_of(models, coefficients=granularity), module=models[0]
        )
    for name, theta in expected.items():
        found = loaded.merged.state.materialise(name)
        torch.testing.assert_close(found, theta, rtol=0, atol=1e-6)
    resumed = module_of(models, coefficients=granularity)
    trainer = trainer_of(tmp_path, max_steps=5)
    with pytest.warns(UserWarning, match="starts with a new state of its optimiser"):
        trainer.fit(resumed, datamodule=vectors(), ckpt_path=path, weights_only=True)
    assert trainer.global_step == 5
    assert resumed.merged.state.run["unchanged"] == resumed.merged.plan.unchanged_note
    assert resumed.merged.plan.unchanged_note in fit_table(trainer, resumed, 1.0)
