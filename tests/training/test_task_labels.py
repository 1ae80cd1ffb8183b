"""Labels, texts, images and files of data are checked in all splits before anything is learned."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy
import pytest
import torch
import transformers
from PIL import Image
from torch.utils.data import Subset

from gradmerge import MergeDataModule, TaskData
from gradmerge.common.errors import ConfigError
from gradmerge.objectives import CrossEntropy, Predictions
from gradmerge.training.fitting import positions_of, require_kind, tokens_of
from gradmerge.training.labels import Labels
from gradmerge.training.splits import load_splits
from networks import seeded
from tiny import SPLITS, build, fit, module_of, sentences, vectors, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(word_tokenizer(tmp_path_factory.mktemp("tokenizer")))


# ---- labels ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [0.9, math.nan, math.inf, None, "1", True, [1], {"a": 1}, -1, -99, 10**12, 2**70]
)
def test_what_is_not_a_class_number_is_named_with_its_row(wrong):
    found = r"task a, test: expected class numbers in column 'label', 0 or more, got .*\(row 1\)"
    with pytest.raises(ConfigError, match=found):
        Labels.read([{"label": 0}, {"label": wrong}, {"label": 2}], "label", "task a, test")


@pytest.mark.parametrize("values", [[0.0, 0.9], [0, -1], [0, None], [False, True], ["0", "1"]])
def test_columns_of_datasets_are_checked_too(values):
    table = datasets.Dataset.from_dict({"label": values, "text": ["x", "y"]})
    for rows in (table, table.with_format("torch"), Subset(table, range(2))):
        with pytest.raises(ConfigError, match=r"column 'label', 0 or more, got .*\(row [01]\)"):
            Labels.read(rows, "label", "here")


def test_class_numbers_of_every_type_are_read():
    given = [0, 1.0, -100, -100.0, torch.tensor(2), numpy.int32(3), numpy.float32(4)]
    labels = Labels.read([{"label": value} for value in given], "label", "here")
    assert labels.values == [0, 1, -100, -100, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"0 to 2 \(the network has 3 .* got 3 \(row 5\), 4"):
        labels.require_below(3)
    labels.require_below(5)


def texts_with(label, split, at=1):
    """Splits to classify in which one label is another."""
    path = {}
    for i, name in enumerate(SPLITS):
        path[name] = [{"text": t, "label": k % 3} for k, t in enumerate(sentences(i, 5))]
    path[split][at]["label"] = label
    return TaskData(path, kind="text_classification", max_length=8)


class Bert:
    """What a merged model shows of itself."""

    def __init__(self, **options):
        kind = transformers.BertForSequenceClassification
        self.skeleton = seeded(kind, num_labels=3, max_position_embeddings=12, **options)
        recipe = SimpleNamespace(trust_remote_code=False)
        self.plan = SimpleNamespace(private=[], serving={}, recipe=recipe)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("label", [3, 0.9])
def test_labels_of_all_splits_are_checked_at_set_up(split, label, tokenizer):
    data = MergeDataModule({"a": texts_with(label, split)}, processor=tokenizer)
    data.attach(Bert())
    with pytest.raises(ConfigError, match=rf"task a, {split}: .*got {label} \(row 1\)"):
        data.setup()


def test_a_network_of_ones_own_shows_its_classes_at_the_first_batch(tmp_path):
    data = vectors()
    data.tasks["b"].path["test"][4]["labels"] = torch.tensor(3)
    with pytest.raises(ConfigError, match=r"task b, test: .*0 to 2 .* got 3 \(row 4\)"):
        fit(tmp_path, data=data)
    with pytest.raises(ConfigError, match=r"CrossEntropy: .*0 to 2 .*got 0 to 5"):
        CrossEntropy().loss(Predictions(torch.zeros(2, 3), torch.tensor([0, 5])))
    with pytest.raises(ConfigError, match=r"CrossEntropy: expected class numbers .*float32"):
        CrossEntropy().loss(Predictions(torch.zeros(2, 3), torch.zeros(2)))


@pytest.mark.parametrize("split", ["adaptation", "selection"])
def test_a_split_without_the_label_column_is_refused_at_set_up(split, tmp_path, tokenizer):
    task = texts_with(0, split)
    for row in task.path[split]:
        del row["label"]
    data = MergeDataModule({"a": task}, processor=tokenizer)
    data.setup()
    assert [data.lacks_labels("a", name) for name in SPLITS] == [name == split for name in SPLITS]


def test_examples_that_differ_in_their_inputs_are_refused(tmp_path):
    data = vectors()
    data.tasks["a"].path["test"][2]["mask"] = torch.ones(6)
    with pytest.raises(ConfigError, match=r"task a, test: expected the same inputs .* in row 2"):
        data.setup()
    data.tasks["a"].path["test"][2] = [1, 2]
    with pytest.raises(ConfigError, match=r"task a, test: expected mappings .* list in row 2"):
        data.setup()


# ---- texts and the network ------------------------------------------------------------------


def rows_of(texts):
    path = {
        name: [{"text": t, "label": 0} for t in sentences(i, 4)] for i, name in enumerate(SPLITS)
    }
    path["test"] = [{"text": t, "label": 0} for t in texts]
    return path


@pytest.mark.parametrize("kind", ["text_classification", "causal_lm"])
@pytest.mark.parametrize("text", [None, 5, ["w1"]])
def test_rows_without_a_text_are_named(kind, text, tokenizer):
    path = rows_of([*sentences(7, 4), text])
    data = MergeDataModule({"a": TaskData(path, kind=kind, max_length=4)}, processor=tokenizer)
    with pytest.raises(ConfigError, match=r"task a, test, row 4: expected a text in column 'text'"):
        data.setup()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("w1 " * 40, {}, r"row 1: expected at most 12 tokens, .* got 20\. Set max_length: 12"),
        ("w28", {"vocab_size": 31}, r"row 1: expected tokens 0 to 30, .* got 31"),
    ],
)
def test_texts_that_the_network_cannot_take_are_refused_at_set_up(
    text, options, message, tokenizer
):
    task = TaskData(rows_of(["w1 w2", text]), kind="text_classification", max_length=20)
    data = MergeDataModule({"a": task}, processor=tokenizer)
    data.attach(Bert(**options))
    with pytest.raises(ConfigError, match=message):
        data.setup()


def test_positions_are_limits_only_where_they_are_learned():
    bert = Bert().skeleton
    assert (tokens_of(bert), positions_of(bert)) == (32, 12)
    roberta = seeded(
        transformers.RobertaForSequenceClassification, max_position_embeddings=14, pad_token_id=1
    )
    assert positions_of(roberta) == 12
    roberta(input_ids=torch.full((1, 12), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        roberta(input_ids=torch.full((1, 13), 5))
    assert positions_of(seeded(transformers.LlamaForCausalLM)) is None
    assert positions_of(build()) is None


@pytest.mark.parametrize(
    ("network", "kind", "message"),
    [
        ("LlamaForCausalLM", "text_classification", "predicts the next token, got text_class"),
        ("BertForSequenceClassification", "causal_lm", "predicts classes, got causal_lm"),
        ("BertForSequenceClassification", "image_classification", "whose input is pixel_values"),
        ("ViTForImageClassification", "text_classification", "whose input is input_ids"),
    ],
)
def test_kinds_that_the_network_does_not_take_are_refused(network, kind, message):
    skeleton = seeded(getattr(transformers, network))
    with pytest.raises(ConfigError, match=f"task a: expected a kind of examples.*{message}"):
        require_kind(skeleton, kind, "task a")
    require_kind(skeleton, "tensors", "task a")


# ---- options and files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": 5}, "path: expected the name"),
        ({"limit": {"test": 0}}, r"limit\.test: expected at least 1 example, got 0"),
        ({"limit": {"test": -3}}, r"limit\.test: expected at least 1 example, got -3"),
        ({"max_length": 0}, "max_length: expected 2 to .*, got 0"),
        ({"max_length": 1}, "max_length: expected 2 to .*, got 1"),
        ({"max_length": 10**30}, "max_length: expected 2 to .* tokens"),
        ({"fractions": (1.5, -0.7, 0.2)}, "fractions: expected three positive shares"),
        ({"fractions": (math.nan, 0.5, 0.5)}, "fractions: expected three positive shares"),
    ],
)
def test_options_of_tasks_are_checked_when_they_are_given(options, message):
    with pytest.raises(ConfigError, match=message):
        TaskData(**{"path": "json", **options})


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": 10**20},
        {"eval_batch_size": 0},
        {"num_workers": -1},
        {"num_workers": 10**5},
        {"seed": -1},
        {"seed": 10**20},
    ],
)
def test_options_of_batches_are_checked_when_they_are_given(options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=rf"data\.{name}: expected [01] to \d+, got {value}"):
        MergeDataModule({"a": TaskData("json")}, **options)


GOOD = '{"text": "w1", "label": 0}\n{"text": "w2", "label": 1}\n'
FILES = [
    ("json", GOOD + '{"text": "w3", "lab', r"bad\.json \(split test\): line 3: Unterminated"),
    ("json", '[{"text": "w1"},\n{"text"]', r"bad\.json \(split test\): line 2: Expecting"),
    ("json", GOOD + '{"text": "w3", "label": "x"}\n', r"bad\.json \(split test\): .*type"),
    ("json", bytes(range(256)) * 9, r"bad\.json \(split test\): line 1"),
    ("json", '{"text": ' + "[" * 5000, r"bad\.json \(split test\): line 1"),
    ("csv", 'text,label\nw1,1\nw2,1,5,6\n"w3', r"bad\.csv \(split test\): "),
    ("parquet", b"PAR1 and more", r"bad\.parquet \(split test\): "),
    ("text", b"\xff\xfe\x00", r"bad\.text \(split test\): .*utf-8"),
]


@pytest.mark.parametrize(("kind", "content", "message"), FILES)
def test_a_file_that_cannot_be_read_is_named(kind, content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    good = datasets.Dataset.from_list([json.loads(line) for line in GOOD.splitlines()])
    files = {}
    for name in SPLITS[:2]:
        files[name] = path = str(tmp_path / f"{name}.{kind}")
        if kind == "text":
            Path(path).write_text("w1\nw2\n")
        else:
            getattr(good, f"to_{kind}")(path)
    bad = tmp_path / f"bad.{kind}"
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    files["test"] = str(bad)
    with pytest.raises(
        ConfigError, match=rf"task a: cannot read {re.escape(str(tmp_path))}/{message}"
    ):
        load_splits("a", TaskData(kind, data_files=files), seed=0)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_a_damaged_image_is_named_with_its_row(content, tmp_path):
    from transformers import ViTImageProcessor

    generator = numpy.random.default_rng(0)
    for split in ("train", "validation", "test"):
        for i in range(2):
            path = tmp_path / "data" / split / "cat" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:-60] if content is None else content)
    ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(tmp_path / "processor")
    task = TaskData(str(tmp_path / "data"), kind="image_classification")
    data = MergeDataModule({"t": task}, processor=str(tmp_path / "processor"))
    with pytest.raises(ConfigError, match=r"task t, test, row 1: cannot be read: .*image file"):
        data.setup()


def test_a_fit_whose_data_are_refused_can_be_set_up_again(tmp_path):
    data = vectors()
    kept = data.tasks["a"].path["test"][2]["labels"]
    data.tasks["a"].path["test"][2]["labels"] = torch.tensor(-5)
    with pytest.raises(ConfigError, match=r"task a, test: expected class numbers .* got -5"):
        fit(tmp_path, data=data)
    data.tasks["a"].path["test"][2]["labels"] = kept
    module, _ = fit(tmp_path, module_of(), data=data)
    assert set(module.results) <= {"selection"}
