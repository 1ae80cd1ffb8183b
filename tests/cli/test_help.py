"""Help texts, and mistakes that are explained before anything is opened, by calling `main`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import textwrap

import pytest
import yaml

from commands import fails
from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData
from gradmerge.cli import catalogue, main
from gradmerge.cli.check import mistakes
from gradmerge.cli.help import places_of
from gradmerge.cli.main import COMMANDS
from gradmerge.cli.options import options_of
from gradmerge.common.spec import public_path
from gradmerge.objectives import Objective
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")


HEAVY = "torch", "lightning", "transformers", "datasets", "wandb", "matplotlib"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["fitt"],
        ["compare", "--help"],
        ["merge", "-h"],
        ["help", "Column"],
    ],
)
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


def printed(arguments, capsys):
    """What a command prints that ends well."""
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys):
    text = printed(["--help"], capsys)
    assert all(f"\n  {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_is_one_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = printed([command, "--help"], capsys)
    assert text == printed(["help", command], capsys)
    assert f"usage: gradmerge {command} " in text
    # `learn` writes a configuration, `compare` takes several; task files of `evaluate` can run code
    assert ("\n  config " in text) == (command not in ("learn", "plan", "compare", "evaluate"))
    assert len(text.splitlines()) < 120
    assert max(map(len, text.splitlines())) < 100


@pytest.mark.parametrize("command", ["merge", "export"])
def test_commands_that_write_a_folder_share_their_options(capsys, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = printed([command, "--help"], capsys)
    for part in (
        "\n  output                         (required) Folder to write.\n",
        "\n  dtype                          float64, float32, bfloat16, float16: Dtype of the ",
        "\n  overwrite = false              Replace an existing folder.\n",
        "\n  head                           Task whose head the model in the folder itself has.\n",
    ):
        assert part in text, part


def test_the_help_of_fit_names_every_option_of_ours_before_the_trainer(capsys):
    text = printed(["fit", "--help"], capsys)
    ours = text.partition("\ntrainer\n")[0]
    for kind in (Recipe, TaskData, Objective):
        assert [f.name for f in dataclasses.fields(kind) if f"\n  {f.name} " not in ours] == []
    for kind in (MergeModule, MergeDataModule):
        names = set(inspect.signature(kind.__init__).parameters)
        names -= {"self", "recipe", "objective", "tasks", "module", "allow_modules"}
        assert [name for name in names if f"\n  {name} " not in ours] == []
    assert "accumulate_grad_batches" not in text
    assert "coefficients = Tensor " in text
    assert "Initial coefficients; the final ones of a merge without training." in text


def test_the_whole_help_has_the_options_of_the_trainer(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--trainer.accumulate_grad_batches", "--model.memory", "--driver"):
        assert part in text, part


# ---- components ---------------------------------------------------------------------------------


PUBLIC = [
    kind
    for concept, kinds in catalogue.components().items()
    for kind in kinds
    if concept != "training" and places_of(kind)
]


def test_all_components_are_found_in_their_source():
    """The catalogue, which imports nothing, against the classes themselves."""
    assert len(PUBLIC) > 60
    for kind in PUBLIC:
        real = getattr(importlib.import_module(kind.home.name), kind.name)
        assert public_path(real) == kind.path
        if dataclasses.is_dataclass(real):
            fields = {f.name: f for f in dataclasses.fields(real) if f.init}
            assert list(kind.fields) == list(fields)
            needed = [
                name
                for name, f in fields.items()
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            ]
            assert [f.name for f in kind.fields.values() if f.default is None] == needed


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.name)
def test_a_component_is_explained_with_a_line_that_a_yaml_takes(kind, capsys):
    text = printed(["help", kind.name], capsys)
    assert kind.path in text
    assert kind.doc.partition("\n")[0] in text
    assert all(f"\n  {name}: " in text for name in kind.fields)
    sample = text.rpartition("YAML\n")[2].replace("...", "x")
    given = yaml.safe_load(textwrap.dedent(sample))
    if "recipe" in given:
        given = {"model": given}
    unknown = [m for m in mistakes(given, catalogue.Instance(options_of("fit"))) if m.of]
    assert not unknown, sample


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Column", ["Used in recipe.coefficients.", "{class_path: Column}", "arXiv 2410.08371"]),
        ("KLToSource", ["Used in model.objective.terms."]),
        ("AdamW", ["torch.optim.AdamW", "weight_decay: a number (default 0.01)"]),
        ("CosineAnnealingLR", ["lr_scheduler: {class_path: torch.optim.lr_scheduler."]),
        ("gradmerge.preprocess.Trim", ["density: a number or a list of numbers or a mapping"]),
        ("operators", ["\n  Linear ", "\n  Slerp ", "`gradmerge help NAME`"]),
        ("Recipe", ["\n  sources: a mapping from names to ", "(required)"]),
        ("TaskData", ["Used in data.tasks.", "max_length: a whole number (default 512)"]),
        ("text_classification", ["kind: text_classification}", "\n  label = label "]),
    ],
)
def test_components_groups_and_kinds_of_data_are_explained(name, parts, capsys):
    text = printed(["help", name], capsys)
    assert len(text) > 200
    for part in parts:
        assert part in text, part


@pytest.mark.parametrize(
    ("name", "meant"),
    [("Coluum", "Column"), ("slerpp", "Slerp"), ("operator", "operators"), ("adamw", "AdamW")],
)
def test_the_nearest_component_is_named(name, meant, capsys):
    text = fails(["help", name], capsys)
    assert text.startswith(f"gradmerge help: unknown component {name!r}. Did you mean {meant!r}?")
    assert "list a group: sources, " in text


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "unknown command 'fitt' (choose from learn, plan, fit, validate, "),
        (["exprt", "a", "b"], "push). Did you mean 'export'?"),
        (["fit", "--modle.memory", "streamed"], "Did you mean '--model.memory'?"),
        (["fit", "--trainer.max_stepss", "3"], "Did you mean '--trainer.max_steps'?"),
        (["merge", "--outptu", "x"], "Did you mean '--output'?"),
        (["inspect", "a", "--bas", "b"], "Did you mean '--base'?"),
        (["export", "one.ckpt"], "output: required, but not given"),
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
            ["gradmerge fit: model.objective.regularisers[0]: Lp.p: expected at least 1, got 0.5."],
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
            ["gradmerge fit: model.recipe.alignment: WeightMatching.unreached: invalid regular"],
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
