"""Text models merged into the backbone of a model of images and text."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch.func import functional_call

from families import family_of
from gradmerge import MergedModel, Recipe, inspect
from gradmerge.coefficients import Constant
from gradmerge.common.errors import CompatibilityError
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
    expected = loss_of(functional_call(network, thetas, (), BATCH).logits)
    expected.backward()
    loss = loss_of(merged(**BATCH).logits)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    found = merged.raw["tensor"].grad.sum(1)
    assert (found - c.grad).abs().max() <= 1e-6 * c.grad.abs().max()
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
