"""Commands that are killed at any moment: the next run gives the same bits, and nothing is left.

Children are forked from this process, which has imported everything. Every other one is the first
process of a namespace of its own, as in a container, where that is permitted.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import random
import signal
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradmerge.cli.main import main

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.usefixtures("own_folder"),
]

_NEW_PROCESSES, _NEW_MOUNTS = 0x20000000, 0x00020000
_RECURSIVE, _PRIVATE = 0x4000, 0x40000
# These say when they were written.
_DATED = {"README.md", "provenance.json"}
_AT_WORK = (".partial", ".old", ".scratch")


# ---- children ------------------------------------------------------------------------------------


def _work(arguments: list[str], folder: Path) -> None:
    """Run a command in a folder, with temporary files beside it, and end the process."""
    status = 1
    try:
        os.chdir(folder)
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open(folder.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder.parent / "tmp")
        os.environ["XDG_CACHE_HOME"] = str(folder.parent.parent / "cache")
        status = main(arguments)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    finally:
        os._exit(status)


def start(arguments: list[str], folder: Path) -> int:
    """Start a command in a child and return its number."""
    child = os.fork()
    if child == 0:
        _work(arguments, folder)
    return child


def start_contained(arguments: list[str], folder: Path) -> tuple[int, int]:
    """Start a command as the first process of a namespace; return its number and its parent's."""
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        libc = ctypes.CDLL(None)
        if libc.unshare(_NEW_PROCESSES | _NEW_MOUNTS) != 0:
            os._exit(99)
        inner = os.fork()
        if inner == 0:
            libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None)
            libc.mount(b"proc", b"/proc", b"proc", 0, None)
            _work(arguments, folder)
        os.write(write, struct.pack("i", inner))
        os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) & 0xFF)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        found = pipe.read(4)
    return (struct.unpack("i", found)[0] if found else 0), between


def can_contain() -> bool:
    """Return whether this process may make namespaces."""
    child = os.fork()
    if child == 0:
        os._exit(ctypes.CDLL(None).unshare(_NEW_PROCESSES | _NEW_MOUNTS) != 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def finish(arguments: list[str], folder: Path) -> float:
    """Run a command to its end, and return the seconds that it took."""
    begun = time.monotonic()
    _, status = os.waitpid(start(arguments, folder), 0)
    assert os.waitstatus_to_exitcode(status) == 0, (folder.parent / "log").read_text()[-3000:]
    return time.monotonic() - begun


def kill(arguments: list[str], folder: Path, after: float, contained: bool) -> None:
    """Run a command and kill it after so many seconds."""
    if contained:
        child, between = start_contained(arguments, folder)
    else:
        child = between = start(arguments, folder)
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(between, 0)


# ---- what is there -------------------------------------------------------------------------------


def bits(output: Path) -> dict[str, str]:
    """Return a hash of each file, or of its name alone if it says when it was written."""
    return {
        str(path.relative_to(output)): ""
        if path.name in _DATED
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }


def left(root: Path) -> list[str]:
    """Return everything below a folder that no finished command leaves."""
    found = []
    for path in root.rglob("*"):
        parts = path.relative_to(root).parts
        hidden = path.name.startswith(".") and path.name != ".gradmerge"
        if hidden or (len(parts) > 1 and parts[0] == "tmp") or path.name.endswith(_AT_WORK):
            found.append("/".join(parts))
    return found


def place(root: Path) -> Path:
    """Make the folders of a run, and return the one that it works in."""
    for name in ("work", "tmp"):
        (root / name).mkdir(parents=True)
    return root / "work"


# ---- the commands --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Arguments by command; all write `merged`."""
    folder = tmp_path_factory.mktemp("commands")
    recipe = {**world["model"]["recipe"], "preprocess": [{"class_path": "Trim"}]}
    recipe["preprocess"][0]["init_args"] = {"density": 0.5}
    trainer = {**world["trainer"], "logger": False, "enable_model_summary": False}
    export = {"class_path": "ExportAtEnd", "init_args": {"output": "merged"}}
    fit = {
        "seed_everything": 1,
        "model": {"recipe": recipe},
        "data": world["data"],
        "trainer": {**trainer, "callbacks": [export]},
    }
    static = {"recipe": {**recipe, "init": "Uniform"}}
    stepwise = {"class_path": "Pairwise", "init_args": {"every_n_steps": 1}}
    files = {"fit": fit, "driver": {**fit, "driver": stepwise}, "merge": static}
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    merge = ["merge", "--config", str(folder / "merge.yaml"), "--output", "merged"]
    fit_ = ["fit", "--config", str(folder / "fit.yaml")]
    learned = place(folder / "learned")
    finish(fit_, learned)
    (checkpoint,) = learned.rglob("*.ckpt")
    return {
        "fit": fit_,
        "driver": ["fit", "--config", str(folder / "driver.yaml")],
        "merge": merge,
        "overwrite": [*merge, "--overwrite", "true", "--recipe.preprocess", "[]"],
        "export": ["export", str(checkpoint), "merged"],
    }


def battery(commands: dict[str, Any], command: str, root: Path, kills: int) -> int:
    """Kill a command so often, check what the next run makes of it; return how many were at work.

    A killed run may have ended before, or have finished its output.
    """
    arguments, chance = commands[command], random.Random(f"{command} {kills}")
    contains, at_work = can_contain(), 0
    whole = place(root / "whole")
    before: dict[str, str] = {}
    finish(commands["merge"], place(root / "first"))  # fills the cache, which all share
    if command == "overwrite":
        finish(commands["merge"], whole)
        before = bits(whole / "merged")
    seconds = finish(arguments, whole)
    expected = bits(whole / "merged")
    assert before.keys() <= expected.keys()
    assert before != expected
    assert left(root / "whole") == []
    for number in range(kills):
        folder = place(root / str(number))
        if before:
            finish(commands["merge"], folder)
        kill(arguments, folder, chance.uniform(0, seconds), contains and number % 2 == 1)
        found = bits(folder / "merged") if (folder / "merged").exists() else {}
        assert found in ({}, before, expected), f"kill {number}"
        assert found or not before
        at_work += found != expected
        if found in ({}, before) or command == "driver":
            finish(arguments, folder)
            assert bits(folder / "merged") == expected, f"kill {number}"
        else:  # complete: any export to that name tidies up
            finish(commands["overwrite"], folder)
        assert left(root / str(number)) == [], f"kill {number}"
    cached = (root / "cache" / "gradmerge").glob("*")  # none if kernels were loaded before
    assert all(path.name.startswith(("kernels-", "opened")) for path in cached)
    return at_work


@pytest.mark.parametrize(
    ("command", "kills"),
    [("merge", 2), ("overwrite", 1), ("export", 1), ("fit", 1), ("driver", 1)],
)
def test_killed_commands_leave_nothing_and_give_the_same_bits(commands, tmp_path, command, kills):
    battery(commands, command, tmp_path, kills)


@pytest.mark.nightly
@pytest.mark.parametrize("command", ["merge", "overwrite", "export", "fit", "driver"])
def test_a_hundred_kills(commands, tmp_path, command):
    at_work = battery(commands, command, tmp_path, 100)
    print(f"{command}: 100 kills, {at_work} before the output was complete")
    assert at_work > 30
