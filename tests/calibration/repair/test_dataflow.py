"""The data flow between layers, as the graph of a pass shows it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from gradmerge.calibration.repair.dataflow import Dataflow
from gradmerge.calibration.repair.layers import Layer


class Paths(nn.Module):
    """One layer per kind of path: what follows each is in the name."""

    def __init__(self):
        super().__init__()
        self.branch, self.same, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.written, self.chosen, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.scaled = Scaled(4, 4)

    def forward(self, x):
        x = self.norm(self.branch(x) + 0) + self.same(x)
        kept = torch.zeros_like(x)
        kept[:, :] = self.written(x).relu_()
        table = torch.eye(4)[self.chosen(x).argmax(dim=1)]  # no gradient passes
        cached = self.scaled(kept * table)
        return SimpleNamespace(logits=self.head(cached)[:, :2], hidden_states=cached)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def flow_of(network, *batches):
    layers = {
        place: Layer(place, module, f"{place}.weight")
        for place, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.BatchNorm1d))
    }
    flow = Dataflow(network.eval(), layers)
    with torch.no_grad():
        for batch in batches:
            flow.record(lambda batch=batch: network(batch))
    return flow


def test_where_outputs_go():
    flow = flow_of(Paths(), torch.randn(5, 4))
    assert flow.read == {"branch", "same", "norm", "written", "scaled"}
    assert flow.returned == {"head"}
    assert flow.normalised == set()
    assert flow.transformed == {"scaled"}
    places = [place for place, _ in flow.passes[0]]
    assert places == ["branch", "norm", "same", "written", "chosen", "scaled", "head"]


def test_layers_are_found_behind_batch_norm_and_again_after_it():
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 2)]
    flow = flow_of(nn.Sequential(*layers), torch.randn(5, 4))
    assert flow.normalised == {"0"}
    assert flow.read == {"0", "1"}
    assert flow.returned == {"3"}


class Shared(nn.Module):
    """Two layers of one input, and one of the same tensor after a write."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x.clone()
        x += self.one(x) * self.two(x)
        return self.three(x)


def test_consecutive_calls_of_one_input_share_a_number():
    flow = flow_of(Shared(), torch.randn(5, 4), torch.randn(2, 4))
    for calls in flow.passes:
        numbers = dict(calls)
        assert numbers["one"] == numbers["two"] != numbers["three"]


def test_a_pass_leaves_no_hook_and_records_no_gradient_of_weights():
    network = Shared()
    flow_of(network, torch.randn(5, 4))
    assert all(not module._forward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_outputs_beside_logits_do_not_count():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    network.register_forward_hook(
        lambda module, inputs, output: SimpleNamespace(logits=output * 1, states=output)
    )
    assert flow_of(network, torch.randn(5, 4)).returned == set()
