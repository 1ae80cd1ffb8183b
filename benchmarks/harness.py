"""Shared parts of the benchmarks: suites, measuring, processes of their own, models, tables.

Only the standard library is imported at the top, so that a measured process starts small.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


# ---- suites -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suite:
    """A suite: how its merges are scored, for how long they learn, and what builds it."""

    metric: str
    higher_is_better: bool
    unit: str
    steps: int
    program: str
    """Program in `suites`, and its options."""
    options: tuple[str, ...] = ()


SUITES = {
    "text4": Suite("accuracy", True, "accuracy (higher is better)", 60, "text8", ("--quick",)),
    "text8": Suite("accuracy", True, "accuracy (higher is better)", 120, "text8"),
    "lm": Suite("bits_per_byte", False, "bits per byte (lower is better)", 60, "lm"),
    "vision": Suite("accuracy", True, "accuracy (higher is better)", 100, "vision"),
    "vision4": Suite("accuracy", True, "accuracy (higher is better)", 100, "vision8", ("--quick",)),
    "vision8": Suite("accuracy", True, "accuracy (higher is better)", 160, "vision8"),
    "chat": Suite("exact_match", True, "exact match of answers (higher is better)", 30, "chat"),
    "lm-chat": Suite("bits_per_byte", False, "bits per byte (lower is better)", 24, "lm_chat"),
}


def suite_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options of programs that compare methods on a suite."""
    parser = make_parser(description, "suites")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser


def build_suite(suite: str, seed: int, cache: Path, quiet: bool = True) -> None:
    """Build experts and data in a process of its own, or find them in the cache."""
    program = ROOT / "benchmarks" / "suites" / f"{SUITES[suite].program}.py"
    command = [sys.executable, str(program), *SUITES[suite].options]
    command += ["--cache", str(cache), "--seed", str(seed)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL if quiet else None)


def suite_file(suite: str, seed: int, cache: Path, folder: Path) -> Path:
    """Write the shipped configuration of a suite to a folder, for another seed or cache."""
    text = (CONFIGS / "suites" / f"{suite}.yaml").read_text()
    text = text.replace(".cache/suites", str(cache))
    text = text.replace(f"{suite}-seed0", f"{suite}-seed{seed}")
    text = text.replace("seed_everything: 0", f"seed_everything: {seed}")
    path = folder / f"{suite}-seed{seed}.yaml"
    path.write_text(text)
    return path


def seeded_suite(suite: str, seeds: Sequence[int], cache: Path, folder: Path) -> Path:
    """Build a suite for each seed, and write its configuration, as `gradmerge compare` takes it."""
    for seed in seeds:
        build_suite(suite, seed, cache, quiet=False)
    folder.mkdir(parents=True, exist_ok=True)
    return suite_file(suite, seeds[0], cache, folder)


# ---- Lightning ----------------------------------------------------------------------------------


def quieten() -> None:
    """Silence warnings and advice of the libraries."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def quiet_trainer(**options: Any) -> Any:
    """Return a Lightning trainer on the CPU that logs, prints and saves nothing."""
    import lightning

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = dict.fromkeys(off, False)
    settings |= {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    return lightning.Trainer(**settings | options)


def compare(
    suite: str,
    methods: Sequence[str],
    args: argparse.Namespace,
    score: Callable[[str, int], dict[str, Any]],
) -> dict[str, dict[int, dict[str, Any]]]:
    """Score methods on each seed of a suite; print and write each result as soon as it is there."""
    found: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in methods}
    for seed in args.seeds:
        build_suite(suite, seed, args.cache)
        for method in methods:
            found[method][seed] = score(method, seed)
            print(f"seed {seed} {method}: {found[method][seed]}", flush=True)
            write_json(args.json, found)
    return found


def ranking(
    suite: str,
    found: dict[str, dict[int, dict[str, Any]]],
    columns: dict[str, Callable[[list[dict[str, Any]]], str]],
) -> str:
    """Return a markdown table of methods, the best first; columns make cells of their results."""
    own = SUITES[suite]
    every = {name: list(results.values()) for name, results in found.items() if results}
    scores = {name: [result["score"] for result in results] for name, results in every.items()}
    order = sorted(scores, key=lambda n: statistics.mean(scores[n]), reverse=own.higher_is_better)
    rows = [
        [f"`{n}`", spread(scores[n]), *(cell(every[n]) for cell in columns.values())] for n in order
    ]
    return table(["method", own.metric, *columns], rows)


# ---- measuring ----------------------------------------------------------------------------------


def anonymous() -> int:
    """Return the anonymous resident memory of this process in bytes; mapped files do not count."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@contextmanager
def measured(result: dict[str, float]) -> Iterator[None]:
    """Measure the block: wall and CPU time in seconds; in bytes the `peak` of anonymous memory,
    and the rise to it (`memory`).
    """
    before = peak = anonymous()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.003):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        result["wall"], result["cpu"] = time.perf_counter() - wall, time.process_time() - cpu
        stop.set()
        watcher.join()
        result["peak"] = float(max(peak, anonymous()))
        result["memory"] = result["peak"] - before


def ask(compute: Callable[..., Any], *arguments: Any) -> Any:
    """Compute something in a fresh process."""
    # No allocator setting of the caller may reach some processes and not others.
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]
    with ProcessPoolExecutor(1, get_context("spawn"), quieten) as pool:
        return pool.submit(compute, *arguments).result()


# ---- models -------------------------------------------------------------------------------------


def classifier(head: str | Path, body: str | Path | None = None, **options: Any) -> Any:
    """Return a classifier with the head of one folder and, if given, the network of another."""
    import transformers

    config = json.loads((Path(head) / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model = kind.from_pretrained(head, local_files_only=True, **options)
    if body is not None:
        other = kind.from_pretrained(body, local_files_only=True).base_model
        model.base_model.load_state_dict(other.state_dict())
    return model


def write_classifiers(folder: Path, network: Mapping[str, Any], experts: Mapping[str, str]) -> None:
    """Write a network under the heads of experts, as exports with private heads are written."""
    for task, place in experts.items():
        model = classifier(place)
        model.base_model.load_state_dict(network)
        for target in (folder, folder / "tasks" / task):
            model.save_pretrained(target)
            for path in Path(place).iterdir():  # tokenizer or image processor
                if not (target / path.name).exists():
                    shutil.copy(path, target)


def make_models(folder: Path, config: Any, sources: Sequence[str], noise: float) -> None:
    """Make the folders `base` and one of each source, unless they are there.

    Weights are drawn by their names, N(0, 0.02^2), gains about 1; a source differs from the base by
    N(0, noise^2). The dtype is the configuration's.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    def drawn(name: str, shape: Sequence[int]) -> torch.Tensor:
        seed = zlib.crc32(name.encode())
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    with torch.device("meta"):
        network = getattr(transformers, config.architectures[0])(config)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for index, source in enumerate(("base", *sources)):
        target = folder / source
        if (target / "config.json").is_file():
            continue
        target.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for key, shape in shapes.items():
            gain = len(shape) == 1 and not key.endswith("bias")
            tensor = drawn(key, shape) * 0.02 + gain
            if index:
                tensor += drawn(f"{index} {key}", shape) * noise
            tensors[key] = tensor.to(config.dtype)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(target)


LLAMAS = {
    "1b": (32_000, 2048, 5632, 22, 8, 4),
    "200m": (32_000, 1024, 2816, 10, 8, 4),
    "60m": (16_384, 512, 1664, 12, 8, 8),
    "5m": (1024, 640, 1792, 24, 10, 10),  # per layer
    "tiny": (1024, 32, 64, 2, 2, 2),
}
_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)


def llama(size: str, dtype: str, **fields: Any) -> Any:
    """Return the configuration of a Llama whose files are in a dtype."""
    import transformers

    fields = {**dict(zip(_FIELDS, LLAMAS[size], strict=True)), **fields}
    fields |= {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}
    return transformers.LlamaConfig(**fields, dtype=dtype)


# ---- command line and tables --------------------------------------------------------------------


def make_parser(description: str | None, cache: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark: where to keep and to write things."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / cache)
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    return parser


def write_json(path: Path | None, content: Any) -> None:
    """Write plain data to a file, where one was asked for: all of it, or nothing."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps(content, indent=1, default=asdict) + "\n")
        aside.replace(path)


def fingerprint(content: Any) -> str:
    """Return a short hash of plain data and dataclasses.

    Caches are recognised by it, so another way to write the same content would empty them all.
    """
    text = json.dumps(content, sort_keys=True, default=asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cached(path: Path, compute: Callable[[], Any]) -> Any:
    """Return plain data that are kept in a file, or computed and kept."""
    if not path.is_file():
        write_json(path, compute())
    return json.loads(path.read_text())


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean and, of several values, the standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], pad: bool = False) -> str:
    """Return a markdown table, also readable as plain text if padded."""
    widths = [max(map(len, column)) if pad else 3 for column in zip(head, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    padded = [
        [cell.ljust(width if pad else 0) for cell, width in zip(row, widths, strict=True)]
        for row in (head, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)
