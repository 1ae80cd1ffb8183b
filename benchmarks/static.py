"""Cost of a static merge, beside mergekit on the same files.

    python benchmarks/static.py --json static.json

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
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

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
_HALVES = {"weight": 0.5, "density": 0.5}
# mergekit's parameters per source; `recipe_of` states the same to gradmerge.
METHODS: dict[str, dict[str, float]] = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.3},
    "slerp": {},
    "ties": {"weight": 0.5, "density": 0.2},
    "dare_linear": _HALVES,
    "dare_ties": _HALVES,
    "della": {**_HALVES, "epsilon": 0.15},
    "della_linear": {**_HALVES, "epsilon": 0.15},
    "breadcrumbs": {"weight": 0.3, "density": 0.9},
}
WITHOUT_BASE = ("linear", "slerp")


def recipe_of(name: str, folder: Path) -> Any:
    from gradmerge import Recipe
    from gradmerge.coefficients import Constant, Model, Uniform
    from gradmerge.operators import DisjointMean, Linear, Slerp
    from gradmerge.preprocess import Breadcrumbs, MagnitudeDrop, RandomDrop, Trim

    sources = {source: str(folder / source) for source in SOURCES}
    if name in WITHOUT_BASE:
        operator = Slerp(threshold=0.9995) if name == "slerp" else Linear()
        plain = {"origin": "zero", "init": Uniform(), "operator": operator}
        return Recipe(sources, coefficients=Model(), **plain)
    steps: dict[str, Any] = {
        "task_arithmetic": [],
        "ties": [Trim(density=0.2)],
        "dare": [RandomDrop(density=0.5, rescale="l1")],
        "della": [MagnitudeDrop(density=0.5, epsilon=0.15, rescale="l1")],
        "breadcrumbs": [Breadcrumbs(density=0.9)],
    }
    return Recipe(
        sources,
        base=str(folder / "base"),
        coefficients=Model(),
        preprocess=steps[name if name in steps else name.split("_")[0]],
        init=Constant(METHODS[name]["weight"]),
        operator=DisjointMean() if name in ("ties", "dare_ties", "della") else Linear(),
    )


# ---- one run, in a process of its own -----------------------------------------------------------


def run_mergekit(folder: Path, name: str, output: Path) -> dict[str, float]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    models = [{"model": str(folder / s), "parameters": dict(METHODS[name])} for s in SOURCES]
    spec: dict[str, Any] = {"models": models, "merge_method": name, "dtype": "bfloat16"}
    if name == "slerp":
        spec |= {"base_model": str(folder / SOURCES[0]), "parameters": {"t": 0.5}}
    elif name != "linear":
        spec["base_model"] = str(folder / "base")
    options = MergeOptions(
        quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=0, lazy_unpickle=True
    )
    result: dict[str, float] = {}
    with harness.measured(result):
        run_merge(MergeConfiguration.model_validate(spec), str(output), options)
    return result


def run_gradmerge(folder: Path, name: str, output: Path) -> dict[str, float]:
    from gradmerge.engine.opening import open_plan
    from gradmerge.engine.state import FitState
    from gradmerge.export.folder import export_state
    from gradmerge.operators._native import native_kernels

    native_kernels()  # compiled once per machine, not once per merge
    recipe = recipe_of(name, folder)
    result: dict[str, float] = {}
    with harness.measured(result):
        state = FitState.start(open_plan(recipe, with_skeleton=False))
        export_state(state, output, overwrite=True)
    return result


def run_copy(folder: Path, name: str, output: Path) -> dict[str, float]:
    """Read plainly what a merge reads, and write plainly what it writes."""
    read = [*SOURCES] if name in WITHOUT_BASE else [*SOURCES, "base"]
    output.mkdir(parents=True, exist_ok=True)
    buffer = bytearray(16 << 20)
    result: dict[str, float] = {}
    with harness.measured(result):
        for index, source in enumerate(read):
            with weights(folder / source).open("rb", buffering=0) as file:
                if index:
                    while file.readinto(buffer):
                        pass
                    continue
                with weights(output).open("wb", buffering=0) as target:
                    while size := file.readinto(buffer):
                        target.write(memoryview(buffer)[:size])
                    os.fsync(target.fileno())
    return result


TOOLS: dict[str, Callable[[Path, str, Path], dict[str, float]]] = {
    "gradmerge": run_gradmerge,
    "mergekit": run_mergekit,
    "copy": run_copy,
}


# ---- all runs -----------------------------------------------------------------------------------


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def largest_tensor(folder: Path) -> int:
    """Return the bytes of the largest tensor of a file."""
    from safetensors import safe_open

    with safe_open(weights(folder), framework="pt") as file:
        return max(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def load_or_evict(folder: Path, cold: bool) -> None:
    """Have the files in the system's cache, or ask the system to forget them."""
    for name in ("base", *SOURCES):
        with weights(folder / name).open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and file.read(16 << 20):
                pass


def one(tool: str, name: str, folder: Path, work: Path, cold: bool) -> dict[str, float]:
    """Measure a run in a fresh process."""
    load_or_evict(folder, cold)
    output = work / tool
    start = time.perf_counter()
    found = harness.ask(__file__, tool, folder, name, output)
    found["process"] = time.perf_counter() - start
    shutil.rmtree(output)
    return found


def compare(name: str, folder: Path, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All runs of one method."""
    runs: dict[str, list[dict[str, float]]] = {tool: [] for tool in args.tools}
    for turn in range(args.repeats):
        for tool in args.tools if turn % 2 == 0 else args.tools[::-1]:
            runs[tool].append(one(tool, name, folder, work, args.cold))
    best = {t: {k: min(run[k] for run in rs) for k in rs[0]} for t, rs in runs.items()}
    row: dict[str, Any] = {"method": name, "runs": runs, "best": best}
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


def render(rows: list[dict[str, Any]], largest: int) -> str:
    head = ["method", "wall", "median", "target", "CPU", "process", "seconds", "memory", "theirs"]

    def cells(row: dict[str, Any]) -> list[str]:
        missing = float("nan")
        ours, theirs = row["best"]["gradmerge"], row["best"].get("mergekit", {})
        ratios = [f"{row.get(k, missing):.2f}" for k in ("wall", "wall_median", "cpu", "process")]
        target = TARGETS.get(row["method"])
        ratios.insert(2, "" if target is None else f"{target:.1f}")
        memory = [f"{tool.get('memory', missing) / largest:.1f}" for tool in (ours, theirs)]
        seconds = f"{ours['wall']:.1f} / {theirs.get('wall', missing):.1f}"
        return [row["method"], *ratios, seconds, *memory, f"{row.get('throughput', missing):.2f}"]

    return harness.table([*head, "of a copy's throughput"], [cells(row) for row in rows])


def main() -> None:
    harness.answer(lambda tool, folder, name, output: TOOLS[tool](Path(folder), name, Path(output)))
    parser = harness.make_parser(__doc__, "bench")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="files leave the cache before each run")
    args = parser.parse_args()
    folder = args.cache.resolve() / f"llama-{args.size}"
    words = 512 if args.size == "tiny" else 32000
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = harness.llama("bfloat16", vocab_size=words, **heads, **SIZES[args.size])
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
