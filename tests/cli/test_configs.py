"""Configurations: factors parse and learn together, every shipped file parses."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import jsonargparse
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from gradmerge import MergedModel, Recipe
from gradmerge.cli import main
from gradmerge.cli.main import learn, register
from gradmerge.coefficients import Tensor
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.optimisers import CosineDecay
from tiny import write_yaml

pytestmark = pytest.mark.usefixtures("own_folder")

CONFIGS = Path(__file__).parents[2] / "configs"
GRANULARITIES = [
    "Model",
    "Group",
    "Tensor",
    "Column",
    "Row",
    "Partition",
    "Chunks",
    "Component",
    "Element",
]
LINKS = ["none", "Clamp", "Sigmoid", "Tanh", "Softmax", "Complement", "Complement-Sigmoid"]
INITS = ["Constant", "Uniform", "Mixup", "DepthRamp", "MetaGPT"]
SUMS = ["Uniform", "Mixup", "MetaGPT"]  # what a link that sums to one can start from


def wrapped(granularity, link):
    """A granularity in its links, as a configuration says it."""
    spec = {"class_path": granularity}
    for name in reversed(link.split("-")) if link != "none" else ():
        spec = {"class_path": name, "init_args": {"inner": spec}}
    return spec


def names_of(coefficients):
    """The inverse of `wrapped`."""
    names = []
    while hasattr(coefficients, "inner"):
        names.append(type(coefficients).__name__)
        coefficients = coefficients.inner
    return type(coefficients).__name__, "-".join(names) or "none"


@pytest.fixture(scope="module")
def parser():
    register()
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, "recipe")
    return parser


def trios():
    """Every granularity with every link, and both with every init that they take, in turn."""
    for i, granularity in enumerate(GRANULARITIES):
        for j, link in enumerate(LINKS):
            inits = SUMS if link.startswith(("Softmax", "Complement")) else INITS
            yield granularity, link, inits[(i + j) % len(inits)]


@pytest.mark.parametrize(("granularity", "link", "init"), trios())
def test_factors_of_a_recipe_parse_together_and_take_a_step(world, parser, granularity, link, init):
    tokens = torch.arange(12).view(2, 6)
    factors = {"coefficients": wrapped(granularity, link), "init": init}
    if granularity == "Component":
        factors["operator"] = "Components"
    parsed = parser.parse_object({"recipe": {**world["model"]["recipe"], **factors}})
    recipe = parser.instantiate_classes(parsed).recipe
    assert names_of(recipe.coefficients) == (granularity, link)
    assert type(recipe.init).__name__ == init
    merged = MergedModel(recipe)
    optimiser = torch.optim.SGD(merged.parameters(), lr=0.5)
    before = loss = merged(input_ids=tokens, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert all(torch.isfinite(raw.grad).all() for raw in merged.raw.values())
    assert any(raw.grad.abs().max() > 0 for raw in merged.raw.values())
    optimiser.step()
    with torch.no_grad():
        after = merged(input_ids=tokens, labels=torch.tensor([0, 2])).loss
    assert after < before


@pytest.mark.parametrize(
    ("granularity", "link", "init"),
    [("Column", "Softmax", "MetaGPT"), ("Element", "Complement-Sigmoid", "Mixup")],
)
def test_combinations_are_fitted_from_the_command_line(world, tmp_path, granularity, link, init):
    factors = {"coefficients": wrapped(granularity, link), "init": init}
    config = write_yaml(tmp_path / "c.yaml", world, {"model": {"recipe": factors}})
    found = learn(["fit", "--config", config, "--trainer.fast_dev_run", "1"])
    assert found.trainer.global_step == 1
    assert names_of(found.model.recipe.coefficients) == (granularity, link)
    start = found.model.merged.plan.initial_raw()
    assert any(not torch.equal(raw, start[key]) for key, raw in found.model.merged.raw.items())


def test_finalisers_are_named_in_a_fit_and_act_on_its_export(world, tmp_path, capsys):
    depth = {"class_path": "DepthRescale", "init_args": {"first": 0.5, "last": 1.0}}
    factors = {"finalisers": [depth, "SpectralRescale", "REPAIR"]}
    callbacks = {"callbacks": [{"class_path": "ExportAtEnd", "init_args": {"output": "merged"}}]}
    files = [{"model": {"recipe": factors}}, {"trainer": callbacks}]
    learn(["fit", "--config", write_yaml(tmp_path / "c.yaml", world, *files)])
    came = load_file("merged/model.safetensors")
    provenance = json.loads(Path("merged/provenance.json").read_text())
    assert len(provenance["finalisation"]["corrected"]) == 7
    learned = load_file("merged/coefficients.st")
    base, a, b = (
        load_file(Path(folder) / "model.safetensors")
        for folder in (
            world["model"]["recipe"]["base"],
            *world["model"]["recipe"]["sources"].values(),
        )
    )
    name = "bert.encoder.layer.0.attention.self.query.weight"
    c = learned[name]
    plain = base[name] + c[0] * (a[name] - base[name]) + c[1] * (b[name] - base[name])
    ratio = came[name] / plain
    assert not torch.allclose(came[name], plain, atol=1e-3)
    assert torch.isfinite(ratio).all()
    options = ["--config", str(tmp_path / "c.yaml"), "--recipe.finalisers", "[Repair]"]
    assert main(["merge", *options]) == 2
    assert "Did you mean 'REPAIR'?" in capsys.readouterr().err


# those of methods are parsed by the test of their learning rates
OTHERS = [p for p in sorted(CONFIGS.rglob("*.yaml")) if p.parent.name != "methods"]


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_every_shipped_configuration_parses(path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    with pytest.raises(SystemExit, match="0"):
        main([*command_of(path), "--print_config"])


def command_of(path):
    """The command of its own head, with the other files that it names there."""
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    commands = [line.split("gradmerge ", 1)[1].split() for line in head if "gradmerge " in line]
    assert commands, "its head must say the command"
    command, *words = commands[0]
    files = [word for word in words if word.endswith(".yaml")]
    assert path.relative_to(CONFIGS.parent).as_posix() in files
    arguments = [word for file in files for word in ("--config", file)]
    return [command, *arguments]


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "static").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_static_merge_merges(world, parser, path, tmp_path):
    """The recipe of each over the tiny sources: something finite, other than the base."""
    if command_of(path)[0] != "merge":
        pytest.skip("its head names another command than merge")
    if "model" not in yaml.safe_load(path.read_text()):
        pytest.skip("a part that goes after a method's file")
    own = yaml.safe_load(path.read_text())["model"]["recipe"]
    recipe = {**world["model"]["recipe"], **own}
    names = list(own.get("sources", recipe["sources"]))
    theirs = list(world["model"]["recipe"]["sources"].values())
    recipe["sources"] = dict(zip(names, theirs, strict=False))
    found = parser.instantiate_classes(parser.parse_object({"recipe": recipe})).recipe
    if found.needs_statistics:
        suite = write_yaml(tmp_path / "suite.yaml", world)
        command = ["collect", "--config", suite, "--config", str(path), "--output", "statistics"]
        assert main(command) == 0
        found = replace(found, statistics="statistics")
    if any(finaliser.needs_data for finaliser in found.finalisers):
        suite = write_yaml(tmp_path / "suite.yaml", world)
        command = ["merge", "--config", suite, "--config", str(path), "--output", "merged"]
        assert main(command) == 0
        plan = open_plan(found, with_skeleton=False)
        merged = load_file("merged/model.safetensors")
    else:
        plan = open_plan(found, with_skeleton=False)
        raw = plan.initial_raw()
        merged = {name: FitState(plan, raw).materialise(name) for name in plan.tensors}
    assert all(tensor.isfinite().all() for tensor in merged.values())
    assert any(not torch.equal(tensor, plan.base.read(name)) for name, tensor in merged.items())
    if found.finalisers:
        plain = open_plan(replace(found, finalisers=[]), with_skeleton=False)
        raw = plain.initial_raw()
        gaps = {n: (FitState(plain, raw).materialise(n) - t).abs().max() for n, t in merged.items()}
        assert any(gap > 1e-3 for gap in gaps.values()), "its finalisers act"
    learned = MergedModel(replace(found, coefficients=Tensor()))
    learned(input_ids=torch.arange(12).view(2, 6), labels=torch.tensor([0, 2])).loss.backward()
    gradient = learned.raw["tensor"].grad
    assert gradient.isfinite().all(), "it is the basis of a learned merge, too"
    assert gradient.count_nonzero() > 0


# of two at a time; the layer-wise one has a test of its own (test_layerwise_cli.py)
FOLDS = [p for p in sorted((CONFIGS / "drivers").glob("*.yaml")) if p.stem != "layerwise"]


@pytest.mark.parametrize("path", FOLDS, ids=lambda path: path.stem)
def test_every_driver_drives(world, path, tmp_path):
    """Each with the tiny sources in place of the suite's, from the plain average."""
    sources = world["model"]["recipe"]["sources"]
    if path.stem == "continual":
        first = write_yaml(tmp_path / "first.yaml", {"recipe": world["model"]["recipe"]})
        own = ["--recipe.sources", f"{{a: {sources['a']}}}", "--recipe.init", "Uniform"]
        assert main(["merge", "--config", first, *own, "--output", "earlier-merge"]) == 0
        sources = {"b": sources["b"]}
    given = {**world, "model": {"recipe": {**world["model"]["recipe"], "sources": sources}}}
    suite = write_yaml(tmp_path / "suite.yaml", given, {"trainer": {"max_steps": 1}})
    assert main(["fit", "--config", suite, "--config", str(path)]) == 0
    said = json.loads(Path("outputs/merged/provenance.json").read_text())["driver"]
    assert said["members"] == ["a", "b"]
    assert [step["merged"] for step in said["steps"]] == [[["a"], ["b"]]]
    model = transformers.BertForSequenceClassification.from_pretrained("outputs/merged")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def made(spec, *arguments):
    """An object from its class path and arguments."""
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(*arguments, **spec["init_args"])


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "methods").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_learning_rate_of_a_method_is_the_stated_one_all_along(path, monkeypatch, capsys):
    """It is constant, or falls until the last step; it never rises again."""
    monkeypatch.chdir(CONFIGS.parent)
    with pytest.raises(SystemExit, match="0"):
        main([*command_of(path), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    optimiser = made(config["optimizer"], [torch.nn.Parameter(torch.zeros(1))])
    scheduler = made(config["lr_scheduler"], optimiser)
    if isinstance(scheduler, CosineDecay):
        scheduler.follow(config["trainer"]["max_steps"])
    rates = []
    for _ in range(config["trainer"]["max_steps"]):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step(lambda: 0.0)  # some need the loss again
        scheduler.step()
    rates.append(optimiser.param_groups[0]["lr"])
    stated = re.search(r"Adam (\S+) throughout", path.read_text())
    if stated is not None:
        assert type(optimiser) is torch.optim.Adam
        assert rates == [float(stated[1])] * len(rates)
    assert rates == sorted(rates, reverse=True)
    assert not hasattr(scheduler, "T_max"), "the length of a run is stated once, as max_steps"
    own = yaml.safe_load(path.read_text())
    assert rates[0] == own["optimizer"]["init_args"]["lr"]
    if "max_steps" in own.get("trainer", {}):
        assert "lr_scheduler" in own, "its length is its own, so its schedule must be, too"
