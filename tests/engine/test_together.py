"""Passes in step: the same gradients with one merge for all tasks in forward and in backward."""

from __future__ import annotations

import threading
from collections import Counter
from functools import partial

import pytest
import torch
import transformers

from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import Column
from gradmerge.common.errors import ConfigError
from gradmerge.engine.predict import predict
from gradmerge.engine.saved import layer_of
from gradmerge.engine.teacher import Teacher
from gradmerge.objectives import CrossEntropy, HiddenStates, KLToSource, Objective
from networks import seeded
from tiny import build, recipe_of, relatives

BERT = transformers.BertForSequenceClassification
LLAMA = transformers.LlamaForCausalLM
VIT = transformers.ViTForImageClassification
TASKS = {"x": "a", "y": "b", "z": "a"}


def batch_of(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    if kind is VIT:
        pixels = torch.randn(3, 3, 16, 16, generator=generator).double()
        return {"pixel_values": pixels, "labels": torch.randint(2, (3,), generator=generator)}
    ids = torch.randint(1, 32, (2 + seed, 5 + seed), generator=generator)
    labels = ids if kind is LLAMA else torch.randint(2, (len(ids),), generator=generator)
    return {"input_ids": ids, "labels": labels}


def network_of(kind):
    options = {"image_size": 16, "patch_size": 8} if kind is VIT else {"pad_token_id": 0}
    return seeded(kind, **options)


def merged_of(kind, at_once, recompute=False, **recipe):
    models = [model.double() for model in relatives(network_of(kind))]
    merged = MergedModel(
        Recipe({"a": models[1], "b": models[2]}, base=models[0], coefficients=Column(), **recipe),
        memory="streamed",
        dtype=torch.float64,
        tasks=TASKS,
        tasks_at_once=at_once,
    )
    if recompute:
        merged.enable_activation_checkpointing()
    return merged.train()


def runs_of(merged, kind, objective):
    teacher = Teacher(merged, objective)
    return [
        partial(
            lambda task, batch: objective.loss(
                predict(merged, objective, task, batch, False, teacher)
            ),
            task,
            batch_of(kind, seed),
        )
        for seed, task in enumerate(TASKS)
    ]


def step(merged, kind, objective):
    """Return losses, gradients, and the number of merges and contractions of each tensor."""
    runs = runs_of(merged, kind, objective)
    merged.accumulate(runs)  # watched: it is the first
    merges, contractions, plan = Counter(), Counter(), merged.plan
    combine, contract = plan.combine, plan.contract

    def counted(counter, function, name, *args, **options):
        counter[name] += 1
        return function(name, *args, **options)

    plan.combine = partial(counted, merges, combine)
    plan.contract = partial(counted, contractions, contract)
    try:
        total, losses = merged.accumulate(runs)
        total.backward()
    finally:
        del plan.combine, plan.contract
    grads = {name: value.grad for name, value in merged.named_parameters()}
    return losses, grads, merges, contractions


OBJECTIVES = {
    "labels": lambda layers: Objective([CrossEntropy()]),
    "teacher": lambda layers: Objective([KLToSource(), HiddenStates(layers=layers)]),
}
HIDDEN = {
    BERT: [r"bert\.encoder\.layer\.\d+"],
    LLAMA: [r"model\.layers\.\d+"],
    VIT: [r"vit\.(encoder\.)?layers?\.\d+"],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("kind", [BERT, LLAMA, VIT], ids=lambda k: k.__name__)
def test_gradients_are_those_of_tasks_in_turn(kind, recompute, objective):
    own = {} if kind is LLAMA else {"private": [r"^classifier\."], "trained": [r"^classifier\."]}
    goal = OBJECTIVES[objective](HIDDEN[kind])
    expected, reference, merges, contractions = step(
        merged_of(kind, 1, recompute, **own), kind, goal
    )
    assert max(merges.values()) > 2
    assert max(contractions.values()) == 3
    losses, grads, merges, contractions = step(merged_of(kind, 3, recompute, **own), kind, goal)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    assert grads.keys() == reference.keys()
    for name, grad in reference.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-14, msg=name)
    again = {name for name, count in merges.items() if count > 2}
    # ViT reads the dtype of this weight before it computes with it
    assert merges
    assert again <= {"vit.embeddings.patch_embeddings.projection.weight"}, merges
    assert max(contractions.values()) == 1, contractions


def test_adapters_of_tasks_share_the_merge():
    options = {"private": [r"^classifier\."], "adapters": {r"layer\..*query\.weight": 2}}
    goal = Objective([KLToSource()])
    models = {}
    for count in (1, 3):
        merged = models[count] = merged_of(BERT, count, **options)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for value in merged.private.parameters():
                value.add_(0.1 * torch.randn(value.shape, generator=generator).double())
    expected, reference, *_ = step(models[1], BERT, goal)
    losses, grads, merges, contractions = step(models[3], BERT, goal)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    for name, grad in reference.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-14, msg=name)
    assert max(merges.values()) <= 2
    assert max(contractions.values()) == 1


def test_the_error_of_a_pass_ends_all_and_the_next_step_works():
    merged = merged_of(BERT, 3)
    goal = Objective([CrossEntropy()])
    runs = runs_of(merged, BERT, goal)
    total, expected = merged.accumulate(runs)
    total.backward()

    threads = threading.enumerate()

    def fails():
        merged(**{k: v for k, v in batch_of(BERT, 1).items() if k != "labels"}, task="y")
        raise KeyError("of the second pass")

    with pytest.raises(KeyError, match="of the second pass"):
        merged.accumulate([runs[0], fails, runs[2]])
    with pytest.raises(ConfigError, match=r"expected a scalar, got shape \(4, 2\)"):
        merged.accumulate([runs[0], lambda: merged(task="y", **batch_of(BERT, 2)).logits])
    assert threading.enumerate() == threads
    torch.testing.assert_close(merged.accumulate(runs)[1], expected, rtol=1e-12, atol=0)


def test_autocast_and_groups_of_tasks():
    results = []
    for count in (1, 2, 3):
        merged = merged_of(BERT, count).float()
        with torch.autocast("cpu", torch.bfloat16):
            total, losses = merged.accumulate(runs_of(merged, BERT, Objective([CrossEntropy()])))
        total.backward()
        results.append((torch.stack(losses), merged.raw))
    for losses, raw in results[1:]:
        assert torch.equal(losses, results[0][0])
        for key, value in raw.items():
            wanted = results[0][1][key].grad
            error = float((value.grad - wanted).norm())
            assert error <= 0.02 * float(wanted.norm()), key  # gradients are added in bfloat16


@pytest.mark.parametrize(("count", "memory"), [(0, "streamed"), (2, "resident")])
def test_other_numbers_are_refused(count, memory):
    models = relatives(build())
    with pytest.raises(ConfigError, match=f"expected 1, or more .* got {count} with {memory}"):
        MergedModel(recipe_of(models), memory=memory, tasks_at_once=count)


def test_layers_are_the_first_numbered_part():
    names = ("model.layers.3.mlp.up_proj", "model.embed_tokens", "a.0.b.1")
    assert [layer_of(name) for name in names] == ["model.layers.3", "model.embed_tokens", "a.0"]
