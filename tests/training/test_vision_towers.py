"""CLIP classification as AdaMerging does it: vision towers before frozen zero-shot heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import yaml

from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData
from gradmerge.coefficients import Constant
from gradmerge.export.folder import export_merged
from gradmerge.objectives import Entropy, Objective
from kinds import CASES, folders, rows
from tiny import trainer_of

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


@pytest.mark.parametrize("kind", [CLIP, PROJECTED], ids=["tower", "projected"])
def test_the_suite_of_adamerging_learns_towers_alone(tmp_path, kind):
    """With tiny towers of random weights and drawn images in the place of the hub's."""
    suite = yaml.safe_load(SUITE.read_text())
    paths = towers(tmp_path / "models", kind)
    names = list(suite["model"]["recipe"]["sources"])
    assert names == list(suite["data"]["tasks"])
    tasks = {}
    for i, name in enumerate(names):
        fields = {k: v for k, v in suite["data"]["tasks"][name].items() if k not in _OF_THE_HUB}
        splits = {s: rows(CASE, 10 * i + j, 2) for j, s in enumerate(suite_splits(suite, name))}
        tasks[name] = TaskData(path=splits, class_names=["w1", "w2 w3", "w4"], **fields)
    sources = {name: paths["ab"[i % 2]] for i, name in enumerate(names)}
    recipe = Recipe(sources, base=paths["base"], init=Constant(0.1))
    module = MergeModule(recipe, Objective([Entropy()]))
    data = MergeDataModule(tasks, batch_size=2)
    trainer_of(tmp_path, max_steps=2).fit(module, datamodule=data)
    merged = module.merged
    owners = merged.plan.binding.owners
    learned = {place for key in merged.plan.layout.slots for place in owners[key]}
    assert all(place.startswith(("vision_model.", "visual_projection.")) for place in learned)
    assert ("visual_projection.weight" in learned) == (kind is PROJECTED)
    assert (merged.raw["tensor"] != 0.1).any()

    export_merged(merged, tmp_path / "out")
    loaded = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    base = transformers.CLIPModel.from_pretrained(paths["base"])
    for place, parameter in loaded.named_parameters():
        assert torch.equal(parameter, base.get_parameter(place)) == (place not in learned), place
    assert transformers.AutoProcessor.from_pretrained(tmp_path / "out").tokenizer is not None


_OF_THE_HUB = ("path", "name", "splits")


def suite_splits(suite, name):
    """The splits that a task of the suite names."""
    found = list(suite["data"]["tasks"][name]["splits"])
    assert found == ["adaptation", "selection", "test"]
    return found
