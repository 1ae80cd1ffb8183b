"""The plan of a fit: bytes and work of its steps against formulas, without a weight being read."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers

from gradmerge import Recipe
from gradmerge.coefficients import Complement, Element, Sigmoid, Uniform
from gradmerge.common.errors import ConfigError
from gradmerge.engine import plan as plan_module
from gradmerge.engine.opening import Opening
from gradmerge.objectives import KLToSource, Objective
from gradmerge.sources.files import FileCheckpoint
from gradmerge.training.calibrate import calibrate
from gradmerge.training.data import MergeDataModule
from gradmerge.training.declared import declared_batch
from gradmerge.training.examples import STAGES, TaskData
from gradmerge.training.planned import Fit, Setting, estimate, headers, settings
from tiny import relatives, save_family

ROWS, TOKENS, WIDTH, LAYERS, VOCABULARY = 4, 16, 64, 3, 128


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    models = relatives(transformers.LlamaForCausalLM(config))
    return save_family(tmp_path_factory.mktemp("planned"), models, tokenizer=False)


@pytest.fixture(scope="module", autouse=True)
def no_weight_is_read():
    def refuse(self, name):
        raise AssertionError(f"{name} was read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileCheckpoint, "read", refuse)
        yield


def opened(places):
    return Opening(Recipe({name: places[name] for name in "ab"}, places["base"]))


def fit_of(tasks=("a",), kind="causal_lm", length=TOKENS, objective=None):
    data = MergeDataModule(
        {task: TaskData("unread", kind, max_length=length, source="a") for task in tasks},
        batch_size=ROWS,
        eval_batch_size=ROWS,
    )
    optimise = partial(torch.optim.Adam, lr=0.1)
    return Fit(data, objective or Objective(), torch.float32, optimise, torch.device("cpu"))


@pytest.fixture(scope="module")
def plain(places):
    """The estimate of the simplest fit, resident."""
    return estimate(opened(places), fit_of(), Setting())


def size_of(opening):
    return sum(math.prod(info.shape) for info in opening.reference.infos.values())


def test_a_resident_step_merges_and_contracts_each_entry_once(places, plain):
    found, size = plain, size_of(opened(places))
    assert found.merged == found.contracted == size
    assert found.read == 2 * 3 * 4 * size  # two passes over two sources and a base in float32
    assert found.parts["merged"] == 4 * size
    assert found.disk == 0
    assert found.host >= found.device > 4 * size


def test_streamed_memory_merges_what_backward_needs_again_and_holds_a_layer(places, plain):
    opening, resident = opened(places), plain
    streamed = estimate(opening, fit_of(), Setting("streamed"))
    embedding = VOCABULARY * WIDTH  # its backward needs no weight
    assert streamed.merged == 2 * size_of(opening) - embedding
    assert streamed.flops == resident.flops
    assert streamed.parts["merged"] < resident.parts["merged"] / 3
    assert streamed.device < resident.device


def test_tasks_at_once_merge_as_often_as_one_task(places):
    opening, fit = opened(places), fit_of(("x", "y"))
    one = estimate(opening, fit_of(("x",)), Setting("streamed"))
    turns = estimate(opening, fit, Setting("streamed"))
    found = estimate(opening, replace(fit, tasks_at_once=2), Setting("streamed"))
    assert turns.merged == 2 * one.merged
    assert found.merged == one.merged
    assert turns.contracted == 2 * found.contracted
    assert found.flops == turns.flops
    assert found.parts["rest"] > 1.5 * turns.parts["rest"], "activations of both tasks"


def test_checkpointing_runs_the_blocks_again_and_keeps_their_inputs_only(places, plain):
    again = estimate(opened(places), fit_of(), Setting("resident", True))
    assert plain.flops < again.flops < 4 / 3 * plain.flops
    assert again.device < plain.device
    assert again.merged == plain.merged


def test_the_operations_of_a_step_are_those_of_its_products(plain):
    tokens = ROWS * TOKENS
    matrices = LAYERS * (4 * WIDTH**2 + 3 * 2 * WIDTH**2) + WIDTH * VOCABULARY
    products = 3 * 2 * tokens * matrices  # forward, and backward to inputs and weights
    attention = LAYERS * 2 * 2 * ROWS * TOKENS**2 * WIDTH
    # attention runs backward at two to three times its forward; rotary tables are a small product
    assert products <= plain.flops <= products + 4.5 * attention


def test_a_coefficient_per_weight_takes_sixteen_bytes_with_adam(places):
    coefficients = Complement(Sigmoid(Element()))
    recipe = Recipe(
        {name: places[name] for name in "ab"}, coefficients=coefficients, init=Uniform()
    )
    opening = Opening(recipe)
    found, size = estimate(opening, fit_of(), Setting()), size_of(opening)
    steps = 4 * len(opening.reference.infos)
    assert 16 * size <= found.parts["coefficients"] <= 16 * size + 4 * steps + 4 * size


def test_a_second_task_adds_one_set_of_gradients_and_no_activations(places, plain):
    opening, one = opened(places), plain
    two = estimate(opening, fit_of(("a", "b")), Setting())
    assert two.merged == one.merged
    assert two.contracted == one.contracted
    assert two.flops == 2 * one.flops
    assert two.device - one.device == pytest.approx(4 * size_of(opening), abs=2048)


def test_a_teacher_runs_forward_and_its_sources_take_no_memory(places, plain):
    opening, alone = opened(places), plain
    taught = estimate(opening, fit_of(objective=Objective([KLToSource()])), Setting())
    assert taught.flops == pytest.approx(4 / 3 * alone.flops, rel=0.02)
    logits = 4 * ROWS * TOKENS * VOCABULARY
    assert taught.device - alone.device < 4 * size_of(opening) / 2 + 6 * logits


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("causal_lm", {"input_ids": (4, 16), "labels": (4, 16)}),
        ("chat", {"input_ids": (4, 16), "attention_mask": (4, 16), "labels": (4, 16)}),
        ("text_classification", {"input_ids": (4, 16), "attention_mask": (4, 16), "labels": (4,)}),
        ("question_answering", {"input_ids": (4, 16), "attention_mask": (4, 16), "labels": (4, 2)}),
        ("embeddings", {"input_ids": (8, 16), "attention_mask": (8, 16)}),
    ],
)
def test_declared_batches_have_the_shapes_of_prepared_ones(kind, expected):
    batch = declared_batch(fit_of(kind=kind).data, "a", torch.nn.Linear(1, 1), "adaptation")
    found = {key: tuple(v.shape) for key, v in batch.items() if isinstance(v, torch.Tensor)}
    assert found == expected


def test_images_have_the_size_of_the_config_or_are_refused():
    network = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="expected a config with image_size"):
        declared_batch(fit_of(kind="image_classification").data, "a", network, "adaptation")
    network.config = transformers.ViTConfig(image_size=24)
    batch = declared_batch(fit_of(kind="image_classification").data, "a", network, "adaptation")
    assert batch["pixel_values"].shape == (ROWS, 3, 24, 24)


class Distinct(torch.nn.Linear):
    def forward(self, x):
        return super().forward(torch.unique(x, dim=0))


def test_a_network_whose_shapes_depend_on_numbers_cannot_be_planned():
    models = relatives(Distinct(4, 2))
    opening = Opening(Recipe(dict(zip("ab", models[1:], strict=True)), models[0]))
    rows = [{"x": torch.ones(4), "labels": torch.tensor(0)}] * 2
    data = MergeDataModule(
        {"a": TaskData(dict.fromkeys(STAGES, rows), "tensors")}, check_disjoint=False
    )
    fit = Fit(data, Objective(), torch.float32, torch.optim.Adam, torch.device("cpu"))
    with pytest.raises(ConfigError, match="Distinct: expected a forward that runs on tensors with"):
        estimate(opening, fit, Setting())


def test_processes_that_divide_the_sources_read_and_merge_their_share(places, plain, monkeypatch):
    monkeypatch.setattr(plan_module, "SMALLEST_SHARED", 1)
    found = estimate(opened(places), replace(fit_of(), processes=2), Setting())
    for name in ("read", "merged", "contracted"):
        assert getattr(found, name) == pytest.approx(getattr(plain, name) / 2, rel=1e-3)
    assert found.flops == plain.flops
    copied = estimate(opened(places), replace(fit_of(), processes=2), Setting(placement="device"))
    assert copied.parts["sources"] == pytest.approx(3 * 4 * size_of(opened(places)) / 2, rel=1e-3)


def test_calibration_measures_the_merge_of_the_recipe(places, plain):
    speed = calibrate(headers(opened(places)), torch.float32, torch.device("cpu"))
    assert 0 < speed.seconds(plain) < 60
    assert [setting.placement for setting in settings(torch.device("cpu"))] == ["mapped"] * 4
