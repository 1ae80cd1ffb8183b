"""Help texts, and mistakes that are explained before anything is opened, by calling `main`."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

from commands import fails
from gradmerge.cli import main
from gradmerge.cli.main import COMMANDS
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")


HEAVY = "torch", "lightning", "transformers", "datasets", "wandb", "matplotlib"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fitt"]])
def test_help_imports_nothing_heavy(arguments):
    script = (
        "import sys; from gradmerge.cli import main; status = main(sys.argv[1:]);"
        f"print('loaded', [name for name in {HEAVY} if name in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == (2 if arguments == ["fitt"] else 0)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "--config" in text
    assert len(text) > 300


@pytest.mark.parametrize("command", ["merge", "export"])
def test_commands_that_write_a_folder_share_their_options(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--dtype DTYPE float64, float32, bfloat16 or float16.",
        "--overwrite {true,false} replace an existing folder. (type: bool, default: False)",
        "--head HEAD task whose head the model in the folder itself has.",
    ):
        assert part in text, part


def test_the_help_of_fit_describes_our_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "Initial coefficients; the final ones of a merge without training",
        "examples per task, step and process",
        "--model.memory",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "unknown command 'fitt' (choose from fit, validate, "),
        (["exprt", "a", "b"], "push). Did you mean 'export'?"),
        (["fit", "--modle.memory", "streamed"], "Did you mean '--model.memory'?"),
        (["fit", "--trainer.max_stepss", "3"], "Did you mean '--trainer.max_steps'?"),
        (["merge", "--outptu", "x"], "Did you mean '--output'?"),
        (["inspect", "a", "--bas", "b"], "Did you mean '--base'?"),
        (["export", "one.ckpt"], "'output' is required"),
        (["export", "absent.ckpt", "out"], "absent.ckpt: no such checkpoint"),
        (["inspect", "absent"], "absent"),
        (["fit", "--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_wrong_commands_and_options_suggest_the_nearest(capsys, arguments, message):
    assert message in fails(arguments, capsys)


@pytest.mark.parametrize(
    ("part", "messages"),
    [
        ({"model": {"recipe": {"coefficients": "Tensr"}}}, ["Tensr", "Did you mean 'Tensor'?"]),
        (
            {"model": {"recipe": {"coefficients": {"class_path": "Softmx"}}}},
            ["Softmx", "Did you mean 'Softmax'?"],
        ),
        ({"model": {"recipe": {"init": {"class_path": "Unifrm"}}}}, ["Did you mean 'Uniform'?"]),
        (
            {"model": {"objective": {"terms": [{"class_path": "CrossEntrpy"}]}}},
            ["Did you mean 'CrossEntropy'?"],
        ),
        (
            {"model": {"recipe": {"privates": ["x"]}}},
            ["privates", "Did you mean 'model.recipe.private'?"],
        ),
        ({"model": {"memory": "streemed"}}, ["model.memory", "streamed"]),
        ({"trainer": {"max_stps": 3}}, ["max_stps", "Did you mean 'trainer.max_steps'?"]),
        ({"data": {"batch_sise": 3}}, ["batch_sise", "Did you mean 'data.batch_size'?"]),
        (
            {"model": {"recipe": {"init": {"class_path": "Mixup", "init_args": {"alpha": -1}}}}},
            ["Mixup: alpha must be positive, got -1"],
        ),
        ({"model": {"objective": {"task_weights": {"aa": 1.0}}}}, ["unknown task 'aa'", "'a'"]),
        (
            {
                "model": {
                    "objective": {
                        "terms": [{"class_path": "Entropy"}],
                        "regularisers": [{"class_path": "Lp", "init_args": {"p": 0.5}}],
                    }
                }
            },
            ["gradmerge fit: Lp.p: expected at least 1, got 0.5."],
        ),
        (
            {
                "model": {
                    "recipe": {
                        "alignment": {
                            "class_path": "WeightMatching",
                            "init_args": {"unreached": ["("]},
                        }
                    }
                }
            },
            ["gradmerge fit: WeightMatching.unreached: invalid regular expression '('"],
        ),
        ({"data": {"tasks": {"a": {"kind": "text_clasification"}}}}, ["text_clasification"]),
        ({"data": {"batch_size": 0}}, ["batch_size: expected 1 to"]),
        ({"model": {"recipe": {"sources": {"a": "absent-folder"}}}}, ["absent-folder"]),
    ],
)
def test_mistakes_in_a_configuration_are_explained(world, capsys, tmp_path, part, messages):
    text = fails(["fit", "--config", write(tmp_path / "c.yaml", world, part)], capsys)
    for message in messages:
        assert message in text
    assert len(text) < 3_000


def stock(key, path, **init):
    """A part of a configuration that names a class."""
    spec = {"class_path": path, **({"init_args": init} if init else {})}
    if key in ("callbacks", "logger"):
        return {"trainer": {key: [spec] if key == "callbacks" else spec}}
    return {"optimizer": {"class_path": "Adam", "init_args": {"lr": 0.1}}, key: spec}


@pytest.mark.parametrize(
    ("key", "path", "suggestion"),
    [
        ("optimizer", "torch.optim.Adm", "torch.optim.Adam"),
        ("optimizer", "SGDD", "torch.optim.SGD"),
        ("optimizer", "adamw", "torch.optim.AdamW"),
        (
            "lr_scheduler",
            "torch.optim.lr_scheduler.CosineAnnealinLR",
            "torch.optim.lr_scheduler.CosineAnnealingLR",
        ),
        ("lr_scheduler", "ReduceOnPlateau", "lightning.pytorch.cli.ReduceLROnPlateau"),
        ("logger", "lightning.pytorch.loggers.CSVLoger", "lightning.pytorch.loggers.CSVLogger"),
        ("logger", "WandbLoger", "lightning.pytorch.loggers.WandbLogger"),
        ("callbacks", "ModelCheckpoit", "lightning.pytorch.callbacks.ModelCheckpoint"),
        (
            "callbacks",
            "lightning.callbacks.EarlyStopping",
            "lightning.pytorch.callbacks.EarlyStopping",
        ),
        ("callbacks", "ExportAtTheEnd", "ExportAtEnd"),
    ],
)
def test_mistyped_stock_classes_are_suggested_by_a_path_that_works(
    world, capsys, tmp_path, key, path, suggestion
):
    text = fails(["fit", "--config", write(tmp_path / "c.yaml", world, stock(key, path))], capsys)
    assert path in text
    assert re.findall(r"Did you mean '(.*?)'", text) == [suggestion]
    if "." in suggestion:
        module, _, name = suggestion.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), name), type)


@pytest.mark.parametrize("path", ["Transmogrifier", "lightning.pytorch.callbacks.Backup"])
def test_nothing_is_suggested_for_a_class_like_no_other(world, capsys, tmp_path, path):
    config = write(tmp_path / "c.yaml", world, stock("callbacks", path))
    text = fails(["fit", "--config", config], capsys)
    assert path in text
    assert "Did you mean" not in text


def test_a_class_that_exists_is_not_corrected(world, capsys, tmp_path):
    path = "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint"
    part = stock("callbacks", path, save_top_k="many")
    text = fails(["fit", "--config", write(tmp_path / "c.yaml", world, part)], capsys)
    assert "save_top_k" in text
    assert "Did you mean" not in text
