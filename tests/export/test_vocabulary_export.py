"""Exports of merges over several tokenizers: the tokenizer, matching ids, and the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData, export_merged
from gradmerge.cli import main
from gradmerge.cli.main import learn
from gradmerge.coefficients import Constant, Model
from gradmerge.common.errors import ConfigError, FingerprintError
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.export.folder import export_state
from gradmerge.sources import Vocabulary
from gradmerge.sources.tokenizers.ids import with_ids, with_size
from gradmerge.sources.tokenizers.report import summarise, token_report
from networks import seeded
from tiny import SPLITS, trainer_of, write_yaml
from wordings import bpe, bpe_family, llama, rows_by_token, vocabulary_of, words


def merge(paths: dict[str, str], out: Path, vocabulary: Vocabulary, **options: Any) -> Path:
    sources: dict[str, Any] = {n: p for n, p in paths.items() if n != "base"}
    recipe = Recipe(
        sources,
        base=paths.get("base"),
        coefficients=Model(),
        init=Constant(0.5),
        tokenizer=vocabulary,
        **options,
    )
    plan = open_plan(recipe, with_skeleton=False)
    return export_state(FitState.start(plan), out)


def tokenizer_of(folder: Path | str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_the_folder_loads_and_its_tokenizer_fits_its_rows(tmp_path: Path) -> None:
    paths = bpe_family(tmp_path)
    folder = merge(paths, tmp_path / "out", Vocabulary(pad_to_multiple_of=32))
    tokenizer = tokenizer_of(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) <= model.config.vocab_size == 96
    assert model.get_input_embeddings().weight.shape[0] == 96
    tokens = {name: vocabulary_of(path).keys() for name, path in paths.items()}
    assert tokenizer.get_vocab().keys() == tokens["base"] | tokens["a"] | tokens["b"]
    ids = tokenizer("wide <shared> low", return_tensors="pt").input_ids
    assert tokenizer.convert_tokens_to_ids("<shared>") in ids
    assert model(ids).logits.isfinite().all()
    assert "<shared>" not in tokenizer.decode(ids[0], skip_special_tokens=True)
    assert "<think>" in tokenizer.decode(tokenizer("<think>").input_ids, skip_special_tokens=True)


@pytest.mark.parametrize("source", ["base", "b"])
def test_files_of_a_named_tokenizer_are_carried_as_they_are(tmp_path: Path, source: str) -> None:
    paths = bpe_family(tmp_path)
    folder = merge(paths, tmp_path / "out", Vocabulary(source))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (Path(paths[source]) / name).read_bytes()


def chat_family(root: Path) -> dict[str, str]:
    """A base and a chat model with other special tokens in other places, and a third."""
    layouts: dict[str, dict[str, Any]] = {
        "base": {"order": ["<unk>", "<s>", "</s>", "x", "y"], "eos": "</s>", "pad": None},
        "chat": {"order": ["x", "<pad>", "<s>", "<end>", "</s>", "<unk>"], "eos": "<end>"},
        "other": {"order": ["<unk>", "y", "<s>", "</s>", "z"], "eos": "</s>"},
    }
    paths = {}
    for i, (name, layout) in enumerate(layouts.items()):
        order = layout["order"]
        pad = order.index("<pad>") if "<pad>" in order else None
        ids = {
            "bos_token_id": order.index("<s>"),
            "eos_token_id": order.index(layout["eos"]),
            "pad_token_id": pad,
        }
        model = llama(len(order), i, **ids)
        if name == "chat":
            ends = [order.index("<end>"), order.index("</s>")]
            model.generation_config.eos_token_id = ends
            model.generation_config.do_sample = True
        model.save_pretrained(root / name)
        special: dict[str, Any] = {"bos_token": "<s>", "eos_token": layout["eos"]}
        if pad is not None:
            special["pad_token"] = "<pad>"
        words(root / name, order, **special)
        if name != "base":
            (root / name / "chat_template.jinja").write_text(f"{{{{ '{name}' }}}}")
        paths[name] = str(root / name)
    return paths


def test_special_ids_are_those_of_the_chosen_tokenizer(tmp_path: Path) -> None:
    folder = merge(chat_family(tmp_path), tmp_path / "out", Vocabulary("chat"))
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 3, 1)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [3, 4]
    assert "do_sample" not in generation, "the rest is the base's"
    tokenizer = tokenizer_of(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<end>", 3)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 6


def test_a_union_keeps_the_bases_special_tokens(tmp_path: Path) -> None:
    folder = merge(chat_family(tmp_path), tmp_path / "out", Vocabulary())
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)
    tokenizer = tokenizer_of(folder)
    assert tokenizer.eos_token_id == 2
    assert set(tokenizer.get_vocab()) == {
        *("<unk>", "<s>", "</s>", "x", "y", "<pad>", "<end>", "z"),
    }
    special = {s.content for s in tokenizer.added_tokens_decoder.values() if s.special}
    assert {"<pad>", "<end>"} <= special


def test_each_task_keeps_a_special_token_that_the_owner_does_not_set(tmp_path: Path) -> None:
    paths = chat_family(tmp_path)
    sources: dict[str, Any] = {n: p for n, p in paths.items() if n != "base"}
    plan = open_plan(
        Recipe(sources, base=paths["base"], tokenizer=Vocabulary()), with_skeleton=False
    )
    config = plan.sources["chat"].config
    assert config is not None
    target = vocabulary_of(str(plan.folder))
    assert config["pad_token_id"] == target["<pad>"] != 1
    assert config["eos_token_id"] == target["</s>"]


def test_fields_that_name_tokens_are_found_wherever_they_stand() -> None:
    config = {
        "vocab_size": 7,
        "pad_token_id": 1,
        "image_token_id": 5,
        "eos_token_id": [2, 6],
        "forced": 3,
        "text_config": {"vocab_size": 7, "bos_token_id": 0, "hidden_size": 7},
        "vision_config": {"vocab_size": 9},
    }
    owner = {"eos_token_id": 4, "text_config": {"bos_token_id": None}, "sep_token_id": 3}
    moved = {0: 8, 1: 20, 5: 2}
    found = with_ids(with_size(config, 16), owner, moved, 16)
    assert found == {
        "vocab_size": 16,
        "pad_token_id": None,  # 20 has no row
        "image_token_id": 2,
        "eos_token_id": 4,
        "forced": 3,
        "text_config": {"vocab_size": 16, "bos_token_id": 8, "hidden_size": 7},
        "vision_config": {"vocab_size": 9},
        "sep_token_id": 3,
    }
    assert with_ids({"eos_token_id": [1, 6], "bos_token_id": 6}, {}, moved, 32) == {
        "eos_token_id": [20],
        "bos_token_id": None,
    }
    assert with_size({"hidden_size": 3}, 5) == {"hidden_size": 3, "vocab_size": 5}


@pytest.mark.parametrize(
    ("vocabulary", "template", "whose"),
    [
        (Vocabulary(), "{{ 'chat' }}", "chat"),  # the base has none
        (Vocabulary("other"), "{{ 'other' }}", "other"),
        (Vocabulary("base", chat_template="other"), "{{ 'other' }}", "other"),
        (Vocabulary("chat", chat_template="{{ 'mine' }}"), "{{ 'mine' }}", "the recipe"),
    ],
)
def test_the_chat_template_is_carried(
    tmp_path: Path, vocabulary: Vocabulary, template: str, whose: str
) -> None:
    folder = merge(chat_family(tmp_path), tmp_path / "out", vocabulary)
    assert tokenizer_of(folder).chat_template == template
    assert json.loads((folder / "tokens.json").read_text())["chat_template"] == whose


def test_a_template_inside_the_tokenizers_config_gives_way(tmp_path: Path) -> None:
    paths = chat_family(tmp_path)
    path = Path(paths["base"]) / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "chat_template": "{{ 'old' }}"}
    path.write_text(json.dumps(settings))
    assert tokenizer_of(paths["base"]).chat_template == "{{ 'old' }}"
    folder = merge(paths, tmp_path / "kept", Vocabulary("base"))
    assert tokenizer_of(folder).chat_template == "{{ 'old' }}"
    folder = merge(paths, tmp_path / "out", Vocabulary("base", chat_template="chat"))
    assert tokenizer_of(folder).chat_template == "{{ 'chat' }}"
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_a_source_without_the_template_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="source base has no chat template"):
        merge(chat_family(tmp_path), tmp_path / "out", Vocabulary(chat_template="base"))


def test_the_report_says_what_happened_to_each_token(tmp_path: Path) -> None:
    folder = merge(chat_family(tmp_path), tmp_path / "out", Vocabulary("chat", 4))
    report = json.loads((folder / "tokens.json").read_text())
    assert report["differs"] == [
        {"token": "x", "id": 0, "rows": {"base": "row 3", "chat": "row 0", "other": "base"}},
        {
            "token": "<pad>",
            "id": 1,
            "rows": {"base": "only chat", "chat": "row 1", "other": "only chat"},
        },
        {"token": "<s>", "id": 2, "rows": {"base": "row 1", "chat": "row 2", "other": "row 2"}},
        {
            "token": "<end>",
            "id": 3,
            "rows": {"base": "only chat", "chat": "row 3", "other": "only chat"},
        },
        {"token": "</s>", "id": 4, "rows": {"base": "row 2", "chat": "row 4", "other": "row 3"}},
        {"token": "<unk>", "id": 5, "rows": {"base": "row 0", "chat": "row 5", "other": "row 0"}},
    ]
    assert report["dropped"] == {"base": ["y"], "other": ["y", "z"]}
    assert report["rows_before"] == {"base": 5, "chat": 6, "other": 5}
    assert (report["rows"], report["padding_rows"], report["tokens"]) == (8, 2, 6)
    text = summarise(report)
    assert "tokenizer (chat): 6 tokens with the ids of chat, 8 rows, 2 of them padding" in text
    assert (
        "base (5 rows): 0 as before, 4 from another row, 2 from only chat, 1 dropped ('y')" in text
    )
    assert "chat (6 rows): 6 as before" in text
    assert "'x' -> 0 (base: row 3, chat: row 0, other: base)" in text
    assert "and 3 more tokens that differ" in text
    card = (folder / "README.md").read_text()
    assert text in card
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["tokenizer"]["ids_of"] == "chat"
    assert "differs" not in provenance["tokenizer"]


def test_merging_an_export_again_does_not_carry_its_old_report(tmp_path: Path) -> None:
    paths = chat_family(tmp_path)
    first = merge(paths, tmp_path / "first", Vocabulary("chat"))
    recipe = Recipe({"a": str(first), "b": str(first)}, coefficients=Model())
    plan = open_plan(recipe, with_skeleton=False)
    assert plan.tokens is None
    assert not (export_state(FitState.start(plan), tmp_path / "second") / "tokens.json").exists()


def _task_network(rows: int, labels: int, seed: int) -> transformers.PreTrainedModel:
    sizes = {"intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 16}
    options = {"vocab_size": rows, "num_labels": labels, **sizes}
    return seeded(transformers.BertForSequenceClassification, seed, **options)


def test_heads_of_tasks_go_with_the_merged_tokens(tmp_path: Path) -> None:
    paths, order = {}, {"a": ["<unk>", "x", "y"], "b": ["y", "z", "<unk>", "x"]}
    for i, (name, tokens) in enumerate(order.items()):
        _task_network(len(tokens), 2 + i, i).save_pretrained(tmp_path / name)
        words(tmp_path / name, tokens, unk_token="<unk>")
        paths[name] = str(tmp_path / name)
    folder = merge(paths, tmp_path / "out", Vocabulary(), private=[r"^classifier\."])
    for i, name in enumerate("ab"):
        task = folder / "tasks" / name
        model = transformers.AutoModelForSequenceClassification.from_pretrained(task)
        assert model.config.vocab_size == 4
        assert model.config.num_labels == 2 + i
        assert vocabulary_of(task) == {"<unk>": 0, "x": 1, "y": 2, "z": 3}


# ---- learning -----------------------------------------------------------------------------------


def _texts(seed: int) -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(seed)
    known = ["low", "lower", "new", "wide", "merging", "token", "<shared>", "<think>", "widest"]
    draws = torch.randint(len(known), (8, 12), generator=generator).tolist()
    return [{"text": " ".join(known[i] for i in row)} for row in draws]


def test_a_fit_trains_on_the_merges_tokens_and_its_checkpoint_exports_them(
    tmp_path: Path,
) -> None:
    paths = bpe_family(tmp_path)
    recipe = Recipe({k: paths[k] for k in "ab"}, base=paths["base"], tokenizer=Vocabulary())
    module = MergeModule(recipe, learning_rate=0.1)
    data = MergeDataModule(
        {
            task: TaskData({s: _texts(10 * i + j) for j, s in enumerate(SPLITS)}, max_length=8)
            for i, task in enumerate("ab")
        },
        batch_size=2,
    )
    trainer = trainer_of(tmp_path, max_steps=2)
    start = {key: value.detach().clone() for key, value in module.merged.raw.items()}
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "merge.ckpt")
    target = vocabulary_of(str(module.merged.plan.folder))
    assert data.processor.get_vocab() == target
    ids = torch.cat([window["input_ids"] for window in data.examples("adaptation")["a"]])
    own = vocabulary_of(paths["base"])
    assert any(token not in own for token, i in target.items() if i in ids)
    assert any(not torch.equal(start[key], value) for key, value in module.merged.raw.items())

    again = MergeModule.load_from_checkpoint(
        tmp_path / "merge.ckpt", map_location="cpu", weights_only=True
    )
    assert again.recipe.tokenizer == Vocabulary()
    first = export_merged(module.merged, tmp_path / "first")
    second = export_merged(again.merged, tmp_path / "second")
    for name in ("model.safetensors", "tokens.json", "tokenizer.json", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert vocabulary_of(first) == target

    bpe(Path(paths["a"]), "other words from elsewhere", 30)  # the weights are the same
    with pytest.raises(FingerprintError, match=r"other weights of: \(tokens\)"):
        MergeModule.load_from_checkpoint(
            tmp_path / "merge.ckpt", map_location="cpu", weights_only=True
        )


def test_the_option_in_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gradmerge"])
    paths = bpe_family(tmp_path)
    recipe = {
        "base": paths["base"],
        "sources": {k: paths[k] for k in "ab"},
        "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
    }
    file = write_yaml(tmp_path / "m.yaml", {"recipe": recipe})
    assert main(["merge", "--config", file, "--output", "out"]) == 0
    out = capsys.readouterr().out
    assert "tokenizer (union): " in out
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] % 8 == 0

    given = {"recipe": {key: value for key, value in recipe.items() if key != "tokenizer"}}
    file = write_yaml(tmp_path / "plain.yaml", given)
    command = ["merge", "--config", file, "--output", "plain"]
    assert main([*command, "--recipe.tokenizer.source=base"]) == 0
    assert vocabulary_of("plain") == vocabulary_of(paths["base"])

    Path("x.json").write_text('{"text": "a"}')
    task = {"path": "json", "data_files": "x.json"}
    fit = {"model": {"recipe": recipe}, "data": {"tasks": {"a": task}}}
    options = ["--trainer.logger=false", "--trainer.accelerator=cpu"]
    cli = learn(["--config", write_yaml(tmp_path / "f.yaml", fit), *options], run=False)
    assert cli.model.recipe.tokenizer == Vocabulary("union", 8)


def test_inspect_shows_what_a_merge_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = chat_family(tmp_path)
    arguments = ["inspect", paths["chat"], paths["other"], "--base", paths["base"]]
    assert main(arguments) != 0
    assert "tokenizer: {source: union}" in capsys.readouterr().out
    assert main([*arguments, "--tokenizer", "chat"]) == 0
    out = capsys.readouterr().out
    assert "compatible: yes" in out
    assert "tokenizer (chat): 6 tokens with the ids of chat" in out
    assert "directions from the base" in out
    assert main([*arguments, "--tokenizer", "union", "--json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["tokenizer"]["rows"] == 8
    assert main([*arguments, "--tokenizer", "chatt"]) != 0
    assert "Did you mean 'chat'" in capsys.readouterr().err


@pytest.mark.parametrize("whose", ["union", "a"])
@pytest.mark.parametrize("form", ["vocab.json", "vocab.txt"])
def test_older_forms_of_tokenizers(tmp_path: Path, form: str, whose: str) -> None:
    """GPT-2's vocab.json with merges.txt, and BERT's vocab.txt."""
    paths = {}
    for i, name in enumerate("ab"):
        folder = tmp_path / name
        if form == "vocab.json":
            letters = ["<|endoftext|>", *(["l", "o", "w"] if i else ["w", "o", "l"]), "lo"]
            tokens = [*letters, "low"] if i else letters
            model: Any = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=len(tokens), n_embd=8, n_layer=1, n_head=2, n_positions=16
                )
            )
        else:
            tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "low"]
            tokens = [*tokens[::-1], "lower"] if i else tokens
            model = _task_network(len(tokens), 2, i)
        model.save_pretrained(folder)
        if form == "vocab.json":
            (folder / form).write_text(json.dumps({t: k for k, t in enumerate(tokens)}))
            merges = "#version: 0.2\nl o\n" + ("lo w\n" if i else "")
            (folder / "merges.txt").write_text(merges)
        else:
            (folder / form).write_text("\n".join(tokens) + "\n")
        paths[name] = str(folder)
    folder = merge(paths, tmp_path / "out", Vocabulary(whose))
    target = vocabulary_of(folder)
    own = {name: vocabulary_of(path) for name, path in paths.items()}
    assert target.keys() == own["a"].keys() | (own["b"].keys() if whose == "union" else set())
    assert {token: target[token] for token in own["a"]} == own["a"]
    name = "transformer.wte.weight" if form == "vocab.json" else None
    name = name or "bert.embeddings.word_embeddings.weight"
    got = rows_by_token(folder, name)
    rows = {source: rows_by_token(path, name) for source, path in paths.items()}
    for token, row in got.items():
        owners = [rows[n][token] for n in "ab" if token in own[n]]
        expected = sum(owners) / len(owners)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)


def test_the_report_of_equal_tokenizers_is_short(tmp_path: Path) -> None:
    paths = {}
    for i, name in enumerate(("base", "a")):
        added = [tokenizers.AddedToken("<t>", special=True, normalized=False)]
        tokenizer = bpe(tmp_path / name, "low lower", 20, added=added)
        llama(len(tokenizer), i).save_pretrained(tmp_path / name)
        paths[name] = str(tmp_path / name)
    recipe = Recipe({"a": paths["a"]}, base=paths["base"], tokenizer=Vocabulary())
    plan = open_plan(recipe, with_skeleton=False)
    assert plan.tokens is not None
    report = token_report(plan.tokens)
    assert report["differs"] == []
    assert report["dropped"] == {}
    assert report["warnings"] == []
