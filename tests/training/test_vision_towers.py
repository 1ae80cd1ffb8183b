"""CLIP classification as AdaMerging does it: vision towers before frozen zero-shot heads."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import yaml

from gradmerge.cli.main import learn
from gradmerge.coefficients import Column
from gradmerge.export.folder import export_merged
from gradmerge.preprocess import TSVM
from kinds import CASES, folders, rows
from tiny import SPLITS

SUITE = Path(__file__).parents[2] / "configs/suites/clip_eight_tasks.yaml"
CASE = CASES["zero_shot_image_classification"]
CLIP, PROJECTED = transformers.CLIPVisionModel, transformers.CLIPVisionModelWithProjection


def towers(root, kind):
    """Folders of a whole CLIP and of the vision towers of two others."""
    paths = folders(root, CASE)
    for name in "ab":
        whole = transformers.CLIPModel.from_pretrained(paths[name])
        config = transformers.CLIPVisionConfig(**whole.config.vision_config.to_dict())
        config.projection_dim = whole.config.projection_dim
        tower = kind(config)
        (tower if kind is CLIP else tower.vision_model).load_state_dict(
            whole.vision_model.state_dict()
        )
        if kind is PROJECTED:
            tower.visual_projection.load_state_dict(whole.visual_projection.state_dict())
        tower.save_pretrained(paths[name])
    return paths


def tiny_suite(root, paths):
    """The suite with tiny towers and drawn images in the place of the hub's."""
    suite = yaml.safe_load(SUITE.read_text())
    recipe, tasks = suite["model"]["recipe"], suite["data"]["tasks"]
    assert list(recipe["sources"]) == list(tasks)
    label = datasets.ClassLabel(names=["w1", "w2 w3", "w4"])
    columns = datasets.Features({"image": datasets.Image(), "label": label})
    recipe["base"] = paths["base"]
    for i, (name, task) in enumerate(tasks.items()):
        recipe["sources"][name] = paths["ab"[i % 2]]
        assert list(task.pop("splits")) == list(SPLITS)
        drawn = {s: rows(CASE, 10 * i + j, 2) for j, s in enumerate(SPLITS)}
        parts = {s: datasets.Dataset.from_list(given, columns) for s, given in drawn.items()}
        datasets.DatasetDict(parts).save_to_disk(root / name)
        task.pop("name", None)
        task["path"] = str(root / name)
    suite["data"] |= {"batch_size": 2, "eval_batch_size": 2}
    suite["trainer"] |= {"max_steps": 2, "val_check_interval": 1, "accelerator": "cpu"}
    (root / "suite.yaml").write_text(yaml.safe_dump(suite))
    return str(root / "suite.yaml")


PER_TASK = {"private": ["^visual_projection"], "trained": ["^visual_projection"]}


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize(
    ("kind", "parts"),
    [(CLIP, {}), (PROJECTED, {}), (PROJECTED, PER_TASK)],
    ids=["tower", "projected", "projections"],
)
def test_the_suite_of_adamerging_learns_towers_alone(tmp_path, kind, parts):
    """By the default method; the projections per task as the head of the suite says."""
    paths = towers(tmp_path / "models", kind)
    options = [f"--model.recipe.{name}={json.dumps(value)}" for name, value in parts.items()]
    if parts:
        options += ["--model.objective.terms", "HardLabels", "--optimizer", "torch.optim.Adam"]
    module = learn(["fit", "--config", tiny_suite(tmp_path, paths), *options]).model
    merged = module.merged
    plan = merged.plan
    learned = {place for key in plan.layout.slots for place in plan.binding.owners[key]}
    assert all(place.startswith(("vision_model.", "visual_projection.")) for place in learned)
    assert ("visual_projection.weight" in learned) == (kind is PROJECTED and not parts)
    start = plan.initial_raw()
    assert any(not torch.equal(raw, start[key]) for key, raw in merged.raw.items())
    assert len(module.results["selection"]) == 8 + 1
    if parts:
        own = [value for name, value in module.named_parameters() if "private" in name]
        assert [value.shape for value in own] == [(8, 8)] * 8
        assert len({value.detach().numpy().tobytes() for value in own}) == 8
        return
    assert (module.recipe.coefficients, module.recipe.preprocess) == (Column(), [TSVM()])

    export_merged(merged, tmp_path / "out")
    loaded = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    base = transformers.CLIPModel.from_pretrained(paths["base"])
    for place, parameter in loaded.named_parameters():
        assert torch.equal(parameter, base.get_parameter(place)) == (place not in learned), place
    assert transformers.AutoProcessor.from_pretrained(tmp_path / "out").tokenizer is not None
