"""Rows of sources with different tokenizers: each token's own, or by rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import nn

from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import Constant, Model
from gradmerge.coefficients import Tensor as TensorGranularity
from gradmerge.common.errors import CompatibilityError, ConfigError, SourceError
from gradmerge.engine.opening import open_plan
from gradmerge.engine.plan import Plan
from gradmerge.engine.state import FitState
from gradmerge.export.folder import export_state
from gradmerge.sources import Lora, SafetensorsFile, Vocabulary
from gradmerge.sources.tokenizers.report import token_report
from networks import seeded
from wordings import bpe, bpe_family, copies, llama, rows_by_token, vocabulary_of, words

EMBEDDING = "model.embed_tokens.weight"
TOKENS = {
    "base": ["u", "both", "base", "pair"],
    "a": ["a", "u", "shared", "both", "pair"],
    "b": ["both", "shared", "u", "b", "beyond"],
}
ROWS = {"base": 5, "a": 5, "b": 4}  # a padding row in the base; `beyond` has no row


def small_family(root: Path, tokens: dict[str, list[str]] = TOKENS) -> dict[str, str]:
    """Save Llamas whose embedding has, in row i, the number 10 * source + i."""
    paths = {}
    for i, (name, own) in enumerate(tokens.items()):
        model = llama(ROWS.get(name, len(own)), bos_token_id=None, eos_token_id=None)
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            weight.copy_((10.0 * i + torch.arange(len(weight)))[:, None].expand_as(weight))
        model.save_pretrained(root / name)
        words(root / name, own)
        paths[name] = str(root / name)
    return paths


def opened(paths: dict[str, str], vocabulary: Vocabulary, **options: Any) -> Plan:
    sources: dict[str, Any] = {n: p for n, p in paths.items() if n != "base"}
    settings: dict[str, Any] = {"coefficients": Model(), "init": Constant(0.5), **options}
    return open_plan(
        Recipe(sources, base=paths.get("base"), tokenizer=vocabulary, **settings),
        with_skeleton=False,
    )


def rows_read(plan: Plan, source: str, name: str = EMBEDDING) -> dict[str, float]:
    """Return the number in the row of each token of a source's view."""
    assert plan.folder is not None
    tensor = plan.read(source, name)
    return {token: float(tensor[i, 0]) for token, i in vocabulary_of(plan.folder).items()}


# Own rows, else the only owner's, else the base's, else the mean of a and b, else zeros.
EXPECTED = {
    "base": {"u": 0, "both": 1, "base": 2, "pair": 3, "a": 10, "shared": (12 + 21) / 2, "b": 23},
    "a": {"u": 11, "both": 13, "base": 2, "pair": 14, "a": 10, "shared": 12, "b": 23},
    "b": {"u": 22, "both": 20, "base": 2, "pair": 3, "a": 10, "shared": 21, "b": 23},
}


def test_rows_of_a_union_by_the_rule(tmp_path: Path) -> None:
    plan = opened(small_family(tmp_path), Vocabulary())
    for source, expected in EXPECTED.items():
        assert rows_read(plan, source) == expected, source
    assert plan.reference.infos[EMBEDDING].shape == (7, 8)
    assert plan.folder is not None
    ids = vocabulary_of(plan.folder)
    assert [ids[token] for token in TOKENS["base"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("source", ["base", "a"])
def test_rows_of_one_tokenizer_keep_its_ids(tmp_path: Path, source: str) -> None:
    plan = opened(small_family(tmp_path), Vocabulary(source))
    assert plan.folder is not None
    assert vocabulary_of(plan.folder) == {token: i for i, token in enumerate(TOKENS[source])}
    for name, expected in EXPECTED.items():
        assert rows_read(plan, name) == {token: expected[token] for token in TOKENS[source]}


def test_without_a_base_the_first_source_starts_the_union_and_owners_are_averaged(
    tmp_path: Path,
) -> None:
    paths = small_family(tmp_path, {"b": TOKENS["b"], "a": TOKENS["a"], "c": ["c"]})
    plan = opened(paths, Vocabulary())
    # b: 0 + row, a: 10 + row, c: 20 + row
    assert rows_read(plan, "c") == {
        "both": (0 + 13) / 2,
        "shared": (1 + 12) / 2,
        "u": (2 + 11) / 2,
        "b": 3,
        "beyond": 0,
        "a": 10,
        "pair": 14,
        "c": 20,
    }


def test_a_token_without_any_row_is_zeros_with_a_warning(tmp_path: Path) -> None:
    plan = opened(small_family(tmp_path), Vocabulary("b"))
    assert all(rows_read(plan, source)["beyond"] == 0 for source in EXPECTED)
    (warning,) = [w for w in plan.warnings if "zeros" in w.todo]
    assert "1 ('beyond')" in warning.got


def test_padding_is_the_mean_of_the_tokens_rows(tmp_path: Path) -> None:
    plan = opened(small_family(tmp_path), Vocabulary(pad_to_multiple_of=4))
    for source, expected in EXPECTED.items():
        tensor = plan.read(source, EMBEDDING)
        assert tensor.shape == (8, 8)
        mean = sum(expected.values()) / 7
        torch.testing.assert_close(tensor[7:], torch.full((1, 8), mean), rtol=0, atol=1e-5)


def test_equal_tokenizers_are_read_as_they_are(tmp_path: Path) -> None:
    same = {name: ["u", "v", "w"] for name in "xyz"}
    plan = opened(small_family(tmp_path, same), Vocabulary())
    assert torch.equal(plan.read("z", EMBEDDING)[:, 0], 20.0 + torch.arange(3))
    assert plan.read("z", EMBEDDING) is plan.read("z", EMBEDDING), "mapped, not formed"
    assert not plan.warnings


def test_kept_rows_are_the_formed_ones_and_their_files_have_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plan = opened(small_family(tmp_path), Vocabulary())
    before = {source: plan.read(source, EMBEDDING) for source in EXPECTED}
    files = set(tmp_path.rglob("*"))
    plan.prepare_learning()
    for source, tensor in before.items():
        assert plan.read(source, EMBEDDING) is plan.read(source, EMBEDDING)
        assert torch.equal(plan.read(source, EMBEDDING), tensor)
    assert set(tmp_path.rglob("*")) == files


def test_rows_of_the_widest_dtype(tmp_path: Path) -> None:
    paths = small_family(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["base"], dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    model.save_pretrained(paths["base"])
    plan = opened(paths, Vocabulary())
    assert plan.read("a", EMBEDDING).dtype == torch.float32
    assert plan.read("base", EMBEDDING).dtype == torch.float32
    assert rows_read(plan, "a")["base"] == 2.5
    assert plan.reference.infos[EMBEDDING].dtype == torch.bfloat16


def _bert(rows: int, seed: int) -> nn.Module:
    sizes = {"intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 16}
    return seeded(transformers.BertForMaskedLM, seed, vocab_size=rows, **sizes)


def _gpt2(rows: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=rows, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    )


def _t5(tied: bool) -> Callable[[int, int], nn.Module]:
    def make(rows: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=rows,
                d_model=8,
                d_ff=8,
                num_layers=1,
                num_heads=2,
                d_kv=4,
                decoder_start_token_id=0,
                tie_word_embeddings=tied,
            )
        )

    return make


def _bart(rows: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=rows,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            max_position_embeddings=16,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=2,
        )
    )
    model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))
    return model


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "llama": lambda rows, seed: llama(rows, seed),
    "llama-tied": lambda rows, seed: llama(rows, seed, tied=True),
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5(True),
    "t5-untied": _t5(False),
    "bart": _bart,
}


@pytest.mark.parametrize(
    ("name", "shard"), [*((n, "5GB") for n in NETWORKS), ("llama", "1KB"), ("bert", "1KB")]
)
def test_a_merge_that_is_one_source_computes_what_it_computes(
    tmp_path: Path, name: str, shard: str
) -> None:
    """At coefficients (1, 0) and origin zero the export is source a, token by token."""
    own = {
        "a": ["<unk>", "<p>", "</s>", *(f"w{i}" for i in range(9))],
        "b": ["<unk>", "<p>", "</s>", *(f"w{i}" for i in reversed(range(4, 14))), "only"],
    }
    models = {}
    for i, (source, tokens) in enumerate(own.items()):
        models[source] = NETWORKS[name](len(tokens) + i, i).eval()
        with torch.no_grad():
            for parameter in models[source].parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        models[source].save_pretrained(tmp_path / source, max_shard_size=shard)
        words(tmp_path / source, tokens, eos_token="</s>", pad_token="<p>")
    recipe = Recipe(
        {"b": str(tmp_path / "b"), "a": str(tmp_path / "a")},
        origin="zero",
        coefficients=Model(),
        init=Constant([0.0, 1.0]),
        buffers="mean",
        tokenizer=Vocabulary(pad_to_multiple_of=8),
    )
    plan = open_plan(recipe)
    buffers = {n: plan.read("a", n) for n in plan.buffers}
    folder = export_state(FitState.start(plan), tmp_path / "out", buffers=buffers)
    merged = type(models["a"]).from_pretrained(folder).eval()
    target = vocabulary_of(folder)
    text = ["w3", "w0", "w8", "w5"]
    first = torch.tensor([[own["a"].index(token) for token in text]])
    second = torch.tensor([[target[token] for token in text]])
    inputs = [{"input_ids": ids} for ids in (first, second)]
    if models["a"].config.is_encoder_decoder:
        inputs = [{**given, "decoder_input_ids": given["input_ids"]} for given in inputs]
    with torch.no_grad():
        expected, got = models["a"](**inputs[0]).logits, merged(**inputs[1]).logits
    assert got.shape[-1] == 24
    assert len(target) == 18
    places = [target[token] for token in own["a"]]
    torch.testing.assert_close(got[..., places], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_step_through_the_views_has_the_gradient_of_the_network(
    tmp_path: Path, memory: Any
) -> None:
    """dL/dc = <G, B> with G from plain autograd on the exported weights."""
    paths = bpe_family(tmp_path)
    recipe = Recipe(
        {k: paths[k] for k in "ab"},
        base=paths["base"],
        coefficients=TensorGranularity(),
        init=Constant(0.4),
        tokenizer=Vocabulary(pad_to_multiple_of=16),
    )
    merged = MergedModel(recipe, memory=memory, dtype=torch.float64)
    plan = merged.plan
    tokens = torch.arange(plan.reference.infos[EMBEDDING].shape[0])[None, ::3]
    merged(input_ids=tokens, labels=tokens).loss.backward()
    gradient = {key: value.grad for key, value in merged.raw.items()}

    network = llama(plan.reference.infos[EMBEDDING].shape[0]).double()
    state = {
        name: FitState(plan, merged.raw).materialise(name, torch.float64) for name in plan.tensors
    }
    network.load_state_dict(state)
    network(input_ids=tokens, labels=tokens).loss.backward()
    for name in (EMBEDDING, "lm_head.weight"):
        weights = network.get_parameter(name).grad
        base = plan.read("base", name).double()
        expected = [float((weights * (plan.read(k, name).double() - base)).sum()) for k in "ab"]
        got = plan.layout.slots[name].read(gradient).flatten().tolist()
        assert min(abs(value) for value in expected) > 1e-4
        assert got == pytest.approx(expected, rel=1e-6)


def test_a_teacher_runs_on_the_merges_tokens(tmp_path: Path) -> None:
    paths = bpe_family(tmp_path)
    recipe = Recipe({k: paths[k] for k in "ab"}, base=paths["base"], tokenizer=Vocabulary("union"))
    merged = MergedModel(recipe)
    target, own = vocabulary_of(str(merged.plan.folder)), vocabulary_of(paths["a"])
    text = ["<shared>", "wide", "merging together"]
    text = [token for token in text if token in own]
    with merged.as_source("a"), torch.no_grad():
        got = merged(input_ids=torch.tensor([[target[t] for t in text]])).logits
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["a"])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[own[t] for t in text]])).logits
    places = [target[token] for token in own]
    ids = list(own.values())
    torch.testing.assert_close(got[..., places], expected[..., ids], rtol=1e-5, atol=1e-6)


# ---- sources of other kinds ---------------------------------------------------------------------


def test_a_file_without_tokenizer_with_as_many_rows_has_the_bases_tokens(tmp_path: Path) -> None:
    paths = small_family(tmp_path)
    sources = {"a": paths["a"], "b": SafetensorsFile(f"{paths['base']}/model.safetensors")}
    recipe = Recipe(sources, base=paths["base"], tokenizer=Vocabulary(), coefficients=Model())
    plan = open_plan(recipe, with_skeleton=False)
    assert rows_read(plan, "b") == rows_read(plan, "base")
    assert any("assumed to be the same" in warning.todo for warning in plan.warnings)


def test_a_file_without_tokenizer_with_other_rows_is_refused(tmp_path: Path) -> None:
    paths = small_family(tmp_path, {**TOKENS, "c": list("abcdefg")})
    sources = {"a": paths["a"], "c": SafetensorsFile(f"{paths['c']}/model.safetensors")}
    with pytest.raises(
        SourceError, match=r"\(source c\) has no tokenizer, and its embedding has 7"
    ):
        open_plan(Recipe(sources, base=paths["base"], tokenizer=Vocabulary()), with_skeleton=False)


def test_a_base_without_tokenizer_is_refused(tmp_path: Path) -> None:
    paths = small_family(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).unlink()
    with pytest.raises(ConfigError, match=r"base \(source base\) has no tokenizer"):
        opened(paths, Vocabulary())


def test_an_image_model_has_no_vocabulary(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8
    )
    for model, name in zip([transformers.ViTForImageClassification(config)] * 2, "ab", strict=True):
        model.save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match=r"ViTForImageClassification .* has no vocabulary"):
        opened({name: str(tmp_path / name) for name in "ab"}, Vocabulary())


def test_modules_in_memory_have_no_tokens(tmp_path: Path) -> None:
    models = copies(llama(4), 2)
    with pytest.raises(ConfigError, match="no source is a model folder"):
        open_plan(Recipe({"a": models[0], "b": models[1]}, tokenizer=Vocabulary()))


def _adapter(folder: Path, base: str, tokens: Sequence[str] | None) -> None:
    """A LoRA of one projection; with `tokens` also whole embeddings for them."""
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    whole = None
    if tokens is not None:
        model.resize_token_embeddings(len(tokens))
        whole = ["embed_tokens", "lm_head"]
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=whole, init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    if tokens is not None:
        words(folder, tokens)


def test_an_adapter_that_brings_tokens_and_one_that_does_not(tmp_path: Path) -> None:
    paths = small_family(tmp_path)
    _adapter(tmp_path / "plain", paths["base"], None)
    _adapter(tmp_path / "more", paths["base"], [*TOKENS["base"], "new", "newer"])
    sources: dict[str, Any] = {name: str(tmp_path / name) for name in ("plain", "more")}
    recipe = Recipe(sources, base=paths["base"], tokenizer=Vocabulary(), coefficients=Model())
    plan = open_plan(recipe)
    lora = plan.tokens.checkpoints["more"]  # type: ignore[union-attr]
    assert lora.infos[EMBEDDING].shape == (6, 8)
    assert rows_read(plan, "plain") == {
        **{token: EXPECTED["base"][token] for token in TOKENS["base"]},
        "new": float(lora.read(EMBEDDING)[4, 0]),
        "newer": float(lora.read(EMBEDDING)[5, 0]),
    }
    assert torch.equal(plan.read("more", EMBEDDING), lora.read(EMBEDDING))
    projection = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(plan.read("more", projection), plan.read("base", projection))


def test_an_adapter_whose_heights_differ_is_refused(tmp_path: Path) -> None:
    paths = small_family(tmp_path)
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(paths["base"])
    model.resize_token_embeddings(6)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "more", save_embedding_layers=False)
    source = Lora(str(tmp_path / "more"), base=as_folder(paths["base"]))
    with pytest.raises(
        SourceError, match=r"all of one height, got lm_head.weight 5, model.embed_tokens.weight 6"
    ):
        open_plan(
            Recipe({"a": source}, base=paths["base"], tokenizer=Vocabulary()), with_skeleton=False
        )


def as_folder(path: str) -> Any:
    from gradmerge.sources import HuggingFace

    return HuggingFace(path)


# ---- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"source": "base"}, "expected union or one of a, b, got 'base'"),
        ({"source": "bb"}, "expected union or one of a, b, got 'bb'. Did you mean 'b'"),
        ({"chat_template": "c"}, "expected auto, the name of a source, or the text"),
    ],
)
def test_names_that_mean_no_source(vocabulary: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe({"a": "a", "b": "b"}, tokenizer=Vocabulary(**vocabulary))


def test_a_source_named_as_an_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="a source is named 'union'"):
        Recipe({"union": "a"}, tokenizer=Vocabulary())


def test_padding_to_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="pad_to_multiple_of: expected at least 1, got 0"):
        Vocabulary(pad_to_multiple_of=0)


def test_without_the_option_the_report_names_it(tmp_path: Path) -> None:
    paths = small_family(tmp_path)
    sources = {name: paths[name] for name in "ab"}
    with pytest.raises(CompatibilityError, match=r"tokenizer: \{source: union\}"):
        open_plan(Recipe(sources, base=paths["base"]), with_skeleton=False)


def test_added_tokens_with_two_settings_keep_the_first(tmp_path: Path) -> None:
    paths = {}
    for i, name in enumerate(("base", "a", "b")):
        token = tokenizers.AddedToken("<t>", special=i < 2, normalized=False, lstrip=i == 2)
        tokenizer = bpe(tmp_path / name, "low lower", 20, added=() if i == 0 else (token,))
        llama(len(tokenizer), i).save_pretrained(tmp_path / name)
        paths[name] = str(tmp_path / name)
    plan = opened(paths, Vocabulary())
    loaded = transformers.AutoTokenizer.from_pretrained(plan.folder)
    (settings,) = [s for s in loaded.added_tokens_decoder.values() if s.content == "<t>"]
    assert settings.special
    assert not settings.lstrip
    (warning,) = plan.warnings
    assert warning.where == paths["b"]
    assert warning.got == "others for 1 ('<t>')"
    assert token_report(plan.tokens)["other_settings"] == {"b": ["<t>"]}  # type: ignore[arg-type]
    rows = [rows_by_token(paths[name], EMBEDDING)["<t>"] for name in "ab"]
    i = loaded.get_vocab()["<t>"]
    torch.testing.assert_close(plan.read("base", EMBEDDING)[i], (rows[0] + rows[1]) / 2)
