"""Steps of a merge whose sources are mapped, with and without read-ahead of what comes next.

    python benchmarks/placement.py --json placement.json

The sources are random Llamas of 183M parameters in bfloat16, a base and four sources (1.8 GB),
written to `--cache`. After two steps that are not measured, steps with and without read-ahead take
turns: with files that are dropped from the page cache before each step (cold), and with files that
stay in it (warm). Times are wall time in seconds.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

import harness
from gradmerge import MergedModel, Recipe
from gradmerge.engine import placement

SOURCES = "abcd"
ROWS, TOKENS = 1, 32
_DROP = 4


def drop(merged: MergedModel, folder: Path) -> None:
    """Drop the sources' files from the page cache, and from this process."""
    library = ctypes.CDLL(None)
    plan = merged.plan
    for name in plan.tensors:
        for owner in plan.owners:
            tensor = plan.read(owner, name)
            start = tensor.data_ptr() - tensor.data_ptr() % mmap.PAGESIZE
            size = tensor.data_ptr() + tensor.nbytes - start
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _DROP)
    for file in folder.rglob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


@contextmanager
def read_ahead(on: bool) -> Iterator[None]:
    """Read ahead inside the context, or not."""
    if on:
        yield
        return
    with patch.object(placement, "read_ahead", lambda *_: None):
        yield


def step(merged: MergedModel, tokens: torch.Tensor) -> float:
    """Return the time of a step."""
    start = time.perf_counter()
    loss, _ = merged.accumulate([lambda: merged(input_ids=tokens, labels=tokens).loss])
    loss.backward()
    return time.perf_counter() - start


def main() -> None:
    """Measure, and print one line per case."""
    parser = harness.make_parser(__doc__, "placement")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = harness.llama("200m", "bfloat16")
    harness.make_models(given.cache, config, SOURCES, noise=1e-3)
    os.sync()  # pages that are not written yet stay in the cache
    tokens = torch.randint(0, config.vocab_size, (ROWS, TOKENS))
    sources = {source: str(given.cache / source) for source in SOURCES}
    results = {}
    for memory in ("resident", "streamed"):
        recipe = Recipe(sources, str(given.cache / "base"))
        merged = MergedModel(recipe, memory=memory, dtype=torch.bfloat16)
        merged.plan.place(dict.fromkeys(merged.plan.owners, "mapped"), merged.device)
        for _ in range(2):
            step(merged, tokens)
        for state in ("cold", "warm"):
            times: dict[str, list[float]] = {"ahead": [], "without": []}
            for turn in range(2 * given.repeats):
                kind = "without" if turn % 2 else "ahead"
                if state == "cold":
                    drop(merged, given.cache)
                with read_ahead(kind == "ahead"):
                    times[kind].append(step(merged, tokens))
            results[f"{memory}, {state}"] = times
            figures = (
                f"{kind} {min(own):.2f} (median {statistics.median(own):.2f})"
                for kind, own in times.items()
            )
            print(f"{memory}, {state}: {', '.join(figures)}", flush=True)
        del merged
        gc.collect()  # pages that another mapping holds are not dropped
    harness.write_json(given.json, results)


if __name__ == "__main__":
    main()
