"""Text models merged into the backbone of a model of images and text."""

from __future__ import annotations

import copy
import dataclasses

import peft
import pytest
import torch
import transformers
from torch.func import functional_call

from families import family_of
from gradmerge import MergedModel, Recipe, inspect
from gradmerge.coefficients import Constant
from gradmerge.common.errors import CompatibilityError, SourceError
from gradmerge.engine.opening import Opening
from gradmerge.export.folder import export_merged
from stored import eager, loss_of

BATCH = {"input_ids": torch.arange(3, 19).view(2, 8)}
PAIRS = {
    "LlavaForConditionalGeneration": "LlamaForCausalLM",
    "Qwen2VLForConditionalGeneration": "Qwen2ForCausalLM",
    "Qwen3VLForConditionalGeneration": "Qwen3ForCausalLM",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3MoeForCausalLM",
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
}
# two ways of storing the backbone, of which the second has the names of the network
ADAPTED = ("LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration")
ADAPTED += ("Qwen3VLForConditionalGeneration",)


def text_model_of(network, name):
    """A text model of the sizes of the backbone, with its weights."""
    kind = getattr(transformers, name)
    fields = network.config.get_text_config().to_dict()
    known = {k: v for k, v in fields.items() if k not in ("model_type", "rope_parameters")}
    known["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    if name.startswith("Gemma3"):
        known["rope_parameters"] = fields["rope_parameters"]
    known["tie_word_embeddings"] = network.config.tie_word_embeddings
    text = eager(kind(kind.config_class(**known)).double())
    text.model.load_state_dict(network.model.language_model.state_dict())
    if not known["tie_word_embeddings"]:
        text.lm_head.load_state_dict(network.lm_head.state_dict())
    return text


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    def make(name):
        root = tmp_path_factory.mktemp(name)
        network = eager(family_of(name).double())
        network.save_pretrained(root / "base")
        text = text_model_of(network, PAIRS[name])
        generator = torch.Generator().manual_seed(1)
        models = {}
        for source in ("a", "b"):
            models[source] = copy.deepcopy(text)
            for parameter in models[source].parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data += 0.1 * noise
            models[source].save_pretrained(root / source)
        sources = {source: str(root / source) for source in models}
        recipe = Recipe(sources=sources, base=str(root / "base"), init=Constant(0.25))
        return network, models, recipe

    return make


def assert_learns_as(merged, network, thetas, c):
    """Loss and gradient are those of the network at weights that depend on c."""
    expected = loss_of(functional_call(network, thetas, (), BATCH).logits)
    expected.backward()
    loss = loss_of(merged(**BATCH).logits)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    found = merged.raw["tensor"].grad.sum(1)
    assert (found - c.grad).abs().max() <= 1e-6 * c.grad.abs().max()


@pytest.mark.parametrize("name", PAIRS)
def test_the_backbone_is_learned_and_the_rest_is_the_bases(suites, tmp_path, name):
    network, models, recipe = suites(name)
    merged = MergedModel(recipe, dtype=torch.float64)
    c = torch.full((2,), 0.25, dtype=torch.float64, requires_grad=True)
    thetas = {}
    for place, base in network.named_parameters():
        own = place.replace("model.language_model.", "model.")
        inside = own != place or place == "lm_head.weight"
        others = [m.get_parameter(own).detach() - base.detach() for m in models.values() if inside]
        thetas[place] = base.detach() + sum(x * d for x, d in zip(c, others, strict=False))
    assert_learns_as(merged, network, thetas, c)
    places = {
        place for key in merged.plan.layout.slots for place in merged.plan.binding.owners[key]
    }
    assert places == {p for p in places if "language_model" in p or p == "lm_head.weight"}
    text = [n for n, _ in network.named_parameters() if "language_model" in n]
    assert places.issuperset(text)

    export_merged(merged, tmp_path / "out")
    loaded = type(network).from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    for place, theta in thetas.items():
        torch.testing.assert_close(loaded.get_parameter(place), theta, rtol=1e-7, atol=1e-8)
        if "language_model" not in place and place != "lm_head.weight":
            assert torch.equal(loaded.get_parameter(place), network.get_parameter(place))


def test_what_the_base_keeps_is_noted(suites):
    _, _, recipe = suites("LlavaForConditionalGeneration")
    notes = [str(p) for p in Opening(recipe).problems if p.kind == "part"]
    assert len(notes) == 2
    assert "tensors outside model.language_model" in notes[0]
    found = inspect(dict(recipe.sources), recipe.base)
    assert found["compatible"]
    assert [str(p) for p in found["problems"] if p.kind == "part"] == notes


def test_another_text_model_is_refused(suites, tmp_path):
    _, _, recipe = suites("LlavaForConditionalGeneration")
    family_of("GPT2LMHeadModel").save_pretrained(tmp_path / "other")
    wrong = Recipe(sources={"a": str(tmp_path / "other")}, base=recipe.base)
    with pytest.raises(CompatibilityError, match=r"got GPT2LMHeadModel, whose\s+par"):
        MergedModel(wrong)


# ---- adapters of text models ---------------------------------------------------------------------


def adapter_of(text, folder, seed, targets=("q_proj", "down_proj"), **options):
    """Save an adapter of PEFT with random factors; return the text model with it merged in."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), **options)
    model = peft.get_peft_model(copy.deepcopy(text), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = parameter.data + 0.2 * noise
    model.save_pretrained(folder)
    return model.merge_and_unload()


@pytest.mark.parametrize("headless", [False, True], ids=["with head", "without"])
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_of_the_text_model_are_those_of_the_backbone(suites, tmp_path, name, headless):
    network, _, recipe = suites(name)
    text = text_model_of(network, PAIRS[name])
    text, before = (text.model, "") if headless else (text, "model.")
    saved = {} if headless else {"modules_to_save": ["embed_tokens"]}
    tuned = {s: adapter_of(text, tmp_path / s, i, **saved) for i, s in enumerate("ab")}
    sources = {source: str(tmp_path / source) for source in tuned}
    merged = MergedModel(dataclasses.replace(recipe, sources=sources), dtype=torch.float64)
    c = torch.full((2,), 0.25, dtype=torch.float64, requires_grad=True)
    thetas = {}
    for place, base in network.named_parameters():
        theta, own = base.detach(), place.replace("model.language_model.", before)
        if own != place:
            others = (m.get_parameter(own).detach() - base.detach() for m in tuned.values())
            theta = theta + sum(x * d for x, d in zip(c, others, strict=True))
        thetas[place] = theta
    assert_learns_as(merged, network, thetas, c)
    changed = 2 * network.config.get_text_config().num_hidden_layers + (not headless)
    assert len(merged.plan.layout.slots) == changed


def test_an_adapter_of_another_text_model_is_refused(suites, tmp_path):
    _, _, recipe = suites("LlavaForConditionalGeneration")
    adapter_of(family_of("GPT2LMHeadModel").double(), tmp_path / "other", 0, ["c_attn"])
    wrong = dataclasses.replace(recipe, sources={"a": str(tmp_path / "other")})
    with pytest.raises(SourceError, match=r"belong to no tensor of the base.*Is this the adapter"):
        MergedModel(wrong)


def test_an_adapter_of_larger_layers_is_refused(suites, tmp_path):
    network, _, recipe = suites("Qwen3VLForConditionalGeneration")
    text = text_model_of(network, "Qwen3ForCausalLM")
    for layer in text.model.layers:
        layer.mlp.down_proj = torch.nn.Linear(48, 16, bias=False).double()
    adapter_of(text, tmp_path / "other", 0, ["down_proj"])
    wrong = dataclasses.replace(recipe, sources={"a": str(tmp_path / "other")})
    with pytest.raises(SourceError, match=r"factors do not fit the base.*down_proj"):
        MergedModel(wrong)
