"""Reading, splitting, preparing and collating data; the order of the training stream."""

from __future__ import annotations

import csv
import json
from itertools import chain
from types import SimpleNamespace

import datasets
import numpy
import pytest
import torch
from PIL import Image

from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData
from gradmerge.common.errors import ConfigError
from gradmerge.training.examples import STAGES
from gradmerge.training.loaders import collate
from gradmerge.training.splits import load_splits, require_disjoint
from tiny import relatives, sentences, word_tokenizer

ROWS = {
    stage: [{"text": text, "label": i % 3} for i, text in enumerate(sentences(j, 5 + j))]
    for j, stage in enumerate(("train", "validation", "test"))
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(word_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(folder, kind, rows=ROWS):
    """The rows as files of a kind; returns `data_files`."""
    files = {}
    for stage, own in rows.items():
        path = folder / f"{stage}.{kind}"
        if kind == "json":
            path.write_text("\n".join(json.dumps(row) for row in own))
        elif kind == "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["text", "label"])
                writer.writeheader()
                writer.writerows(own)
        elif kind == "parquet":
            datasets.Dataset.from_list(own).to_parquet(path)
        else:
            path.write_text("\n".join(row["text"] for row in own))
        files[stage] = str(path)
    return files


def texts(splits):
    return {stage: [row["text"] for row in split] for stage, split in splits.items()}


WANTED = {s: [r["text"] for r in rows] for s, rows in zip(STAGES, ROWS.values(), strict=True)}


# ---- reading --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "text"])
def test_files_of_every_kind_are_read_by_their_usual_splits(tmp_path, kind):
    splits = load_splits("t", TaskData(kind, data_files=write(tmp_path, kind)), seed=0)
    assert texts(splits) == WANTED
    if kind != "text":
        assert [row["label"] for row in splits["test"]] == [r["label"] for r in ROWS["test"]]


def test_folders_of_save_to_disk_are_read(tmp_path):
    whole = datasets.DatasetDict({s: datasets.Dataset.from_list(r) for s, r in ROWS.items()})
    whole.save_to_disk(tmp_path / "all")
    assert texts(load_splits("t", TaskData(str(tmp_path / "all")), seed=0)) == WANTED
    whole["train"].save_to_disk(tmp_path / "one")
    cut = load_splits("t", TaskData(str(tmp_path / "one")), seed=0)
    assert sorted(chain(*texts(cut).values())) == sorted(WANTED["adaptation"])


def test_a_python_mapping_is_taken_as_it_is():
    given = dict(zip(STAGES, ROWS.values(), strict=True))
    splits = load_splits("t", TaskData(given), seed=0)
    assert all(splits[stage] is given[stage] for stage in STAGES)
    with pytest.raises(ConfigError, match=r"task t: expected the splits .*; missing test\."):
        load_splits("t", TaskData({k: given[k] for k in STAGES[:2]}), seed=0)


def test_an_image_folder_gives_pixels_and_class_numbers(tmp_path):
    from transformers import ViTImageProcessor

    generator = numpy.random.default_rng(0)
    for stage, count in (("train", 4), ("validation", 2), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / stage / name
            folder.mkdir(parents=True)
            for i in range(count):
                mode, shape = ("L", (8, 8)) if i == 0 else ("RGB", (8, 8, 3))
                pixels = generator.integers(0, 256, shape, dtype=numpy.uint8)
                Image.fromarray(pixels, mode).save(folder / f"{i}.png")
    ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(tmp_path / "processor")
    task = TaskData(str(tmp_path / "data"), kind="image_classification")
    data = MergeDataModule({"t": task}, batch_size=3, processor=str(tmp_path / "processor"))
    data.setup()
    assert [len(data.examples(stage)["t"]) for stage in STAGES] == [8, 4, 4]
    batch = next(iter(data.train_dataloader()))["t"]
    assert batch["pixel_values"].shape == (3, 3, 4, 4)
    assert batch["pixel_values"].dtype == torch.float32
    assert sorted(e["labels"].item() for e in data.examples("test")["t"]) == [0, 0, 1, 1]


def test_what_cannot_be_read_is_said_with_its_task(tmp_path):
    data = TaskData("json", data_files=str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError, match=r"task t: cannot read json \(files .*absent\.json"):
        load_splits("t", data, seed=0)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    files = write(tmp_path, "json", ROWS)
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    found = r"task t: the cache of datasets, .*file/cache, cannot be written: .*Not a directory"
    with pytest.raises(ConfigError, match=found):
        load_splits("t", TaskData("json", data_files=files), seed=0)


# ---- splits ---------------------------------------------------------------------------------


def test_splits_of_our_own_names_come_before_their_usual_names(tmp_path):
    rows = {**dict(zip(STAGES, ROWS.values(), strict=True)), "train": [{"text": "x", "label": 0}]}
    splits = load_splits("t", TaskData("json", data_files=write(tmp_path, "json", rows)), seed=0)
    assert texts(splits) == WANTED


def test_split_expressions_cut_one_split(tmp_path):
    files = write(tmp_path, "json")
    data = TaskData(
        "json",
        data_files=files,
        splits={"adaptation": "train[:2]", "selection": "train[2:]"},
    )
    splits = load_splits("t", data, seed=0)
    assert texts(splits) == {
        "adaptation": WANTED["adaptation"][:2],
        "selection": WANTED["adaptation"][2:],
        "test": WANTED["test"],
    }


def test_a_single_split_is_cut_by_seeded_shares(tmp_path):
    path = tmp_path / "all.json"
    path.write_text("\n".join(json.dumps({"text": text}) for text in sentences(0, 20)))
    data = TaskData("json", data_files=str(path), fractions=(0.6, 0.1, 0.3))
    first = texts(load_splits("t", data, seed=0))
    assert [len(first[stage]) for stage in STAGES] == [12, 2, 6]
    assert sorted(chain(*first.values())) == sorted(sentences(0, 20))
    assert texts(load_splits("t", data, seed=0)) == first
    assert texts(load_splits("t", data, seed=1)) != first


def test_too_few_examples_and_other_splits_are_refused(tmp_path):
    path = tmp_path / "all.json"
    path.write_text("\n".join(json.dumps({"text": text}) for text in sentences(0, 2)))
    with pytest.raises(ConfigError, match="task t: too few examples for three splits: 2"):
        load_splits("t", TaskData("json", data_files=str(path)), seed=0)
    files = write(tmp_path, "json", {"train": ROWS["train"], "holdout": ROWS["test"]})
    with pytest.raises(ConfigError, match=r"got train, holdout\. Choose them with"):
        load_splits("t", TaskData("json", data_files=files), seed=0)


def test_options_of_a_task_are_checked():
    with pytest.raises(ConfigError, match=r"unknown split 'adaption'.*Did you mean 'adaptation'"):
        TaskData("json", splits={"adaption": "train"})
    with pytest.raises(ConfigError, match=r"unknown split 'train'"):
        TaskData("json", limit={"train": 3})
    with pytest.raises(
        ConfigError, match=r"three positive shares that sum to 1, got \(0\.5, 0\.5, 0\.5\)"
    ):
        TaskData("json", fractions=(0.5, 0.5, 0.5))
    with pytest.raises(ConfigError, match="at least one task, got none"):
        MergeDataModule({})
    with pytest.raises(ConfigError, match=r"batch_size: expected 1 to 1048576, got 0"):
        MergeDataModule({"t": TaskData("json")}, batch_size=0)


# ---- disjointness ---------------------------------------------------------------------------


def test_shared_examples_are_refused_with_their_counts(tokenizer):
    rows = [{"text": text, "label": 0} for text in sentences(0, 9)]
    splits = {
        "adaptation": rows[:5],
        "selection": [*rows[5:7], {**rows[1], "label": 2}, rows[3]],
        "test": [rows[8], rows[6]],
    }
    with pytest.raises(ConfigError, match=r"task t: the splits share examples") as caught:
        require_disjoint("t", splits, ("text",))
    text = str(caught.value)
    assert "2 of adaptation also in selection (rows 1 = 2, 3 = 3)" in text
    assert "1 of selection also in test (rows 1 = 1)" in text
    data = MergeDataModule({"t": TaskData(splits, max_length=4)}, processor=tokenizer)
    with pytest.raises(ConfigError, match=r"splits share examples.*data\.check_disjoint: false"):
        data.setup()


@pytest.mark.parametrize("kind", ["text_classification", "causal_lm"])
def test_only_examples_that_are_used_are_compared(tokenizer, kind):
    rows = [{"text": text, "label": 0} for text in sentences(0, 9)]
    splits = {"adaptation": rows[:4], "selection": [*rows[4:6], rows[0]], "test": rows[6:]}

    def setup(count):
        limit = {"selection": count}
        task = TaskData(splits, kind=kind, max_length=9, limit=limit)  # 8 words and an end mark
        MergeDataModule({"t": task}, processor=tokenizer).setup()

    setup(2)
    with pytest.raises(ConfigError, match=r"1 of adaptation also in selection \(rows 0 = 2\)"):
        setup(3)


def test_blank_and_repeated_lines_of_a_text_are_left_out(tmp_path, tokenizer, caplog):
    lines = sentences(0, 12)
    path = tmp_path / "all.txt"
    path.write_text("\n".join(["", *lines, "  ", lines[3], "", *lines[:2], "\t", ""]))
    task = TaskData("text", data_files=str(path), max_length=9)
    with caplog.at_level("INFO"):
        splits = load_splits("t", task, seed=0)
    assert sorted(chain(*texts(splits).values())) == sorted(lines)
    assert "task t: dropped 3 exact duplicates of 15 examples" in caplog.text
    MergeDataModule({"t": task}, processor=tokenizer).setup()


def test_blank_lines_of_given_splits_are_left_out(tmp_path):
    rows = {stage: [{"text": ""}, *own, {"text": " "}] for stage, own in ROWS.items()}
    files = write(tmp_path, "text", rows)
    assert texts(load_splits("t", TaskData("text", data_files=files), seed=0)) == WANTED
    named = dict(zip(STAGES, ROWS, strict=True))
    task = TaskData("text", data_files=files, splits=named)
    assert texts(load_splits("t", task, seed=0)) == WANTED


def test_one_text_with_two_labels_is_no_repetition(tmp_path):
    rows = [{"text": text, "label": 0} for text in sentences(0, 6)]
    path = tmp_path / "all.json"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {**rows[0], "label": 1}]))
    task = TaskData("json", kind="text_classification", data_files=str(path))
    assert sum(len(split) for split in load_splits("t", task, seed=0).values()) == 7


@pytest.mark.parametrize("column", ["pixel_values", "x"])
def test_shared_tensors_are_refused_whatever_their_name(column):
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    rows = [{column: value, "labels": torch.tensor(0)} for value in values]
    splits = {"adaptation": rows[:2], "selection": rows[2:3], "test": rows[3:]}
    require_disjoint("t", splits, ("text",))
    with pytest.raises(ConfigError, match="1 of adaptation also in test"):
        require_disjoint("t", {**splits, "test": [rows[1]]}, ("text",))


def test_the_check_can_be_left_out(tokenizer):
    same = dict.fromkeys(STAGES, ROWS["train"])
    options = {"processor": tokenizer, "check_disjoint": False}
    data = MergeDataModule({"t": TaskData(same, kind="text_classification")}, **options)
    data.setup()
    assert len(data.examples("test")["t"]) == 5


# ---- preparation ----------------------------------------------------------------------------


def prepared(tokenizer, rows=ROWS, kind="text_classification", **options):
    data = dict(zip(STAGES, rows.values(), strict=True))
    module = MergeDataModule({"t": TaskData(data, kind=kind, **options)}, 2, processor=tokenizer)
    module.setup()
    return {stage: module.examples(stage)["t"] for stage in STAGES}, module


def test_texts_become_truncated_tokens_with_labels(tokenizer):
    found, _ = prepared(tokenizer, max_length=5)
    example = found["adaptation"][1]
    words = [3 + int(word[1:]) for word in ROWS["train"][1]["text"].split()]
    assert example["input_ids"].tolist() == words[:5]
    assert example["labels"].item() == 1


def test_a_task_without_the_label_column_is_unlabelled(tokenizer):
    rows = {s: [{"text": row["text"]} for row in own] for s, own in ROWS.items()}
    found, _ = prepared(tokenizer, rows)
    assert "labels" not in found["adaptation"][0]


def test_labels_in_words_and_missing_columns_are_refused(tokenizer):
    rows = {s: [{**row, "label": "cat"} for row in own] for s, own in ROWS.items()}
    with pytest.raises(ConfigError, match=r"adaptation: .*'label', .* got 'cat' \(row 0\)"):
        prepared(tokenizer, rows)
    with pytest.raises(ConfigError, match=r"expected a column 'texts', got text, label.*'text'"):
        prepared(tokenizer, text="texts")
    with pytest.raises(ConfigError, match="task t, test: expected at least one example"):
        prepared(tokenizer, {**ROWS, "test": []})


def test_windows_run_over_documents_with_an_end_mark_between(tokenizer):
    found, _ = prepared(tokenizer, kind="causal_lm", max_length=6)
    stream = []
    for row in ROWS["train"]:
        stream += [*(3 + int(word[1:]) for word in row["text"].split()), 2]
    count = len(stream) // 6
    assert len(found["adaptation"]) == count == 7
    for i in range(count):
        window = found["adaptation"][i]
        assert window["input_ids"].tolist() == stream[6 * i : 6 * i + 6]
        assert torch.equal(window["labels"], window["input_ids"])
    num_bytes = sum(len(row["text"].encode()) for row in ROWS["train"])
    assert window["bytes_per_token"] == pytest.approx(num_bytes / len(stream))


def test_too_few_tokens_for_a_window_are_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"window of 999 tokens \(max_length\), got 45 tokens"):
        prepared(tokenizer, kind="causal_lm", max_length=999)


def test_limits_count_examples_or_windows(tokenizer):
    limit = {"adaptation": 2, "test": 100}
    found, _ = prepared(tokenizer, limit=limit)
    assert [len(found[stage]) for stage in STAGES] == [2, 6, 7]
    with pytest.raises(IndexError, match="index out of range"):
        found["adaptation"][2]
    found, _ = prepared(tokenizer, kind="causal_lm", max_length=6, limit=limit)
    assert [len(found[stage]) for stage in STAGES] == [2, 9, 10]


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"(?s)empty: cannot load its tokenizer.*data\.processor"):
        prepared(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="expected a source folder with a tokenizer, got none"):
        prepared(None)


def test_collating_pads_tokens_masks_and_labels_on_the_right():
    long, short = torch.tensor([5, 6, 7]), torch.tensor([8])
    batch = collate(
        [
            {"input_ids": ids, "attention_mask": ids > 0, "labels": ids, "bytes_per_token": size}
            for ids, size in ((long, 3.0), (short, 5.0))
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert batch["bytes_per_token"] == (3 * 3.0 + 1 * 5.0) / 4
    rows = [{"input_ids": ids, "token_type_ids": ids} for ids in (long, short)]
    padded = collate(rows, pad=9)
    assert padded["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert padded["token_type_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert collate([{"labels": 2}, {"labels": 0}])["labels"].tolist() == [2, 0]


def decoder_classifier(kind, pad):
    """Sources of a tiny decoder that finds the last token by the padding of its config."""
    import transformers

    options = {"vocab_size": 32, "num_labels": 3, "pad_token_id": pad}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, **options)
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(**sizes, **heads, **options)
    name = {"gpt2": "GPT2", "llama": "Llama"}[kind] + "ForSequenceClassification"
    torch.manual_seed(0)
    return relatives(getattr(transformers, name)(config), scale=0.2)


def with_network(models, folder, **options):
    """A data module of uneven texts whose trainer has a merge of the models."""
    module = MergeModule(Recipe({"t": models[1], "u": models[2]}, base=models[0]))
    rows = {
        stage: [{**r, "text": " ".join(r["text"].split()[: 8 - i])} for i, r in enumerate(own)]
        for stage, own in zip(STAGES, ROWS.values(), strict=True)
    }
    task = TaskData(rows, kind="text_classification")
    data = MergeDataModule({"t": task}, processor=str(folder), **options)
    data.trainer = SimpleNamespace(lightning_module=module, world_size=1, global_rank=0)
    data.setup()
    return data, module.merged


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("in_tokenizer", "in_config"), [(31, 31), (None, 31), (30, 31)])
def test_a_row_of_an_uneven_batch_of_a_decoder_has_the_logits_of_the_row_alone(
    tmp_path, kind, in_tokenizer, in_config
):
    folder = word_tokenizer(tmp_path / "tokenizer")
    change_padding(folder, in_tokenizer)
    data, merged = with_network(decoder_classifier(kind, in_config), folder, batch_size=4)
    for loader in (data.train_dataloader(), *data.val_dataloader()):
        batch = next(iter(loader))
        batch = batch.get("t", batch)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        assert len(set(lengths)) > 1
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            together = merged(**inputs).logits
            for i, length in enumerate(lengths):
                alone = merged(**{key: value[i : i + 1, :length] for key, value in inputs.items()})
                torch.testing.assert_close(together[i : i + 1], alone.logits)


def test_a_decoder_that_classifies_without_a_padding_token_is_refused(tmp_path):
    folder = word_tokenizer(tmp_path / "tokenizer")
    change_padding(folder, None)
    models = decoder_classifier("llama", None)
    message = r"LlamaForSequenceClassification .* no pad_token_id.*Set pad_token_id in the config"
    with pytest.raises(ConfigError, match=message):
        with_network(models, folder, batch_size=2)
    data, _ = with_network(models, folder, batch_size=1, eval_batch_size=1)
    assert len(next(iter(data.train_dataloader()))["t"]["input_ids"]) == 1


def change_padding(folder, token):
    """Another padding token of a saved tokenizer, or none."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("pad_token", None)
    if token is not None:
        settings["pad_token"] = f"w{token - 3}"
    path.write_text(json.dumps(settings))


def test_evaluation_goes_over_every_example_once_in_order(tokenizer):
    _, module = prepared(tokenizer)
    (loader,) = module.val_dataloader()
    labels = torch.cat([batch["labels"] for batch in loader]).tolist()
    assert labels == [row["label"] for row in ROWS["validation"]]
    assert loader.batch_size == 4
