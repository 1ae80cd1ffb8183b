"""Channels of a repaired network have the sources' mean and deviation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from repairing import (
    LAST,
    Convolutions,
    Deep,
    ResNet,
    assert_statistics,
    averages,
    channels,
    exported,
    images,
    moments_of,
    networks,
    repaired,
    tokens,
    vectors,
)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_channels_of_a_perceptron_are_those_of_its_sources(memory):
    models, batches = networks(Deep, 3), vectors(40, 7, 23)
    merged, found = repaired(models, batches, memory=memory)
    places = ["first", "second", "third"]
    twin, expected = exported(merged, models[0]), averages(models, batches, places)
    assert_statistics(channels(twin, batches, places), expected)
    report = merged.state.corrections.report
    assert report["corrected"] == [f"{place}.weight" for place in places]
    assert report["left alone"] == {"head.weight": LAST}
    assert report["batches"] == 3
    average = sum(model.head.weight for model in models) / 3
    torch.testing.assert_close(twin.head.weight, average, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(merged(batches[0]), twin(batches[0]), rtol=1e-5, atol=1e-6)
    assert found.survey.unusual == {}


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_channels_of_convolutions_are_those_of_their_sources(memory):
    models, batches = networks(Convolutions), images(16, 5)
    merged, _ = repaired(models, batches, memory=memory)
    places = ["first", "grouped", "flat"]
    twin = exported(merged, models[0])
    assert_statistics(channels(twin, batches, places), averages(models, batches, places))
    assert merged.state.corrections.report["corrected"] == [f"{p}.weight" for p in places]


@pytest.mark.parametrize("buffers", ["recompute", "mean"])
def test_channels_of_a_residual_network_are_those_of_its_sources(buffers):
    """Behind each BatchNorm; its statistics are of what it sees, if the recipe says so."""
    models, batches = networks(ResNet), images(24, 9)
    merged, _ = repaired(models, batches, buffers=buffers)
    places = ["norm", *(f"blocks.{i}.bn{j}" for i in (0, 1) for j in (1, 2)), "blocks.1.short.1"]
    twin = exported(merged, models[0])
    assert_statistics(channels(twin, batches, places), averages(models, batches, places))
    report = merged.state.corrections.report
    assert sorted(report["corrected"]) == sorted(f"{place}.weight" for place in places)
    assert report["left alone"]["stem.weight"] == "it feeds a BatchNorm"
    stem = channels(twin, batches, ["stem", "blocks.1.conv1"])
    seen = torch.stack([stem["stem"][0].float(), twin.norm.running_mean])
    assert torch.allclose(*seen, atol=1e-5) == (buffers == "recompute")
    if buffers == "recompute":
        inner = twin.blocks[1].bn1
        rows = 33 * 16
        variance = stem["blocks.1.conv1"][1].square() * rows / (rows - 1)
        torch.testing.assert_close(inner.running_var.double(), variance, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(merged(batches[0]), twin(batches[0]), rtol=1e-5, atol=1e-5)


def test_a_llama_without_biases_gets_the_deviations(family):
    models, _ = family("llama", 3, torch.float32)
    batches = [tokens(8, 5, 3), tokens(2, 8)]
    merged, found = repaired(models[1:], batches)
    linear = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    linear += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    places = [f"model.layers.{i}.{name}" for i in (0, 1) for name in linear]
    twin = exported(merged, models[0])
    expected = averages(models[1:], batches, places)
    assert_statistics(channels(twin, batches, places), expected, mean=False)
    report = merged.state.corrections.report
    assert report["scale alone"] == [f"{place}.weight" for place in places]
    assert "corrected" not in report
    sizes = [len(stage) for stage in found.survey.stages]
    assert sizes == [3, 1, 2, 1] * 2, "layers of one input are measured in one pass"
    with torch.no_grad():
        got, wanted = merged(**batches[0]).logits, twin(**batches[0]).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


class Seen:
    """A merged model in evaluation, as `channels` looks at networks."""

    def __init__(self, merged):
        self.merged, self.get_submodule = merged, merged.skeleton.get_submodule

    def __call__(self, **batch):
        return self.merged.eval()(**batch)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("name", ["gpt2", "vit", "llama-tied", "t5"])
def test_channels_of_other_architectures(family, name, memory):
    """Weights stored `[in, out]`, renamed on loading, tied to an embedding; a decoder."""
    models, inputs = family(name, 3, torch.float32)
    batches = [inputs, {k: v.roll(1, -1) for k, v in inputs.items()}]
    merged, _ = repaired(models[1:], batches, memory=memory)
    report = merged.state.corrections.report
    binding = merged.plan.binding.parameters

    def places(kind):
        return [binding[n][0].removesuffix(".weight") for n in report.get(kind, ())]

    count = {"gpt2": (8, 0), "vit": (13, 0), "llama-tied": (0, 14), "t5": (0, 16)}[name]
    assert (len(places("corrected")), len(places("scale alone"))) == count
    for kind in ("corrected", "scale alone"):
        expected = averages(models[1:], batches, places(kind))
        got = channels(Seen(merged), batches, places(kind))
        assert_statistics(got, expected, mean=kind == "corrected")


def test_sixteen_bits_are_corrected_to_their_precision():
    models, batches = networks(Deep), vectors(200)
    merged, _ = repaired(models, [b.bfloat16() for b in batches], dtype=torch.bfloat16)
    places = ["first", "second", "third"]
    assert merged.state.corrections.report["corrected"] == [f"{place}.weight" for place in places]
    expected = averages(models, batches, places)
    got = channels(exported(merged, models[0]), batches, places)
    for place in places:
        assert (got[place][1] / expected[place][1] - 1).abs().max() < 0.05


def test_no_tensor_of_the_data_is_marked():
    batches = vectors(8, 8)
    repaired(networks(Deep), batches)
    assert [vars(batch) for batch in batches] == [{}, {}]


class InPlace(nn.Module):
    """The second layer's input is the first's, written to by what the first put out."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = x.clone()
        x += self.first(x).relu()
        return self.head(self.second(x).relu())


def test_an_input_that_was_written_to_is_another():
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(InPlace().eval())
    merged, found = repaired(models, vectors(50))
    assert [len(stage) for stage in found.survey.stages] == [1, 1]
    places = ["first", "second"]
    twin, expected = exported(merged, models[0]), averages(models, vectors(50), places)
    assert_statistics(channels(twin, vectors(50), places), expected)


def test_padding_does_not_count(family):
    models, _ = family("bert", 3, torch.float32)
    batches = [tokens(8, 5, 3), tokens(2, 8)]
    merged, _ = repaired(models[1:], batches)
    report = merged.state.corrections.report
    places = [name.removesuffix(".weight") for name in report["corrected"]]
    assert len(places) == 2 * 6 + 1
    assert "bert.pooler.dense" in places
    twin = exported(merged, models[0])
    assert_statistics(channels(twin, batches, places), averages(models[1:], batches, places))
    unmasked = [{"input_ids": batch["input_ids"]} for batch in batches]
    place = places[-2]
    other = channels(twin, unmasked, [place])[place]
    assert not torch.allclose(other[0], averages(models[1:], batches, places)[place][0], atol=1e-3)


class Layouts(nn.Module):
    """Tokens, each by itself, in one layout after the other."""

    def __init__(self):
        super().__init__()
        self.plain, self.flat, self.width = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(3, 3)
        self.heads, self.turned = nn.Linear(3, 3), nn.Linear(6, 6)
        self.conv, self.head = nn.Conv1d(6, 6, 1), nn.Linear(6, 3)

    def forward(self, x, attention_mask):
        batch, tokens, _ = x.shape
        x = self.flat(self.plain(x).relu().flatten(0, 1)).relu()
        x = self.width(x.view(batch, tokens, 2, 3)).relu()  # heads behind tokens
        x = self.heads(x.transpose(1, 2)).relu().transpose(1, 2).flatten(2)  # and before them
        x = self.turned(x.transpose(0, 1)).relu().transpose(0, 1)
        x = self.conv(x.mT).relu().mT
        kept = x * attention_mask[..., None]
        return self.head(kept.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("count", [1, 2])
def test_padding_does_not_count_in_any_layout(count):
    """Other numbers on padding change no correction."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Layouts().eval())
    found = []
    for noise in (0.0, 5.0):
        batches = []
        for lengths in ([5, 3, 2], [1, 5])[:count]:
            mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).float()
            x = torch.randn(len(lengths), 5, 6, generator=torch.Generator().manual_seed(4))
            batches.append({"x": x + noise * (1 - mask)[..., None], "attention_mask": mask})
        merged, _ = repaired(models, batches)
        found.append(merged.state.corrections)
    names = ["plain", "flat", "width", "heads", "turned", "conv"]
    assert found[0].report["corrected"] == [f"{name}.weight" for name in names]
    for name, correction in found[0].of.items():
        other = found[1].of[name]
        torch.testing.assert_close(other.scale, correction.scale, rtol=1e-5, atol=1e-6)
        if correction.shift is not None:
            torch.testing.assert_close(other.shift, correction.shift, rtol=1e-5, atol=1e-6)


class OneExample(nn.Module):
    """Takes one example without an axis of batches, up to the vector behind its head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=4)
        self.flat = nn.Conv1d(8, 6, 2)
        self.vector, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.grouped(self.first(x).relu()).relu()
        return self.head(self.vector(self.flat(x.flatten(1)).relu().mean(dim=1)).relu())


def test_examples_may_come_without_an_axis_of_batches():
    """Means and deviations over the places of several examples are those of the sources."""
    torch.manual_seed(0)
    models = [OneExample().eval() for _ in range(2)]
    batches = list(images(6)[0])
    merged, found = repaired(models, batches)
    places = ["first", "grouped", "flat", "vector"]
    assert [layer.place for layer in found.survey.layers] == places
    assert found.survey.left == {"head.weight": LAST}
    own = [moments_without_a_batch(model, batches, places) for model in models]
    after = moments_without_a_batch(exported(merged, models[0]), batches, places)
    for place in places:
        for i in range(2):
            expected = (own[0][place][i] + own[1][place][i]) / 2
            torch.testing.assert_close(after[place][i], expected, rtol=1e-4, atol=1e-5)


def moments_without_a_batch(model, batches, places):
    """Of layers whose outputs are `[channels, ...]`."""
    return moments_of(
        model, batches, places, lambda out: out.flatten(1).T if out.dim() > 1 else out[None]
    )
