"""A configuration names components; it imports and calls nothing else."""

from __future__ import annotations

import copy
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from commands import fails
from gradmerge.cli import main
from gradmerge.cli.configs import read_merge_input
from gradmerge.cli.imports import allowed_modules
from gradmerge.cli.main import learn, merge_options
from gradmerge.common.errors import ConfigError
from tiny import write_yaml as write

pytestmark = pytest.mark.usefixtures("own_folder")

MODULE = """
import pathlib
from lightning.pytorch import Callback
from torch.optim import SGD

pathlib.Path("ran").touch()


def touch(*args, **options):
    pathlib.Path("ran").touch()


class Own(SGD):
    pass


class Steps(Callback):
    def __init__(self, step=None):
        touch()

    def __call__(self, *args):
        touch()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported, and which is not."""
    (tmp_path / "stranger.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("stranger", None)


def spec(path, **arguments):
    return {"class_path": path, "init_args": arguments}


def aligned(given):
    return spec("WeightMatching", example={"x": given})


CALLS = {
    "system": spec("os.system", command="touch ran"),
    "popen": spec("subprocess.Popen", args=["touch", "ran"]),
    "through torch": spec("torch.os.system", command="touch ran"),
    "through lightning": spec("lightning.pytorch.trainer.trainer.os.system", command="touch ran"),
    "module": spec("stranger.Steps"),
    "function": spec("stranger.touch"),
    "load": spec("torch.load", f="x.ckpt", weights_only=False),
    "hub": spec("torch.hub.load_state_dict_from_url", url="http://127.0.0.1:9/x"),
    "process": spec("torch.multiprocessing.Process"),
    "handler": spec("torch.distributed.elastic.multiprocessing.SubprocessHandler"),
    "import": spec("importlib.import_module", name="stranger"),
}
TEXTS = ["os.system", "builtins.exec", "torch.os.system", "stranger.touch", "torch.hub.load"]
LAMBDA = "torch.optim.lr_scheduler.LambdaLR"
CHAINED = "torch.optim.lr_scheduler.ChainedScheduler"
CALLBACK = "lightning.pytorch.callbacks.LambdaCallback"
PLACES = {
    "path": lambda given: {"data": {"tasks": {"a": {"path": given}}}},
    "optimizer": lambda given: {"optimizer": given},
    "argument": lambda given: {"optimizer": spec("torch.optim.SGD", lr=given)},
    "untyped": lambda given: {"lr_scheduler": spec(CHAINED, schedulers=given)},
    "lambda": lambda given: {"lr_scheduler": spec(LAMBDA, lr_lambda=given)},
    "hook": lambda given: {"trainer": {"callbacks": [spec(CALLBACK, on_fit_start=given)]}},
    "callback": lambda given: {"trainer": {"callbacks": [given]}},
    "logger": lambda given: {"trainer": {"logger": given}},
    "profiler": lambda given: {"trainer": {"profiler": given}},
    "strategy": lambda given: {"trainer": {"strategy": given}},
    "plugins": lambda given: {"trainer": {"plugins": [given]}},
    "init": lambda given: {"model": {"recipe": {"init": given}}},
    "source": lambda given: {"model": {"recipe": {"sources": {"a": given}}}},
    "example": lambda given: {"model": {"recipe": {"alignment": aligned(given)}}},
    "objective": lambda given: {"model": {"objective": {"terms": [given]}}},
    "network": lambda given: {"model": {"module": given}},
    "driver": lambda given: {"driver": given},
    "search": lambda given: {"search": given},
}  # fmt: skip


def tried(arguments):
    """Build everything that a configuration describes, without opening anything."""
    try:
        return learn(arguments, run=False)
    except (Exception, SystemExit) as error:  # whatever a wrong value raises
        return error


FEW = ("system", "through torch", "module")


@pytest.mark.parametrize("place", PLACES)
def test_what_a_yaml_names_is_neither_imported_nor_called(world, here, place):
    every = place in ("lambda", "argument")
    given = [*(CALLS if every else FEW), *(TEXTS if every else TEXTS[2:4])]
    for what in given:
        content = PLACES[place](copy.deepcopy(CALLS.get(what, what)))
        tried(["--config", write(here / "c.yaml", world, content)])
        assert not Path("ran").exists(), what
        assert "stranger" not in sys.modules, what


STATIC = {
    "init": lambda given: {"init": given},
    "steps": lambda given: {"preprocess": [given]},
    "example": lambda given: {"alignment": aligned(given)},
}


@pytest.mark.parametrize("place", STATIC)
def test_a_static_merge_names_no_code_either(world, here, place, capsys):
    recipe = {**world["model"]["recipe"], "init": {"class_path": "Uniform"}}
    for what in (*FEW, *TEXTS[2:4]):
        changed = {**recipe, **STATIC[place](copy.deepcopy(CALLS.get(what, what)))}
        config = write(here / "c.yaml", {"recipe": changed})
        with suppress(SystemExit):
            assert main(["merge", "--config", config, "--output", "out"]) == 2
        assert not Path("ran").exists(), what
        assert "stranger" not in sys.modules, what
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "merge"])
def test_the_error_says_what_may_be_named(world, here, command, capsys):
    recipe = {**world["model"]["recipe"], "init": {"class_path": "stranger.Own"}}
    content = {**world, "model": {"recipe": recipe}} if command == "fit" else {"recipe": recipe}
    options = [command, "--config", write(here / "c.yaml", content)]
    text = fails(options if command == "fit" else [*options, "--output", "out"], capsys)
    assert "stranger.Own: expected a component of gradmerge or a part of a trainer" in text
    assert "got an object of stranger, which is not imported, because that runs code" in text
    assert text.endswith("If you trust it, add --allow_modules stranger.\n")
    assert text.count("\n") == 1
    assert not Path("ran").exists()


def test_help_imports_nothing(here, capsys):
    for form in (["--optimizer.help", "stranger.Own"], ["--model.recipe.init.help=stranger.Own"]):
        with pytest.raises(SystemExit, match=r"^2$"):
            main(["fit", *form])
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["merge", "--recipe.init.help", "stranger.Own"])
    assert "stranger" not in sys.modules
    assert not Path("ran").exists()
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", "--optimizer.help", "torch.optim.SGD"])
    assert "momentum" in capsys.readouterr().out


TAGS = [
    "!!python/object/apply:os.mkdir [ran]",
    "!!python/object/new:os.mkdir [ran]",
    "!!python/name:os.system",
    "!!python/module:stranger",
    "!!python/object:stranger.Own {}",
]


def test_tags_of_python_are_errors(here, capsys):
    for tag in TAGS:
        Path("tag.yaml").write_text(f"data: {{tasks: {{a: {{path: {tag}}}}}}}")
        fails(["fit", "--config", "tag.yaml"], capsys)
        Path("tag.yaml").write_text(tag)
        fails(["merge", "--config", "tag.yaml", "--output", "out"], capsys)
        assert not Path("ran").exists()
        assert "stranger" not in sys.modules


def test_no_interpolation_and_no_addresses_of_configurations(world, here, monkeypatch, capsys):
    monkeypatch.setenv("OWN_SECRET", "secret")
    part = {"data": {"tasks": {"a": {"path": "${oc.env:OWN_SECRET}"}}}}
    given = read_merge_input(["--config", write(here / "c.yaml", world, part), "--output", "x"])
    data = merge_options("merge", given, data=True)["data"]
    assert data.tasks["a"].path == "${oc.env:OWN_SECRET}"
    for address in ("http://127.0.0.1:9/c.yaml", "file:///c.yaml", "memory://c.yaml", "@c.yaml"):
        assert "secret" not in fails(["fit", "--config", address], capsys)


# ---- what the user allows -----------------------------------------------------------------------


def test_the_command_line_allows_modules(world, here, capsys):
    part = {"optimizer": spec("stranger.Own", lr=0.1)}
    config = write(here / "c.yaml", world, part)
    for form in (["--allow_modules", "stranger"], ["--allow-modules=x,stranger"]):
        found = learn(["--config", config, *form], run=False)
        assert found.config["optimizer"]["class_path"] == "stranger.Own"
    assert Path("ran").exists()
    del sys.modules["stranger"]
    with pytest.raises(SystemExit, match=r"^2$"):  # the permission is that of one call
        learn(["--config", config], run=False)


def test_a_yaml_allows_nothing(world, here, capsys):
    for part in ({"allow_modules": ["stranger"]}, {"model": {"allow_modules": ["stranger"]}}):
        config = write(here / "c.yaml", world, part)
        with pytest.raises(ConfigError, match=r"allow_modules: expected modules on the command"):
            learn(["--config", config], run=False)
        used = write(here / "c.yaml", world, {**part, "optimizer": spec("stranger.Own", lr=0.1)})
        assert "add --allow_modules stranger" in fails(["fit", "--config", used], capsys)
    recipe = {**world["model"]["recipe"], "init": {"class_path": "Uniform"}}
    config = write(here / "m.yaml", {"recipe": recipe, "allow_modules": "stranger"})
    text = fails(["merge", "--config", config, "--output", "out"], capsys)
    assert "allow_modules: expected modules on the command line only, got stranger" in text
    assert "stranger" not in sys.modules


def test_allowing_a_module_does_not_allow_what_it_imports(world, here):
    (here / "stranger.py").write_text("import os\nfrom subprocess import Popen\n")
    for path in ("stranger.os.mkdir", "stranger.Popen"):
        part = {
            "optimizer": spec("torch.optim.SGD", lr=0.1),
            "lr_scheduler": spec(
                LAMBDA, lr_lambda={"class_path": path, "init_args": {"path": "ran"}}
            ),
        }
        config = write(here / "c.yaml", world, part)
        with pytest.raises(SystemExit, match=r"^2$"):
            learn(["--config", config, "--allow_modules", "stranger"], run=False)
    assert not Path("ran").exists()


def test_modules_are_listed_in_several_ways():
    for given, expected in (
        (["--allow_modules", "a"], ("a",)),
        (["--allow_modules=a,b"], ("a", "b")),
        (["--allow_modules", "[a, b]", "--allow_modules+=c"], ("a", "b", "c")),
        (["--allow_modules"], ()),
        (["--allow", "a"], ()),
    ):
        assert allowed_modules(given) == expected
