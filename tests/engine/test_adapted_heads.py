"""Adapters that update tied tensors, or add a head: against what PEFT computes with them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gradmerge import MergedModel, Recipe, export_merged, merge
from gradmerge.coefficients import Constant
from gradmerge.sources import HuggingFace, Lora

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

IDS = torch.tensor([[5, 6, 7, 8]])
LAYERS = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
EMBED, HEAD = "embed_tokens", "lm_head"
# what is adapted -> options of PEFT, and whether embedding and head are one tensor
TIED = {
    "embedding saved": ({"modules_to_save": [EMBED]}, False),
    "embedding saved, tied": ({"modules_to_save": [EMBED], "ensure_weight_tying": True}, True),
    "both saved": ({"modules_to_save": [EMBED, HEAD]}, False),
    "both saved, tied": ({"modules_to_save": [EMBED, HEAD], "ensure_weight_tying": True}, True),
    "head saved": ({"modules_to_save": [HEAD]}, False),
    "embedding, tied": ({"target_modules": ["q_proj", EMBED], "ensure_weight_tying": True}, True),
    "head, tied": ({"target_modules": ["q_proj", HEAD], "ensure_weight_tying": True}, True),
    "both, tied": (
        {"target_modules": ["q_proj", EMBED, HEAD], "ensure_weight_tying": True},
        True,
    ),
    "neither": ({}, True),
}


def base_of(folder, model):
    torch.manual_seed(0)
    model = model()
    model.save_pretrained(folder / "base")
    return HuggingFace(str(folder / "base"))


def llama():
    config = transformers.LlamaConfig(
        **LAYERS, num_attention_heads=2, pad_token_id=0, tie_word_embeddings=True
    )
    return transformers.LlamaForCausalLM(config)


def adapter(folder, name, model, **options):
    """Save an adapter with random updates; return the logits of PEFT, and the adapter's source."""
    config = peft.LoraConfig(r=2, **{"target_modules": ["q_proj"], **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        expected = adapted(IDS)
    adapted.save_pretrained(folder / name)
    return expected, Lora(str(folder / name), HuggingFace(str(folder / "base")))


@torch.no_grad()
def loaded(folder):
    kind = json.loads(Path(folder, "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("case", TIED)
def test_tied_tensors_are_updated_as_in_peft(tmp_path, case):
    options, tied = TIED[case]
    base = base_of(tmp_path, llama)
    model = transformers.AutoModelForCausalLM.from_pretrained(base.path)
    expected, source = adapter(tmp_path, "a", model, task_type="CAUSAL_LM", **options)
    recipe = Recipe({"a": source}, base, init=Constant(1.0))
    merged = MergedModel(recipe)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected.logits, rtol=1e-5, atol=1e-5)
    folder = merge(recipe, tmp_path / "out")
    with torch.no_grad():
        found = loaded(folder)(IDS).logits
    torch.testing.assert_close(found, expected.logits, rtol=1e-5, atol=1e-5)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied


def bert():
    config = transformers.BertConfig(**LAYERS, num_attention_heads=2, pad_token_id=0)
    return transformers.BertForMaskedLM(config)


CLASSIFIERS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", llama, "LlamaForSequenceClassification", 3),
    "TOKEN_CLS": ("AutoModelForTokenClassification", bert, "BertForTokenClassification", 5),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", bert, "BertForQuestionAnswering", 2),
}
PRIVATE = [r"^(score|classifier|qa_outputs)\."]


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_adapters_with_a_head_on_another_model_become_classifiers(tmp_path, task):
    auto, make, kind, count = CLASSIFIERS[task]
    base = base_of(tmp_path, make)
    outputs, sources = {}, {}
    for name in ("a", "bb"):
        options = {} if task == "QUESTION_ANS" else {"num_labels": count}
        model = getattr(transformers, auto).from_pretrained(base.path, **options)
        kept = {"target_modules": ["query" if make is bert else "q_proj"], "task_type": task}
        outputs[name], sources[name] = adapter(tmp_path, name, model, **kept)
    recipe = Recipe(sources, base, private=[*PRIVATE, *([r"^cls\."] if make is bert else [])])
    learned = export_merged(MergedModel(recipe), tmp_path / "learned")
    for folder in (merge(recipe, tmp_path / "out"), learned):
        for part in (folder, folder / "tasks" / "bb"):
            model = loaded(part)
            assert type(model).__name__ == kind
            assert model.config.num_labels == count
    for name, expected in outputs.items():
        one = Recipe({name: sources[name]}, init=Constant(1.0))
        alone = loaded(merge(one, tmp_path / f"alone-{name}"))
        with torch.no_grad():
            torch.testing.assert_close(alone(IDS)[0], expected[0], rtol=1e-5, atol=1e-5)


def test_labels_are_those_of_the_adapters_own_config(tmp_path):
    base = base_of(tmp_path, llama)
    sources = {}
    for name, labels in {"a": ["no", "yes"], "b": ["x", "y", "z"]}.items():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            base.path, num_labels=len(labels), id2label=dict(enumerate(labels))
        )
        _, sources[name] = adapter(tmp_path, name, model, task_type="SEQ_CLS")
        model.config.save_pretrained(tmp_path / name)
    folder = merge(Recipe(sources, base, private=PRIVATE), tmp_path / "out")
    assert loaded(folder).config.id2label == {0: "no", 1: "yes"}
    assert loaded(folder / "tasks" / "b").config.id2label == {0: "x", 1: "y", 2: "z"}


def test_an_image_classifier_may_get_another_number_of_classes(tmp_path):
    """Without a task, PEFT names the class; the base's own head has other classes."""

    def vit():
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        config = transformers.ViTConfig(
            **sizes, num_attention_heads=2, image_size=8, patch_size=4, num_labels=7
        )
        return transformers.ViTForImageClassification(config)

    base = base_of(tmp_path, vit)
    model = transformers.ViTForImageClassification.from_pretrained(
        base.path, num_labels=16, ignore_mismatched_sizes=True
    )
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    source = Lora(str(tmp_path / "a"), base)
    folder = merge(Recipe({"a": source}, base, private=["^classifier"]), tmp_path / "out")
    assert loaded(folder).config.num_labels == 16
