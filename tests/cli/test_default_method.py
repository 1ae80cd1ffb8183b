"""The method of `gradmerge fit` where a configuration states none."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
import yaml

from gradmerge.cli import main
from gradmerge.cli.main import learn
from gradmerge.cli.method import DEFAULT, DEFAULTED, with_method
from gradmerge.coefficients import Column, Constant, Tensor
from gradmerge.common.checkpoints import load_checkpoint
from gradmerge.objectives import CrossEntropy, KLToSource
from gradmerge.preprocess import TSVM
from tiny import raws
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")

ROOT = Path(__file__).parents[2]
SHORT = {"seed_everything": 0, "trainer": {"max_steps": 2}}


def suite_of(world):
    """The tiny suite without a method."""
    suite = copy.deepcopy(world)
    del suite["model"]["recipe"]["coefficients"]
    return suite


def fitted(*arguments):
    """The module of a fit, and the folder of its logs."""
    cli = learn(["fit", *arguments])
    return cli, Path(cli.trainer.logger.log_dir)


def test_it_is_the_shipped_file_and_is_recorded(world, tmp_path, caplog):
    export = {"class_path": "ExportAtEnd", "init_args": {"output": "merged"}}
    config = write(tmp_path / "s.yaml", suite_of(world), SHORT)
    with caplog.at_level(logging.INFO):
        cli, folder = fitted("--config", config, "--trainer.callbacks", json.dumps([export]))
    said = [r.message for r in caplog.records if r.message.startswith("method: ")]
    assert said == [f"method: {DEFAULTED}: KLToSource; coefficients Column over TSVM"]
    recipe = cli.model.recipe
    assert (recipe.preprocess, recipe.coefficients) == ([TSVM()], Column())
    assert recipe.init == Constant(1.0)
    assert cli.model.objective.terms == [KLToSource()]
    assert cli.trainer.optimizers[0].defaults["lr"] == 0.05
    assert json.loads(Path("merged/provenance.json").read_text())["run"]["method"] == DEFAULTED

    # its checkpoint is scored and resumed with the same method
    (checkpoint,) = folder.rglob("*.ckpt")
    assert load_checkpoint(checkpoint)["gradmerge"]["run"]["method"] == DEFAULTED
    assert main(["test", "--config", config, "--ckpt_path", str(checkpoint)]) == 0
    more, _ = fitted("--config", config, "--ckpt_path", "last", "--trainer.max_steps", "3")
    assert more.model.recipe == recipe

    method = ROOT / "configs/methods/default.yaml"
    stated, _ = fitted("--config", config, "--config", str(method))
    expected, found = raws(stated.model), raws(cli.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert method.samefile(DEFAULT), "one file, which the package ships"
    assert '"cli/default.yaml"' in (ROOT / "pyproject.toml").read_text()


def test_a_checkpoint_of_another_method_keeps_it(world, tmp_path):
    config = write(tmp_path / "s.yaml", suite_of(world), SHORT)
    _, folder = fitted("--config", config, "--model.recipe.coefficients", "Tensor")
    (checkpoint,) = folder.rglob("*.ckpt")
    for place in (str(checkpoint), "last"):
        given = ("--config", config, "--ckpt_path", place, "--trainer.max_steps", "3")
        found, _ = fitted(*given)
        assert found.model.recipe.coefficients == Tensor()
        assert found.model.objective.terms == [CrossEntropy()]
    assert main(["validate", "--config", config, "--ckpt_path", str(checkpoint)]) == 0


@pytest.mark.parametrize(
    ("options", "kind", "rate"),
    [
        (["--model.learning_rate", "0.2"], torch.optim.Adam, 0.2),
        (["--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.3"], torch.optim.SGD, 0.3),
    ],
    ids=["rate", "optimiser"],
)
def test_options_that_are_given_replace_its_own(world, tmp_path, options, kind, rate):
    config = write(tmp_path / "s.yaml", suite_of(world), SHORT, {"trainer": {"max_steps": 1}})
    cli, _ = fitted("--config", config, *options, "--model.teacher_cache", "0")
    assert cli.model.recipe.coefficients == Column()
    assert type(cli.trainer.optimizers[0]) is kind
    assert cli.trainer.optimizers[0].defaults["lr"] == rate


def test_the_whole_configuration_shows_it(world, tmp_path, capsys):
    config = write(tmp_path / "s.yaml", suite_of(world))
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", config, "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)["model"]
    assert shown["recipe"]["preprocess"][0]["class_path"].endswith("TSVM")
    assert shown["objective"]["terms"][0]["class_path"].endswith("KLToSource")


@pytest.mark.parametrize(
    ("part", "origin"),
    [
        ({}, DEFAULTED),
        ({"recipe": {"private": ["^classifier"]}, "teacher_cache": 1}, DEFAULTED),
        ({"recipe": {"init": "Uniform"}}, "as configured"),
        ({"objective": {"terms": ["CrossEntropy"]}}, "as configured"),
        ({"search": "Scales"}, "as configured"),
        ({"driver": "Pairwise"}, "as configured"),
        ({"recipe": {"base": None}}, "there is no base"),
        ({"data": {"labels_per_task": 4}}, "asks for labels"),
        ({"data": {"tasks": {"a": {"kind": "causal_lm"}}}}, "no classification: a"),
        ({"data": {"tasks": {"a": {"source": "elsewhere"}}}}, "no source of its own: a"),
        ({"ckpt_path": "no.ckpt"}, "built in, as in the checkpoint"),
    ],
)
def test_it_applies_where_nothing_else_is_stated_and_it_can(world, tmp_path, part, origin):
    own = {key: part[key] for key in part if key in ("data", "search", "driver", "ckpt_path")}
    model = {key: part[key] for key in part if key not in own}
    given = ["--config", write(tmp_path / "s.yaml", suite_of(world), {**own, "model": model})]
    found, said = with_method("fit", given)
    assert origin in said
    assert found == (["--config", str(DEFAULT), *given] if origin == DEFAULTED else given)
