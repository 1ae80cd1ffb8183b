"""Finishing a merge on data: when it is done anew, and within a trainer's inference mode."""

from __future__ import annotations

import torch
from torch import nn

from gradmerge import MergeDataModule, MergeModule, TaskData
from gradmerge.finalisers import REPAIR
from tiny import SPLITS, Normalised, build, recipe_of, relatives, vectors


class Masked(nn.Module):
    """Multiplies activations by the data, which a graph would keep for backward."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, attention_mask):
        kept = self.first(x).relu() * attention_mask[..., None]
        return self.head(self.second(kept).relu().mean(dim=1))


def test_other_data_give_other_statistics():
    module = MergeModule(recipe_of(relatives(build(Normalised))))
    found = []
    for count in (12, 20):
        data = vectors(count=count)
        data.setup()
        module.refresh_buffers(data)
        found.append(module.merged.network_buffers.values()["norm.running_mean"].clone())
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    module.refresh_buffers()  # without data, those that are known for these coefficients stay
    assert torch.equal(module.merged.network_buffers.values()["norm.running_mean"], found[1])


def test_repair_is_computed_in_inference_mode():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(5) < 3).float()
    rows = [
        {"x": torch.randn(5, 4, generator=generator), "attention_mask": mask, "labels": label}
        for label in torch.arange(8) % 3
    ]
    tasks = {task: TaskData(dict.fromkeys(SPLITS, rows), "tensors") for task in "ab"}
    data = MergeDataModule(tasks, batch_size=4, check_disjoint=False)
    modules = []
    for inference in (True, False):
        modules.append(MergeModule(recipe_of(relatives(build(Masked)), finalisers=[REPAIR()])))
        data.setup()
        with torch.inference_mode(inference):
            modules[-1].refresh_buffers(data)
    one, two = (module.merged.state.corrections for module in modules)
    assert one.report["corrected"] == ["first.weight", "second.weight"]
    for name, correction in two.of.items():
        assert torch.equal(one.of[name].scale, correction.scale)
