"""Configurations that are ambiguous, without end or without effect: one error, before any work."""

from __future__ import annotations

import re

import pytest
from safetensors.torch import save_file

from gradmerge.cli import main
from tiny import build, relatives


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files of three perceptrons."""
    root = tmp_path_factory.mktemp("world")
    for name, model in zip(("base", "a", "b"), relatives(build()), strict=True):
        save_file(model.state_dict(), root / f"{name}.safetensors")
    (root / "models").mkdir()
    return root


def refused(world, monkeypatch, capsys, *arguments):
    monkeypatch.chdir(world)
    before = sorted(world.rglob("*"))
    try:
        status = main(list(arguments))
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert sorted(world.rglob("*")) == before
    return capsys.readouterr().err


RECIPE = "recipe: {base: base.safetensors, sources: {a: a.safetensors, b: b.safetensors}, %s}\n"
CONFIGS = {
    "twice": (
        "recipe: {}\noutput: x\nrecipe: {}\n",
        "m.yaml: expected YAML.*the key 'recipe' twice",
    ),
    "twice inside": (RECIPE % "frozen: {head: 0, head: 1}", "m.yaml.*the key 'head' twice"),
    "mergekit, twice": ("merge_method: linear\nmodels: []\nmodels: []\n", "the key 'models' twice"),
    "itself": ("recipe: &r {sources: {a: *r}}\n", r"m.yaml.*the alias \*r within what it stands"),
    "deep": ("recipe: " + "[" * 3000, "m.yaml.*more than 64 levels"),
    "digits": ("recipe: {frozen: {head: " + "9" * 5000 + "}}", "m.yaml.*a number of 5000 digits"),
    "patterns": (
        RECIPE % "init: Uniform, private: [hed], frozen: {bdy: 0}",
        "2 patterns have no effect.*frozen: 'bdy' .* mean 'body'.*private: 'hed' .* mean 'head'",
    ),
    "settings": (
        RECIPE % "init: Uniform, preprocess: [{class_path: Trim, init_args: {density: "
        "{boddy: 0.1, '.*': 0.5}}}]",
        "Trim.density: 'boddy' matches no tensor of the sources. Did you mean 'body'",
    ),
    "empty": ("", "expected options in the configuration, got an empty file"),
    "null": (
        RECIPE % "init: {class_path: Constant, init_args: {value: null}}",
        r"recipe\.init\.init_args\.value: expected a number or a list of numbers.*, got null",
    ),
    "null in a list": (
        RECIPE % "preprocess: [{class_path: Trim, init_args: {density: null}}]",
        r"preprocess\[0\]\.init_args\.density: expected a number.*, got null",
    ),
    "no such option": (
        RECIPE % "preprocess: [{class_path: Trim, init_args: {densty: 1}}]",
        r"no such option of Trim\. Did you mean 'recipe\.preprocess\[0\]\.init_args\.density'",
    ),
    "a name": ("recipe: {sources: {../x: a.safetensors}}", r"sources: expected a name.*'\.\./x'"),
    "a path": ("recipe: {sources: {a: models/x}}", "models/x: expected .*models is a folder here"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_are_refused(world, monkeypatch, capsys, tmp_path, name):
    text, message = CONFIGS[name]
    path = tmp_path / "m.yaml"
    path.write_text(text)
    output = f"--output={world / 'out'}"
    told = refused(world, monkeypatch, capsys, "merge", f"--config={path}", output)
    assert re.search(message, told, re.DOTALL), told


def test_what_fits_is_merged(world, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    path = tmp_path / "m.yaml"
    path.write_text(
        RECIPE % "init: Uniform, private: ['^head', '^bo.y\\.none|head'], frozen: {bias: 0}"
    )
    assert main(["merge", f"--config={path}", f"--output={tmp_path / 'out'}"]) == 0


def test_inspect_names_expressions_without_effect(world, monkeypatch, capsys):
    files = ["a.safetensors", "b.safetensors"]
    told = refused(world, monkeypatch, capsys, "inspect", *files, "--private", "['^hed']")
    assert "private: '^hed' matches no tensor of the sources. Did you mean 'head'" in told
