"""Folders of sentence-transformers whose network is in `0_Transformer`, as older versions wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gradmerge import MergedModel, Recipe, merge
from gradmerge.coefficients import Constant
from gradmerge.common.errors import SourceError
from gradmerge.export.folder import export_merged
from gradmerge.sources import as_source
from gradmerge.training.kinds.texts import pooling_of
from networks import seeded
from tiny import relatives, save_family

OLD = "sentence_transformers.models"
IDS = torch.arange(3, 11).view(1, 8)


def listed(*modules):
    return [
        {"idx": i, "name": str(i), "path": path, "type": f"{OLD}.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]


@pytest.fixture
def world(tmp_path):
    """The same models in both layouts, with dense modules that differ, by layout and name."""
    models = relatives(seeded(transformers.BertModel, max_position_embeddings=16))
    paths = save_family(tmp_path / "new", models)
    for number, (name, path) in enumerate(paths.items()):
        folder, old = Path(path), tmp_path / "old" / name
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
        shutil.copytree(folder, old / "0_Transformer")
        for root, network in ((folder, ""), (old, "0_Transformer")):
            kinds = ((network, "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"))
            (root / "modules.json").write_text(json.dumps(listed(*kinds)))
            (root / "config_sentence_transformers.json").write_text('{"__version__": {}}')
            (root / "README.md").write_text("---\nlicense: mit\n---\n")
            for module in ("1_Pooling", "2_Dense"):
                (root / module).mkdir()
                settings = {"pooling_mode_cls_token": True, "word_embedding_dimension": 8}
                (root / module / "config.json").write_text(json.dumps(settings))
            weights = {"linear.weight": torch.full((2, 8), float(number))}
            save_file(weights, root / "2_Dense" / "model.safetensors")
    old_paths = {name: str(tmp_path / "old" / name) for name in paths}
    return {"new": paths, "old": old_paths}, models


def recipe_of(paths):
    sources = {name: paths[name] for name in "ab"}
    return Recipe(sources, paths["base"], init=Constant([0.5, 0.2]))


def files_in(folder):
    names = (p.relative_to(folder) for p in Path(folder).rglob("*") if p.is_file())
    return {name.as_posix() for name in names}


@pytest.mark.parametrize("old", ["base ab", "base", "ab"])
def test_the_merge_is_that_of_todays_layout(world, tmp_path, old):
    folders, models = world
    paths = {n: folders["old" if n in old else "new"][n] for n in ("base", "a", "b")}
    out = merge(recipe_of(paths), tmp_path / "out")
    expected = merge(recipe_of(folders["new"]), tmp_path / "expected")
    assert files_in(out) == files_in(expected)
    changed = {"README.md", "provenance.json", "report.html", "coefficients.st"}
    for name in files_in(out) - changed:
        if name == "modules.json":
            lists = (json.loads((folder / name).read_text()) for folder in (out, expected))
            assert next(lists) == next(lists)
        else:
            assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    dense = load_file(out / "2_Dense" / "model.safetensors")["linear.weight"]
    assert torch.equal(dense, torch.full((2, 8), 0.5 * 1 + 0.2 * 2))
    found = transformers.AutoModel.from_pretrained(out)
    base, *others = ({n: p.detach() for n, p in m.named_parameters()} for m in models)
    for name, parameter in found.named_parameters():
        parts = (c * (o[name] - base[name]) for c, o in zip((0.5, 0.2), others, strict=True))
        torch.testing.assert_close(parameter.detach(), base[name] + sum(parts))
    assert "license: mit" in (out / "README.md").read_text()
    assert pooling_of(transformers.AutoTokenizer.from_pretrained(out)) == "cls"


def test_coefficients_are_learned_and_exported(world, tmp_path):
    folders, _ = world
    models = [MergedModel(recipe_of(folders[layout])) for layout in ("old", "new")]
    for merged in models:
        merged(input_ids=IDS).last_hidden_state.square().sum().backward()
    first, second = ({k: raw.grad for k, raw in m.raw.items()} for m in models)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert any(grad.abs().max() > 0 for grad in first.values())
    folder = models[0].plan.folder
    assert pooling_of(transformers.AutoTokenizer.from_pretrained(folder)) == "cls"
    out = export_merged(models[0], tmp_path / "out")
    assert json.loads((out / "modules.json").read_text())[0]["path"] == ""


def test_torch_files_are_read_and_the_temporary_folder_goes_with_its_checkpoint(world):
    folders, models = world
    network = Path(folders["old"]["a"], "0_Transformer")
    torch.save(models[1].state_dict(), network / "pytorch_model.bin")
    (network / "model.safetensors").unlink()
    opened = as_source(folders["old"]["a"]).open()
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(opened.read(name), models[1].get_parameter(name))
    folder = opened.folder
    assert (folder / "1_Pooling").is_dir()
    assert not (folder / "pytorch_model.bin").exists()
    assert network / "config.json" in opened.side_files
    del opened
    assert not folder.exists()


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        ([("0_WordEmbeddings", "WordEmbeddings"), ("1_Pooling", "Pooling")], "WordEmbeddings"),
        ([("0_Transformer", "Transformer"), ("1_Transformer", "Transformer")], "several: 0_Trans"),
    ],
    ids=["no network", "two networks"],
)
def test_modules_without_one_network_are_refused(world, tmp_path, modules, told):
    folders, _ = world
    folder = tmp_path / "other"
    for name, kind in modules:
        if kind == "Transformer":
            shutil.copytree(Path(folders["old"]["a"], "0_Transformer"), folder / name)
        else:
            (folder / name).mkdir(parents=True)
    (folder / "modules.json").write_text(json.dumps(listed(*modules)))
    match = rf"other/modules\.json: expected one module with a network.*got .*{told}"
    with pytest.raises(SourceError, match=match):
        as_source(str(folder)).open()
