"""Run one kind of fault in a process of its own, and tell what became of it.

Processes are forked from a server that has everything imported, so a run takes no start-up time.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

TIMEOUT = 90.0
STEPPED, LOG, DONE, HOME = ".stepped", ".log", ".done", "home"
OUTPUTS = ("config.yaml", "out", "outputs", "lightning_logs", "wandb", "checkpoints")
ACCEPTED = ("clear", "right")


@dataclass(frozen=True)
class Kind:
    """One kind of fault: what is damaged, the command, and what is expected of it."""

    name: str
    command: str
    """Arguments of `gradmerge`, as in a shell."""
    damage: Callable[[Path], object] | None = None
    """Damages the world in the folder it gets."""
    message: str = ""
    """Regular expression that the error must match. None is accepted if it is empty."""
    right: Callable[[Path], bool] | None = None
    """Holds for the folder after a command that succeeded. Success is an error without it."""
    late: bool = False
    """The fault cannot be known before training."""
    changes: tuple[str, ...] = ()
    """Files and folders that the command may change or remove."""
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a kind: its class, and what the command printed."""

    kind: str
    """clear, right, late, vague, raw, silent, hang or elsewhere."""
    status: int | None
    printed: str


def start_server() -> None:
    """Start the server that processes are forked from, which takes as long as all imports."""
    # before Python 3.12.3 the server does not get `sys.path`, and then loads nothing
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        process = _context().Process(target=int)
        process.start()
        process.join()


def run_kind(kind: Kind, world: Path, folder: Path) -> Outcome:
    """Copy the world to `folder`, damage it, run the command and classify what happened."""
    work = folder / "work"
    shutil.copytree(world, work, symlinks=True)
    if kind.damage is not None:
        kind.damage(work)
    (folder / HOME).mkdir()
    (folder / HOME / "notes.txt").write_text("nobody may take this away")
    before = _state(folder)
    process = _context().Process(
        target=child, args=(shlex.split(kind.command), str(work), dict(kind.environment))
    )
    process.start()
    process.join(TIMEOUT)
    hung = process.is_alive()
    if hung:
        os.killpg(process.pid, signal.SIGKILL) if _leads(process.pid) else process.kill()
        process.join()
    log = folder / LOG
    printed = log.read_text(errors="replace") if log.exists() else ""
    done = folder / DONE
    # the fork server may lose the exit status of a process and say 255
    status = int(done.read_text()) if done.exists() else process.exitcode
    stepped = (folder / STEPPED).exists()
    lost = _changed(before, _state(folder), kind.changes)
    if hung:
        found = "hang"
    elif (folder / "PWNED").exists() or lost:
        found = "elsewhere"
        printed += f"\nchanged: {lost}"
    elif not done.exists():
        found = "hang"  # a crash: no message can follow
    else:
        found = _classified(kind, status, printed, stepped, work)
    return Outcome(found, status, printed)


def _classified(kind: Kind, status: int | None, printed: str, stepped: bool, work: Path) -> str:
    if status == 0:
        return "right" if kind.right is not None and kind.right(work) else "silent"
    if "Traceback (most recent call last)" in printed:
        return "raw"
    found = re.search(r"gradmerge[ \w]*: (.*)", printed, re.DOTALL)
    if status != 2 or found is None:
        return "raw"
    if not kind.message or not re.search(kind.message, printed, re.IGNORECASE | re.DOTALL):
        return "vague"
    return "late" if stepped and not kind.late else "clear"


def child(arguments: list[str], work: str, environment: dict[str, str]) -> None:
    """Run a command in its folder; its output goes to a file beside it."""
    os.setpgrp()
    faulthandler.disable()
    os.chdir(work)
    folder = Path(work).parent
    target = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(target, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    temporary = folder / "tmp"
    temporary.mkdir()
    # a version that writes or removes what it must not shall find nobody's own files
    cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    own = {"HOME": folder / HOME, "XDG_CACHE_HOME": cache}
    own |= {"TMPDIR": temporary, "HF_HOME": temporary / "hf", **environment}
    os.environ.update({name: str(value) for name, value in own.items()})
    sys.argv = ["gradmerge", *arguments]
    import tempfile

    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    tempfile.tempdir = None
    torch.set_num_threads(1)
    register_optimizer_step_post_hook(lambda *_: (folder / STEPPED).touch())
    from gradmerge.cli import main

    status: Any = 1
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 0 if not stopped.code else 1
    except BaseException:
        traceback.print_exc()
    (folder / DONE).write_text(str(status))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _leads(pid: int | None) -> bool:
    try:
        return os.getpgid(pid or 0) == pid
    except ProcessLookupError:
        return False


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for place, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(place, name)
            stat = os.lstat(path)
            found[os.path.relpath(path, folder)] = (stat.st_size, stat.st_mtime_ns)
    return found


def _changed(
    before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], allowed: tuple[str, ...]
) -> list[str]:
    """Return files that were lost or changed, and new ones outside the places for outputs."""
    lost = [name for name, state in before.items() if after.get(name) != state]
    new = [name for name in after.keys() - before.keys() if not _is_output(name)]
    places = tuple(f"work/{name}" for name in allowed)
    return [n for n in (*lost, *new) if not (places and n.startswith(places))]


def _is_output(name: str) -> bool:
    first, *rest = Path(name).parts
    if not rest or first in ("tmp", "PWNED"):
        return first in (STEPPED, LOG, DONE, "tmp")
    return rest[0].startswith(OUTPUTS) or "__pycache__" in rest


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_warm"])
    return context
