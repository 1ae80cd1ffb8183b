"""Merges without training that need data: statistics, searches and scores, by calling `main`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gradmerge.cli import commands, main
from gradmerge.cli.configs import read_merge_input
from gradmerge.cli.main import learn, merge_options
from gradmerge.coefficients import Constant
from gradmerge.preprocess import RegMean
from gradmerge.sources.collected import SourceStatistics
from tiny import Normalised, build, recipe_of, relatives, vectors
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")

ONES = {"coefficients": "Model", "init": {"class_path": "Constant", "init_args": {"value": 1.0}}}
STEP = {"class_path": "RegMean", "init_args": {"damping": 1e-3}}


def method(path, *steps, **more):
    """A file as in configs/static."""
    recipe = {**ONES, "preprocess": list(steps or [STEP])}
    return write(path / "method.yaml", {"model": {"recipe": recipe}}, more)


def arguments(suite, method, *more):
    return ["--config", suite, "--config", method, *more]


@pytest.fixture
def suite(world, tmp_path):
    return write(tmp_path / "suite.yaml", world)


def test_a_merge_collects_what_its_recipe_needs(suite, tmp_path, capsys):
    files = arguments(suite, method(tmp_path))
    assert main(["merge", *files, "--output", "direct"]) == 0
    text = capsys.readouterr()
    assert "a: Gram matrices of 8 of" in text.err
    assert "merged 2 sources" in text.out
    search = write(tmp_path / "search.yaml", {"search": "GreedySoup"})
    assert main(["collect", *files, "--config", search, "--output", "statistics"]) == 0
    assert "statistics written to statistics" in capsys.readouterr().out
    assert main(["merge", *files, "--recipe.statistics", "statistics", "--output", "kept"]) == 0
    assert "Gram" not in capsys.readouterr().err
    direct, kept = (load_file(f"{folder}/model.safetensors") for folder in ("direct", "kept"))
    assert all(torch.equal(direct[name], kept[name]) for name in kept)
    whole = yaml.safe_load(Path(suite).read_text())["model"]["recipe"]["sources"]
    a, b = (load_file(Path(whole[name]) / "model.safetensors") for name in "ab")
    solved = [n for n in kept if not torch.allclose(kept[n], (a[n] + b[n]) / 2, atol=1e-5)]
    assert len(solved) == 8
    assert all(name.endswith("weight") and kept[name].dim() == 2 for name in solved)
    provenance = json.loads(Path("direct/provenance.json").read_text())
    assert provenance["recipe"]["init_args"]["statistics"] is None
    collected = provenance["statistics"]["collected"]["gram"]["sources"]
    assert {name: (s["examples"], s["tensors"]) for name, s in collected.items()} == {
        "a": (6, 8),
        "b": (6, 8),
    }
    again = json.loads(Path("kept/provenance.json").read_text())
    assert again["statistics"]["collected"] == provenance["statistics"]["collected"]
    assert again["recipe"]["init_args"]["statistics"] == "statistics"


def test_a_fit_starts_from_kept_statistics_and_says_how_to_get_them(suite, tmp_path, capsys):
    files = arguments(suite, method(tmp_path))
    assert main(["fit", *files]) == 2
    text = capsys.readouterr().err
    assert "expected the folder that RegMean needs, with the sources' statistics on data" in text
    assert "gradmerge collect" in text
    assert main(["collect", *files, "--output", "statistics"]) == 0
    found = learn(["fit", *files, "--model.recipe.statistics", "statistics"])
    raw = found.model.merged.raw["model"]
    assert found.trainer.global_step == 4
    assert not torch.equal(raw, torch.ones_like(raw))


def test_a_search_prints_and_keeps_what_it_tried(suite, tmp_path, capsys):
    scales = {"values": [0.25, 0.5], "metric": "loss", "widen": False}
    search = {"class_path": "Scales", "init_args": scales}
    files = arguments(suite, method(tmp_path, search=search))
    files[3] = write(tmp_path / "m.yaml", {"model": {"recipe": ONES}, "search": search})
    assert main(["merge", *files, "--output", "merged"]) == 0
    text = capsys.readouterr().out
    assert text.count("Scaled 0.25: ") == text.count("Scaled 0.5: ") == 1
    assert "selection, average: accuracy" in text
    provenance = json.loads(Path("merged/provenance.json").read_text())
    trials = provenance["search"]["trials"]
    losses = [trial["selection"]["loss"] for trial in trials]
    best = [0.25, 0.5][losses.index(min(losses))]
    assert f"* Scaled {best}: " in text
    assert provenance["search"]["chosen"]["init_args"]["factor"] == best
    assert provenance["recipe"]["init_args"]["init"]["init_args"]["factor"] == best
    assert provenance["results"]["selection"]["average"]["loss"] == pytest.approx(min(losses))
    came = load_file("merged/model.safetensors")
    recipe = yaml.safe_load(Path(suite).read_text())["model"]["recipe"]
    folders = [recipe["base"], *recipe["sources"].values()]
    base, *sources = (load_file(Path(folder) / "model.safetensors") for folder in folders)
    for name, tensor in came.items():
        expected = base[name] + best * sum(source[name] - base[name] for source in sources)
        torch.testing.assert_close(tensor, expected, msg=name)


def test_a_soup_over_statistics_and_scores_of_a_plain_merge(suite, tmp_path, capsys):
    files = arguments(suite, method(tmp_path))
    assert main(["merge", *files, "--search", "GreedySoup", "--output", "soup"]) == 0
    assert capsys.readouterr().out.count("Constant [") == 3
    plain = write(tmp_path / "plain.yaml", {"model": {"recipe": ONES}})
    assert main(["merge", *arguments(suite, plain), "--score", "true", "--output", "plain"]) == 0
    assert "selection, b: accuracy" in capsys.readouterr().out


def test_data_is_kept_only_where_it_is_needed(suite, tmp_path):
    plain = write(tmp_path / "plain.yaml", {"model": {"recipe": {**ONES, "preprocess": ["Trim"]}}})
    needy = method(tmp_path, {"class_path": "gradmerge.preprocess.FisherScale"})
    direct = write(tmp_path / "direct.yaml", {"recipe": {**ONES, "preprocess": ["MaTS"]}})
    named = write(tmp_path / "named.yaml", {"recipe": {"statistics": "somewhere"}})
    own = yaml.safe_load(Path(suite).read_text())["model"]["recipe"]
    whole = write(tmp_path / "whole.yaml", {"recipe": {**own, **ONES, "preprocess": ["RegMean"]}})
    for files, needed in [
        (arguments(suite, plain), False),
        (arguments(suite, needy), True),
        (arguments(suite, direct), True),
        ([f"--config={suite}", f"--config={needy}"], True),
        (arguments(suite, needy, "--recipe.statistics", "x"), False),
        (arguments(suite, needy, "--config", named), False),
        (arguments(suite, plain, "--search.class_path", "GreedySoup"), True),
        (arguments(suite, plain, "--score=true"), True),
        (["--config", suite, "--recipe.preprocess", "[RegMean]"], True),
        (["--config", whole], False),  # no data is given at all; the recipe says what to do
    ]:
        options = merge_options("merge", read_merge_input([*files, "--output", "x"]))
        assert ("data" in options) == needed, files
        if needed:
            assert list(options["data"].tasks) == ["a", "b"]


def test_a_plain_merge_with_the_files_of_fit_does_not_wait_for_lightning(suite, tmp_path):
    plain = write(tmp_path / "plain.yaml", {"model": {"recipe": ONES}})
    script = (
        "import sys; from gradmerge.cli import main; status = main(sys.argv[1:]);"
        "print('lightning' in sys.modules, status)"
    )
    options = ["merge", *arguments(suite, plain), "--output", "merged"]
    command = [sys.executable, "-c", script, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "expected the folder that RegMean needs, with the sources' statistics on data"),
        (["--search", "GreedySoup"], "data.tasks: expected at least one task"),
        (["--search", "GredySoup"], "Did you mean 'GreedySoup'?"),
    ],
)
def test_a_merge_without_the_data_it_needs_says_so(world, tmp_path, capsys, more, message):
    recipe = {"recipe": {**world["model"]["recipe"], **ONES, "preprocess": [STEP]}}
    config = write(tmp_path / "m.yaml", recipe)
    try:
        status = main(["merge", "--config", config, "--output", "merged", *more])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not Path("merged").exists()


def test_batch_norm_statistics_are_of_the_merged_network(tmp_path):
    """Of rows of both tasks, through the layer that RegMean merged; no search, no scores."""
    models, data = relatives(build(Normalised)), vectors(count=30, eval_batch_size=30)
    recipe = recipe_of(models, preprocess=[RegMean()], init=Constant(1.0))
    commands.merge(recipe, data, output=str(tmp_path / "merged"))
    came = load_file(tmp_path / "merged/model.safetensors")
    every = [data.tasks[t].path["adaptation"] for t in "ab"]
    x = torch.stack([row["x"] for rows in every for row in rows])
    hidden = x @ came["body.weight"].T + came["body.bias"]
    torch.testing.assert_close(came["norm.running_mean"], hidden.mean(dim=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(came["norm.running_var"], hidden.var(dim=0), atol=1e-5, rtol=1e-5)
    average = (models[1].body.weight + models[2].body.weight) / 2
    assert not torch.allclose(came["body.weight"], average, atol=1e-3)


def test_one_source_may_serve_several_tasks(tmp_path):
    """Its Gram matrix is of both tasks' rows."""
    models, data = relatives(build()), vectors(("a", "b", "c"), count=30)
    data.tasks["c"] = replace(data.tasks["c"], source="a")
    folder = tmp_path / "statistics"
    commands.collect(recipe_of(models, preprocess=[RegMean()]), data, str(folder))
    rows = [row["x"] for t in "ac" for row in data.tasks[t].path["adaptation"]]
    found = SourceStatistics(folder).read("gram", "a", "body.weight")
    x = torch.stack(rows)
    torch.testing.assert_close(found.values["gram"][0], x.T @ x, atol=1e-4, rtol=1e-5)
    assert (found.rows, found.axis) == (60, 1)
