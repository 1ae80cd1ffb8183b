"""Files of one architecture under different names are merged as transformers loads them."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gradmerge import Recipe, merge
from gradmerge.cli import main
from gradmerge.coefficients import Uniform
from gradmerge.common.errors import CompatibilityError
from gradmerge.engine.opening import open_plan
from gradmerge.sources.renaming import RenamedView
from tiny import relatives

TINY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 32,
}  # fmt: skip
IMAGE = {"image_size": 16, "patch_size": 8}
TEXT_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2(kind=transformers.GPT2LMHeadModel):
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return kind(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def bert(kind=transformers.BertForMaskedLM):
    return kind(transformers.BertConfig(**TINY, max_position_embeddings=16))


def clip():
    sizes = {key: value for key, value in TINY.items() if key != "vocab_size"}
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, **IMAGE))


def llava():
    text = transformers.LlamaConfig(**TINY, **TEXT_TOKENS, num_key_value_heads=2)
    sizes = {key: value for key, value in TINY.items() if key != "vocab_size"}
    vision = transformers.CLIPVisionConfig(**sizes, **IMAGE)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
    return transformers.LlavaForConditionalGeneration(config)


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        **TINY, conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


def stripped(prefix):
    return lambda state: {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def replaced(*pairs):
    def rename(state):
        named = {}
        for name, tensor in state.items():
            for pattern, other in pairs:
                name = re.sub(pattern, other, name)
            named[name] = tensor
        return named

    return rename


def with_positions(name, count):
    return lambda state: {**state, name: torch.arange(count)[None]}


OLD_NORMS = replaced(
    (r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta")
)
NEW_LLAVA = replaced(
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^(vision_tower|multi_modal)", r"model.\1"),
)
OLD_WEIGHT_NORM = replaced(
    (r"parametrizations\.weight\.original0", "weight_g"),
    (r"parametrizations\.weight\.original1", "weight_v"),
)
CASES = {
    "gpt2 without its prefix": (gpt2, stripped("transformer.")),
    "bert without its prefix": (bert, stripped("bert.")),
    "norms of old": (bert, OLD_NORMS),
    "norms of old, without prefix": (bert, lambda state: OLD_NORMS(stripped("bert.")(state))),
    "stored positions": (bert, with_positions("bert.embeddings.position_ids", 16)),
    "stored positions of images": (clip, with_positions("vision_model.embeddings.position_ids", 5)),
    "llava as in its module": (llava, NEW_LLAVA),
    "weight norm of old": (wav2vec2, OLD_WEIGHT_NORM),
}  # fmt: skip


def family(folder, models, rename, renamed):
    """Save folders `base`, `a` and `b`; those in `renamed` under other names."""
    for name, model in zip(("base", "a", "b"), models, strict=True):
        model.save_pretrained(folder / name)
        if name in renamed:
            file = folder / name / "model.safetensors"
            state = rename(load_file(file))
            assert state.keys() != load_file(file).keys()
            save_file(state, file, metadata={"format": "pt"})
    return {name: str(folder / name) for name in ("base", "a", "b")}


def read(kind, folder):
    """What transformers loads, and that it loads everything."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    return model.state_dict()


@pytest.mark.parametrize("renamed", [("base",), ("a",), ("a", "b")], ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_the_merge_is_the_mean_of_what_transformers_loads(tmp_path, case, renamed):
    build, rename = CASES[case]
    torch.manual_seed(0)
    models = relatives(build())
    paths = family(tmp_path, models, rename, renamed)
    kind = type(models[0])
    loaded = [read(kind, paths[name]) for name in ("a", "b")]
    sources = {name: paths[name] for name in "ab"}
    with pytest.warns(UserWarning, match="ignored") if "positions" in case else nullcontext():
        merge(Recipe(sources, paths["base"], init=Uniform()), tmp_path / "out")
    merged = read(kind, tmp_path / "out")
    assert merged.keys() == loaded[0].keys()
    for name, tensor in merged.items():
        mean = (loaded[0][name] + loaded[1][name]) / 2
        torch.testing.assert_close(tensor, mean, msg=name)
    # under the names that transformers saves
    models[0].save_pretrained(tmp_path / "again")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == load_file(tmp_path / "again" / "model.safetensors").keys()


def test_names_that_agree_stay_whatever_they_are(tmp_path):
    paths = family(tmp_path, relatives(gpt2()), stripped("transformer."), ("base", "a", "b"))
    recipe = Recipe({name: paths[name] for name in "ab"}, paths["base"], init=Uniform())
    plan = open_plan(recipe, with_skeleton=False)
    assert "wte.weight" in plan.tensors
    assert not isinstance(plan.reference, RenamedView)
    merge(recipe, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert stored == load_file(tmp_path / "base" / "model.safetensors").keys()


def test_a_learned_merge_and_its_private_heads(tmp_path):
    """The base has no head and no prefix; the heads stay with their tasks."""
    models = relatives(bert(transformers.BertForSequenceClassification), count=3)
    paths = family(tmp_path, models, OLD_NORMS, ("b",))
    models[0].bert.save_pretrained(tmp_path / "base")
    sources = {name: paths[name] for name in "ab"}
    recipe = Recipe(sources, paths["base"], init=Uniform(), private=[r"^classifier\."])
    plan = open_plan(recipe)
    assert sorted(plan.private) == ["classifier.bias", "classifier.weight"]
    assert plan.binding is not None
    assert not plan.binding.missing
    merge(recipe, tmp_path / "out")
    for name, model in zip("ab", models[1:], strict=True):
        written = read(type(models[0]), tmp_path / "out" / "tasks" / name)
        mean = [m.state_dict()["bert.pooler.dense.weight"] for m in models[1:]]
        torch.testing.assert_close(written["bert.pooler.dense.weight"], sum(mean) / 2)
        norm = "bert.embeddings.LayerNorm.weight"
        torch.testing.assert_close(written[norm], sum(m.state_dict()[norm] for m in models[1:]) / 2)
        assert torch.equal(written["classifier.weight"], model.classifier.weight)


def test_a_tensor_that_one_file_lacks_is_still_reported(tmp_path):
    paths = family(tmp_path, relatives(gpt2()), stripped("transformer."), ("base",))
    file = tmp_path / "b" / "model.safetensors"
    state = load_file(file)
    del state["transformer.ln_f.weight"]
    save_file(state, file, metadata={"format": "pt"})
    recipe = Recipe({name: paths[name] for name in "ab"}, paths["base"], init=Uniform())
    with pytest.raises(CompatibilityError, match=r"1 problem.*\n.*b: transformer\.ln_f\.weight"):
        open_plan(recipe, with_skeleton=False)


def test_inspect_compares_under_common_names(tmp_path, capsys):
    paths = family(tmp_path, relatives(gpt2()), stripped("transformer."), ("base",))
    assert main(["inspect", paths["a"], paths["b"], "--base", paths["base"]]) == 0
    told = capsys.readouterr().out
    assert "compatible: yes\n" in told
    assert "sign" in told


def test_two_tensors_for_one_place_are_no_renaming(tmp_path):
    """A file with old and new names of a norm: which one counts is anybody's guess."""
    paths = family(
        tmp_path,
        relatives(bert()),
        lambda state: {**state, **OLD_NORMS({n: t + 1 for n, t in state.items() if "Norm" in n})},
        ("b",),
    )
    recipe = Recipe({name: paths[name] for name in "ab"}, paths["base"], init=Uniform())
    with pytest.raises(CompatibilityError, match=r"\[extra\] .*b: .*LayerNorm\.beta"):
        open_plan(recipe, with_skeleton=False)
