"""Steps of a merge whose sources are mapped, with and without read-ahead of what comes next.

    python benchmarks/placement.py --folder /tmp/placement

Random Llamas of 165M parameters in bfloat16 (a base and four sources, 1.7 GB) are written to the
folder and removed again. After two steps that are not measured, steps with and without read-ahead
take turns: with files that are dropped from the page cache before each step (cold), and with files
that stay in it (warm). Times are wall time in seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import transformers

from gradmerge import MergedModel, Recipe
from gradmerge.engine import placement

SOURCES = "abcd"
ROWS, TOKENS = 1, 32
_DROP = 4


def write(folder: Path) -> dict[str, str]:
    """Write a base and sources, and return their folders."""
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    places = {}
    for name in ("base", *SOURCES):
        for parameter in network.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        places[name] = str(folder / name)
        network.save_pretrained(places[name])
    os.sync()  # pages that are not written yet stay in the cache
    return places


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        places = write(Path(name))
        tokens = torch.randint(0, 8192, (ROWS, TOKENS))
        for memory in ("resident", "streamed"):
            recipe = Recipe({source: places[source] for source in SOURCES}, places["base"])
            merged = MergedModel(recipe, memory=memory, dtype=torch.bfloat16)
            merged.plan.place(dict.fromkeys(merged.plan.owners, "mapped"), merged.device)
            for _ in range(2):
                step(merged, tokens)
            for state in ("cold", "warm"):
                times: dict[bool, list[float]] = {True: [], False: []}
                for turn in range(2 * given.repeats):
                    ahead = turn % 2 == 0
                    if state == "cold":
                        drop(merged, Path(name))
                    with read_ahead(ahead):
                        times[ahead].append(step(merged, tokens))
                results[f"{memory}, {state}"] = times
                best = {ahead: min(own) for ahead, own in times.items()}
                middle = {ahead: statistics.median(own) for ahead, own in times.items()}
                print(
                    f"{memory}, {state}: with {best[True]:.2f} (median {middle[True]:.2f}), "
                    f"without {best[False]:.2f} ({middle[False]:.2f})",
                    flush=True,
                )
            del merged
            gc.collect()  # pages that another mapping holds are not dropped
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
