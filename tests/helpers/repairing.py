"""Networks, passes and statistics of channels for the tests of REPAIR."""

from __future__ import annotations

import copy

import torch
from torch import nn

from gradmerge import MergedModel, Recipe
from gradmerge.calibration.repair.correct import Renormalisation
from gradmerge.calibration.repair.measure import Run
from gradmerge.coefficients import Model, Uniform
from gradmerge.finalisers import REPAIR

LAST = "it is a last layer: no other reads its output"
GIVEN = "the network gives out its output as it is"


class Deep(nn.Module):
    """Three linear layers and a head, without any norm."""

    def __init__(self, width=16, bias=True):
        super().__init__()
        self.first = nn.Linear(6, width, bias=bias)
        self.second = nn.Linear(width, width, bias=bias)
        self.third = nn.Linear(width, width, bias=bias)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.third(self.second(self.first(x).relu()).relu()).relu())


class Convolutions(nn.Module):
    """Convolutions with biases, one of them in groups, and a 1-D one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=4)
        self.flat = nn.Conv1d(8, 6, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.grouped(self.first(x).relu_()).relu_()
        return self.head(self.flat(x.flatten(2)).relu().mean(dim=2))


class Block(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.short = nn.Sequential()
        if stride != 1:
            self.short = nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.short(x)).relu()


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(Block(6, 6, 1), Block(6, 8, 2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.blocks(self.norm(self.stem(x)).relu()).mean(dim=(2, 3)))


def networks(kind, count=2, **options):
    """Independently initialised networks; statistics of BatchNorm from data of their own."""
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = kind(**options)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
                module.momentum = None
        with torch.no_grad():
            model.train()(torch.randn(64, 3, 8, 8) if kind is not Deep else torch.randn(64, 6))
        made.append(model.eval())
    return made


def images(*sizes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 3, 8, 8, generator=generator) + 0.5 for n in sizes]


def vectors(*sizes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 6, generator=generator) + 0.5 for n in sizes]


def repaired(models, batches, repair=None, memory="resident", dtype=torch.float32, **options):
    """A merged model after REPAIR on batches, and the REPAIR."""
    sources = dict(zip("abcd", models, strict=False))
    factors = {"coefficients": Model(), "init": Uniform(), "finalisers": [repair or REPAIR()]}
    merged = MergedModel(Recipe(sources, **{**factors, **options}), memory=memory, dtype=dtype)
    runs = [run_of(merged, batch) for batch in batches]
    found = Renormalisation(merged, merged.plan.finalisation.repair, runs)
    found.correct(runs)
    return merged, found


def run_of(merged, batch):
    if isinstance(batch, dict):
        return Run(lambda: merged(**batch), batch.get("attention_mask"))
    return Run(lambda: merged(batch))


def exported(merged, model):
    """A network of its own with the tensors and buffers that an export writes."""
    twin = copy.deepcopy(model)
    state = {n: merged.state.materialise(n) for n in merged.plan.tensors}
    state.update({n: b.clone() for n, b in merged.network_buffers.values().items()})
    twin.load_state_dict(state, strict=False)
    return twin.eval()


def channels(model, batches, places):
    """Mean and deviation of layers' outputs over all rows together, by place."""
    rows = {place: [] for place in places}
    mask = None

    def note(place, output):
        if mask is not None and output.dim() == 3:
            output = output[mask.bool()]
        elif output.dim() == 4 or (output.dim() == 3 and isinstance(model, Convolutions)):
            output = output.movedim(1, -1)
        rows[place].append(output.reshape(-1, output.shape[-1]).double())

    hooks = [
        model.get_submodule(place).register_forward_hook(
            lambda _, __, output, place=place: note(place, output)
        )
        for place in places
    ]
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, dict) else None
            model(**batch) if isinstance(batch, dict) else model(batch)
    for hook in hooks:
        hook.remove()
    every = {place: torch.cat(found) for place, found in rows.items()}
    return {p: (r.mean(0), r.std(0, correction=0)) for p, r in every.items()}


def averages(models, batches, places, weights=None):
    """The targets of the channels: means over the models."""
    weights = weights or [1 / len(models)] * len(models)
    own = [channels(model, batches, places) for model in models]
    return {
        place: tuple(
            sum(w * o[place][i] for w, o in zip(weights, own, strict=True)) for i in (0, 1)
        )
        for place in places
    }


def assert_statistics(got, expected, mean=True, tolerance=1e-4):
    for place, (target, deviation) in expected.items():
        if mean:
            torch.testing.assert_close(got[place][0], target, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got[place][1], deviation, rtol=tolerance, atol=tolerance)


def moments_of(model, batches, places, rows_of):
    """Mean and deviation of each place's channels; `rows_of` makes an output `[rows, channels]`."""
    rows = {place: [] for place in places}
    hooks = [
        model.get_submodule(place).register_forward_hook(
            lambda _, __, output, place=place: rows[place].append(rows_of(output))
        )
        for place in places
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    every = {place: torch.cat(found) for place, found in rows.items()}
    return {place: (r.mean(0), r.std(0, correction=0)) for place, r in every.items()}


def tokens(*lengths):
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 32, (len(lengths), 8), generator=generator)
    mask = (torch.arange(8)[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}
