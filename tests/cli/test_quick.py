"""`gradmerge learn`: from sources and files to a merge and its YAML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import kinds
from commands import fails
from gradmerge.cli import main
from tiny import relatives, save_family, seeded, sentences

pytestmark = pytest.mark.usefixtures("own_folder")


def rows(path: Path, entries) -> str:
    path.write_text("\n".join(map(json.dumps, entries)))
    return str(path)


@pytest.fixture
def classifiers(world, tmp_path):
    """Sources and base of the text classifiers, with a single file per task."""
    recipe = world["model"]["recipe"]
    files = {}
    for i, task in enumerate("ab"):
        texts = sentences(40 + i, 24)
        files[task] = [{"text": text, "label": k % 3} for k, text in enumerate(texts)]
        files[task] = rows(tmp_path / f"{task}.jsonl", files[task])
    return recipe, files


def options(recipe, files, *more):
    sources = [f"{name}={path}" for name, path in recipe["sources"].items()]
    data = [part for name, path in files.items() for part in ("--data", f"{name}={path}")]
    return ["learn", *sources, "--base", recipe["base"], *data, *more]


def test_a_merge_is_learned_and_scored_and_its_yaml_repeats_it(classifiers, capsys):
    recipe, files = classifiers
    sizes = ("--steps", "3", "--batch-size", "2", "--max_length", "12")
    assert main(options(recipe, files, *sizes)) == 0
    out = capsys.readouterr().out
    for line in (
        "network    BertForSequenceClassification",
        "task       a: text_classification (text = text, label = label)",
        "learned    one coefficient per source and tensor",
        "sizes      3 steps of 2 examples per task, up to 12 tokens",
        "again      gradmerge fit --config merged.yaml",
    ):
        assert line in out
    first = json.loads(Path("merged/provenance.json").read_text())
    assert set(first["results"]["test"]) >= {"a", "b", "average"}
    transformers.AutoModelForSequenceClassification.from_pretrained("merged")
    config = yaml.safe_load(Path("merged.yaml").read_text())
    assert config["trainer"]["max_steps"] == 3
    again = "trainer.callbacks.output=again"
    assert main(["fit", "--config", "merged.yaml", f"--{again}"]) == 0
    second = json.loads(Path("again/provenance.json").read_text())
    assert second["results"]["test"] == first["results"]["test"]


def test_a_dry_run_only_writes_the_yaml(classifiers, capsys):
    recipe, files = classifiers
    assert main(options(recipe, files, "--dry-run", "true", "--granularity", "Column")) == 0
    config = yaml.safe_load(Path("merged.yaml").read_text())
    assert config["model"]["recipe"]["coefficients"] == {"class_path": "Column"}
    assert config["model"]["objective"]["terms"] == [{"class_path": "CrossEntropy"}]
    assert not Path("merged").exists()
    assert "merged.yaml exists" in fails(options(recipe, files), capsys)


def test_tasks_without_labels_are_distilled(classifiers, tmp_path):
    recipe, files = classifiers
    texts = [{"text": text} for text in sentences(50, 24)]
    files = {"a": rows(tmp_path / "plain.jsonl", texts)}
    kind = ("--kind", "a=text_classification")
    assert main(options(recipe, files, *kind, "--steps", "2")) == 0
    config = yaml.safe_load(Path("merged.yaml").read_text())
    assert config["model"]["objective"]["terms"] == [{"class_path": "KLToSource"}]
    assert config["model"]["teacher_cache"] == 2.0
    assert Path("merged/model.safetensors").is_file()


def test_sources_with_other_classes_keep_their_heads(tmp_path):
    sizes = {"intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 16}
    model = seeded(transformers.BertForSequenceClassification, num_labels=3, **sizes)
    paths = save_family(tmp_path / "family", relatives(model, scale=0.2))
    config = json.loads((Path(paths["b"]) / "config.json").read_text())
    config["id2label"] = {str(i): name for i, name in enumerate(("x", "y", "z"))}
    (Path(paths["b"]) / "config.json").write_text(json.dumps(config))
    entries = [{"text": t, "label": k % 3} for k, t in enumerate(sentences(3, 24))]
    file = rows(tmp_path / "rows.jsonl", entries)
    recipe = {"base": paths["base"], "sources": {k: paths[k] for k in "ab"}}
    assert main(options(recipe, {"a": file}, "--dry-run", "true")) == 0
    chosen = yaml.safe_load(Path("merged.yaml").read_text())
    assert chosen["model"]["recipe"]["private"] == ["^classifier\\."]


def test_all_problems_are_named_at_once(classifiers, capsys):
    recipe, _ = classifiers
    given = options(recipe, {"a": "nowhere.jsonl", "c": "x.jsonl"}, "--steps", "0")
    message = fails([*given, "--granularity", "tensor"], capsys)
    for part in (
        "data of a: nowhere.jsonl does not exist",
        "--data: unknown name 'c' (choose from a, b)",
        "expected one of Model, Group, Tensor, Column, Row, Element, got 'tensor'. Did you mean",
        "steps: expected at least 1, got 0",
    ):
        assert part in message
    assert not Path("merged.yaml").exists()


def test_columns_of_no_kind_are_listed(classifiers, tmp_path, capsys):
    recipe, _ = classifiers
    file = rows(tmp_path / "odd.jsonl", [{"foo": str(i), "bar": i} for i in range(24)])
    message = fails(options(recipe, {"a": file}), capsys)
    assert "task a: expected columns of a known kind" in message
    assert "foo, bar" in message
    assert "--kind a=KIND (choose from text_classification" in message


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["learn", "a"], "expected NAME=PLACE for at least one source"),
        (["learn", "--bas", "x", "a"], "unrecognized arguments: --bas. Did you mean '--base'?"),
        (["learn"], "the following arguments are required: SOURCE"),
    ],
)
def test_mistakes_in_options_are_short(given, expected, capsys):
    message = fails(given, capsys)
    assert expected in message
    assert len(message.splitlines()) <= 4


# ---- what is found before anything is opened -----------------------------------------------------


def test_kinds_and_outputs_are_checked_before_sources_are_read(classifiers, monkeypatch, capsys):
    recipe, files = classifiers
    monkeypatch.setattr("gradmerge.cli.quick.Choice._open", lambda self: pytest.fail("opened"))
    message = fails(options(recipe, files, "--kind", "a=text_clasification"), capsys)
    assert "--kind a: expected one of causal_lm, " in message
    assert "Did you mean 'text_classification'?" in message
    Path("merged.yaml").touch()
    assert "merged.yaml exists" in fails(options(recipe, files), capsys)


def test_a_fault_of_several_sources_is_told_once(classifiers, tmp_path, capsys):
    """Adapters on a base of another width, which their own files name."""
    peft = pytest.importorskip("peft")
    _, files = classifiers
    sizes = {"intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 16}
    model = seeded(transformers.BertForSequenceClassification, num_labels=3, **sizes)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))
    for name in "ab":
        adapted.save_pretrained(tmp_path / name)
    sizes["hidden_size"] = 2 * model.config.hidden_size
    seeded(transformers.BertForSequenceClassification, **sizes).save_pretrained(tmp_path / "other")
    given = {"base": str(tmp_path / "other"), "sources": {k: str(tmp_path / k) for k in "ab"}}
    message = fails(options(given, files), capsys)
    assert "sources a, b: the factors do not fit the base" in message
    assert message.count("do not fit") == 1


# ---- what is chosen ------------------------------------------------------------------------------


def test_files_that_are_named_after_splits_are_the_splits(classifiers, tmp_path):
    recipe, _ = classifiers
    (tmp_path / "folder").mkdir()
    sizes = {"train": 9, "validation": 5, "test": 6, "more": 4}
    for seed, (name, count) in enumerate(sizes.items()):
        entries = [{"text": t, "label": 0} for t in sentences(60 + seed, count)]
        rows(tmp_path / "folder" / f"{name}.jsonl", entries)
    assert main(options(recipe, {"a": str(tmp_path / "folder")}, "--dry-run", "true")) == 0
    task = yaml.safe_load(Path("merged.yaml").read_text())["data"]["tasks"]["a"]
    assert task["path"] == "json"
    assert {name: Path(file).name for name, file in task["data_files"].items()} == {
        name: f"{name}.jsonl" for name in ("train", "validation", "test")
    }


@pytest.mark.parametrize(
    ("instructions", "small", "stored", "expected"),
    [
        (True, False, "bfloat16", "bfloat16"),
        (True, True, "bfloat16", "float32"),
        (True, False, "float32", "float32"),
        (False, False, "bfloat16", "float32"),
    ],
)
def test_bfloat16_is_chosen_where_it_is_faster(
    classifiers, tmp_path, monkeypatch, instructions, small, stored, expected
):
    """Of files in 16 bits, on a CPU that multiplies in them, if the network is not small."""
    _, files = classifiers
    sizes = {"intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 16}
    model = seeded(transformers.BertForSequenceClassification, num_labels=3, **sizes)
    model = model.to(getattr(torch, stored))
    paths = save_family(tmp_path / "family", relatives(model, scale=0.2))
    monkeypatch.setattr("gradmerge.cli.quick._multiplies_bfloat16", lambda: instructions)
    monkeypatch.setattr("gradmerge.cli.quick._SMALL", 10**9 if small else 1)
    recipe = {"base": paths["base"], "sources": {k: paths[k] for k in "ab"}}
    assert main(options(recipe, files, "--dry-run", "true")) == 0
    config = yaml.safe_load(Path("merged.yaml").read_text())
    assert config["model"]["dtype"] == expected


def test_short_texts_leave_time_for_more_steps(classifiers, tmp_path, monkeypatch):
    """Steps follow from the length of the texts, not only from the longest that is allowed."""
    recipe, files = classifiers
    monkeypatch.setattr("gradmerge.cli.quick._FLOPS", {"float32": 6e5})
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    long = [{"text": t * 40, "label": 0} for t in sentences(70, 24)]
    long_files = {k: rows(tmp_path / f"long-{k}.jsonl", long) for k in "ab"}
    steps = []
    for output, given in (("short", files), ("long", long_files)):
        more = ("--dry-run", "true", "--output", output, "--max_length", "512")
        assert main(options(recipe, given, *more)) == 0
        steps.append(yaml.safe_load(Path(f"{output}.yaml").read_text())["trainer"]["max_steps"])
    assert 20 == steps[1] < steps[0] < 100


def test_chats_take_the_template_of_a_source_if_the_base_has_none(tmp_path, capsys):
    case = kinds.CASES["chat"]
    places = kinds.folders(tmp_path / "chats", case)
    sources = {"base": places["base"], "sources": {k: places[k] for k in "ab"}}
    files = {k: rows(tmp_path / f"chat-{k}.jsonl", kinds.rows(case, i)) for i, k in enumerate("ab")}
    for name in ("base", "a", "b"):
        (Path(places[name]) / "chat_template.jinja").unlink()
    message = fails(options(sources, files, "--dry-run", "true"), capsys)
    assert "data of a, b: expected a base or source whose tokenizer has a chat template" in message
    assert not Path("merged.yaml").exists()
    kinds.tokenizer(Path(places["b"]))
    assert main(options(sources, files, "--dry-run", "true")) == 0
    assert yaml.safe_load(Path("merged.yaml").read_text())["data"]["processor"] == places["b"]
    kinds.tokenizer(Path(places["base"]))
    assert main(options(sources, files, "--dry-run", "true", "--output", "other")) == 0
    assert "processor" not in yaml.safe_load(Path("other.yaml").read_text())["data"]
