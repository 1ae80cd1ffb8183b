"""What a static merge costs, beside mergekit on the same files.

    python scripts/bench_static.py --json static.json

Two sources and a base of one Llama architecture, made here: random bfloat16 weights, the sources a
little off the base. Every run is a process of its own: it imports, takes the time, merges from disk
to disk, takes the time. The two tools take turns, in alternating order, and the best of each counts
for the ratio, the median of the paired ratios beside it. Wall and CPU time are those of the merge
without the interpreter's start and imports; `process` is the wall time with them.

Memory is the highest anonymous resident memory (RssAnon) less what it was before the merge: mapped
files are the system's cache and not counted. It is shown as a multiple of the largest tensor, in
the dtype of the files; the bound is K + 3.

`copy` reads the same files with plain reads, writes as many bytes as a merge does, and flushes
them to disk as gradmerge does: its time over a merge's is the share of the machine's throughput.
With --cold the files leave the system's cache before each run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradmerge.engine.opening import open_plan
from local_llama import make_llamas
from measuring import measured

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SIZES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
    "200m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
}
TARGETS = {
    "linear": 0.7,
    "task_arithmetic": 0.7,
    "slerp": 0.5,
    "ties": 0.2,
    "dare_linear": 0.4,
    "dare_ties": 0.4,
    "della": 0.4,
    "della_linear": 0.4,
}
SOURCES = ("a", "b")


@dataclass(frozen=True)
class Method:
    """One method, as each tool is told of it."""

    mergekit: dict[str, Any]
    """Parameters for the whole merge."""
    own: dict[str, Any]
    """Fields of a recipe, as a configuration says them."""
    each: dict[str, Any]
    """mergekit's parameters a source."""


def _class(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


def _constant(value: float) -> dict[str, Any]:
    return _class("Constant", value=value)


TIES = _class("DisjointMean")
METHODS = {
    "linear": Method({}, {"origin": "zero", "init": "Uniform"}, {"weight": 0.5}),
    "task_arithmetic": Method({}, {"init": _constant(0.3)}, {"weight": 0.3}),
    "slerp": Method(
        {"t": 0.5},
        {"origin": "zero", "init": "Uniform", "operator": _class("Slerp", threshold=0.9995)},
        {},
    ),
    "ties": Method(
        {},
        {"preprocess": [_class("Trim", density=0.2)], "init": _constant(0.5), "operator": TIES},
        {"weight": 0.5, "density": 0.2},
    ),
    "dare_linear": Method(
        {},
        {
            "preprocess": [_class("RandomDrop", density=0.5, rescale="l1")],
            "init": _constant(0.5),
        },
        {"weight": 0.5, "density": 0.5},
    ),
    "dare_ties": Method(
        {},
        {
            "preprocess": [_class("RandomDrop", density=0.5, rescale="l1")],
            "init": _constant(0.5),
            "operator": TIES,
        },
        {"weight": 0.5, "density": 0.5},
    ),
    "della": Method(
        {},
        {
            "preprocess": [_class("MagnitudeDrop", density=0.5, epsilon=0.15, rescale="l1")],
            "init": _constant(0.5),
            "operator": TIES,
        },
        {"weight": 0.5, "density": 0.5, "epsilon": 0.15},
    ),
    "della_linear": Method(
        {},
        {
            "preprocess": [_class("MagnitudeDrop", density=0.5, epsilon=0.15, rescale="l1")],
            "init": _constant(0.5),
        },
        {"weight": 0.5, "density": 0.5, "epsilon": 0.15},
    ),
    "breadcrumbs": Method(
        {},
        {"preprocess": [_class("Breadcrumbs", density=0.9)], "init": _constant(0.3)},
        {"weight": 0.3, "density": 0.9},
    ),
}


# ---- models -------------------------------------------------------------------------------------


def largest_tensor(folder: Path) -> int:
    """Bytes of the largest tensor of a file."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return max(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


# ---- one run, in a process of its own -----------------------------------------------------------


def run_mergekit(folder: Path, name: str, output: Path) -> dict[str, float]:
    """One merge by mergekit."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    method = METHODS[name]
    models = [{"model": str(folder / s), "parameters": dict(method.each)} for s in SOURCES]
    spec: dict[str, Any] = {"models": models, "merge_method": name, "dtype": "bfloat16"}
    if name == "slerp":
        spec["base_model"] = str(folder / SOURCES[0])
    elif name != "linear":
        spec["base_model"] = str(folder / "base")
    if method.mergekit:
        spec["parameters"] = method.mergekit
    options = MergeOptions(
        quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=0, lazy_unpickle=True
    )
    result: dict[str, float] = {}
    with measured(result):
        run_merge(MergeConfiguration.model_validate(spec), str(output), options)
    return result


def run_gradmerge(folder: Path, name: str, output: Path) -> dict[str, float]:
    """One merge by gradmerge."""
    import jsonargparse

    from gradmerge import Recipe
    from gradmerge.cli.main import register
    from gradmerge.export.folder import export_plan
    from gradmerge.operators._native import native_kernels

    register()
    native_kernels()  # compiled once a machine, not once a merge
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, "recipe")
    given: dict[str, Any] = {
        "sources": {source: str(folder / source) for source in SOURCES},
        "coefficients": "Model",
        **METHODS[name].own,
    }
    if given.get("origin") != "zero":
        given["base"] = str(folder / "base")
    recipe = parser.instantiate_classes(parser.parse_object({"recipe": given})).recipe
    result: dict[str, float] = {}
    with measured(result):
        plan = open_plan(recipe, with_skeleton=False)
        export_plan(plan, plan.initial_raw(), output, overwrite=True)
    return result


def run_copy(folder: Path, name: str, output: Path) -> dict[str, float]:
    """Plain reads of what a merge reads, and a plain write of what it writes."""
    read = [folder / source / "model.safetensors" for source in SOURCES]
    if name not in ("linear", "slerp"):
        read.append(folder / "base" / "model.safetensors")
    output.mkdir(parents=True, exist_ok=True)
    buffer = bytearray(16 << 20)
    result: dict[str, float] = {}
    with measured(result):
        for index, path in enumerate(read):
            with path.open("rb", buffering=0) as source:
                if index:
                    while source.readinto(buffer):
                        pass
                    continue
                with (output / "model.safetensors").open("wb", buffering=0) as target:
                    while size := source.readinto(buffer):
                        target.write(memoryview(buffer)[:size])
                    os.fsync(target.fileno())
    return result


TOOLS: dict[str, Callable[[Path, str, Path], dict[str, float]]] = {
    "gradmerge": run_gradmerge,
    "mergekit": run_mergekit,
    "copy": run_copy,
}


# ---- all runs -----------------------------------------------------------------------------------


def evict(folder: Path) -> None:
    """Ask the system to forget the cached pages of the files."""
    for name in ("base", *SOURCES):
        with (folder / name / "model.safetensors").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder: Path) -> None:
    """Have the files in the system's cache."""
    for name in ("base", *SOURCES):
        with (folder / name / "model.safetensors").open("rb") as file:
            while file.read(16 << 20):
                pass


def one(tool: str, name: str, folder: Path, work: Path, cold: bool) -> dict[str, float]:
    """A run in a fresh process."""
    (evict if cold else warm)(folder)
    output = work / tool
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, __file__, "--run", tool, name, str(folder), str(output)]
    start = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    if ran.returncode:
        raise SystemExit(f"{tool} {name} failed:\n{ran.stderr[-3000:]}")
    shutil.rmtree(output, ignore_errors=True)
    return {**json.loads(ran.stdout.splitlines()[-1]), "process": wall}


def compare(name: str, folder: Path, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All runs of one method."""
    runs: dict[str, list[dict[str, float]]] = {tool: [] for tool in args.tools}
    for turn in range(args.repeats):
        for tool in args.tools if turn % 2 == 0 else args.tools[::-1]:
            runs[tool].append(one(tool, name, folder, work, args.cold))
    row: dict[str, Any] = {"method": name, "runs": runs}
    best = {t: {k: min(run[k] for run in rs) for k in rs[0]} for t, rs in runs.items()}
    row["best"] = best
    for key in ("wall", "cpu", "process"):
        if {"gradmerge", "mergekit"} <= best.keys():
            row[key] = best["gradmerge"][key] / best["mergekit"][key]
            row[f"{key}_median"] = statistics.median(
                ours[key] / theirs[key]
                for ours, theirs in zip(runs["gradmerge"], runs["mergekit"], strict=True)
            )
    if {"gradmerge", "copy"} <= best.keys():
        row["throughput"] = best["copy"]["wall"] / best["gradmerge"]["wall"]
    return row


def show(rows: list[dict[str, Any]], largest: int) -> None:
    """The table."""
    head = ("method", "wall", "median", "target", "CPU", "process", "seconds", "memory", "theirs")
    print(" | ".join(head), "| of a copy's throughput")
    for row in rows:
        best = row["best"]
        ours, theirs = best["gradmerge"], best.get("mergekit", {})
        target = TARGETS.get(row["method"])
        cells = [
            row["method"],
            f"{row.get('wall', float('nan')):.2f}",
            f"{row.get('wall_median', float('nan')):.2f}",
            "" if target is None else f"{target:.1f}",
            f"{row.get('cpu', float('nan')):.2f}",
            f"{row.get('process', float('nan')):.2f}",
            f"{ours['wall']:.1f} / {theirs.get('wall', float('nan')):.1f}",
            f"{ours['memory'] / largest:.1f}",
            f"{theirs.get('memory', float('nan')) / largest:.1f}",
            f"{row.get('throughput', float('nan')):.2f}",
        ]
        print(" | ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="files leave the cache before each run")
    parser.add_argument("--cache", default=".cache/bench", help="where the models are kept")
    parser.add_argument("--json", help="file to write all figures to")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        tool, name, folder, output = args.run
        print(json.dumps(TOOLS[tool](Path(folder), name, Path(output))))
        return
    folder = Path(args.cache).resolve() / f"llama-{args.size}"
    words = {"vocab_size": 512 if args.size == "tiny" else 32000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    make_llamas(folder, SOURCES, 0.002, "bfloat16", **words, **heads, **SIZES[args.size])
    largest = largest_tensor(folder / "base")
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for name in args.methods:
            rows.append(compare(name, folder, Path(work), args))
            show(rows[-1:], largest)
    print()
    show(rows, largest)
    print(f"largest tensor {largest / 1e6:.0f} MB; bound {len(SOURCES) + 3} of it")
    if args.json:
        found = {"size": args.size, "cold": args.cold, "largest_tensor": largest, "rows": rows}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
