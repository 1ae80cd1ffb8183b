"""Exported folders agree with their weights: they are opened once before they get their name."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gradmerge import MergedModel, Recipe, export_merged, merge
from gradmerge.coefficients import Constant
from gradmerge.common.errors import CompatibilityError, OutputError, SourceError
from gradmerge.export.opened import OPENED, _problems, load_class, require_opens
from gradmerge.export.provenance import mean_coefficients
from gradmerge.operators import DisjointMean
from gradmerge.preprocess import ElectSign, Trim
from gradmerge.sources import HuggingFace, Lora
from tiny import save_family, word_tokenizer

NAMES = ("base", "a", "b")


def settings(folder, **fields):
    path = Path(folder, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change(folder, **tensors):
    """Replace tensors; None removes one."""
    path = Path(folder, "model.safetensors")
    state = {**load_file(path), **tensors}
    save_file({n: t for n, t in state.items() if t is not None}, path, {"format": "pt"})


@pytest.fixture
def llamas(tmp_path, family):
    models, _ = family("llama", dtype=torch.float32)
    return save_family(tmp_path / "sources", models)


WRONG = {
    "missing": (
        {"model.norm.weight": None},
        r"model\.norm\.weight \(not in the files, so they would be random\)",
    ),
    "unexpected": ({"extra.weight": torch.zeros(2)}, r"extra\.weight \(in the files, but not"),
    "mismatched": (
        {"model.norm.weight": torch.zeros(3)},
        r"model\.norm\.weight.* \(of other shapes in the files\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_does_not_fit_its_config_is_refused(tmp_path, llamas, case):
    tensors, message = WRONG[case]
    assert require_opens(Path(llamas["a"]), tmp_path / "out") == "opened with transformers"
    change(llamas["a"], **tensors)
    with pytest.raises(OutputError, match=message):
        require_opens(Path(llamas["a"]), tmp_path / "out")
    with pytest.raises(OutputError, match=message):
        require_opens(Path(llamas["a"]), tmp_path / "out", Path(llamas["b"]))
    change(llamas["b"], **tensors)  # what is left over in the source, too, is no fault of a merge
    refused = pytest.raises(OutputError, match=message)
    with nullcontext() if case == "unexpected" else refused:
        require_opens(Path(llamas["a"]), tmp_path / "out", Path(llamas["b"]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_attention_heads", "many"), ("hidden_act", "nope"), ("model_type", "bert")],
)
def test_a_config_that_transformers_refuses_is_refused(tmp_path, llamas, field, value):
    """Also where the source has the same."""
    for name in ("a", "b"):
        settings(llamas[name], **{field: value})
    with pytest.raises(OutputError, match=rf"(?s)it was not written.*{field}"):
        require_opens(Path(llamas["a"]), tmp_path / "out", Path(llamas["b"]))


def test_a_folder_like_one_that_was_opened_is_not_opened_again(tmp_path, llamas, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened = []

    def problems(folder, trusted):
        opened.append(folder.name)
        return _problems(folder, trusted)

    monkeypatch.setattr("gradmerge.export.opened._problems", problems)

    def opens(name, trusted=False):
        opened.clear()
        require_opens(Path(llamas[name]), tmp_path / "out", None, trusted)
        return bool(opened)

    load_class({"architectures": ["LlamaForCausalLM"]})
    assert [opens("a"), opens("a"), opens("b")] == [True, False, False]  # alike but for values
    assert opens("a", trusted=True)  # code in the folder may be another
    settings(llamas["a"], rope_theta=3.0)
    assert [opens("a"), opens("a")] == [True, False]
    Path(llamas["b"], "generation_config.json").write_text("{}")
    assert [opens("b"), opens("b")] == [True, False]
    change(llamas["b"], **{"model.norm.weight": torch.zeros(3)})
    for _ in range(2):  # what is refused is not remembered
        with pytest.raises(OutputError, match="of other shapes in the files"):
            opens("b")
        assert opened


def test_without_a_cache_every_folder_is_opened(tmp_path, llamas, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert require_opens(Path(llamas["a"]), tmp_path / "out") == OPENED


def test_what_cannot_be_opened_is_said(tmp_path, llamas, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(llamas["a"])
    with monkeypatch.context() as patch:
        patch.setattr(transformers.utils, "is_accelerate_available", lambda: False)
        with pytest.warns(UserWarning, match=r"out: not opened .*only with accelerate"):
            require_opens(folder, tmp_path / "out")
    settings(folder, architectures=["NobodysModel"])
    with pytest.warns(UserWarning, match=r"out: not opened .*NobodysModel is not in transformers"):
        found = require_opens(folder, tmp_path / "out")
    assert "not opened" in found
    (folder / "config.json").unlink()
    assert "no config that names a class" in require_opens(folder, tmp_path / "out")


def test_the_check_is_recorded_and_quiet(tmp_path, llamas, capfd):
    folder = merge(Recipe({"a": llamas["a"], "b": llamas["b"]}, llamas["base"]), tmp_path / "out")
    found = json.loads((folder / "provenance.json").read_text())
    assert found["check"] == "opened with transformers"
    assert capfd.readouterr().err == ""
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_a_merge_that_would_not_load_is_not_written(tmp_path, llamas):
    """Heads of one more class than the configs say."""
    for name in NAMES:
        settings(llamas[name], architectures=["LlamaForSequenceClassification"], num_labels=2)
        change(llamas[name], **{"lm_head.weight": None, "score.weight": torch.ones(3, 16)})
    recipe = Recipe({"a": llamas["a"], "b": llamas["b"]}, llamas["base"], private=["^score"])
    with pytest.raises(OutputError, match=r"score\.weight.* \(of other shapes in the files\)"):
        merge(recipe, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


# ---- modules around the network ------------------------------------------------------------------


def with_modules(folder, mode="cls", dense=None):
    """Add a pooling module, and a dense one with weights, as sentence-transformers stores them."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": "Transformer"}]
    for number, name in enumerate(["Pooling", *(["Dense"] if dense is not None else [])], 1):
        place = f"{number}_{name}"
        listed.append({"idx": number, "name": str(number), "path": place, "type": name})
        Path(folder, place).mkdir()
        Path(folder, place, "config.json").write_text(json.dumps({"mode": mode}))
    if dense is not None:
        save_file({"linear.weight": dense}, Path(folder, "2_Dense", "model.safetensors"))
    Path(folder, "modules.json").write_text(json.dumps(listed))
    Path(folder, "sentence_bert_config.json").write_text("{}")


@pytest.mark.parametrize("holders", [NAMES, ("a", "b"), ("b",)], ids=str)
def test_folders_of_modules_are_copied(tmp_path, llamas, holders):
    for name in holders:
        with_modules(llamas[name], dense=torch.ones(2, 2))
    folder = merge(Recipe({"a": llamas["a"], "b": llamas["b"]}, llamas["base"]), tmp_path / "out")
    assert json.loads((folder / "1_Pooling/config.json").read_text()) == {"mode": "cls"}
    assert load_file(folder / "2_Dense/model.safetensors")["linear.weight"].sum() == 4
    for name in ("modules.json", "sentence_bert_config.json"):
        assert (folder / name).read_bytes() == Path(llamas["b"], name).read_bytes()


def test_modules_that_differ_are_reported(tmp_path, llamas):
    recipe = Recipe({"a": llamas["a"], "b": llamas["b"]}, llamas["base"])
    with_modules(llamas["a"])
    with_modules(llamas["b"], mode="mean")
    with pytest.warns(UserWarning, match=r"others: 1_Pooling/config\.json"):
        folder = merge(recipe, tmp_path / "out")
    assert json.loads((folder / "1_Pooling/config.json").read_text()) == {"mode": "cls"}


def test_weights_of_modules_are_merged_as_the_network_is(tmp_path, llamas):
    """`base + sum_k c_k (source_k - base)` with each source's mean coefficient."""
    values = {"base": 1.0, "a": 2.0, "b": 5.0}
    for name, value in values.items():
        with_modules(llamas[name], dense=torch.full((2, 3), value))
    recipe = Recipe({"a": llamas["a"], "b": llamas["b"]}, llamas["base"], init=Constant([0.5, 0.2]))
    folder = merge(recipe, tmp_path / "out")
    found = load_file(folder / "2_Dense/model.safetensors")
    torch.testing.assert_close(found, {"linear.weight": torch.full((2, 3), 1 + 0.5 * 1 + 0.2 * 4)})
    hashes = json.loads((folder / "provenance.json").read_text())["modules"]
    assert {len(set(v.values())) for v in hashes.values()} == {3}
    merged = MergedModel(recipe)
    with torch.no_grad():
        for raw in merged.raw.values():
            raw[0] += torch.linspace(0, 0.2, raw[0].numel()).view_as(raw[0])
    export_merged(merged, tmp_path / "learned")
    shares = mean_coefficients(merged.state)
    wanted = torch.full((2, 3), 1 + shares["a"] + 4 * shares["b"])
    assert shares["a"] > 0.5
    found = load_file(tmp_path / "learned/2_Dense/model.safetensors")["linear.weight"]
    torch.testing.assert_close(found, wanted)


def test_weights_of_modules_follow_operator_and_preprocess(tmp_path, llamas):
    """A TIES merge of the folder is a TIES merge of its modules; `.bin` becomes safetensors."""
    dense = {name: torch.randn(4, 4, generator=generator(i)) for i, name in enumerate(NAMES)}
    for name in NAMES:
        with_modules(llamas[name], dense=dense[name])
        path = Path(llamas[name], "2_Dense/model.safetensors")
        torch.save(load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
    steps = {
        "preprocess": [Trim(0.5), ElectSign()],
        "operator": DisjointMean(),
        "init": Constant(1),
    }
    recipe = Recipe({"a": llamas["a"], "b": llamas["b"]}, llamas["base"], **steps)
    folder = merge(recipe, tmp_path / "out")
    assert not (folder / "2_Dense/pytorch_model.bin").exists()
    plain = Recipe(
        {n: {"linear.weight": dense[n]} for n in "ab"}, {"linear.weight": dense["base"]}, **steps
    )
    expected = load_file(merge(plain, tmp_path / "plain") / "model.safetensors")
    found = load_file(folder / "2_Dense/model.safetensors")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("problem", ["shape", "lacking", "numpy"])
def test_modules_whose_weights_cannot_be_merged_are_refused(tmp_path, llamas, problem):
    recipe = Recipe({"a": llamas["a"], "b": llamas["b"]}, llamas["base"])
    with_modules(llamas["a"], dense=torch.ones(2, 2))
    with_modules(llamas["b"], dense=torch.zeros(2, 3 if problem == "shape" else 2))
    if problem != "lacking":
        with_modules(llamas["base"], dense=torch.zeros(2, 2))
    if problem == "numpy":
        for name, size in zip(NAMES, range(3), strict=True):
            Path(llamas[name], "2_Dense", "table.npy").write_bytes(b"0" * size)
    kind = SourceError if problem == "numpy" else CompatibilityError
    with pytest.raises(kind, match=r"2_Dense/(model\.safetensors|table\.npy)"):
        merge(recipe, tmp_path / "out")


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("path", ["../b", "/etc", "1_Pooling/../../b", "c:x", "nowhere", 5])
def test_modules_elsewhere_are_refused(tmp_path, llamas, path):
    with_modules(llamas["a"])
    listed = [{"idx": 0, "name": "0", "path": path, "type": "Pooling"}]
    Path(llamas["a"], "modules.json").write_text(json.dumps(listed))
    with pytest.raises(SourceError, match=r"modules\.json: "):
        merge(Recipe({"a": llamas["a"], "b": llamas["b"]}), tmp_path / "out")


# ---- vocabularies of adapters --------------------------------------------------------------------


def test_an_adapter_that_extended_the_vocabulary_brings_size_and_tokenizer(tmp_path, llamas):
    rows = load_file(Path(llamas["base"], "model.safetensors"))["model.embed_tokens.weight"]
    more = torch.cat([rows, torch.ones(3, rows.shape[1])])
    for name in "ab":
        folder = tmp_path / f"adapter-{name}"
        word_tokenizer(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["<x>"])
        tokenizer.save_pretrained(folder)
        described = {"peft_type": "LORA", "r": 1, "modules_to_save": ["embed_tokens", "lm_head"]}
        (folder / "adapter_config.json").write_text(json.dumps(described))
        key = "base_model.model.{}.weight"
        tensors = {key.format(n): more.clone() for n in ("model.embed_tokens", "lm_head")}
        save_file(tensors, folder / "adapter_model.safetensors")
    base = HuggingFace(llamas["base"])
    sources = {name: Lora(str(tmp_path / f"adapter-{name}"), base) for name in "ab"}
    folder = merge(Recipe(sources, init=Constant(0.5)), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(more)
    found = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(found.get_input_embeddings().weight, more)
    assert "<x>" in transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    shutil.rmtree(folder)
