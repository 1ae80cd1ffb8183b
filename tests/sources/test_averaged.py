"""Averages of several checkpoints of one run, against sums of their tensors in float64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from safetensors.torch import load_file, save_file

from gradmerge import MergedModel, Recipe, merge
from gradmerge.cli import main
from gradmerge.coefficients import Constant, Uniform
from gradmerge.common.errors import CompatibilityError, ConfigError, SourceError
from gradmerge.sources import RunAverage, as_source
from gradmerge.sources.averaged import shares
from tiny import relatives, word_tokenizer

STEPS = (5, 10, 100, 200, 1000)
CONFIG = Path(__file__).parents[2] / "configs/static/last_checkpoints.yaml"


def network(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A trainer's folder with checkpoints of five steps, and the state of each."""
    monkeypatch.chdir(tmp_path)
    states = {}
    for step, model in zip(STEPS, relatives(network(), len(STEPS)), strict=True):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        model.save_pretrained(folder)
        word_tokenizer(folder)
        (folder / "trainer_state.json").write_text("{}")
        states[step] = load_file(folder / "model.safetensors")
    (tmp_path / "run/checkpoint-9.zip").write_text("none of them")
    return states


def averaged(states, weights):
    """The sum over the last states in float64, `{name: tensor}`."""
    chosen = list(states.values())[-len(weights) :]
    return {
        name: sum(w * state[name].double() for w, state in zip(weights, chosen, strict=True))
        for name in chosen[0]
    }


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("weights", "last", "expected"),
    [
        ("average", None, [0.2] * 5),
        ("average", 3, [1 / 3] * 3),
        ("linear", 3, [1 / 6, 2 / 6, 3 / 6]),
        ("cosine", 2, [(1 - math.cos(math.pi / 2)) / 3, 2 / 3]),
        ([1, 1, 2], 3, [0.25, 0.25, 0.5]),
        ("linear", 1, [1.0]),
    ],
)
def test_the_last_checkpoints_by_step(run, weights, last, expected):
    opened = RunAverage("run/checkpoint-*", last, weights).open()
    close({name: opened.read(name) for name in opened.infos}, averaged(run, expected))
    opened.keep()
    close({name: opened.read(name) for name in opened.infos}, averaged(run, expected))


@pytest.mark.parametrize("name", ["average", "linear", "cosine"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_schedules_fall_with_age_and_sum_to_one(name, count):
    found = shares(name, count)
    assert math.isclose(sum(found), 1)
    assert found == sorted(found)
    assert min(found) > 0


def test_one_line_on_the_command_line(run, tmp_path, capsys):
    """The YAML of configs/static, a dictionary, and a pattern alone."""
    assert main(["merge", "--config", str(CONFIG), "--output", "one"]) == 0
    close(load_file("one/model.safetensors"), averaged(run, [0.2] * 5))
    window = {"path": "run/checkpoint-*", "last": 2, "weights": "linear"}
    sources = json.dumps({"run": {"class_path": "RunAverage", "init_args": window}})
    for options in (["--config", str(CONFIG)], ["--recipe.init", "Uniform"]):
        output = f"two{len(options[1])}"
        command = ["merge", *options, "--recipe.sources", sources, "--output", output]
        assert main(command) == 0
        close(load_file(f"{output}/model.safetensors"), averaged(run, [1 / 3, 2 / 3]))
    alone = ["--recipe.sources", "{run: run/checkpoint-*}", "--recipe.init", "Uniform"]
    assert main(["merge", *alone, "--output", "three"]) == 0
    close(load_file("three/model.safetensors"), averaged(run, [0.2] * 5))
    assert not Path("three/trainer_state.json").exists()
    assert Path("three/tokenizer.json").exists()
    capsys.readouterr()


def test_it_composes_with_bases_other_sources_and_learning(run, tmp_path):
    network().save_pretrained("base")
    network(1).save_pretrained("other")
    window = RunAverage("run/checkpoint-*", 2, "linear")
    recipe = Recipe({"run": window, "other": "other"}, "base", init=Constant([0.5, 0.25]))
    base, other = (load_file(f"{name}/model.safetensors") for name in ("base", "other"))
    mean = averaged(run, [1 / 3, 2 / 3])
    expected = {
        n: base[n].double() + 0.5 * (mean[n] - base[n]) + 0.25 * (other[n].double() - base[n])
        for n in base
    }
    close(load_file(merge(recipe, "out") / "model.safetensors"), expected)
    merged = MergedModel(recipe)
    tokens = torch.arange(8)[None]
    merged(input_ids=tokens).logits.square().mean().backward()
    assert all(raw.grad.abs().sum() > 0 for raw in merged.raw.values())
    found = json.loads(Path("out/provenance.json").read_text())["sources"]
    assert len({source["sha256"] for source in found.values()}) == 3
    again = json.loads((merge(recipe, "again") / "provenance.json").read_text())["sources"]
    assert found == again


def test_checkpoints_of_any_kind(run, tmp_path):
    """Files, and folders of torch.distributed.checkpoint."""
    for step, state in run.items():
        save_file(state, f"run/step_{step}.safetensors")
        saved = {"model": {name: tensor.clone() for name, tensor in state.items()}}
        dcp.save(saved, checkpoint_id=f"dcp/step-{step}", no_dist=True)
    for path in ("run/step_*.safetensors", "dcp/step-*"):
        opened = as_source(path).open()
        close({name: opened.read(name) for name in opened.infos}, averaged(run, [0.2] * 5))


def test_half_precision_is_summed_in_float32(run):
    halves = {step: {n: t.bfloat16() for n, t in state.items()} for step, state in run.items()}
    for step, state in halves.items():
        save_file(state, f"run/checkpoint-{step}/model.safetensors", {"format": "pt"})
    folder = merge(Recipe({"run": "run/checkpoint-*"}, init=Uniform()), "out")
    expected = averaged(halves, [0.2] * 5)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        # half a unit in the last of 8 digits: rounded once
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1.01 * 2**-8, atol=1e-7)


def test_names_of_unnamed_runs(run):
    assert list(Recipe(["run/checkpoint-*", "run/checkpoint-5"]).sources) == ["run", "checkpoint-5"]


def test_errors(run, tmp_path):
    with pytest.raises(SourceError, match=r"ruin/checkpoint-\*.*nothing matches.*Did you mean run"):
        as_source("ruin/checkpoint-*").open()
    with pytest.raises(SourceError, match=r"run/step-\*: expected checkpoints of a run .* nothing"):
        as_source("run/step-*").open()
    with pytest.raises(
        SourceError, match=r"at least 6 checkpoints \(last\), got 5: checkpoint-5, "
    ):
        RunAverage("run/checkpoint-*", last=6).open()
    for options, message in (
        ({"path": "run/checkpoint-5"}, r"RunAverage\.path: expected a pattern with \*"),
        ({"last": 0}, r"RunAverage\.last: expected a number of at least 1, got 0"),
        ({"weights": "lineal"}, r"RunAverage\.weights: expected average, linear, cosine"),
        ({"weights": [1.0, -1.0]}, r"RunAverage\.weights: expected finite numbers whose sum"),
        (
            {"weights": [1.0], "last": 2},
            r"one weight per checkpoint, 2 in all, oldest first, got 1",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            RunAverage(**{"path": "run/checkpoint-*", **options})
    with pytest.raises(ConfigError, match=r"one weight per checkpoint, 5 in all"):
        RunAverage("run/checkpoint-*", weights=[1.0]).open()
    shutil.copytree("run", "mixed")
    network().save_pretrained("mixed/checkpoint-11")
    config = json.loads(Path("mixed/checkpoint-11/config.json").read_text())
    wider = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**config, "n_embd": 4}))
    wider.save_pretrained("mixed/checkpoint-11")
    with pytest.raises(CompatibilityError, match=r"checkpoint-11/model\.safetensors"):
        as_source("mixed/checkpoint-*").open()


def test_the_output_is_apart_from_all_checkpoints(run, capsys):
    config = {"recipe": {"sources": {"run": "run/checkpoint-*"}, "init": "Uniform"}}
    Path("m.yaml").write_text(yaml.safe_dump(config))
    for output in ("run/checkpoint-5", "run/checkpoint-5/merged"):
        options = ["--output", output, "--overwrite", "true"]
        assert main(["merge", "--config", "m.yaml", *options]) == 2
        assert "apart from the input" in capsys.readouterr().err
    options = ["--mergekit", "true", "--output", "o.yaml"]
    assert main(["merge", "--config", "m.yaml", *options]) == 2
    assert "run" in capsys.readouterr().err
