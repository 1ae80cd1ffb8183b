"""One report of everything that keeps checkpoints from being merged, without reading weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from architectures import ARCHITECTURES
from gradmerge import Recipe
from gradmerge.common.errors import CompatibilityError, ConfigError, SourceError
from gradmerge.engine.opening import open_plan
from gradmerge.sources import Checkpoint, HuggingFace, InMemory, TensorInfo
from gradmerge.sources.compatibility import check, require
from gradmerge.sources.tokenizers.files import read_vocabulary

TENSORS = {"embed.weight": (8, 4), "layer.weight": (4, 4), "layer.bias": (4,), "norm.weight": (4,)}
CONFIG = {"model_type": "llama", "rope_theta": 10000.0, "num_labels": 2, "vocab_size": 8}


class Headers(Checkpoint):
    """A checkpoint of headers only: reading a weight is an error."""

    def __init__(self, name, tensors=TENSORS, config=CONFIG, folder=None, dtype=torch.float32):
        infos = {
            tensor: TensorInfo(
                tensor,
                *(value if isinstance(value[-1], torch.dtype) else (value, dtype)),
                f"{name}.safetensors",
            )
            for tensor, value in tensors.items()
        }
        super().__init__(name, infos, folder, config)

    def read(self, name):
        raise AssertionError(f"{name} was read")


def found(*checkpoints, private=(), allow=()):
    named = {checkpoint.label: checkpoint for checkpoint in checkpoints}
    return {(p.kind, p.what): p for p in check(named, private, allow)}


def without(name):
    return {n: s for n, s in TENSORS.items() if n != name}


def tokenizer(folder: Path, tokens, kind="tokenizer.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    content = {
        "tokenizer.json": lambda: json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}),
        "vocab.json": lambda: json.dumps(vocabulary),
        "vocab.txt": lambda: "\n".join(tokens),
    }[kind]()
    (folder / kind).write_text(content)
    return folder


# ---- tensors ------------------------------------------------------------------------------------


def test_equal_headers_have_no_problem():
    other = Headers("b", dtype=torch.bfloat16)  # precisions may differ: the merge is in float32
    assert found(Headers("a"), other, Headers("c")) == {}


@pytest.mark.parametrize(
    ("tensors", "kind", "name", "expected", "got", "todo"),
    [
        (
            {**without("layer.weight"), "layer.weights": (4, 4)},
            "missing",
            "layer.weight",
            "a tensor of shape (4, 4) as in a.safetensors",
            "none of that name",
            "Did you mean 'layer.weights'?",
        ),
        (
            {**TENSORS, "layer.scale": (4,)},
            "extra",
            "layer.scale",
            "no such tensor, as in a",
            "shape (4,) in b.safetensors",
            "accept that with allow: [extra]",
        ),
        (
            {**TENSORS, "layer.weight": (4, 5)},
            "shape",
            "layer.weight",
            "shape (4, 4) as in a.safetensors",
            "(4, 5)",
            "different architectures or sizes",
        ),
        (
            {**TENSORS, "embed.weight": (9, 4)},
            "shape",
            "embed.weight",
            "shape (8, 4) as in a.safetensors",
            "(9, 4)",
            "vocabularies differ in size",
        ),
        (
            {**TENSORS, "layer.bias": ((4,), torch.int64)},
            "dtype",
            "layer.bias",
            "torch.float32 as in a.safetensors",
            "torch.int64",
            "different architectures",
        ),
        (
            {**TENSORS, "layer.weight": ((4, 4), torch.float8_e4m3fn)},
            "quantised",
            "layer.weight",
            "weights of at least 16 bits per entry",
            "codes of an unknown quantisation (float8_e4m3fn)",
            "Give the checkpoint that it was made from",
        ),
        (
            {**TENSORS, "layer.weight": ((4, 4), torch.int8)},
            "quantised",
            "layer.weight",
            "weights of at least 16 bits per entry",
            "codes of an unknown quantisation (int8)",
            "Give the checkpoint that it was made from",
        ),
        (
            {**TENSORS, "lm_head.weight": (8, 4)},
            "extra",
            "lm_head.weight",
            "no such tensor, as in a",
            "shape (8, 4) in b.safetensors",
            "One of them has no head, and no config that ties it to the embeddings",
        ),
    ],
)
def test_every_kind_of_tensor_problem_says_all_parts(tensors, kind, name, expected, got, todo):
    problem = found(Headers("a"), Headers("b", tensors))[kind, name]
    assert problem.fatal
    assert problem.where in ("b", "b.safetensors")
    assert problem.expected == expected
    assert problem.got == got
    assert todo in problem.todo
    line = str(problem)
    for part in (kind, problem.where, name, expected, got, todo):
        assert part in line


def test_untied_reference_reports_the_tie_too():
    problems = found(Headers("a", {**TENSORS, "lm_head.weight": (8, 4)}), Headers("b"))
    assert "no config that ties it" in problems["missing", "lm_head.weight"].todo


def test_quantised_alike_is_still_refused():
    """Both sources agree, so comparing them does not find it."""
    packed = {**TENSORS, "layer.weight": ((4, 4), torch.uint8)}
    problems = check({"a": Headers("a", packed), "b": Headers("b", packed)})
    assert [(p.kind, p.where) for p in problems] == [
        ("quantised", "a"),
        ("quantised", "b"),
    ]
    assert found(Headers("a", packed), private=[r"^layer\."]) == {}
    masks = {**TENSORS, "attention.bias": ((1, 1, 4, 4), torch.bool)}
    assert found(Headers("a", masks), Headers("b", masks)) == {}


def test_all_problems_come_in_one_report():
    other = Headers(
        "b",
        {**without("norm.weight"), "layer.weight": (2, 4), "x.weight": (1,)},
        {**CONFIG, "rope_theta": 5e5},
    )
    third = Headers("c", {**TENSORS, "layer.bias": ((4,), torch.int64)})
    with pytest.raises(CompatibilityError, match=r"5 problem\(s\)") as error:
        require(check({"a": Headers("a"), "b": other, "c": third}))
    text = str(error.value)
    lines = [line for line in text.splitlines() if line.startswith("  error")]
    assert len(lines) == 5
    for part in (
        "[missing] b: norm.weight",
        "[extra] b: x.weight",
        "[shape] b.safetensors: layer.weight",
        "[dtype] c.safetensors: layer.bias",
        "[config.rope_theta] b/config.json: rope_theta",
    ):
        assert part in text


def test_long_report_still_shows_every_kind():
    many = {f"block.{i}.weight": (4, 4) for i in range(100)}
    other = Headers("b", {**TENSORS, "layer.bias": (5,)}, {**CONFIG, "hidden_act": "relu"})
    first = Headers("a", {**TENSORS, **many}, {**CONFIG, "hidden_act": "silu"})
    with pytest.raises(CompatibilityError, match=r"102 problem\(s\)") as error:
        require(check({"a": first, "b": other}))
    for kind in ("[missing]", "[shape]", "[config.hidden_act]"):
        assert kind in str(error.value)


# ---- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("classifier.weight", r"^classifier\."),
        ("score.weight", r"^score\."),
        ("qa_outputs.weight", r"^qa_outputs\."),
        ("classifier.dense.weight", r"^classifier\.dense\."),
        ("cls.predictions.bias", r"^cls\.predictions\."),
    ],
)
def test_head_that_differs_is_suggested_as_private_and_the_advice_works(name, pattern):
    first = Headers("a", {**TENSORS, name: (2, 4)})
    others = [Headers("b", {**TENSORS, name: (3, 4)}), Headers("c")]
    problems = check({"a": first, "b": others[0], "c": others[1]})
    assert {p.kind for p in problems} == {"shape", "missing"}
    for problem in problems:
        assert f"private: ['{pattern}']" in problem.todo
    assert check({"a": first, "b": others[0], "c": others[1]}, private=[pattern]) == []


# ---- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "first", "second"),
    [
        ("rope_theta", 10000.0, 500000.0),
        ("hidden_act", "silu", "gelu"),
        ("num_attention_heads", 4, 8),
        ("num_key_value_heads", 4, 2),
        ("rms_norm_eps", 1e-5, 1e-6),
        ("tie_word_embeddings", True, False),
        ("vocab_size", 8, 9),
        ("sliding_window", None, 512),
        ("model_type", "llama", "mistral"),
        ("layer_norm_eps", 1e-12, 1e-5),
        ("patch_size", 16, 14),
    ],
)
def test_config_field_that_changes_the_function(field, first, second):
    one, two = (
        Headers("a", config={**CONFIG, field: first}),
        Headers("b", config={**CONFIG, field: second}),
    )
    (problem,) = found(one, two).values()
    assert problem.fatal
    assert (problem.kind, problem.what) == (f"config.{field}", field)
    assert problem.where == "b/config.json"
    assert repr(first) in problem.expected
    assert problem.got == repr(second)
    assert f"allow: [config.{field}]" in problem.todo
    (allowed,) = found(one, two, allow=[f"config.{field}"]).values()
    assert not allowed.fatal
    require([allowed])  # does not raise


def test_nested_config_fields_are_compared():
    one = Headers("a", config={"text_config": {"rope_theta": 1.0, "dropout": 0.0}})
    two = Headers("b", config={"text_config": {"rope_theta": 2.0, "dropout": 0.1}})
    assert list(found(one, two)) == [("config.rope_theta", "text_config.rope_theta")]


def test_rotary_settings_of_old_and_new_files_are_the_same_thing():
    def new(theta, **rest):
        return Headers(
            "b", config={"rope_parameters": {"rope_theta": theta, "rope_type": "default", **rest}}
        )

    old = Headers("a", config={"rope_theta": 1e4, "rope_scaling": None})
    assert found(old, new(1e4)) == {}
    problem = found(old, new(1e6))["config.rope_theta", "rope_theta"]
    assert problem.fatal
    assert problem.got == "1000000.0"
    scaled = found(old, new(1e4, rope_type="linear", factor=2.0))
    assert scaled["config.rope_scaling", "rope_scaling"].fatal


@pytest.mark.parametrize(
    "field",
    [
        "num_labels", "id2label", "problem_type", "hidden_dropout_prob", "attention_dropout",
        "torch_dtype", "dtype", "transformers_version", "use_cache", "_name_or_path",
        "initializer_range", "pad_token_id", "finetuning_task", "architectures",
    ],
)  # fmt: skip
def test_harmless_config_fields_are_ignored(field):
    one, two = Headers("a", config={**CONFIG, field: 1}), Headers("b", config={**CONFIG, field: 2})
    assert found(one, two) == {}
    assert found(one, Headers("b")) == {}


def test_unknown_config_field_is_a_warning():
    one, two = (
        Headers("a", config={**CONFIG, "novel": 1}),
        Headers("b", config={**CONFIG, "novel": 2}),
    )
    (problem,) = found(one, two).values()
    assert not problem.fatal


def test_field_at_its_default_is_a_warning_only_if_it_matters():
    unknown = {**CONFIG, "model_type": "of_our_own"}
    one = Headers("a", config={**unknown, "hidden_act": "silu", "novel": 1})
    (problem,) = found(one, Headers("b", config=unknown)).values()
    assert (problem.kind, problem.fatal) == ("config.hidden_act", False)
    assert found(Headers("a", config=None), Headers("b")) == {}


@pytest.mark.parametrize(
    ("model_type", "field", "default", "value"),
    [
        ("llama", "rope_theta", 10000.0, 500000),
        ("llama", "hidden_act", "silu", "gelu"),
        ("llama", "tie_word_embeddings", False, True),
        ("mistral", "sliding_window", 4096, 512),
        ("starcoder2", "norm_epsilon", 1e-5, 1e-6),
        ("granite", "attention_multiplier", 1.0, 0.5),
        ("granite", "embedding_multiplier", 1.0, 12.0),
        ("granite", "residual_multiplier", 1.0, 0.22),
        ("granite", "logits_scaling", 1.0, 8.0),
        ("modernbert", "classifier_activation", "gelu", "relu"),
        ("modernbert", "classifier_pooling", "cls", "mean"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_an_omitted_field_has_the_default_of_its_model_type(
    model_type, field, default, value, swapped
):
    omitted = {"model_type": model_type}
    assert (
        found(Headers("a", config=omitted), Headers("b", config={**omitted, field: default})) == {}
    )
    pair = [omitted, {**omitted, field: value}][:: -1 if swapped else 1]
    (problem,) = found(Headers("a", config=pair[0]), Headers("b", config=pair[1])).values()
    assert (problem.kind, problem.fatal) == (f"config.{field}", True)
    shown = [f"{default!r} (the default)", repr(value)][:: -1 if swapped else 1]
    assert problem.expected == f"{shown[0]} as in a"
    assert problem.got == shown[1]
    stated = found(
        Headers("a", config={**omitted, field: default}),
        Headers("b", config={**omitted, field: value}),
    )
    assert stated[f"config.{field}", field].fatal


def test_fields_that_a_config_derives_are_no_difference():
    sizes = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    bare = Headers("a", config=sizes)
    for derived in (
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"head_dim": None},
        {"rope_scaling": None},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    ):
        assert found(bare, Headers("b", config={**sizes, **derived})) == {}, derived
    problem = found(bare, Headers("b", config={**sizes, "num_key_value_heads": 2}))
    assert problem["config.num_key_value_heads", "num_key_value_heads"].fatal
    gpt2 = Headers("a", config={"model_type": "gpt2", "n_layer": 3})
    assert found(gpt2, Headers("b", config={"model_type": "gpt2", "num_hidden_layers": 3})) == {}


# ---- tokenizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json", "vocab.txt"])
def test_tokenizer_difference_names_tokens(tmp_path, kind):
    one = Headers("a", folder=tokenizer(tmp_path / "a", ["x", "y", "z", "old"], kind))
    two = Headers("b", folder=tokenizer(tmp_path / "b", ["y", "x", "z", "new"], kind))
    same = Headers("c", folder=tokenizer(tmp_path / "c", ["x", "y", "z", "old"], kind))
    (problem,) = found(one, two, same).values()
    assert problem.fatal
    assert problem.where == str(tmp_path / "b")
    assert problem.expected == "the 4 tokens of a"
    assert problem.got == "2 with another id ('x', 'y'), 1 missing ('old'), 1 new ('new')"
    assert "allow: [tokenizer]" in problem.todo
    (allowed,) = found(one, two, allow=["tokenizer"]).values()
    assert not allowed.fatal


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_sentencepiece_files_are_compared_as_files(tmp_path, name):
    folders = [tmp_path / letter for letter in "abc"]
    for folder, content in zip(folders, (b"one", b"other", b"one"), strict=True):
        folder.mkdir()
        (folder / name).write_bytes(content)
    one, two, same = (Headers(f.name, folder=f) for f in folders)
    (problem,) = found(one, two, same).values()
    assert (problem.kind, problem.fatal) == ("tokenizer", True)
    assert problem.where == str(tmp_path / "b" / name)
    assert problem.got == "another one (5 bytes, 3 there)"
    (allowed,) = found(one, two, allow=["tokenizer"]).values()
    assert not allowed.fatal


def test_tokens_without_a_row_are_reported_unless_they_are_added(tmp_path):
    folder = tokenizer(tmp_path / "a", ["x", "y", "z"])

    def rows(count, **config):
        return Headers("a", {**TENSORS, "embed.weight": (count, 4)}, config, folder)

    one, fits, wrong = rows(2, vocab_size=2), rows(3, vocab_size=3), rows(3, vocab_size=1)
    assert found(fits, fits) == {}
    assert found(wrong, wrong) == {}  # the config is at fault
    (problem,) = found(one, one).values()
    assert problem.fatal
    assert problem.expected.startswith("ids 0 to 1, the rows of the embeddings")
    assert problem.got == "1 beyond ('z')"
    (allowed,) = found(one, one, allow=["tokenizer"]).values()
    assert not allowed.fatal
    assert ("tokenizer", "vocabulary") in found(rows(2, text_config={"vocab_size": 2}))
    # Gemma 3 has the token of an image beyond the rows of its text models
    vocabulary = {"model": {"vocab": {"x": 0, "y": 1}}, "added_tokens": [{"content": "z", "id": 2}]}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert found(one, one) == {}


def test_no_tokenizer_is_no_difference(tmp_path):
    one = Headers("a", folder=tokenizer(tmp_path / "a", ["x"]))
    (tmp_path / "b").mkdir()
    assert found(one, Headers("b", folder=tmp_path / "b"), Headers("c")) == {}


def test_vocabulary_forms(tmp_path):
    unigram = {
        "model": {"vocab": [["a", -1.0], ["b", -2.0]]},
        "added_tokens": [{"content": "<s>", "id": 7}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    assert read_vocabulary(tmp_path) == {"a": 0, "b": 1, "<s>": 7}
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match=r"tokenizer\.json: expected JSON"):
        read_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": [1]}}')
    with pytest.raises(SourceError, match=r"tokenizer\.json: expected a vocabulary"):
        read_vocabulary(tmp_path)


# ---- allow --------------------------------------------------------------------------------------


def test_extra_tensors_can_be_allowed():
    other = Headers("b", {**TENSORS, "x.weight": (1,)})
    (problem,) = found(Headers("a"), other, allow=["extra"]).values()
    assert not problem.fatal


@pytest.mark.parametrize("kind", ["shape", "missing", "dtype", "tokeniser"])
def test_what_cannot_be_allowed_is_an_error(kind):
    with pytest.raises(ConfigError, match=rf"allow: expected 'tokenizer'.*got '{kind}'"):
        found(Headers("a"), Headers("b"), allow=[kind])


# ---- real folders -------------------------------------------------------------------------------


def test_recipe_reports_on_real_folders_before_reading_a_weight(tmp_path, monkeypatch):
    torch.manual_seed(0)
    llama, gpt2 = ARCHITECTURES["llama"][0](), ARCHITECTURES["gpt2"][0]()
    for name, model in (("a", llama), ("b", gpt2)):
        model.save_pretrained(tmp_path / name)

    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr("gradmerge.sources.files.SafetensorsCheckpoint.read", read)
    recipe = Recipe(sources={"a": str(tmp_path / "a"), "b": str(tmp_path / "b")})
    with pytest.raises(CompatibilityError, match=r"(?s)config\.model_type.*\[missing\]"):
        open_plan(recipe)
    same = Recipe(sources={"a": str(tmp_path / "a"), "b": str(tmp_path / "a")})
    assert open_plan(same).warnings == []


def test_saved_and_living_model_do_not_warn_of_defaults(tmp_path):
    """A file has fewer fields than a config in memory; that alone is not a difference."""
    for name in ("llama", "bert", "vit", "t5", "gpt2"):
        model = ARCHITECTURES[name][0]()
        model.save_pretrained(tmp_path / name)
        if name == "vit":  # its files and its module name tensors differently
            continue
        checkpoints = {
            "file": HuggingFace(str(tmp_path / name)).open(),
            "memory": InMemory(model).open(),
        }
        assert check(checkpoints) == [], name
