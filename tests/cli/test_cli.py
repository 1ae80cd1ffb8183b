"""The command line from end to end, on tiny folders, by calling `main`."""

from __future__ import annotations

import csv
import json
import re
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from commands import fails
from gradmerge import TaskData
from gradmerge.cli import main
from gradmerge.cli.main import learn
from gradmerge.coefficients import Clamp, Constant, Tensor
from gradmerge.objectives import CrossEntropy, Objective
from gradmerge.training.callbacks import CoefficientLogger
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")


def test_fit_then_validate_test_and_export(world, tmp_path, capsys):
    config = write(tmp_path / "c.yaml", world)
    assert main(["fit", "--config", config, "--trainer.default_root_dir", "run"]) == 0
    (checkpoint,) = Path("run").rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 4
    assert list(saved["state_dict"]) == ["merged.raw.tensor"]
    assert list(Path("run").rglob("metrics.csv"))
    (kept,) = Path("run").rglob("config.yaml")
    assert yaml.safe_load(kept.read_text())["model"]["recipe"]["base"].endswith("base")

    capsys.readouterr()
    for command, split in (("validate", "selection"), ("test", "test")):
        assert main([command, "--config", config, "--ckpt_path", str(checkpoint)]) == 0
        printed = capsys.readouterr().out.strip().splitlines()
        header, *rows = printed[:-1] if split == "test" else printed
        assert header.startswith(f"{split} split")
        assert rows[-1].startswith("average")

    assert main(["export", str(checkpoint), "merged", "--dtype", "bfloat16"]) == 0
    model = transformers.BertForSequenceClassification.from_pretrained("merged")
    assert model.dtype == torch.bfloat16
    found = load_file("merged/coefficients.st")
    assert not all(torch.equal(c, torch.full((2,), 0.3)) for c in found.values())
    message = fails(["export", str(checkpoint), "merged"], capsys)
    assert "merged exists; give another folder, or --overwrite true" in message
    assert main(["export", str(checkpoint), "merged", "--overwrite", "true"]) == 0


def test_validate_scores_the_checkpoint_and_not_the_start(world, tmp_path):
    config = write(tmp_path / "c.yaml", world, {"model": {"learning_rate": 0.5}})
    assert main(["fit", "--config", config, "--trainer.default_root_dir", "run"]) == 0
    (checkpoint,) = Path("run").rglob("*.ckpt")
    options = ["validate", "--config", config]
    started = learn(options).trainer.callback_metrics["selection/loss"]
    trained = learn([*options, "--ckpt_path", str(checkpoint)])
    assert abs(trained.trainer.callback_metrics["selection/loss"] - started) > 1e-3
    raw = torch.load(checkpoint, weights_only=True)["state_dict"]["merged.raw.tensor"]
    assert torch.equal(trained.model.merged.raw["tensor"].detach(), raw)


@pytest.mark.usefixtures("figures")
def test_fit_exports_by_callback_and_takes_optimiser_and_schedule_from_yaml(world, tmp_path):
    part = {
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.9}},
        "lr_scheduler": {
            "class_path": "gradmerge.optimisers.CosineDecay",
            "init_args": {"end": 0.0},
        },
        "trainer": {
            "callbacks": [
                {"class_path": "ExportAtEnd", "init_args": {"output": "merged"}},
                {"class_path": "CoefficientLogger"},
            ]
        },
    }
    found = learn(["fit", "--config", write(tmp_path / "c.yaml", world, part)])
    (optimiser,) = found.trainer.optimizers
    assert isinstance(optimiser, torch.optim.SGD)
    assert optimiser.param_groups[0]["momentum"] == 0.9
    # the schedule moves a step at a time and takes its length from the trainer
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0, abs=1e-8)
    model = transformers.BertForSequenceClassification.from_pretrained("merged")
    assert model.config.num_labels == 3
    assert list(Path("outputs").rglob("coefficients.png"))


def test_an_exported_folder_holds_the_whole_configuration_and_the_seeds(world, tmp_path):
    options = {"output": "merged", "provenance_paths": True}
    part = {
        "seed_everything": 17,
        "data": {"seed": 6},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.9}},
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
            "init_args": {"T_max": 4},
        },
        "trainer": {
            "default_root_dir": "run",
            "callbacks": [{"class_path": "ExportAtEnd", "init_args": options}],
        },
    }
    assert main(["fit", "--config", write(tmp_path / "c.yaml", world, part)]) == 0
    (checkpoint,) = Path("run").rglob("*.ckpt")
    (saved,) = Path("run").rglob("config.yaml")
    assert main(["export", str(checkpoint), "again", "--provenance_paths", "true"]) == 0
    for folder in ("merged", "again"):
        run = json.loads(Path(folder, "provenance.json").read_text())["run"]
        assert run["seed"] == 17
        assert run["data"]["seed"] == 6
        (optimiser,), (schedule,) = run["optimizers"], run["lr_schedulers"]
        assert optimiser["init_args"]["momentum"] == 0.9
        assert schedule["init_args"]["T_max"] == 4
        assert schedule["interval"] == "step"
        assert run["trainer"]["max_steps"] == 4
        assert run["initial_coefficients"] == pytest.approx({"a": 0.3, "b": 0.3})
        assert run["yaml"] == Path(folder, "gradmerge.yaml").read_text()
        assert yaml.safe_load(run["yaml"]) == yaml.safe_load(saved.read_text())
        found = yaml.safe_load(run["yaml"])
        assert (found["seed_everything"], found["data"]["seed"]) == (17, 6)
        assert found["optimizer"]["init_args"]["momentum"] == 0.9
    # the file is one that a fit takes
    options = ["fit", "--config", "merged/gradmerge.yaml", "--trainer.fast_dev_run", "1"]
    assert learn([*options, "--trainer.callbacks=null"]).trainer.global_step == 1


STEPS = {"val_check_interval": 2, "check_val_every_n_epoch": None, "default_root_dir": "run"}


@pytest.mark.usefixtures("figures")
def test_a_fit_logs_its_coefficients_unasked(world, tmp_path):
    found = learn(["fit", "--config", write(tmp_path / "c.yaml", world, {"trainer": STEPS})])
    folder = Path(found.trainer.log_dir)
    with (folder / "coefficients.csv").open() as file:
        assert sorted({row["step"] for row in csv.DictReader(file)}) == ["2", "4"]
    assert (folder / "coefficients.png").is_file()
    with (folder / "metrics.csv").open() as file:
        starts = [row for row in csv.DictReader(file) if row["init/a"]]
    assert [float(row["init/b"]) for row in starts] == pytest.approx([0.3])


def test_a_configuration_s_own_coefficient_logger_stays_the_only_one(world, tmp_path):
    own = {"class_path": "CoefficientLogger", "init_args": {"every_n_validations": 2}}
    part = {"trainer": {**STEPS, "callbacks": [own]}}
    found = learn(["fit", "--config", write(tmp_path / "c.yaml", world, part)])
    loggers = [c for c in found.trainer.callbacks if isinstance(c, CoefficientLogger)]
    assert [logger.every_n_validations for logger in loggers] == [2]


PLAIN = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "own"}}
OTHER = {"class_path": "memory_logger.MemoryLogger"}


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (PLAIN, ["CSVLogger"]),
        ([PLAIN], ["CSVLogger"]),
        (OTHER, ["MemoryLogger", "CSVLogger"]),
        ([OTHER, PLAIN], ["MemoryLogger", "CSVLogger"]),
        (True, ["CSVLogger"]),
        (False, []),
    ],
)
def test_scores_always_go_to_a_csv_file_too(world, tmp_path, monkeypatch, given, names):
    (tmp_path / "memory_logger.py").write_text(MEMORY_LOGGER)
    monkeypatch.syspath_prepend(tmp_path)
    part = {"trainer": {**STEPS, "logger": given}}
    config = write(tmp_path / "c.yaml", world, part)
    found = learn(["fit", "--config", config, "--allow_modules", "memory_logger"])
    assert [type(logger).__name__ for logger in found.trainer.loggers] == names
    files = [path.parts[0] for path in Path().rglob("metrics.csv")]
    assert files == ([] if not names else ["own"] if "own" in json.dumps(given) else ["run"])
    logged = any(isinstance(c, CoefficientLogger) for c in found.trainer.callbacks)
    assert logged == bool(names)


MEMORY_LOGGER = """
from lightning.pytorch.loggers.logger import DummyLogger

class MemoryLogger(DummyLogger):
    name, version, save_dir = "memory", 0, "kept"
"""


@pytest.mark.parametrize("known", [[], ["a"]])
def test_tasks_may_be_given_on_the_command_line_alone(world, tmp_path, known):
    tasks = world["data"]["tasks"]
    own = {"model": world["model"], "trainer": world["trainer"], "data": {"batch_size": 2}}
    if known:
        own["data"]["tasks"] = {name: tasks[name] for name in known}
    options = [
        f"--data.tasks.{name}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for name, task in tasks.items()
        if name not in known
        for key, value in task.items()
    ]
    config = write(tmp_path / "c.yaml", own)
    found = learn(["fit", "--config", config, *options, "--trainer.fast_dev_run", "1"])
    assert found.datamodule.tasks == {name: TaskData(**task) for name, task in tasks.items()}
    assert set(found.model.results) == {"selection"}


def test_a_fit_without_tasks_is_refused_before_the_model_is_opened(world, tmp_path, capsys):
    sources = {"model": {"recipe": {"sources": {"a": "absent"}}}}
    config = write(tmp_path / "c.yaml", sources, {"trainer": world["trainer"]})
    text = fails(["fit", "--config", config], capsys)
    assert "data.tasks: required, but not given (the tasks by name)." in text


def test_fit_resumes_from_a_checkpoint(world, tmp_path):
    config = write(tmp_path / "c.yaml", world)
    rate = ["--model.learning_rate", "0.1"]
    root = "--trainer.default_root_dir"
    whole = learn(["fit", "--config", config, *rate, "--trainer.max_steps", "6", root, "whole"])
    learn(["fit", "--config", config, *rate, root, "half"])
    (checkpoint,) = Path("half").rglob("*.ckpt")
    again = ["--trainer.max_steps", "6", "--ckpt_path", str(checkpoint), root, "rest"]
    rest = learn(["fit", "--config", config, *rate, *again])
    assert rest.trainer.global_step == 6
    assert torch.equal(rest.model.merged.raw["tensor"], whole.model.merged.raw["tensor"])


def test_a_trial_run_takes_one_step_and_writes_no_checkpoint(world, tmp_path):
    config = write(tmp_path / "c.yaml", world)
    assert main(["fit", "--config", config, "--trainer.fast_dev_run", "true"]) == 0
    assert not list(tmp_path.rglob("*.ckpt"))


def test_print_config_gives_a_configuration_that_parses_again(world, tmp_path, capsys):
    part = {"recipe": {"coefficients": "Clamp"}, "objective": {"task_weights": {"a": 2.0}}}
    config = write(tmp_path / "c.yaml", world, {"model": part})
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", config, "--model.memory", "streamed", "--print_config"])
    printed = capsys.readouterr().out
    found = yaml.safe_load(printed)
    assert found["model"]["memory"] == "streamed"
    assert found["data"]["batch_size"] == 2
    (tmp_path / "again.yaml").write_text(printed)
    again = ["fit", "--config", str(tmp_path / "again.yaml")]
    with pytest.raises(SystemExit, match="0"):
        main([*again, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == found
    built = learn([*again, "--trainer.fast_dev_run", "1"])
    assert built.model.recipe.coefficients == Clamp(Tensor())
    assert built.model.recipe.init == Constant(0.3)
    assert built.model.objective == Objective([CrossEntropy()], task_weights={"a": 2.0})


def test_merge_writes_fixed_coefficients(world, tmp_path, capsys):
    recipe = {
        **world["model"]["recipe"],
        "init": {"class_path": "Constant", "init_args": {"value": 0.5}},
    }
    config = write(tmp_path / "m.yaml", {"recipe": recipe})
    assert main(["merge", "--config", config, "--output", "merged"]) == 0
    assert "merged 2 sources" in capsys.readouterr().out
    base, a, b = (
        load_file(Path(recipe["base"]).parent / n / "model.safetensors") for n in ("base", "a", "b")
    )
    for name, tensor in load_file("merged/model.safetensors").items():
        expected = base[name] + 0.5 * (a[name] - base[name]) + 0.5 * (b[name] - base[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    assert "exists" in fails(["merge", "--config", config, "--output", "merged"], capsys)


def test_merge_says_what_was_allowed(world, tmp_path, capsys):
    recipe = world["model"]["recipe"]
    other = Path(shutil.copytree(recipe["sources"]["b"], tmp_path / "b"))
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "hidden_act": "relu"}))
    sources = {**recipe["sources"], "b": str(other)}
    for allow in ([], ["config.hidden_act"]):
        config = write(
            tmp_path / "m.yaml", {"recipe": {**recipe, "sources": sources, "allow": allow}}
        )
        assert main(["merge", "--config", config, "--output", "merged"]) == (0 if allow else 2)
    text = capsys.readouterr().err
    assert f"gradmerge merge: warning [config.hidden_act] {other}/config.json: hidden_act" in text


def no_checkpoints(folder):
    """Files that are no checkpoints of ours, by what is wrong with them."""
    files = {
        "text.json": b'{"a": 1}',
        "noise.ckpt": torch.randint(256, (4000,)).to(torch.uint8).numpy().tobytes(),
        "empty.ckpt": b"",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.save(torch.nn.Linear(2, 2), folder / "pickled.pt")
    torch.save([1, 2], folder / "list.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 1}}, folder / "other.ckpt")
    whole = (folder / "other.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    return sorted(path.name for path in folder.iterdir())


def test_what_is_no_checkpoint_of_ours_is_refused_in_a_line(world, tmp_path, capsys):
    (tmp_path / "files").mkdir()
    names = no_checkpoints(tmp_path / "files")
    assert len(names) == 7
    config = write(tmp_path / "c.yaml", world)
    for name in names:
        text = fails(["export", f"files/{name}", "merged"], capsys)
        wrong = ": expected" if name in ("list.ckpt", "other.ckpt") else " cannot be read: expected"
        assert text.startswith(f"gradmerge export: files/{name}{wrong}"), text
        assert text.count("\n") == 1
        assert not Path("merged").exists()
    for command in ("fit", "validate", "test"):
        options = [command, "--config", config, "--ckpt_path"]
        assert "cannot be read: expected a checkpoint of" in fails(
            [*options, "files/text.json"], capsys
        )
        assert "absent.ckpt: no such checkpoint" in fails([*options, "absent.ckpt"], capsys)


def test_a_checkpoint_with_a_class_of_an_optimiser_is_refused_by_its_name(tmp_path, capsys):
    state = {"state": {0: {"exp_avg": Fraction(1)}}}
    torch.save({"gradmerge": {}, "hyper_parameters": {}, "optimizer_states": [state]}, "own.ckpt")
    text = fails(["export", "own.ckpt", "merged"], capsys)
    assert "own.ckpt holds an object of fractions.Fraction, which is not loaded" in text
    assert "save_weights_only" in text


@pytest.mark.parametrize("command", ["merge", "export"])
def test_an_existing_folder_below_home_is_refused_before_anything_is_read(
    tmp_path, monkeypatch, capsys, command
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "merged").mkdir()
    # neither the sources nor the checkpoint exist, which would be found out next
    recipe = ["--recipe", json.dumps({"sources": {"a": "absent", "b": "absent"}})]
    given = {"merge": [*recipe, "--output", "~/merged"], "export": ["absent.ckpt", "~/merged"]}
    assert "merged exists; give another folder" in fails([command, *given[command]], capsys)


def test_inspect_reports_sizes_and_directions(world, tmp_path, capsys):
    recipe = world["model"]["recipe"]
    sources = [recipe["sources"][k] for k in "ab"]
    assert main(["inspect", *sources, "--base", recipe["base"]]) == 0
    text = capsys.readouterr().out
    assert "compatible: yes" in text
    assert "BertForSequenceClassification" in text
    assert main(["inspect", *sources, "--base", recipe["base"], "--json", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    base, a = (
        load_file(Path(recipe["base"]).parent / n / "model.safetensors") for n in ("base", "a")
    )
    norm = sum((a[n].double() - base[n].double()).square().sum() for n in a).sqrt().item()
    assert found["statistics"]["norm"]["a"] == pytest.approx(norm, rel=1e-6)
    assert found["sources"]["a"]["parameters"] == sum(t.numel() for t in a.values())


def test_inspect_stops_on_sources_that_do_not_fit(world, tmp_path, capsys):
    other = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    other.save_pretrained(tmp_path / "other")
    arguments = ["inspect", world["model"]["recipe"]["base"], str(tmp_path / "other")]
    with pytest.raises(SystemExit, match="2"):
        raise SystemExit(main([*arguments, "--json", "true"]))
    found = json.loads(capsys.readouterr().out)
    assert not found["compatible"]
    assert any(problem["kind"] == "shape" for problem in found["problems"])
    assert "these sources cannot be merged: " in fails(arguments, capsys)


def test_merge_takes_the_recipe_of_the_files_that_fit_takes(world, tmp_path, capsys):
    method = tmp_path / "method.yaml"
    init = {"class_path": "Constant", "init_args": {"value": 0.25}}
    method.write_text(yaml.safe_dump({"model": {"recipe": {"init": init}, "objective": None}}))
    suite = write(tmp_path / "suite.yaml", world)
    assert main(["merge", "--config", suite, f"--config={method}", "--output", "merged"]) == 0
    came = load_file("merged/model.safetensors")
    folders = [world["model"]["recipe"]["base"], *world["model"]["recipe"]["sources"].values()]
    base, *sources = (load_file(Path(folder) / "model.safetensors") for folder in folders)
    for name, tensor in came.items():
        expected = base[name] + 0.25 * sum(source[name] - base[name] for source in sources)
        torch.testing.assert_close(tensor, expected, msg=name)
    odd = tmp_path / "odd.yaml"
    odd.write_text(yaml.safe_dump({"model": {"recipe": {}}, "optimiser": {"lr": 1}}))
    options = ["merge", "--config", suite, "--config", str(odd), "--output", "no"]
    assert "optimiser" in fails(options, capsys)


def test_the_best_scale_as_a_mergekit_file(world, tmp_path, capsys):
    """Data and a search do not keep a merge from its other forms of output."""
    suite = write(tmp_path / "suite.yaml", world)
    recipe = {"coefficients": {"class_path": "Model"}, "init": {"class_path": "Constant"}}
    method = tmp_path / "method.yaml"
    search = {"class_path": "Scales", "init_args": {"values": [0.0, 1.0]}}
    method.write_text(yaml.safe_dump({"model": {"recipe": recipe}, "search": search}))
    options = ["merge", "--config", suite, "--config", str(method)]
    assert main([*options, "--output", "found.yaml", "--mergekit", "true"]) == 0
    printed = capsys.readouterr().out
    best = re.search(r"^\* Scaled ([\d.]+):", printed, re.MULTILINE)
    assert best is not None, printed
    models = yaml.safe_load(Path("found.yaml").read_text())["models"]
    assert len(models) == 1 + len(world["model"]["recipe"]["sources"])
    for model in models[1:]:
        assert model["parameters"]["weight"] == pytest.approx(0.3 * float(best[1]))
    message = fails([*options, "--output", "no", "--outputs", "compact"], capsys)
    assert "outputs: a search, scores and a mergekit file need merged, got compact" in message
    options += ["--recipe.preprocess", "[Trim]", "--output", "no.yaml", "--mergekit", "true"]
    message = fails(options, capsys)
    assert "mergekit cannot express this merge:\n  preprocess: the coefficients belong" in message


@pytest.mark.parametrize("flag", ["--config", "-c"])
def test_a_fit_says_what_to_do_with_a_mergekit_file(world, tmp_path, capsys, flag):
    suite, theirs = write(tmp_path / "suite.yaml", world), tmp_path / "theirs.yaml"
    theirs.write_text(yaml.safe_dump({"merge_method": "linear", "models": [{"model": "a"}]}))
    message = fails(["fit", "--config", suite, flag, str(theirs)], capsys)
    assert (
        f"gradmerge fit: expected a configuration to learn a merge, got the mergekit YAML {theirs}"
        in message
    )
    assert f"`gradmerge merge --config {theirs} --output FOLDER`" in message
    assert f"init: {{class_path: FromMergekit, init_args: {{path: {theirs}}}}}" in message
