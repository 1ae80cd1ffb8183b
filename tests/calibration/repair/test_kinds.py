"""Kinds of layers that REPAIR scales, and its options."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from gradmerge import MergedModel, Recipe
from gradmerge.common.errors import ConfigError
from gradmerge.finalisers import REPAIR, Corrections
from repairing import (
    Deep,
    assert_statistics,
    averages,
    channels,
    exported,
    images,
    moments_of,
    networks,
    repaired,
    vectors,
)


class Volumes(nn.Module):
    """Convolutions of three axes, transposed ones (in groups, too), weights by `weight_norm`."""

    def __init__(self):
        super().__init__()
        self.solid = nn.Conv3d(2, 6, 2)
        self.up1 = nn.ConvTranspose1d(6, 8, 3, stride=2)
        self.up2 = nn.ConvTranspose2d(8, 6, 3, groups=2, bias=False)
        self.up3 = nn.ConvTranspose3d(6, 4, 2, groups=2)
        self.normed = weight_norm(nn.Linear(4, 6))
        self.filter = weight_norm(nn.Conv1d(1, 4, 2))
        self.spectral = spectral_norm(nn.Linear(4, 6))
        self.columns = weight_norm(nn.Linear(6, 6), dim=1)
        self.recurrent = nn.LSTM(6, 5, batch_first=True)
        self.experts, self.table = nn.Parameter(torch.ones(2, 5, 5)), nn.Parameter(torch.ones(2, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.solid(x.unflatten(1, (1, 3)).expand(-1, 2, -1, -1, -1)).relu()
        x = self.up1(x.mean(dim=(2, 3))).relu()
        x = self.up2(x.unflatten(2, (5, -1))).relu()
        x = self.up3(x[:, :, :4, :3, None]).relu()
        x = self.normed(x.mean(dim=(2, 3, 4))).relu()
        x = self.filter(x[:, None]).relu().mean(dim=2)
        x = self.columns(self.spectral(x).relu()).relu()
        x = self.recurrent(x[:, None])[0][:, 0]
        return self.head(x @ self.experts.mean(dim=0) + self.table.mean(dim=0))


def channels_first(model, batches, places):
    """`channels`, of layers whose outputs are `[batch, channels, ...]`."""
    return moments_of(
        model, batches, places, lambda out: out.movedim(1, -1).flatten(0, -2).double()
    )


@pytest.mark.parametrize("parts", [[24], [16, 8]])
def test_every_layer_that_can_be_scaled_is_corrected(parts):
    """On the fly and folded; the rest is named."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Volumes().eval())
    batches = images(*parts)
    merged, found = repaired(models, batches)
    report = merged.state.corrections.report
    g = "parametrizations.weight.original0"
    corrected = ["solid.weight", "up1.weight", "up3.weight", f"normed.{g}", f"filter.{g}"]
    assert report["corrected"] == corrected
    assert report["scale alone"] == ["up2.weight"]
    computed, lstm = "its layer's weight is computed from it", "REPAIR corrects no LSTM"
    assert found.survey.unusual == {
        "spectral.parametrizations.weight.original": computed,
        f"columns.{g}": computed,
        "columns.parametrizations.weight.original1": computed,
        "recurrent.weight_ih_l0": lstm,
        "recurrent.weight_hh_l0": lstm,
        "experts": "REPAIR corrects no Volumes",
    }
    assert found.survey.left["table"] == "no layer of a known kind holds it"
    places = ["solid", "up1", "up2", "up3", "normed", "filter"]
    got = channels_first(exported(merged, models[0]), batches, places)
    own = [channels_first(model, batches, places) for model in models]
    for place in places:
        means, deviations = (sum(o[place][i] for o in own) / 2 for i in (0, 1))
        torch.testing.assert_close(got[place][1], deviations, rtol=1e-4, atol=1e-5)
        if place != "up2":
            torch.testing.assert_close(got[place][0], means, rtol=1e-4, atol=1e-4)
    before = {n: merged.state.materialise(n) for n in ("up2.weight", "up3.weight")}
    merged.state.corrections = Corrections.restore(merged.state.corrections.to_save())
    for name, tensor in before.items():
        assert torch.equal(merged.state.materialise(name), tensor)


def test_weight_norm_of_old_style_is_scaled_by_its_g():
    models, batches = networks(Deep), vectors(40, 9)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for model in models:
            torch.nn.utils.weight_norm(model.second)
            model(batches[0])
    merged, _ = repaired(models, batches)
    names = ["first.weight", "second.weight_g", "third.weight"]
    assert merged.state.corrections.report["corrected"] == names
    places = ["first", "second", "third"]
    twin, expected = exported(merged, models[0]), averages(models, batches, places)
    assert_statistics(channels(twin, batches, places), expected)


def test_it_has_to_be_computed_first():
    merged = MergedModel(
        Recipe(dict(zip("ab", networks(Deep), strict=True)), finalisers=[REPAIR()])
    )
    with pytest.raises(ConfigError, match=r"REPAIR has not been computed.*adaptation data"):
        merged.state.materialise("first.weight")
    with torch.no_grad(), pytest.raises(ConfigError, match="REPAIR has not been computed"):
        merged(vectors(3)[0])
    merged(vectors(3)[0]).sum().backward()
    assert merged.raw["tensor"].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolate": "median"}, "REPAIR: interpolate: expected mean or coefficients"),
        ({"batches": 0}, "REPAIR: batches: expected 1 or more, got 0"),
        ({"skip": ["("]}, "REPAIR.skip: invalid regular expression"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        REPAIR(**options)


def test_it_stands_once_in_a_recipe():
    with pytest.raises(ConfigError, match="finalisers: expected REPAIR once, got twice"):
        Recipe({"a": nn.Linear(2, 2)}, finalisers=[REPAIR(), REPAIR()])


def test_no_warning_in_evaluation():
    models, batches = networks(Deep), vectors(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repaired(models, batches)
