"""Components as plain data: public paths, old paths, and classes from a user's own package."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

import gradmerge
from gradmerge import MergeModule
from gradmerge.cli import main
from gradmerge.coefficients import AbstractInit, Clamp, Column
from gradmerge.common.errors import ConfigError
from gradmerge.common.spec import (
    CONCEPTS,
    current_path,
    from_plain,
    modernise,
    public_path,
    to_plain,
)
from gradmerge.objectives import CrossEntropy, Objective
from tiny import text_world, write_yaml

OWN = '''
"""Components of a user."""

from dataclasses import dataclass

import torch

from gradmerge.coefficients import AbstractInit


@dataclass(frozen=True)
class Halves(AbstractInit):
    """Start every coefficient at one number."""

    value: float = 0.5

    def coefficient(self, tensor, slot, context):
        return torch.full((len(context.sources), *slot.shape), self.value)


@dataclass(frozen=True)
class Foreign:
    """Not a component."""
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A package of the user, importable but not imported."""
    (tmp_path / "own_merges").mkdir()
    (tmp_path / "own_merges/__init__.py").write_text("")
    (tmp_path / "own_merges/starts.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_merges.starts"
    forget()


def forget():
    for name in [name for name in sys.modules if name.startswith("own_merges")]:
        del sys.modules[name]


def public_components():
    for concept in CONCEPTS:
        module = importlib.import_module(f"gradmerge.{concept}")
        for name in module.__all__:
            kind = getattr(module, name)
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                yield concept, name, kind


def test_components_are_written_by_public_path():
    assert public_path(Column) == "gradmerge.coefficients.Column"
    assert public_path(gradmerge.Recipe) == "gradmerge.Recipe"
    found = list(public_components())
    assert len(found) > 80
    for concept, name, kind in found:
        shorter = f"gradmerge.{name}" if name in gradmerge.__all__ else None
        assert public_path(kind) in (f"gradmerge.{concept}.{name}", shorter)


def test_specifications_survive_a_round_trip():
    for value in (Clamp(Column(), 0.0, 1.0), Objective([CrossEntropy()])):
        assert from_plain(json.loads(json.dumps(to_plain(value)))) == value


def test_paths_of_earlier_versions_are_read():
    old = {"class_path": "gradmerge.coefficients.link.Clamp", "init_args": {"low": 0.0}}
    old["init_args"]["inner"] = {"class_path": "gradmerge.coefficients.granularity.Column"}
    old["init_args"]["inner"]["init_args"] = {}
    assert from_plain(old) == Clamp(Column(), low=0.0)
    assert modernise([old])[0]["init_args"]["inner"]["class_path"] == public_path(Column)
    assert current_path("gradmerge.recipe.Recipe") == "gradmerge.Recipe"
    assert current_path("torch.optim.adam.Adam") == "torch.optim.adam.Adam"


def test_a_class_that_no_module_holds_is_not_written():
    @dataclass(frozen=True)
    class Local(AbstractInit):
        def coefficient(self, tensor, slot, context):
            return torch.zeros(len(context.sources), *slot.shape)

    plain = to_plain(Local())
    assert "class_path" not in plain
    with pytest.raises(ConfigError, match=r"pass the recipe again"):
        from_plain(plain)


def test_a_foreign_module_is_imported_only_where_it_is_allowed(own):
    plain = {"class_path": f"{own}.Halves", "init_args": {"value": 0.25}}
    for allowed in ((), ("own",), ("own_merges.other",), ("subprocess",)):
        with pytest.raises(ConfigError, match="--allow-modules own_merges"):
            from_plain(plain, allowed)
        assert own not in sys.modules
    for allowed in (("own_merges",), (own,)):
        assert from_plain(plain, allowed).value == 0.25
    assert to_plain(from_plain(plain, [own])) == plain


@pytest.mark.parametrize("name", ["Foreign", "torch"])
def test_classes_that_are_not_components_are_rejected_even_if_allowed(own, name):
    with pytest.raises(ConfigError, match=r"expected a dataclass derived from .*AbstractInit"):
        from_plain({"class_path": f"{own}.{name}", "init_args": {}}, [own])
    with pytest.raises(ConfigError, match="cannot be imported"):
        from_plain({"class_path": f"{own}.Absent", "init_args": {}}, [own])


def test_a_users_component_in_yaml_checkpoint_and_export(own, tmp_path, monkeypatch, capsys):
    """A configuration may also name a callback by its path in version 0.1."""
    world = text_world(tmp_path)
    start = {"model": {"recipe": {"init": {"class_path": f"{own}.Halves"}}}}
    old = {"class_path": "gradmerge.callbacks.ExportAtEnd", "init_args": {"output": "merged"}}
    start["trainer"] = {"max_steps": 1, "callbacks": [old], "logger": False}
    monkeypatch.chdir(tmp_path)
    config = write_yaml(tmp_path / "fit.yaml", world, start)
    assert main(["fit", "--config", config, "--allow_modules", "own_merges"]) == 0
    (checkpoint,) = tmp_path.glob("**/*.ckpt")
    forget()
    assert main(["export", str(checkpoint), "again"]) == 2
    message = capsys.readouterr().err
    assert "--allow-modules own_merges" in message
    assert own not in sys.modules
    arguments = ["export", str(checkpoint), "again", "--allow-modules", "own_merges"]
    assert main(arguments) == 0
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("merged", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    loaded = MergeModule.load_from_checkpoint(checkpoint, allow_modules=["own_merges"])
    assert type(loaded.recipe.init).__name__ == "Halves"
    provenance = json.loads((tmp_path / "again/provenance.json").read_text())
    assert f"{own}.Halves" in json.dumps(provenance)
    assert '"gradmerge.coefficients.Tensor"' in json.dumps(provenance)
