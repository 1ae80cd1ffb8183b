"""Exported folders: reloading with plain transformers, their files, and rejected exports."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from architectures import logits_of
from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import Column, Constant, FromFile, Row, Sigmoid, Tensor
from gradmerge.common.errors import ConfigError, OutputError
from gradmerge.engine.state import FitState
from gradmerge.export.folder import export_state
from gradmerge.export.writer import Entry, write_safetensors
from tiny import Normalised, build, recipe_of, relatives, save_family


def resnet():
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    return relatives(model, scale=0.05), {"pixel_values": images}


def learned(recipe, **options):
    """A merged model whose coefficients have changed."""
    merged = MergedModel(recipe, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for raw in merged.raw.values():
            raw.add_(0.2 * torch.randn(raw.shape, generator=generator))
    return merged


def folders(tmp_path, family, name="llama", tokenizer=True, **options):
    """Return a learned merge of three saved folders, and a batch."""
    models, inputs = resnet() if name == "resnet" else family(name, dtype=torch.float32)
    paths = save_family(tmp_path / "sources", models, tokenizer)
    recipe = Recipe({"a": paths["a"], "b": paths["b"]}, paths["base"], **options)
    return learned(recipe), inputs


def write(merged, output, **options):
    return export_state(
        merged.state, output, buffers=merged.network_buffers.values(), tasks=merged.tasks, **options
    )


@torch.no_grad()
def logits(model, inputs, **options):
    return logits_of(model(**inputs, **options)).float()


def reload(folder, **options):
    name = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


# ---- reloading ------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [5_000_000_000, 3_000], ids=["one file", "shards"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert", "t5", "vit", "resnet"])
def test_the_folder_gives_the_logits_of_training(tmp_path, family, name, shard):
    merged, inputs = folders(tmp_path, family, name, coefficients=Sigmoid(Column()))
    expected = logits(merged, inputs)
    folder = write(merged, tmp_path / "merged", max_shard_size=shard)
    assert len(list(folder.glob("*.safetensors"))) > 3 or shard > 3_000
    torch.testing.assert_close(logits(reload(folder), inputs), expected, rtol=1e-5, atol=1e-5)


def test_batch_norm_statistics_that_were_recomputed_are_exported(tmp_path, family):
    merged, inputs = folders(tmp_path, family, "resnet", tokenizer=False)
    before = logits(merged, inputs)
    merged.network_buffers.recompute([lambda: merged(**inputs)])
    expected = logits(merged, inputs)
    assert not torch.allclose(before, expected, atol=1e-3)
    folder = write(merged, tmp_path / "merged")
    torch.testing.assert_close(logits(reload(folder), inputs), expected, rtol=1e-5, atol=1e-5)


def with_labels(model, count):
    """Return a copy of the model with another head."""
    other = copy.deepcopy(model)
    other.config.num_labels = count
    other.num_labels = count
    torch.manual_seed(count)
    other.classifier = nn.Linear(other.classifier.in_features, count)
    return other


@pytest.mark.parametrize("stored", [True, False], ids=["folders", "memory"])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_each_task_s_folder_carries_its_own_head(tmp_path, family, name, stored):
    models, inputs = family(name, dtype=torch.float32)
    models = [models[0], with_labels(models[1], 3), with_labels(models[2], 5)]
    paths = save_family(tmp_path / "sources", models) if stored else None
    sources = {k: paths[k] for k in "ab"} if stored else {"a": models[1], "b": models[2]}
    recipe = Recipe(sources, paths["base"] if stored else models[0], private=["classifier"])
    merged = learned(recipe)
    folder = write(merged, tmp_path / "merged", head="b", max_shard_size=3_000)
    for task, classes in (("a", 3), ("b", 5)):
        expected = logits(merged, inputs, task=task)
        assert expected.shape[-1] == classes
        got = logits(reload(folder / "tasks" / task), inputs)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(reload(folder), inputs), expected, rtol=1e-5, atol=1e-5)
    index = json.loads((folder / "tasks/a/model.safetensors.index.json").read_text())["weight_map"]
    own = {name for name, file in index.items() if file == index["classifier.weight"]}
    assert own == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_each_task_s_folder_has_what_was_trained_for_it(tmp_path, family, dtype):
    """Heads and LoRA, folded into complete folders; the folders stay so when they are copied."""
    models, inputs = family("bert", dtype=torch.float32)
    models = [models[0], with_labels(models[1], 3), with_labels(models[2], 5)]
    paths = save_family(tmp_path / "sources", models)
    parts = {"private": ["classifier"], "trained": ["classifier"], "adapters": {"query": 2}}
    merged = learned(Recipe({k: paths[k] for k in "ab"}, paths["base"], **parts))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in merged.private.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    merged.private.settled = True
    expected = {task: logits(merged, inputs, task=task) for task in "ab"}
    folder = write(merged, tmp_path / "merged", head="b", max_shard_size=3_000, dtype=dtype)
    shutil.copytree(folder / "tasks" / "a", tmp_path / "alone")
    wide = {"rtol": 1e-5, "atol": 1e-5} if dtype is None else {"rtol": 0.1, "atol": 0.05}
    for place, task in ((folder, "b"), (folder / "tasks/b", "b"), (tmp_path / "alone", "a")):
        found = logits(reload(place, dtype="float32"), inputs)
        torch.testing.assert_close(found, expected[task], **wide)
    count = {"a": 3 * 17, "b": 5 * 17}  # classifier of 16 inputs
    numbers = {task: head + 2 * 2 * (16 + 16) for task, head in count.items()}
    said = json.loads((folder / "provenance.json").read_text())["trained"]
    assert said["parameters"] == numbers
    assert said["tensors"] == ["classifier.weight", "classifier.bias"]
    assert list(said["adapters"].values()) == [2, 2]
    card = (folder / "README.md").read_text()
    assert "## Private parts" in card
    assert f"| b | {numbers['b']} |" in card
    assert "LoRA of rank 2 on 2 matrices" in (folder / "report.html").read_text()


def test_a_task_s_folder_is_copied_where_there_are_no_links(tmp_path, family, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    merged, inputs = folders(tmp_path, family, "bert", private=["^classifier"])
    folder = write(merged, tmp_path / "merged")
    expected = logits(merged, inputs, task="b")
    found = logits(reload(folder / "tasks" / "b"), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(file.stat().st_nlink == 1 for file in folder.rglob("*.safetensors"))


def test_models_in_memory_are_exported_with_their_config(tmp_path, family):
    models, inputs = family("gpt2", dtype=torch.float32)
    merged = learned(Recipe({"a": models[1], "b": models[2]}, models[0]))
    expected = logits(merged, inputs)
    folder = write(merged, tmp_path / "merged")
    torch.testing.assert_close(logits(reload(folder), inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_base_without_a_config_takes_that_of_a_source(tmp_path, family):
    models, inputs = family("llama", dtype=torch.float32)
    paths = save_family(tmp_path / "sources", models)
    base = Path(paths["base"]) / "model.safetensors"
    merged = learned(Recipe({"a": paths["a"], "b": paths["b"]}, str(base)))
    folder = write(merged, tmp_path / "merged")
    torch.testing.assert_close(logits(reload(folder), inputs), logits(merged, inputs))
    assert transformers.AutoTokenizer.from_pretrained(folder)("w1")["input_ids"] == [4]


def test_a_plain_network_is_exported_as_tensors_alone(tmp_path):
    merged = learned(recipe_of(relatives(build(Normalised))))
    folder = write(merged, tmp_path / "merged")
    twin = build(Normalised).eval()
    twin.load_state_dict(load_file(folder / "model.safetensors"))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(twin, {"x": x}), logits(merged, {"x": x}))
    assert not (folder / "config.json").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", None])
def test_the_dtype_asked_for_is_written_and_noted(tmp_path, family, dtype):
    merged, _inputs = folders(tmp_path, family)
    folder = write(merged, tmp_path / "merged", dtype=dtype)
    kind = getattr(torch, dtype or "float32")
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {kind}
    assert json.loads((folder / "config.json").read_text())["dtype"] == (dtype or "float32")
    assert json.loads((folder / "provenance.json").read_text())["dtype"] == (dtype or "as stored")
    for name, tensor in tensors.items():
        wide = merged.state.materialise(name, torch.float64)
        # rounded once, from an accumulation in float32
        torch.testing.assert_close(
            tensor.double(), wide, rtol=torch.finfo(kind).eps + 1e-6, atol=1e-6
        )
    assert reload(folder).dtype == kind


# ---- the files ------------------------------------------------------------------------------


def test_shards_respect_their_limit_and_the_index_names_each_tensor(tmp_path, family):
    merged, _ = folders(tmp_path, family, tokenizer=False)
    folder = write(merged, tmp_path / "merged", max_shard_size=4_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    found = {}
    for path in files:
        tensors = load_file(path)
        found.update(dict.fromkeys(tensors, path.name))
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size <= 4_000 or len(tensors) == 1
    assert index["weight_map"] == found
    assert set(found) == set(merged.plan.tensors)
    total = sum(4 * info.num_elements for info in merged.plan.reference.infos.values())
    assert index["metadata"]["total_size"] == total
    assert [p.name for p in files][-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"


def test_the_writer_s_files_are_valid_aligned_and_exact(tmp_path):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
    kinds += [torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {f"t{i}": (100 * torch.rand(3, i)).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(2.5), "transposed": torch.arange(6.0).view(2, 3).T}
    entries = [Entry(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]
    path = tmp_path / "all.safetensors"
    write_safetensors(path, entries, {"note": "x"})
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    assert length % 8 == 0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor), name
    wrong = [Entry("t", (2, 2), torch.float32, lambda: torch.zeros(4))]
    with pytest.raises(
        RuntimeError, match=r"t: expected shape \(2, 2\) as in the header, got \(4,\)"
    ):
        write_safetensors(tmp_path / "wrong.safetensors", wrong)


def test_tokenizer_and_generation_config_are_carried_and_leftovers_are_not(tmp_path, family):
    merged, _ = folders(tmp_path, family)
    source = Path(merged.plan.base.folder)
    transformers.GenerationConfig(temperature=0.7, do_sample=True).save_pretrained(source)
    for leftover in ("trainer_state.json", "optimizer.pt", "rng_state.pth", "training_args.bin"):
        (source / leftover).write_text("{}")
    folder = write(merged, tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w0 w5")["input_ids"] == [3, 8]
    assert transformers.GenerationConfig.from_pretrained(folder).temperature == 0.7
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".gradmerge",
        "README.md",
        "coefficients.st",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "provenance.json",
        "report.html",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_single_source_is_exported_too(tmp_path):
    models = relatives(build(Normalised), 2)
    merged = learned(recipe_of(models))
    found = load_file(write(merged, tmp_path / "merged") / "coefficients.st")
    for name in merged.plan.tensors:
        assert found[name].tolist() == merged.plan.z(name, merged.raw).tolist()


def test_coefficients_are_written_by_tensor_and_start_another_merge(tmp_path, family):
    merged, _ = folders(tmp_path, family, coefficients=Sigmoid(Tensor()), frozen={"norm": 0.25})
    folder = write(merged, tmp_path / "merged")
    path = folder / "coefficients.st"
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["sources"]) == ["a", "b"]
        assert file.metadata()["origin"] == "base"
        assert set(file.keys()) == set(merged.plan.tensors)
        for name in merged.plan.tensors:
            expected = torch.full((2,), 0.25)
            if "norm" not in name:
                expected = merged.plan.z(name, merged.raw).detach().sigmoid()
            torch.testing.assert_close(file.get_tensor(name), expected, rtol=1e-6, atol=1e-7)
    recipe = Recipe(
        merged.plan.recipe.sources,
        merged.plan.recipe.base,
        coefficients=Sigmoid(Tensor()),
        init=FromFile(str(path)),
        frozen={"norm": 0.25},
    )
    again = MergedModel(recipe)
    for key, raw in merged.raw.items():
        torch.testing.assert_close(again.raw[key], raw, rtol=0, atol=1e-4)


@pytest.mark.parametrize("private", [[], ["^classifier"]], ids=["merged head", "private head"])
def test_only_weights_of_the_model_end_in_safetensors(tmp_path, family, private):
    """Servers and converters load every file of that name."""
    merged, _ = folders(tmp_path, family, "bert", private=private)
    folder = write(merged, tmp_path / "merged")
    files = [*folder.rglob("*.safetensors")]
    assert len(files) == (6 if private else 1)  # shared and own, here and for two tasks
    if private:
        assert len({file.stat().st_ino for file in files}) == 4  # shared files are links
    names = {name for file in files for name in load_file(file)}
    assert names == {*merged.plan.tensors, *merged.plan.buffers, *merged.plan.private}


@pytest.mark.parametrize(
    ("path", "stored"),
    [
        (".", "coefficients.st"),
        ("coefficients.st", "coefficients.st"),
        ("coefficients.safetensors", "coefficients.st"),
        (".", "coefficients.safetensors"),
        ("coefficients.safetensors", "coefficients.safetensors"),
    ],
)
def test_coefficients_are_found_under_their_names_of_now_and_before(tmp_path, path, stored):
    models = relatives(build(Normalised), 2)
    folder = write(learned(recipe_of(models)), tmp_path / "merged")
    expected = load_file(folder / "coefficients.st")
    (folder / "coefficients.st").rename(folder / stored)
    again = MergedModel(recipe_of(models, init=FromFile(str(folder / path)))).state
    for name, values in expected.items():
        torch.testing.assert_close(again.coefficient(name).float(), values)


def test_rows_are_not_taken_for_columns(tmp_path, family):
    """On square matrices they have the same shape."""
    merged, _ = folders(tmp_path, family, coefficients=Column())
    path = write(merged, tmp_path / "merged") / "coefficients.st"
    start = {"sources": merged.plan.recipe.sources, "base": merged.plan.recipe.base}
    init = FromFile(str(path))
    with pytest.raises(ConfigError, match=r"run over axis 1, those of this merge over axis 0"):
        MergedModel(Recipe(**start, coefficients=Row(), init=init))
    again = MergedModel(Recipe(**start, coefficients=Column(), init=init))
    for key, raw in merged.raw.items():
        torch.testing.assert_close(again.raw[key], raw, rtol=0, atol=1e-6)
    mean = MergedModel(Recipe(**start, coefficients=Tensor(), init=init))
    assert mean.raw["tensor"].shape == (2, len(merged.state.learned))


def test_provenance_says_where_everything_came_from(tmp_path, family):
    merged, _ = folders(tmp_path, family, init=Constant(0.4))
    results = {"test": {"a": {"accuracy": 0.75}, "average": {"accuracy": 0.75}}}
    folder = write(merged, tmp_path / "merged", results=results, extra={"steps": 12})
    found = json.loads((folder / "provenance.json").read_text())
    files = {name: source.pop("files") for name, source in found["sources"].items()}
    config = (tmp_path / "sources/a/config.json").read_bytes()
    assert files["a"]["config.json"] == hashlib.sha256(config).hexdigest()
    assert found["sources"] == {
        name: {"from": name, "sha256": merged.plan.fingerprints[name]}
        for name in ("base", "a", "b")
    }
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["recipe"]["init_args"]["init"]["init_args"] == {"value": 0.4}
    text = json.dumps(found["recipe"], sort_keys=True).encode()
    assert found["recipe_sha256"] == hashlib.sha256(text).hexdigest()
    assert (found["steps"], found["results"]) == (12, results)
    assert found["tasks"] == {"a": "a", "b": "b"}
    card = (folder / "README.md").read_text()
    assert "LlamaForCausalLM.from_pretrained" in card
    assert "| a | 0.7500 |" in card
    assert merged.plan.fingerprints["a"][:16] in card
    assert str(tmp_path) not in card.split("## Recipe")[0]


# ---- refusals -------------------------------------------------------------------------------


def test_an_existing_folder_is_refused_or_replaced(tmp_path, family):
    merged, inputs = folders(tmp_path, family, tokenizer=False)
    target = tmp_path / "merged"
    write(merged, target, max_shard_size=3_000)
    before = sorted(path.name for path in target.iterdir())
    with pytest.raises(
        ConfigError, match=r"merged exists; give another folder, or --overwrite true"
    ):
        write(merged, target)
    assert sorted(path.name for path in target.iterdir()) == before
    write(merged, target, overwrite=True)
    assert not list(target.glob("model-*.safetensors"))
    (target / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match=r"nothing but what gradmerge wrote.*mine\.txt"):
        write(merged, target, overwrite=True)
    assert (target / "mine.txt").read_text() == "keep"
    assert torch.isfinite(logits(reload(target), inputs)).all()
    assert {path.name for path in tmp_path.iterdir()} == {"sources", "merged"}


def test_a_file_in_the_way_is_refused_even_with_overwrite(tmp_path, family):
    merged, _ = folders(tmp_path, family, tokenizer=False)
    (tmp_path / "file").write_text("keep")
    with pytest.raises(ConfigError, match="file is a file; give a folder"):
        write(merged, tmp_path / "file", overwrite=True)


def test_unknown_options_are_refused_before_anything_is_written(tmp_path, family):
    merged, _ = folders(tmp_path, family, tokenizer=False)
    with pytest.raises(ConfigError, match=r"dtype: expected one of .*bfloat16.*, got 'int8'"):
        write(merged, tmp_path / "merged", dtype="int8")
    with pytest.raises(
        ConfigError, match=r"unknown task 'aa' \(choose from a, b\)\. Did you mean 'a'\?"
    ):
        write(merged, tmp_path / "merged", head="aa")
    assert {path.name for path in tmp_path.iterdir()} == {"sources"}


def test_a_failing_export_leaves_nothing_behind(tmp_path, family, monkeypatch):
    merged, _ = folders(tmp_path, family, tokenizer=False)
    before = write(merged, tmp_path / "merged") / "provenance.json"
    text = before.read_text()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FitState, "materialise", fail)
    with pytest.raises(OutputError, match=r"cannot be written: the disk is full .* is as it was"):
        write(merged, tmp_path / "merged", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"sources", "merged"}
    assert before.read_text() == text


def test_sources_are_not_written_to(tmp_path, family):
    merged, _ = folders(tmp_path, family)

    def state():
        return {
            path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in sorted((tmp_path / "sources").rglob("*"))
            if path.is_file()
        }

    before = state()
    write(merged, tmp_path / "merged", dtype="bfloat16")
    assert state() == before
    assert len(before) > 9
