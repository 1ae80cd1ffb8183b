"""Files that the version before the package was reordered wrote still give what they gave.

Checkpoints, jobs and folders are in `fixtures/`, written by `write_fixtures.py`; the checkpoints
that they merge are made by formula, with the same bits everywhere.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import is_dataclass
from inspect import isabstract
from pathlib import Path
from typing import Any

import compat_world as world
import pytest
import torch
from safetensors.torch import load_file

from gradmerge import (
    MergeModule,
    alignment,
    coefficients,
    finalisers,
    objectives,
    operators,
    preprocess,
    search,
    sources,
)
from gradmerge.cli import main
from gradmerge.errors import FingerprintError

CHECKPOINTS = sorted((world.FIXTURES / "checkpoints").glob("*.ckpt"))
OLD_PATHS = json.loads(Path(__file__).with_name("old_paths.json").read_text())
CONCEPTS = {
    "alignment": alignment,
    "coefficients": coefficients,
    "finalisers": finalisers,
    "objectives": objectives,
    "operators": operators,
    "preprocess": preprocess,
    "search": search,
    "sources": sources,
}
IN_NO_CHECKPOINT = {("sources", "InMemory")}
"""Weights in memory: a checkpoint says that they were, and the recipe must be given again."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*REPAIR leaves.*"),
    pytest.mark.filterwarnings("ignore:.*vocabulary.*"),
]


@pytest.fixture(scope="module")
def old_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("old")
    world.write_world(root)
    return root


@pytest.fixture
def here(old_world: Path, own_folder: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The world as the working folder: paths in the fixtures are relative. Nothing is written."""
    monkeypatch.chdir(old_world)
    return old_world


@pytest.fixture
def own_world(
    old_world: Path, own_folder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of the world that a test may write to."""
    root = tmp_path / "world"
    shutil.copytree(old_world, root)
    monkeypatch.chdir(root)
    return root


def class_paths(content: Any) -> Iterator[str]:
    """Every class that plain data name."""
    if isinstance(content, dict):
        if "class_path" in content:
            yield content["class_path"]
        content = list(content.values())
    if isinstance(content, list):
        for item in content:
            yield from class_paths(item)


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def named_in(path: Path) -> set[str]:
    """Classes of ours that a checkpoint names and that loading it builds."""
    content = saved(path)
    searched = content["gradmerge"]["run"].get("search", {})
    return {*class_paths(dict(content["hyper_parameters"])), *class_paths(searched)}


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.stem)
def test_an_old_checkpoint_loads_and_exports_what_it_gave(path, here, tmp_path):
    module = MergeModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    content = saved(path)
    own = module.state_dict()
    assert own.keys() == content["state_dict"].keys()
    assert all(torch.equal(own[name], value) for name, value in content["state_dict"].items())
    assert module.results == content["gradmerge"]["results"]
    assert main(["export", str(path), str(tmp_path / "out")]) == 0
    world.assert_exported(tmp_path / "out", path.stem)


def test_every_component_has_a_checkpoint():
    found = {path for file in CHECKPOINTS for path in named_in(file)}
    written = {(path.split(".")[1], path.split(".")[-1]) for path in found}
    public = {
        (concept, name)
        for concept, package in CONCEPTS.items()
        for name in package.__all__
        if is_component(getattr(package, name))
    }
    assert public - written == IN_NO_CHECKPOINT


def is_component(kind: Any) -> bool:
    """Whether a public name is a class that a recipe, an objective or a search may hold."""
    if not isinstance(kind, type) or not is_dataclass(kind) or isabstract(kind):
        return False
    own = any(base.__name__.startswith("Abstract") for base in kind.__mro__)
    return own or kind.__name__ in ("Objective", "Vocabulary")


def test_old_paths_are_those_that_files_name():
    jobs = (world.FIXTURES / "jobs").glob("*/driver/job.json")
    found = {path for job in jobs for path in class_paths(json.loads(job.read_text())["content"])}
    found |= {path for file in CHECKPOINTS for path in named_in(file)}
    assert len(found) > 70
    own = {path for path in found if path.startswith("gradmerge.")}
    assert own <= set(OLD_PATHS)
    assert "gradmerge.coefficients.granularity.Column" in own


@pytest.mark.parametrize("path", OLD_PATHS)
def test_a_class_of_an_old_path_has_a_public_name(path):
    import gradmerge

    concept, name = path.split(".")[1], path.split(".")[-1]
    if name == "FoldedRecipe":
        assert issubclass(
            type(gradmerge.drivers.Pairwise().recipe(sources={"a": "a", "b": "b"})),
            gradmerge.Recipe,
        )
        return
    package = gradmerge if concept in ("recipe", "data") else None
    if package is None:
        import importlib

        package = importlib.import_module(f"gradmerge.{concept}")
    assert isinstance(getattr(package, name), type)


def test_an_old_checkpoint_of_other_weights_is_refused(own_world):
    weights = load_file("a/model.safetensors")
    weights["classifier.bias"] += 1
    from safetensors.torch import save_file

    save_file(weights, "a/model.safetensors", {"format": "pt"})
    path = world.FIXTURES / "checkpoints/column.ckpt"
    with pytest.raises(FingerprintError, match="trained on other weights of: a"):
        MergeModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("name", ["sam", "mofo", "scales", "fisher-to-init"])
def test_a_fit_resumes_from_an_old_checkpoint(name, own_world):
    """With the optimiser's state, what a search chose, and what a regulariser measured."""
    path = world.FIXTURES / "checkpoints" / f"{name}.ckpt"
    content = saved(path)
    optimiser = content["gradmerge"]["run"]["optimizers"][0]["class_path"]
    kind = {"SAM": "SAM", "MoFO": "MoFO"}.get(optimiser.split(".")[-1], "torch.optim.SGD")
    objective = {"class_path": "gradmerge.objectives.Objective"}
    print(objective)
    options = ["--optimizer", kind, "--optimizer.lr", "0.1", "--trainer.max_steps", "3"]
    if name == "scales":
        options += ["--search", "Scales", "--search.metric", "loss"]
    if name == "fisher-to-init":
        options += ["--model.objective.regularisers", "FisherToInit"]
    config = str(world.FIXTURES / "export/gradmerge.yaml")
    plain = {
        "preprocess": "[]",
        "coefficients": "Tensor",
        "operator": "Linear",
        "finalisers": "[]",
        "private": "[]",
    }
    for field, value in plain.items():
        options += [f"--model.recipe.{field}", value]
    assert main(["fit", "--config", config, *options, "--ckpt_path", str(path)]) == 0
    (last,) = Path("run").rglob("*.ckpt")
    assert saved(last)["global_step"] == content["global_step"] + 1


# ---- an export and what is beside it ------------------------------------------------------------


@pytest.mark.parametrize("name", ["gradmerge.yaml", "logged-config.yaml"])
def test_an_old_configuration_fits_to_the_same_weights(name, own_world):
    export = world.FIXTURES / "export"
    assert main(["fit", "--config", str(export / name)]) == 0
    for file in ("model", "coefficients"):
        then = load_file(export / f"{file}.safetensors")
        now = load_file(f"exported/{file}.safetensors")
        assert now.keys() == then.keys()
        for tensor, value in now.items():
            torch.testing.assert_close(value, then[tensor], rtol=1e-4, atol=1e-6)
    one = ["--trainer.max_steps", "1", "--trainer.callbacks.output", "one"]
    assert main(["fit", "--config", str(export / name), *one]) == 0
    assert Path("one/model.safetensors").is_file()


def test_the_checkpoint_of_an_old_fit_exports_the_same_folder(own_world):
    export = world.FIXTURES / "export"
    assert main(["export", str(export / "fit.ckpt"), "again"]) == 0
    for file in ("model", "coefficients"):
        then, now = (load_file(f"{folder}/{file}.safetensors") for folder in (export, "again"))
        assert now.keys() == then.keys()
        for tensor, value in now.items():
            torch.testing.assert_close(value, then[tensor], rtol=1e-4, atol=1e-6)
    files = ("provenance.json", "gradmerge.yaml")
    old, new = (json.loads(Path(f, "provenance.json").read_text()) for f in (export, "again"))
    assert old.keys() - new.keys() == set(), files
    assert new["sources"] == old["sources"]


def test_an_old_export_is_a_source_of_a_continual_merge(own_world):
    """The number of sources in it is read from its provenance."""
    shutil.copytree(world.FIXTURES / "export", "earlier")
    options = ["--driver", "Continual", "--driver.earlier", "earlier"]
    print(options)


def test_an_old_compact_merge_is_unpacked(own_world):
    assert main(["unpack", "compact", "unpacked", "--base", "base"]) == 0
    weights = load_file("unpacked/a/model.safetensors")
    assert weights.keys() == load_file("a/model.safetensors").keys()


# ---- jobs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairwise", "layerwise"])
def test_an_old_job_resumes_and_ends_as_an_uninterrupted_one(name, own_world, capsys):
    from write_fixtures import job

    shutil.copytree(world.FIXTURES / "jobs" / name, "run")
    finished = [path for path in Path("run").rglob("step.json")]
    assert len(finished) == 1
    before = finished[0].stat().st_mtime_ns
    assert job(name) == 0
    assert finished[0].stat().st_mtime_ns == before, "the first half is not done again"
    assert not Path("run/driver.before-1").exists()
    world.assert_exported(Path("run/merged"), f"job-{name}")
