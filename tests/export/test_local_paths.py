"""Nothing that an export writes names a place on the machine, unless it is asked to."""

from __future__ import annotations

import getpass
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from gradmerge import Recipe, merge
from gradmerge.cli import main
from gradmerge.coefficients import Uniform
from gradmerge.common.local_paths import is_place, without_places, yaml_without_places
from gradmerge.sources import RunAverage
from tiny import relatives, save_family, sentences


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Sources with traces of other tools, data, and a current folder apart from both."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    models = relatives(transformers.GPT2LMHeadModel(config), 4)
    paths = save_family(tmp_path / "private" / "models", models)
    for path in paths.values():
        for file in ("config.json", "tokenizer_config.json"):
            settings = json.loads(Path(path, file).read_text())
            traces = {"_name_or_path": path, "name_or_path": path, "inner": {"_name_or_path": path}}
            Path(path, file).write_text(json.dumps({**settings, **traces}))
    data = tmp_path / "private" / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": t}) for t in sentences(1, 16, length=40)))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return paths, str(data)


def traces(folder, *more):
    """Places that the files of a folder name, by file."""
    marks = [str(Path.cwd().parent), str(Path.home()), "private/", *more]
    return {
        (path.relative_to(folder).as_posix(), mark)
        for path in Path(folder).rglob("*")
        if path.is_file()
        for mark in marks
        if mark.encode() in path.read_bytes()
    }


def recipe_of(paths, **options):
    sources = {name: paths[name] for name in "ab"}
    return {"base": paths["base"], "sources": sources, "init": "Uniform", **options}


def test_a_merge_names_no_place(world):
    paths, _ = world
    relative = os.path.relpath(paths["b"])
    window = RunAverage(f"{Path(paths['a']).parent}/*", 2)
    recipe = Recipe({"a": window, "b": relative}, paths["base"], init=Uniform())
    assert traces(merge(recipe, "out")) == set()
    found = json.loads(Path("out/provenance.json").read_text())
    assert {n: s["from"] for n, s in found["sources"].items()} == {
        "base": "base",
        "a": "*",
        "b": "b",
    }
    assert json.loads(Path("out/config.json").read_text())["inner"] == {"_name_or_path": "base"}
    transformers.AutoTokenizer.from_pretrained("out")
    kept = merge(recipe, "kept", provenance_paths=True)
    assert {file for file, _ in traces(kept)} == {"README.md", "provenance.json"}


def test_outputs_per_task_and_compact_name_no_place(world, capsys):
    paths, _ = world
    content = {"recipe": recipe_of(paths, preprocess=["Unify"])}
    Path("e.yaml").write_text(yaml.safe_dump(content))
    for form in ("tasks", "compact"):
        assert main(["merge", "--config", "e.yaml", "--outputs", form, "--output", form]) == 0
        # the compact form needs its base, which it finds beside it
        allowed = {("emr.json", "private/")} if form == "compact" else set()
        assert traces(form) == allowed
    assert main(["unpack", "compact", "unpacked"]) == 0
    assert traces("unpacked") == set()
    assert main(["unpack", "compact", "whole", "--provenance_paths", "true"]) == 0
    for task in "ab":
        record = json.loads(Path(f"whole/{task}/provenance.json").read_text())
        assert Path(record["unpacked"]["base"]["from"]).samefile(paths["base"])
    command = ["merge", "--config", "e.yaml", "--outputs", "compact", "--provenance-paths", "true"]
    assert main([*command, "--output", "kept"]) == 0
    assert json.loads(Path("kept/emr.json").read_text())["base"]["from"] == paths["base"]


@pytest.mark.parametrize("driver", [None, "Pairwise"])
def test_a_fit_names_no_place(world, driver, capsys):
    paths, data = world
    export = {"class_path": "ExportAtEnd", "init_args": {"output": "out"}}
    trainer = {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 1, "callbacks": [export]}
    sources = {name: paths[name] for name in ("abc" if driver else "ab")}
    task = {"kind": "causal_lm", "path": "json", "data_files": data, "max_length": 8}
    content = {
        "model": {"recipe": recipe_of(paths, sources=sources)},
        "data": {"tasks": dict.fromkeys(sources, task), "batch_size": 2},
        "trainer": {**trainer, "default_root_dir": str(Path("run").absolute()), "logger": False},
        **({"driver": {"class_path": driver}} if driver else {}),
    }
    Path("fit.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", "fit.yaml"]) == 0, capsys.readouterr().err
    assert traces("out") == set()
    found = yaml.safe_load(Path("out/gradmerge.yaml").read_text())
    assert found["model"]["recipe"]["sources"]["a"] == "a"
    assert found["data"]["tasks"]["a"]["data_files"] == "data.jsonl"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/models/base", "base"),
        ("~/models/base/", "base"),
        ("./base", "base"),
        ("../data/*.jsonl", "*.jsonl"),
        ("C:\\models\\base", "base"),
        ("owner/name", "owner/name"),
        ("owner/name@main", "owner/name@main"),
        ("models", "models"),
        ("https://huggingface.co/owner/name/x", "https://huggingface.co/owner/name/x"),
        ("hf://datasets/owner/name", "hf://datasets/owner/name"),
        ("/home/me/a on /home/me/base", "a on base"),
        ("cannot read /home/me/a/config.json: see https://a.org/b.", "cannot read config.json: see https://a.org/b."),
        ("1/3 of the tokens, 10 tokens/s and </s>", "1/3 of the tokens, 10 tokens/s and </s>"),
        (r"^model\.layers\.\d+/", r"^model\.layers\.\d+/"),
    ],
)  # fmt: skip
def test_paths_become_names(text, expected):
    assert without_places(text) == expected
    assert without_places({"a": [text], "b": 1.5}) == {"a": [expected], "b": 1.5}
    assert is_place(text) == (text != expected and " " not in text)


def test_what_exists_here_is_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert without_places("owner/name") == "owner/name"
    (tmp_path / "owner/name with spaces").mkdir(parents=True)
    (tmp_path / "owner/name").mkdir()
    assert without_places("owner/name") == "name"
    assert without_places(str(tmp_path / "owner/name with spaces")) == "name with spaces"
    document = yaml_without_places("a: {b: owner/name, c: [1, null]}\n")
    assert yaml.safe_load(document) == {"a": {"b": "name", "c": [1, None]}}
    assert getpass.getuser() not in without_places(f"{Path.home()}/x/y")
