"""Model cards: metadata for the Hugging Face Hub, and their text."""

from __future__ import annotations

import math

import pytest
import torch
from huggingface_hub import ModelCard

from gradmerge import Recipe
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export.card import render
from gradmerge.export.emr import export_compact, export_tasks, task_checkpoints
from gradmerge.export.folder import export_state
from gradmerge.preprocess import Unify
from tiny import Normalised, build, recipe_of, relatives, save_family


def plan_of(family, tmp_path, name="llama", **options):
    models, _ = family(name, dtype=torch.float32)
    paths = save_family(tmp_path / "sources", models)
    recipe = Recipe({"a": paths["a"], "b": paths["b"]}, paths["base"], **options)
    return open_plan(recipe, with_skeleton=False)


def test_scores_become_the_hub_s_evaluation_results(family, tmp_path):
    plan = plan_of(family, tmp_path)
    scores = {"a": {"accuracy": 0.75, "loss": math.nan}, "average": {"accuracy": 0.75}}
    results = {"test": scores, "selection": {"b": {"accuracy": 0.5}}}
    folder = export_state(FitState.start(plan), tmp_path / "merged", results=results)
    card = ModelCard.load(folder / "README.md")
    assert card.data.tags == ["merge", "gradmerge"]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None  # local folders are not on the hub
    assert card.data.model_name == "merged"
    found = [
        (r.task_type, r.dataset_name, r.dataset_split, r.metric_type, r.metric_value)
        for r in card.data.eval_results
    ]
    assert found == [
        ("text-generation", "a", "test", "accuracy", 0.75),
        ("text-generation", "b", "selection", "accuracy", 0.5),
    ]
    assert "| test | accuracy | loss |" in card.text
    assert "| a | 0.7500 | n/a |" in card.text


@pytest.mark.parametrize(
    ("architecture", "pipeline"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertForSequenceClassification", "text-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("T5ForConditionalGeneration", None),  # texts, or images to text
        (None, None),
    ],
)
def test_hub_ids_are_base_models_and_the_architecture_says_the_pipeline(
    architecture, pipeline, tmp_path, monkeypatch
):
    (tmp_path / "local" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    labels = ["owner/base", "owner/tuned@v1.2", "local/model", "/models/a", "adapter on owner/base"]
    results = {"test": {"a": {"loss": 1.0}}}
    card = ModelCard(render("Title", ["Text."], "merged", architecture, labels, results))
    assert card.data.base_model == ["owner/base", "owner/tuned"]
    assert card.data.base_model_relation == "merge"
    assert card.data.pipeline_tag == pipeline
    assert card.data.library_name == ("transformers" if architecture else None)
    assert bool(card.data.eval_results) == (pipeline is not None)
    assert card.text.strip() == "# Title\n\nText."


def test_a_plain_network_is_not_said_to_load_with_transformers(tmp_path):
    plan = open_plan(recipe_of(relatives(build(Normalised))), with_skeleton=False)
    card = ModelCard.load(export_state(FitState.start(plan), tmp_path / "merged") / "README.md")
    assert card.data.library_name is None
    assert "from_pretrained" not in card.text
    assert "None measured." in card.text


def test_coefficients_are_summarised_per_source(tmp_path):
    plan = open_plan(recipe_of(relatives(build())), with_skeleton=False)
    raw = {key: value.clone() for key, value in plan.initial_raw().items()}
    for value in raw.values():
        value.copy_(torch.linspace(-0.5, 0.5, value.numel()).view(value.shape))
    values = torch.stack([FitState(plan, raw).coefficient(name) for name in plan.tensors], dim=1)
    card = (export_state(FitState(plan, raw), tmp_path / "merged") / "README.md").read_text()
    for source, of in zip(plan.sources, values.reshape(len(plan.sources), -1), strict=True):
        numbers = " | ".join(f"{x:.4f}" for x in (of.mean(), of.min(), of.max()))
        assert f"| {source} | {numbers} |" in card


def test_cards_of_outputs_per_task(family, tmp_path):
    plan = plan_of(family, tmp_path, preprocess=[Unify()])
    export_tasks(task_checkpoints(plan), tmp_path / "tasks")
    card = ModelCard.load(tmp_path / "tasks" / "a" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    export_compact(plan, tmp_path / "compact")
    card = ModelCard.load(tmp_path / "compact" / "README.md")
    assert card.data.library_name is None  # needs to be unpacked
    assert card.data.tags == ["merge", "gradmerge"]
    assert "- `a`\n- `b`" in card.text
