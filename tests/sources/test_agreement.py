"""Configs that do not describe the tensors beside them, in all sources alike."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES
from gradmerge import Recipe, merge
from gradmerge.cli import main
from gradmerge.coefficients import Uniform
from gradmerge.common.errors import CompatibilityError, SourceError
from gradmerge.engine.opening import Opening
from gradmerge.sources import HuggingFace
from gradmerge.sources.agreement import looks_wrong
from gradmerge.sources.skeleton import build_skeleton
from tiny import relatives

NAMES = ("base", "a", "b")
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "max_position_embeddings": 16,
}  # fmt: skip
BERT = {key: value for key, value in SIZES.items() if "key_value" not in key}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def bert(labels=3):
    config = transformers.BertConfig(**BERT, num_labels=labels)
    return transformers.BertForSequenceClassification(config)


def family(folder, model, **fields):
    """Save three relatives, in whose configs fields are changed alike."""
    for name, relative in zip(NAMES, relatives(model), strict=True):
        relative.save_pretrained(folder / name)
        change(folder / name, **fields)
    return Recipe({name: str(folder / name) for name in "ab"}, str(folder / "base"), init=Uniform())


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


LABELS = {"id2label": {str(i): f"l{i}" for i in range(5)}, "label2id": None}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("build", "fields", "told"),
    [
        (llama, {"vocab_size": 99}, r"vocab_size \(got 99\)\n.*\(32, 16\) for .*\(and 1 more\)"),
        (llama, {"hidden_size": 40}, r"hidden_size \(got 40\)"),
        (llama, {"intermediate_size": 48}, r"intermediate_size \(got 48\)\n.*\(16, 24\)"),
        (llama, {"num_key_value_heads": 4}, r"\(8, 16\) for model\.layers\.0\.self_attn\.k_proj"),
        (llama, {"num_hidden_layers": 4}, r"num_hidden_layers \(got 4\)\n.*18 that have no tensor"),
        (llama, {"num_hidden_layers": 1}, r"num_hidden_layers \(got 1\)\n.*no|none for 9 tensors"),
        (bert, LABELS, r"id2label \(got 5 labels\)\n.*\(3,\) for classifier\.bias"),
        (bert, {"type_vocab_size": 7}, r"type_vocab_size \(got 7\)"),
    ],
)
def test_a_config_that_is_wrong_in_all_sources(tmp_path, build, fields, told, learned):
    recipe = family(tmp_path, build(), **fields)
    with pytest.raises(CompatibilityError, match=rf"(?s)\[config\] .*base/config\.json: .*{told}"):
        Opening(recipe, with_network=learned)
    if not learned:
        with pytest.raises(CompatibilityError, match=r"\[config\]"):
            merge(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_positions_take_the_network_to_notice(tmp_path, capsys):
    recipe = family(tmp_path, bert(), max_position_embeddings=64)
    with pytest.raises(CompatibilityError, match=r"max_position_embeddings \(got 64\)"):
        Opening(recipe, with_network=True)
    paths = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["inspect", *paths, "--statistics", "false"]) == 2
    assert "max_position_embeddings (got 64)" in capsys.readouterr().out


def test_all_differences_come_at_once(tmp_path):
    recipe = family(tmp_path, llama(), vocab_size=99, intermediate_size=48, num_hidden_layers=3)
    with pytest.raises(CompatibilityError, match=r"(?s)vocab_size .*intermediate_size .*_layers"):
        Opening(recipe, with_network=True)


def test_running_statistics_that_no_file_has(tmp_path):
    model = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3, layer_type="basic"
        )
    )
    recipe = family(tmp_path, model)
    for name in NAMES:
        file = tmp_path / name / "model.safetensors"
        kept = {n: t for n, t in load_file(file).items() if not n.endswith("running_var")}
        save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CompatibilityError, match=r"that have no tensor: .*running_var"):
        Opening(recipe, with_network=True)


@pytest.mark.parametrize("private", [[], [r"^classifier\."]])
def test_the_head_of_each_task_fits_its_own_config(tmp_path, private):
    recipe = family(tmp_path, bert())
    bert(5).save_pretrained(tmp_path / "b")
    change(tmp_path / "b", id2label=None)
    recipe = Recipe(recipe.sources, recipe.base, init=Uniform(), private=private)
    told = r"b/config\.json: .*\n.*\(5, 16\)|\(5,\) for classifier" if private else r"\[shape\]"
    with pytest.raises(CompatibilityError, match=told):
        Opening(recipe, with_network=True)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "convolutions"])
def test_configs_that_fit_cost_a_static_merge_nothing(tmp_path, name):
    build, _ = ARCHITECTURES[name]
    build().save_pretrained(tmp_path)
    assert not looks_wrong(HuggingFace(str(tmp_path)).open())


# ---- configs that transformers refuses ----------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hidden_size": "sixteen"}, r"TypeError.*\n.*hidden_size \(got 'sixteen'\)"),
        ({"num_attention_heads": 0}, r"ZeroDivisionError.*\n.*num_attention_heads \(got 0\)"),
        ({"hidden_act": "nope"}, r"KeyError: 'nope'\n.*another value of hidden_act \(got 'nope'\)"),
        ({"pad_token_id": 10**6}, r"AssertionError.*\n.*pad_token_id \(got 1000000\)"),
        ({"vocab_size": -1}, r"RuntimeError.*\n.*vocab_size \(got -1\)"),
        ({"rope_parameters": 3}, r"Error.*\n.*rope_parameters \(got 3\)"),
        ({"architectures": ["pipeline"]}, r"a model class of transformers, got 'pipeline'"),
        ({"architectures": ["LlamaConfig"]}, r"a model class of transformers, got 'LlamaConfig'"),
        ({"architectures": [5]}, r"`architectures` to be a list with the name .*, got \[5\]"),
        ({"architectures": "LlamaModel"}, r"to be a list with the name .*, got 'LlamaModel'"),
        ({"architectures": []}, r"expected `architectures` to name the model class"),
        ({"hidden_size": 0, "head_dim": "x"}, r"Error.*\n"),
    ],
)
def test_a_refused_config_is_one_error_with_the_field(tmp_path, fields, told):
    llama().save_pretrained(tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(SourceError, match=told) as error:
        build_skeleton(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_refused_field_of_a_part_is_named_by_its_path(tmp_path):
    text = transformers.LlamaConfig(**SIZES)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_config"]["hidden_act"] = "nope"
    change(tmp_path, **fields)
    with pytest.raises(SourceError, match=re.escape("text_config.hidden_act (got 'nope')")):
        build_skeleton(tmp_path)
    torch.manual_seed(0)  # the failed builds left no trace
    assert llama().lm_head.weight.device.type == "cpu"
