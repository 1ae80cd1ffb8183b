"""Cost of a static merge, beside mergekit on the same files and by the same description.

    python benchmarks/static.py --json static.json

Two sources and a base of one Llama architecture are made here. Every run is a process of its own
that merges from disk to disk; the tools take turns, in alternating order, and the best of each
counts. `copy` reads the same files and writes as many bytes as a merge does, flushed to disk: its
time over a merge's is the share of the machine's throughput. With --cold the files leave the
system's cache before each run. docs/benchmarks/static.md says what the columns are.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

SOURCES = ("a", "b")
_HALVES = {"weight": 0.5, "density": 0.5}
# mergekit's parameters per source, and the target of the ratio of wall times.
METHODS: dict[str, tuple[dict[str, float], float | None]] = {
    "linear": ({"weight": 0.5}, 0.7),
    "task_arithmetic": ({"weight": 0.3}, 0.7),
    "slerp": ({}, 0.5),
    "ties": ({"weight": 0.5, "density": 0.2}, 0.2),
    "dare_linear": (_HALVES, 0.4),
    "dare_ties": (_HALVES, 0.4),
    "della": ({**_HALVES, "epsilon": 0.15}, 0.4),
    "della_linear": ({**_HALVES, "epsilon": 0.15}, 0.4),
    "breadcrumbs": ({"weight": 0.3, "density": 0.9}, None),
}


# ---- one run, in a process of its own -----------------------------------------------------------


def spec_of(name: str, folder: Path) -> dict[str, Any]:
    """Return mergekit's description of a merge, which gradmerge reads, too."""
    parameters, _ = METHODS[name]
    models = [{"model": str(folder / s), "parameters": parameters} for s in SOURCES]
    spec: dict[str, Any] = {"models": models, "merge_method": name, "dtype": "bfloat16"}
    if name == "slerp":
        return {**spec, "base_model": models[0]["model"], "parameters": {"t": 0.5}}
    return spec if name == "linear" else {**spec, "base_model": str(folder / "base")}


def mergekit(spec: dict[str, Any], output: Path) -> Callable[[], None]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(
        quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=0, lazy_unpickle=True
    )
    return lambda: run_merge(MergeConfiguration.model_validate(spec), str(output), options)


def gradmerge(spec: dict[str, Any], output: Path) -> Callable[[], None]:
    import yaml

    from gradmerge import read_mergekit
    from gradmerge.engine.opening import open_plan
    from gradmerge.engine.state import FitState
    from gradmerge.export.folder import export_state
    from gradmerge.operators._native import native_kernels

    native_kernels()  # compiled once per machine, not once per merge
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(spec))
    recipe = read_mergekit(file).recipe

    def merge() -> None:
        state = FitState.start(open_plan(recipe, with_skeleton=False))
        export_state(state, output, overwrite=True)

    return merge


def copy(spec: dict[str, Any], output: Path) -> Callable[[], None]:
    """Read plainly what a merge reads, and write plainly what it writes."""
    given = [*(model["model"] for model in spec["models"]), spec.get("base_model")]
    read = [Path(path) for path in dict.fromkeys(given) if path]
    output.mkdir(parents=True, exist_ok=True)
    buffer = bytearray(16 << 20)

    def run() -> None:
        with weights(output).open("wb", buffering=0) as target:
            for source in read:
                with weights(source).open("rb", buffering=0) as file:
                    while size := file.readinto(buffer):
                        if source == read[0]:
                            target.write(memoryview(buffer)[:size])
            os.fsync(target.fileno())

    return run


TOOLS = {"gradmerge": gradmerge, "mergekit": mergekit, "copy": copy}


def run(tool: str, name: str, folder: Path, output: Path) -> dict[str, float]:
    """Measure a merge by one of the tools, in this process."""
    merge = TOOLS[tool](spec_of(name, folder), output)
    result: dict[str, float] = {}
    with harness.measured(result):
        merge()
    return result


# ---- all runs -----------------------------------------------------------------------------------


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def largest_tensor(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(weights(folder), framework="pt") as file:
        return max(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def one(tool: str, name: str, folder: Path, work: Path, cold: bool) -> dict[str, float]:
    """Measure a run in a fresh process, with its files in the system's cache or out of it."""
    for source in ("base", *SOURCES):
        with weights(folder / source).open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and file.read(16 << 20):
                pass
    start = time.perf_counter()
    found = harness.ask(run, tool, name, folder, work / tool)
    found["process"] = time.perf_counter() - start
    shutil.rmtree(work / tool)
    return found


def compare(name: str, folder: Path, work: Path, args: Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {tool: [] for tool in args.tools}
    for turn in range(args.repeats):
        for tool in args.tools if turn % 2 == 0 else args.tools[::-1]:
            runs[tool].append(one(tool, name, folder, work, args.cold))
    best = {t: {k: min(run[k] for run in rs) for k in rs[0]} for t, rs in runs.items()}
    row: dict[str, Any] = {"method": name, "runs": runs, "best": best}
    if {"gradmerge", "mergekit"} <= best.keys():
        pairs = list(zip(runs["gradmerge"], runs["mergekit"], strict=True))
        for key in ("wall", "cpu", "process"):
            row[key] = best["gradmerge"][key] / best["mergekit"][key]
            row[f"{key}_median"] = statistics.median(a[key] / b[key] for a, b in pairs)
    if {"gradmerge", "copy"} <= best.keys():
        row["throughput"] = best["copy"]["wall"] / best["gradmerge"]["wall"]
    return row


def render(rows: list[dict[str, Any]], largest: int) -> str:
    head = ["method", "wall", "median", "target", "CPU", "process", "seconds", "memory", "theirs"]

    def cells(row: dict[str, Any]) -> list[str]:
        missing = float("nan")
        ours, theirs = row["best"]["gradmerge"], row["best"].get("mergekit", {})
        ratios = [f"{row.get(k, missing):.2f}" for k in ("wall", "wall_median", "cpu", "process")]
        ratios.insert(2, str(METHODS[row["method"]][1] or ""))
        memory = [f"{tool.get('memory', missing) / largest:.1f}" for tool in (ours, theirs)]
        seconds = f"{ours['wall']:.1f} / {theirs.get('wall', missing):.1f}"
        return [row["method"], *ratios, seconds, *memory, f"{row.get('throughput', missing):.2f}"]

    return harness.table([*head, "of a copy's throughput"], [cells(row) for row in rows])


def main() -> None:
    parser = harness.make_parser(__doc__, "bench")
    parser.add_argument("--size", choices=harness.LLAMAS, default="1b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="files leave the cache before each run")
    args = parser.parse_args()
    folder = args.cache.resolve() / f"llama-{args.size}"
    config = harness.llama(args.size, "bfloat16")
    harness.make_models(folder, config, SOURCES, 0.002)
    largest = largest_tensor(folder / "base")
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for name in args.methods:
            rows.append(compare(name, folder, Path(work), args))
            print(render(rows[-1:], largest).splitlines()[-1], flush=True)
    print(f"\n{render(rows, largest)}")
    print(f"largest tensor {largest / 1e6:.0f} MB; bound {len(SOURCES) + 3} of it")
    found = {"size": args.size, "cold": args.cold, "largest_tensor": largest, "rows": rows}
    harness.write_json(args.json, found)


if __name__ == "__main__":
    main()
