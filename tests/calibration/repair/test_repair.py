"""REPAIR: channels' statistics after it, what is folded, and what is left alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from gradmerge import MergedModel, Recipe
from gradmerge.alignment import OptimalTransport, WeightMatching
from gradmerge.calibration.repair.correct import Renormalisation
from gradmerge.calibration.repair.layers import Run, in_order
from gradmerge.coefficients import Constant, Model, Uniform
from gradmerge.errors import ConfigError
from gradmerge.finalisers import REPAIR, DepthRescale, SpectralRescale
from gradmerge.finalisers.repair import correction_of

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
    state = {n: merged.plan.materialise(n, merged.raw) for n in merged.plan.tensors}
    state.update({n: b.clone() for n, b in merged.statistics.values().items()})
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
    """What the channels shall have."""
    weights = weights or [1 / len(models)] * len(models)
    own = [channels(model, batches, places) for model in models]
    return {
        place: tuple(
            sum(w * o[place][i] for w, o in zip(weights, own, strict=True)) for i in (0, 1)
        )
        for place in places
    }


def assert_statistics(came, expected, mean=True, tolerance=1e-4):
    for place, (target, deviation) in expected.items():
        if mean:
            torch.testing.assert_close(came[place][0], target, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(came[place][1], deviation, rtol=tolerance, atol=tolerance)


# ---- statistics after it --------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_channels_of_a_perceptron_are_those_of_its_sources(memory):
    models, batches = networks(Deep, 3), vectors(40, 7, 23)
    merged, found = repaired(models, batches, memory=memory)
    places = ["first", "second", "third"]
    twin, expected = exported(merged, models[0]), averages(models, batches, places)
    assert_statistics(channels(twin, batches, places), expected)
    report = merged.plan.finalisation.report
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
    assert merged.plan.finalisation.report["corrected"] == [f"{p}.weight" for p in places]


@pytest.mark.parametrize("buffers", ["recompute", "mean"])
def test_channels_of_a_residual_network_are_those_of_its_sources(buffers):
    """Behind each BatchNorm; its statistics are of what it sees, if the recipe says so."""
    models, batches = networks(ResNet), images(24, 9)
    merged, _ = repaired(models, batches, buffers=buffers)
    places = ["norm", *(f"blocks.{i}.bn{j}" for i in (0, 1) for j in (1, 2)), "blocks.1.short.1"]
    twin = exported(merged, models[0])
    assert_statistics(channels(twin, batches, places), averages(models, batches, places))
    report = merged.plan.finalisation.report
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


def tokens(*lengths):
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 32, (len(lengths), 8), generator=generator)
    mask = (torch.arange(8)[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


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
    report = merged.plan.finalisation.report
    assert report["scale alone"] == [f"{place}.weight" for place in places]
    assert "corrected" not in report
    sizes = [len(stage) for stage in found.survey.stages]
    assert sizes == [3, 1, 2, 1] * 2, "layers of one input are measured in one pass"
    with torch.no_grad():
        came, wanted = merged(**batches[0]).logits, twin(**batches[0]).logits
    torch.testing.assert_close(came, wanted, rtol=1e-5, atol=1e-5)


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
    report = merged.plan.finalisation.report
    binding = merged.plan.binding.parameters

    def places(kind):
        return [binding[n][0].removesuffix(".weight") for n in report.get(kind, ())]

    count = {"gpt2": (8, 0), "vit": (13, 0), "llama-tied": (0, 14), "t5": (0, 16)}[name]
    assert (len(places("corrected")), len(places("scale alone"))) == count
    for kind in ("corrected", "scale alone"):
        expected = averages(models[1:], batches, places(kind))
        came = channels(Seen(merged), batches, places(kind))
        assert_statistics(came, expected, mean=kind == "corrected")


def test_sixteen_bits_are_corrected_to_their_precision():
    models, batches = networks(Deep), vectors(200)
    merged, _ = repaired(models, [b.bfloat16() for b in batches], dtype=torch.bfloat16)
    places = ["first", "second", "third"]
    assert merged.plan.finalisation.report["corrected"] == [f"{place}.weight" for place in places]
    expected = averages(models, batches, places)
    came = channels(exported(merged, models[0]), batches, places)
    for place in places:
        assert (came[place][1] / expected[place][1] - 1).abs().max() < 0.05


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
    report = merged.plan.finalisation.report
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
        found.append(merged.plan.finalisation)
    names = ["plain", "flat", "width", "heads", "turned", "conv"]
    assert found[0].report["corrected"] == [f"{name}.weight" for name in names]
    for name, correction in found[0].corrections.items():
        other = found[1].corrections[name]
        torch.testing.assert_close(other.scale, correction.scale, rtol=1e-5, atol=1e-6)
        if correction.shift is not None:
            torch.testing.assert_close(other.shift, correction.shift, rtol=1e-5, atol=1e-6)


# ---- what is folded -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Deep, Convolutions])
def test_folded_weights_are_the_normaliser_on_the_fly(kind):
    """The paper's: each layer's output is normalised by its batch, then given the targets."""
    models = networks(kind)
    batch = (vectors if kind is Deep else images)(50)[0]
    merged, _ = repaired(models, [batch])
    places = [n for n, m in models[0].named_modules() if n not in ("", "head")]
    targets = averages(models, [batch], places)
    twin = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(sum(dict(m.named_parameters())[name] for m in models) / 2)
    for place in places:

        def normalise(_, __, output, place=place):
            dims = [d for d in range(output.dim()) if d != 1]
            shape = [1, -1] + [1] * (output.dim() - 2)
            mean, deviation = (t.float().view(shape) for t in targets[place])
            apart = output - output.mean(dims, keepdim=True)
            return apart / output.std(dims, correction=0, keepdim=True) * deviation + mean

        twin.get_submodule(place).register_forward_hook(normalise)
    with torch.no_grad():
        torch.testing.assert_close(merged(batch), twin(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("buffers", ["recompute", "mean"])
@pytest.mark.parametrize("kind", [Deep, Convolutions, ResNet])
def test_one_pass_over_one_batch_gives_what_passes_over_its_parts_give(kind, buffers, memory):
    models = networks(kind)
    parts = (vectors if kind is Deep else images)(30, 12)
    options = {"frozen": {r"third\.bias": "mean"}} if kind is Deep else {}
    passes, found = [], []
    for batches in (parts, [torch.cat(parts)]):
        merged, renormalisation = repaired(
            models, batches, memory=memory, buffers=buffers, **options
        )
        calls = []
        runs = [run_of(merged, batch) for batch in batches]
        counted = [Run(lambda run=run, calls=calls: (calls.append(1), run.call())) for run in runs]
        renormalisation.correct(counted)
        passes.append(len(calls))
        found.append(merged)
    assert passes == [2 * len(renormalisation.survey.stages), 1]
    many, one = (merged.plan.finalisation.corrections for merged in found)
    assert many.keys() == one.keys()
    for name, correction in many.items():
        torch.testing.assert_close(one[name].scale, correction.scale, rtol=1e-4, atol=1e-5)
        if correction.shift is not None:
            torch.testing.assert_close(one[name].shift, correction.shift, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        came, wanted = (merged(parts[0]) for merged in found)
    torch.testing.assert_close(came, wanted, rtol=1e-4, atol=1e-4)
    for name, buffer in found[0].statistics.values().items():
        if "num_batches" not in name:
            torch.testing.assert_close(found[1].statistics.values()[name], buffer)


def test_an_average_of_two_scalings_of_one_network_is_that_network():
    """Scaled by 4 and back behind the ReLU: an average is off by 1.5625, which REPAIR takes out."""
    (model,), batches = networks(Deep, 1), vectors(30, 20)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (scaled.first.weight, scaled.first.bias):
            tensor.mul_(4)
        scaled.second.weight.div_(4)
    merged, _ = repaired([model, scaled], batches)
    with torch.no_grad():
        expected = model(batches[0])
        torch.testing.assert_close(scaled(batches[0]), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged(batches[0]), expected, rtol=1e-5, atol=1e-5)
        merged.train()
        assert (merged(batches[0]) - expected).abs().max() > 0.02


def test_the_variance_collapse_of_independent_networks_is_undone():
    models, batches = networks(Deep, 4, width=64), vectors(200)
    places = ["first", "second", "third"]
    wanted = averages(models, batches, places)
    merged, _ = repaired(models, batches)
    collapsed = Recipe(dict(zip("abcd", models, strict=True)), coefficients=Model(), init=Uniform())
    ratios = []
    for each in (MergedModel(collapsed), merged):
        came = channels(exported(each, models[0]), batches, places)
        ratios.append([float((came[p][1] / wanted[p][1]).mean()) for p in places])
    assert ratios[0][0] < 0.6
    assert ratios[0][2] < 0.15, "from layer to layer"
    assert ratios[1] == pytest.approx([1, 1, 1], abs=1e-4)


def test_of_one_source_nothing_changes():
    (model,), batches = networks(Deep, 1), vectors(20, 12)
    merged, _ = repaired([model], batches)
    for name, tensor in model.named_parameters():
        came = merged.plan.materialise(name, merged.raw)
        torch.testing.assert_close(came, tensor.detach(), rtol=1e-5, atol=1e-6)


def test_of_one_source_with_batch_norm_the_function_stays():
    """Whatever its statistics were of: gain and bias make up for those that are recomputed."""
    (model,), batches = networks(ResNet, 1), images(20, 12)
    merged, _ = repaired([model], batches)
    means = [merged.statistics.values()["norm.running_mean"], model.norm.running_mean]
    assert not torch.allclose(*means, atol=1e-3)
    with torch.no_grad():
        expected = model(batches[0])
        torch.testing.assert_close(merged(batches[0]), expected, rtol=1e-5, atol=1e-5)


def test_targets_go_by_coefficients_where_asked_for():
    models, batches = networks(Deep), vectors(40)
    repair = REPAIR(interpolate="coefficients")
    merged, _ = repaired(models, batches, repair, init=Constant([0.6, 0.2]))
    places = ["first", "second", "third"]
    expected = averages(models, batches, places, [0.75, 0.25])
    assert_statistics(channels(exported(merged, models[0]), batches, places), expected)
    with pytest.raises(ConfigError, match=r"none below, got \[0.6, -0.2\] at first.weight"):
        repaired(models, batches, repair, init=Constant([0.6, -0.2]))


@pytest.mark.parametrize(("reference", "number"), [("a", 0), ("b", 1)])
@pytest.mark.parametrize("interpolate", ["mean", "coefficients"])
def test_a_source_whose_units_are_mixed_sets_no_target(reference, number, interpolate):
    """Its view computes something else than the source, whose channels are none of the merge."""
    models, batches = networks(Deep), vectors(40, 30)
    mixing = OptimalTransport(ground="weights", regularisation=0.2, reference=reference)
    repair = REPAIR(interpolate=interpolate)
    merged, _ = repaired(models, batches, repair, alignment=mixing)
    places = ["first", "second", "third"]
    own = channels(models[number], batches, places)
    assert_statistics(channels(exported(merged, models[0]), batches, places), own)
    assert merged.plan.finalisation.report["targets of"] == [reference]
    view = exported_source(merged, models[0], "ba"[number])
    mixed, original = (channels(m, batches, places) for m in (view, models[1 - number]))
    shrunk = mixed["third"][1].mean() / original["third"][1].mean()
    assert shrunk < 0.7  # a target that the merge would have been scaled down to


def test_every_source_sets_targets_where_units_are_permuted():
    models, batches = networks(Deep), vectors(40, 30)
    merged, _ = repaired(models, batches, alignment=WeightMatching())
    assert "targets of" not in merged.plan.finalisation.report
    places = ["first", "second", "third"]
    twin = exported(merged, models[0])
    aligned = [exported_source(merged, models[0], name) for name in "ab"]
    assert_statistics(channels(twin, batches, places), averages(aligned, batches, places))


def exported_source(merged, model, name):
    twin = copy.deepcopy(model)
    twin.load_state_dict({n: merged.plan.read(name, n) for n in merged.plan.tensors}, strict=False)
    return twin.eval()


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


def moments_without_a_batch(model, batches, places):
    """Of layers whose outputs are `[channels, ...]`."""
    return moments_of(
        model, batches, places, lambda out: out.flatten(1).T if out.dim() > 1 else out[None]
    )


def test_a_constant_channel_gets_the_mean_alone():
    values = [torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2.0], [0.0, 0.5], [3.0, 4.0])]
    target = torch.tensor([2.0, 1.0], dtype=torch.float64)
    scale, shift, constant = correction_of(*values, target)
    assert scale.tolist() == [1, 2]
    assert shift.tolist() == [2, 0]
    assert constant == 1


@pytest.mark.parametrize("others", ["before", "after"])
def test_others_act_in_the_order_given(others):
    models, batches = networks(Deep), vectors(40)
    free = [DepthRescale(0.5, 1.5), SpectralRescale()]
    finalisers = [*free, REPAIR()] if others == "before" else [REPAIR(), *free]
    merged, _ = repaired(models, batches, finalisers=finalisers)
    places = ["first", "second", "third"]
    expected = averages(models, batches, places)
    twin = exported(merged, models[0])
    came = channels(twin, batches, places)
    with torch.no_grad():
        torch.testing.assert_close(merged(batches[0]), twin(batches[0]), rtol=1e-5, atol=1e-5)
    if others == "before":
        assert_statistics(came, expected)
    else:
        norms = [torch.linalg.matrix_norm(m.first.weight.detach(), 2) for m in models]
        own = torch.linalg.matrix_norm(twin.first.weight.detach(), 2)
        torch.testing.assert_close(own, sum(norms) / 2, rtol=1e-5, atol=0)
        assert not torch.allclose(came["second"][1], expected["second"][1], rtol=1e-2)


# ---- where it is off ------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_it_is_off_while_coefficients_learn(memory):
    models, (batch,) = networks(Deep), vectors(40)
    merged, _ = repaired(models, [batch], memory=memory)
    plain = MergedModel(
        Recipe(dict(zip("ab", models, strict=True)), coefficients=Model(), init=Uniform()),
        memory=memory,
    )
    with torch.no_grad():
        finished = merged(batch)
    losses = []
    for model in (merged, plain):
        loss = model(batch).square().mean()
        with torch.no_grad():
            model(batch)  # finished in between, before backward
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    assert torch.equal(merged.raw["model"].grad, plain.raw["model"].grad)
    with torch.no_grad():
        assert torch.equal(merged(batch), finished)
        torch.testing.assert_close(merged.train()(batch), plain(batch), rtol=0, atol=0)
    assert not torch.allclose(finished, plain(batch), atol=1e-2)


def test_no_finalisers_change_no_bit():
    models, (batch,) = networks(ResNet), images(8)
    plain, none = (
        MergedModel(Recipe(dict(zip("ab", models, strict=True)), **options))
        for options in ({}, {"finalisers": []})
    )
    assert not none.plan.finalisation.active
    for name in plain.plan.tensors:
        first, second = (m.plan.materialise(name, m.raw) for m in (plain, none))
        assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(plain(batch), none(batch))


# ---- what is left alone ---------------------------------------------------------------------


class Standardised(nn.Linear):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=1, keepdim=True)
        return nn.functional.linear(x, weight, self.bias)


class Odd(nn.Module):
    """Layers that cannot be corrected, each for a reason of its own."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.standardised = Standardised(6, 6)
        self.frozen, self.skipped = nn.Linear(6, 6), nn.Linear(6, 6)
        self.partly = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.uncalled = nn.Linear(2, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.twice(self.norm(self.twice(x)).relu()).relu())
        x = self.standardised(self.other(self.one(x)).relu()).relu()
        return self.head(self.partly(self.skipped(self.frozen(x)).relu()).relu())


def test_what_cannot_be_corrected_is_left_alone_and_named():
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Odd().eval())
    merged, found = repaired(
        models,
        vectors(30),
        REPAIR(skip=["^skipped"]),
        frozen={r"^frozen\.": "mean", r"partly\.bias": "mean"},
    )
    assert found.survey.left == {
        "twice.weight": "it is called 2 times a pass",
        "norm.weight": "it is called 2 times a pass",
        "one.weight": "its weight is shared by one.weight, other.weight",
        "standardised.weight": "its weight is transformed before use",
        "frozen.weight": "it is frozen",
        "skipped.weight": "skip names it",
        "head.weight": LAST,
        "uncalled.weight": "no pass calls it",
    }
    assert merged.plan.finalisation.report["scale alone"] == ["partly.weight"]
    places = ["partly"]
    twin, expected = exported(merged, models[0]), averages(models, vectors(30), places)
    assert_statistics(channels(twin, vectors(30), places), expected, mean=False)
    average = {
        n: (p + dict(models[1].named_parameters())[n]) / 2 for n, p in models[0].named_parameters()
    }
    for name, tensor in twin.named_parameters():
        same = torch.allclose(tensor, average[name], atol=1e-6)
        assert same == (name != "partly.weight"), name


class Loops(nn.Module):
    """The course depends on the batch's size, and on a number among the weights."""

    def __init__(self):
        super().__init__()
        self.first, self.loop, self.side = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.third, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.level = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        x, size = self.first(x).relu(), len(x)
        for _ in range(1 + size % 2):
            x = self.loop(x).relu()
        if size > 20:
            x = self.side(x).relu()
        x = self.third(x).relu()
        if self.level > 0:
            x = self.third(x).relu()
        return self.head(x)


def loops(*levels):
    models = []
    for seed, level in enumerate(levels):
        torch.manual_seed(seed)
        models.append(Loops().eval())
        models[-1].level.data.fill_(level)
    return models


def test_calls_are_those_of_all_batches():
    """Called twice on the third batch alone; called on the second and third alone."""
    models, batches = loops(-1, -2), vectors(20, 30, 31)
    merged, found = repaired(models, batches)
    report = merged.plan.finalisation.report
    assert report["corrected"] == ["first.weight", "side.weight", "third.weight"]
    assert report["left alone"] == {
        "loop.weight": "it is called 2 times a pass",
        "head.weight": LAST,
    }
    assert [[layer.place for layer in stage] for stage in found.survey.stages] == [
        ["first"],
        ["side"],
        ["third"],
    ]
    twin, places = exported(merged, models[0]), ["first", "side", "third"]
    assert_statistics(channels(twin, batches, places), averages(models, batches, places))


def test_calls_are_those_of_all_sources():
    models, batches = loops(-1, 2), vectors(20, 30)
    merged, _ = repaired(models, batches)
    report = merged.plan.finalisation.report
    assert report["corrected"] == ["first.weight", "loop.weight", "side.weight"]
    assert report["left alone"]["third.weight"] == "source b calls it 2 times a pass"
    twin, places = exported(merged, models[0]), ["first", "loop", "side"]
    assert_statistics(channels(twin, batches, places), averages(models, batches, places))


@pytest.mark.parametrize("sizes", [[30], [30, 40]])
def test_a_layer_that_the_merged_network_alone_calls_again_is_refused(sizes):
    """Coefficients that leave the sources' range turn the number's sign."""
    models, batches = loops(-1, -2), vectors(*sizes)
    message = r"merged network calls third more than once.*Name third.weight in `skip`"
    with pytest.raises(ConfigError, match=message):
        repaired(models, batches, init=Constant([1.0, -0.9]))
    merged, _ = repaired(models, batches, REPAIR(skip=["^third"]), init=Constant([1.0, -0.9]))
    assert "third.weight" not in merged.plan.finalisation.report["corrected"]


class Experts(nn.Module):
    """Rows go to one of two experts by the sign of a number; each is called on its rows."""

    def __init__(self, norm=False):
        super().__init__()
        kind = (lambda: nn.BatchNorm1d(6)) if norm else (lambda: nn.Linear(6, 6))
        self.first = nn.Linear(6, 6)
        self.experts, self.head = nn.ModuleList(kind() for _ in range(2)), nn.Linear(6, 3)

    def forward(self, x):
        chosen = (x[:, 0] > 0).long()
        x = self.first(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[chosen == i] = expert(x[chosen == i])
        return self.head(y.relu())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sizes", [(8,), (8, 4)])
def test_an_expert_that_no_row_reaches_is_named(sizes, norm):
    torch.manual_seed(0)
    models = [Experts(norm).eval() for _ in range(2)]
    batches = [batch.abs() for batch in vectors(*sizes)]
    merged, _ = repaired(models, batches, buffers="mean")
    report = merged.plan.finalisation.report
    assert report["corrected"] == ["first.weight", "experts.1.weight"]
    assert report["left alone"] == {
        "experts.0.weight": "no row of the data reaches it in the merged network",
        "head.weight": LAST,
    }
    before, after = (
        MergedModel(
            Recipe(dict(zip("ab", models, strict=True)), coefficients=Model(), init=Uniform())
        ),
        exported(merged, models[0]),
    )
    kept = before.plan.materialise("experts.0.weight", before.raw)
    torch.testing.assert_close(after.experts[0].weight, nn.Parameter(kept))


class Turned(Loops):
    """Two layers change places with the batch's size."""

    def forward(self, x):
        order = (self.side, self.loop) if len(x) > 20 else (self.loop, self.side)
        x = self.first(x).relu()
        for layer in order:
            x = layer(x).relu()
        return self.head(self.third(x).relu())


def test_orders_of_calls_that_contradict_each_other_are_refused():
    models = [Turned().eval(), Turned().eval()]
    with pytest.raises(ConfigError, match=r"contradict each other: among loop, side, third"):
        repaired(models, vectors(20, 30))
    merged, _ = repaired(models, vectors(20, 30), REPAIR(skip=[r"^side\."]))
    places = ["first", "loop", "third"]
    twin, expected = exported(merged, models[0]), averages(models, vectors(20, 30), places)
    came = channels(twin, vectors(20, 30), places)
    assert_statistics(came, expected)


def test_one_order_keeps_that_of_every_batch():
    assert in_order(["124", "234", "35"]) == list("12345")
    assert in_order([]) == []


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
    report = merged.plan.finalisation.report
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
    came = channels_first(exported(merged, models[0]), batches, places)
    own = [channels_first(model, batches, places) for model in models]
    for place in places:
        means, deviations = (sum(o[place][i] for o in own) / 2 for i in (0, 1))
        torch.testing.assert_close(came[place][1], deviations, rtol=1e-4, atol=1e-5)
        if place != "up2":
            torch.testing.assert_close(came[place][0], means, rtol=1e-4, atol=1e-4)
    finalisation = merged.plan.finalisation
    before = {n: merged.plan.materialise(n, merged.raw) for n in ("up2.weight", "up3.weight")}
    finalisation.load_state(finalisation.state())
    for name, tensor in before.items():
        assert torch.equal(merged.plan.materialise(name, merged.raw), tensor)


def test_weight_norm_of_old_style_is_scaled_by_its_g():
    models, batches = networks(Deep), vectors(40, 9)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for model in models:
            torch.nn.utils.weight_norm(model.second)
            model(batches[0])
    merged, _ = repaired(models, batches)
    names = ["first.weight", "second.weight_g", "third.weight"]
    assert merged.plan.finalisation.report["corrected"] == names
    places = ["first", "second", "third"]
    twin, expected = exported(merged, models[0]), averages(models, batches, places)
    assert_statistics(channels(twin, batches, places), expected)


class Detector(nn.Module):
    """Class and box heads behind one trunk; an output that another layer reads; a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.stem, self.trunk = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.classes, self.boxes = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 8, 1)
        self.coarse, self.fine = nn.Linear(6, 5), nn.Linear(11, 3)
        self.project = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        features = self.trunk(self.stem(x).relu()).relu()
        boxes = torch.empty(len(x), 2, features[0, 0].numel(), 4)
        boxes[:] = self.boxes(features).unflatten(1, (2, 4)).flatten(3).mT
        classes = self.classes(features).permute(0, 2, 3, 1).reshape(len(x), -1, 4)
        pooled = features.mean(dim=(2, 3))
        coarse = self.coarse(pooled)
        fine = self.fine(torch.cat([pooled, coarse.softmax(dim=1)], dim=1))
        found = {"boxes": [boxes], "classes": classes.softmax(dim=-1)}
        return found, (coarse[:, :], fine.squeeze(1)), self.norm(self.project(pooled))


def test_no_output_of_the_network_is_corrected():
    """What gives an output keeps the average of the sources, whichever was called last."""
    models, batches = networks(Detector), images(16, 5)
    merged, found = repaired(models, batches)
    assert found.survey.left == {
        "classes.weight": LAST,
        "boxes.weight": LAST,
        "coarse.weight": GIVEN,
        "fine.weight": LAST,
        "norm.weight": LAST,
        "project.weight": "it feeds a BatchNorm",
    }
    assert merged.plan.finalisation.report["corrected"] == ["stem.weight", "trunk.weight"]
    twin, places = exported(merged, models[0]), ["stem", "trunk"]
    assert_statistics(channels(twin, batches, places), averages(models, batches, places))
    for name, tensor in twin.named_parameters():
        if not name.startswith(("stem", "trunk")):
            average = sum(dict(model.named_parameters())[name] for model in models) / 2
            torch.testing.assert_close(tensor, average, rtol=1e-6, atol=1e-7)
    seen = channels(twin, batches, ["project"])["project"][0].float()
    torch.testing.assert_close(twin.norm.running_mean, seen, rtol=1e-4, atol=1e-5)


def test_nothing_to_correct_is_an_error():
    models = [nn.Linear(6, 3), nn.Linear(6, 3)]
    with pytest.raises(
        ConfigError, match=r"no layer to correct.*outputs \(weight: it is a last layer"
    ):
        repaired(models, vectors(9))


def test_it_has_to_be_computed_first():
    merged = MergedModel(
        Recipe(dict(zip("ab", networks(Deep), strict=True)), finalisers=[REPAIR()])
    )
    with pytest.raises(ConfigError, match=r"REPAIR has not been computed.*adaptation data"):
        merged.plan.materialise("first.weight", merged.raw)
    with torch.no_grad(), pytest.raises(ConfigError, match="REPAIR has not been computed"):
        merged(vectors(3)[0])
    merged(vectors(3)[0]).sum().backward()
    assert merged.raw["tensor"].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolate": "median"}, "REPAIR: interpolate: expected mean or coefficients"),
        ({"batches": 0}, "REPAIR: batches: expected 1 or more, got 0"),
        ({"skip": ["("]}, "REPAIR: skip: .* is no regular expression"),
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
