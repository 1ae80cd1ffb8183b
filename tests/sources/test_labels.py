"""Heads whose rows stand for other labels, and configs that say one thing in two spellings."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers

from gradmerge import Recipe, merge
from gradmerge.coefficients import Uniform
from gradmerge.common.errors import CompatibilityError
from gradmerge.engine.opening import open_plan
from gradmerge.sources import Checkpoint, TensorInfo
from gradmerge.sources.compatibility import check
from tiny import relatives

NLI = ["contradiction", "neutral", "entailment"]


def labels(names, inverse=None):
    inverse = names if inverse is None else inverse
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(inverse)},
    }


class Classifier(Checkpoint):
    """Headers of a classifier with three labels."""

    def __init__(self, name, config, kind="LlamaForSequenceClassification"):
        shapes = {"embed_tokens.weight": (3, 4), "score.weight": (3, 4)}
        infos = {n: TensorInfo(n, shape, torch.float32, name) for n, shape in shapes.items()}
        super().__init__(name, infos, None, {"architectures": [kind], **config})

    def read(self, name):
        raise AssertionError(f"{name} was read")


def found(*configs, private=(), **options):
    named = {n: Classifier(n, c, **options) for n, c in zip("abc", configs, strict=False)}
    return [(p.kind, p.where, p.fatal) for p in check(named, private)]


REFUSED = [("config.id2label", "b/config.json", True)]
UNSURE = [("config.id2label", "b/config.json", False)]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (labels(NLI), labels(NLI), []),
        (labels(NLI), labels(NLI[::-1]), REFUSED),
        (labels(NLI), labels(["contradiction", "maybe", "entailment"]), REFUSED),
        (labels(NLI), labels([name.upper() for name in NLI]), []),
        (labels(["not_entailment", "x", "y"]), labels(["not entailment", "X", "Y "]), []),
        (labels(NLI), {"num_labels": 3}, UNSURE),
        (labels(NLI), labels(["LABEL_0", "LABEL_1", "LABEL_2"]), UNSURE),
        ({"num_labels": 3}, {"num_labels": 3}, []),
        (labels(["LABEL_0", "LABEL_1", "LABEL_2"]), labels(["LABEL_2", "LABEL_1", "LABEL_0"]), []),
        # names only in `label2id`, as training scripts write them
        (labels(NLI), {"label2id": {name: i for i, name in enumerate(NLI[::-1])}}, REFUSED),
        (labels(NLI), labels(["LABEL_0", "LABEL_1", "LABEL_2"], NLI[::-1]), REFUSED),
        (labels(NLI), labels(["LABEL_0", "LABEL_1", "LABEL_2"], NLI), []),
        # a list, or rows that are no numbers: transformers has its say later
        (labels(NLI), {"id2label": NLI, "num_labels": 3}, UNSURE),
        (labels(NLI), {"label2id": {"x": [0], "y": [1], "z": [2]}}, UNSURE),
        (labels(NLI), {"label2id": {name: str(i) for i, name in enumerate(NLI)}}, []),
        (labels(NLI), {"id2label": {"x": "1", "y": "2", "z": "3"}}, UNSURE),
    ],
)
def test_meaning_of_labels(first, second, expected):
    assert found(first, second) == expected


def test_sources_are_compared_even_if_the_base_has_no_names():
    told = found({"num_labels": 3}, labels(NLI), labels(NLI[::-1]))
    assert ("config.id2label", "c/config.json", True) in told


def test_heads_that_are_not_merged_may_differ():
    pair = labels(NLI), labels(NLI[::-1])
    assert found(*pair, private=[r"^score\."]) == []
    assert found(*pair, kind="LlamaForCausalLM") == []


def test_the_allowed_difference_is_a_warning():
    named = {"a": Classifier("a", labels(NLI)), "b": Classifier("b", labels(NLI[::-1]))}
    (problem,) = check(named, allow=["config.id2label"])
    assert not problem.fatal
    assert problem.expected == "0: contradiction, 1: neutral, 2: entailment as in a"


def test_a_config_that_contradicts_itself_is_told():
    told = found(labels(NLI, NLI[::-1]), labels(NLI))
    assert told == [("config.label2id", "a/config.json", False)]


@pytest.mark.parametrize(
    ("second", "count"),
    [("multi_label_classification", 1), (None, 0), ("single_label_classification", 0)],
)
def test_kinds_of_scores(second, count):
    kinds = [{"problem_type": k} for k in ("single_label_classification", second)]
    told = found(*({**labels(NLI), **kind} for kind in kinds))
    assert told == [("config.problem_type", "b/config.json", True)] * count


def test_a_merge_of_classifiers_and_of_their_heads(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.BertConfig(
        **sizes, num_attention_heads=2, vocab_size=32, max_position_embeddings=16, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    orders = {"base": NLI, "a": NLI, "b": NLI[::-1]}
    for (name, order), relative in zip(orders.items(), relatives(model), strict=True):
        relative.config = copy.deepcopy(relative.config)
        relative.config.id2label = dict(enumerate(order))
        relative.config.label2id = {label: row for row, label in enumerate(order)}
        relative.save_pretrained(tmp_path / name)
    sources = {name: str(tmp_path / name) for name in "ab"}
    with pytest.raises(CompatibilityError, match=r"\[config\.id2label\].*b/config\.json"):
        open_plan(Recipe(sources, str(tmp_path / "base")))
    private = Recipe(sources, str(tmp_path / "base"), init=Uniform(), private=[r"^classifier\."])
    merge(private, tmp_path / "out")
    for name in "ab":
        written = json.loads((tmp_path / "out" / "tasks" / name / "config.json").read_text())
        assert list(written["id2label"].values()) == orders[name]


# ---- one setting in two spellings ---------------------------------------------------------------


class Plain(Classifier):
    def __init__(self, name, config):
        super().__init__(name, config, kind="LlamaForCausalLM")


def differing(first, second):
    return [p.kind for p in check({"a": Plain("a", first), "b": Plain("b", second)}) if p.fatal]


LINEAR = {"model_type": "llama", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"type": "linear", "factor": 2}, {"type": "linear", "rope_type": "linear", "factor": 2.0}),
        ({"type": "default"}, None),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "of_our_own"])
def test_rotary_types(first, second, model_type):
    configs = [{**LINEAR, "model_type": model_type, "rope_scaling": r} for r in (first, second)]
    assert differing(*configs) == []
    changed = {**(second or {"type": "linear"}), "factor": 4.0}
    assert differing(configs[0], {**configs[1], "rope_scaling": changed}) == ["config.rope_scaling"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"model_type": "llama", "rope_theta": 10000}, {"model_type": "llama", "rope_theta": 1e4}),
        ({"model_type": "gpt2", "n_embd": 8}, {"model_type": "gpt2", "hidden_size": 8}),
        ({"model_type": "llama", "sliding_window": None}, {"model_type": "llama"}),
        ({"model_type": "resnet", "depths": [1, 2]}, {"model_type": "resnet", "depths": (1, 2)}),
        ({"model_type": "llama", "torch_dtype": "float16"}, {"model_type": "llama"}),
        ({"model_type": "bert", "layer_norm_eps": 1e-12}, {"model_type": "bert"}),
        (
            {"model_type": "gemma3_text", "rope_local_base_freq": 10000, "rope_theta": 1000000},
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
        ),
    ],
)
def test_one_value_in_two_spellings(first, second):
    assert differing(first, second) == []
    assert differing(second, first) == []


def test_values_that_differ_under_two_spellings_are_still_told():
    gpt2 = {"model_type": "gpt2"}
    assert differing({**gpt2, "n_embd": 8}, {**gpt2, "hidden_size": 16}) != []
    gemma = {"model_type": "gemma3_text", "rope_theta": 1000000}
    pair = [{**gemma, "rope_local_base_freq": base} for base in (10000, 20000)]
    assert differing(*pair) == ["config.rope_parameters"]
