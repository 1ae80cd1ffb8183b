"""What a training step of a merge costs, over forward and backward of one ordinary model.

    python scripts/bench_step.py --json step.json

Time: CPU time of one step (merge, forward, backward, contraction, Adam on the coefficients) over
that of a plain forward and backward of one model of the same architecture in float32. All cases of
a model and dtype run in one process and take turns, the reference beside each number of sources and
in alternating order, so that a busy machine slows both; the best of each counts, the median of the
paired ratios beside it. Unless told, both sides use the C library's allocator as it is.

Memory: the highest anonymous resident memory (RssAnon) during two steps, interpreter and imports
included. Every case and its reference run in a fresh process of the same kind, with the same
allocator settings; unless told, large freed blocks go back to the system, on both sides: by default
the C library keeps up to a quarter more than is in use, and how much is chance. Sources are
memory-mapped files: the system caches them, they are not counted. The bound on streamed memory is
the plain peak less the weights, plus two layers of weights.

Part `elements` is one coefficient a weight (NP Merge of a pair) over plain fine-tuning of a model:
forward, backward and Adam on all weights, in time and memory.

Merged weights and computation are float32 in every case; `dtype` is what the files hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gradmerge import MergedModel, Recipe
from gradmerge._memory import release_freed_memory
from gradmerge.coefficients import Complement, Element, Sigmoid, Uniform
from gradmerge.engine.opening import open_plan
from gradmerge.operators._native import native_kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("resident", "streamed")
EXAMPLES = 8
TARGETS = {
    ("llama", "resident", 2): 1.10,
    ("llama", "resident", 8): 1.20,
    ("vit", "resident", 2): 1.15,
    ("vit", "resident", 8): 1.35,
    ("llama", "streamed", 2): 1.35,
    ("llama", "streamed", 8): 1.80,
    ("vit", "streamed", 2): 1.35,
    ("vit", "streamed", 8): 1.80,
}


@dataclass(frozen=True)
class Case:
    """One measured merge; `sources` = 0 is the plain reference."""

    model: str
    dtype: str = "fp32"
    sources: int = 0
    memory: str = "resident"
    tasks: int = 1
    kernels: str = "auto"
    elements: bool = False
    """One coefficient a weight; the reference, too, has an optimiser of all weights."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        tasks = f", {self.tasks} tasks" if self.tasks > 1 else ""
        kernels = "" if self.kernels == "auto" else f", {self.kernels} kernels"
        kernels += ", a coefficient a weight" if self.elements else ""
        return f"{self.model}, {self.dtype}, K={self.sources}, {self.memory}{tasks}{kernels}"


# ---- models, sources, batches -------------------------------------------------------------------


def architecture(name: str) -> nn.Module:
    """The network, with seeded random weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    if name in ("llama", "llama-tiny"):
        big = name == "llama"
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=16_384 if big else 128,
                hidden_size=512 if big else 32,
                intermediate_size=1_664 if big else 64,
                num_hidden_layers=12 if big else 2,
                num_attention_heads=8 if big else 2,
                use_cache=False,
            )
        ).eval()
    config = transformers.ViTConfig(
        hidden_size=640,
        intermediate_size=2_560,
        num_hidden_layers=12,
        num_attention_heads=10,
        patch_size={"vit": 16, "vit-32": 32}[name],
        image_size=224,
        num_labels=1000,
    )
    return transformers.ViTForImageClassification(config).eval()


def write_sources(folder: Path, model: str, dtype: str, count: int) -> list[Path]:
    """A base and `count` models near it, as Hugging Face folders."""
    module = architecture(model)
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    paths = []
    for i in range(count + 1):
        path = folder / model / dtype / ("base" if i == 0 else f"source{i}")
        path.mkdir(parents=True)
        generator = torch.Generator().manual_seed(i)
        noise = 0.0 if i == 0 else 0.002
        near = {
            n: torch.randn(t.shape, generator=generator).mul_(noise).add_(t).to(DTYPES[dtype])
            for n, t in state.items()
        }
        save_file(near, path / "model.safetensors", metadata={"format": "pt"})
        module.config.save_pretrained(path)  # type: ignore[operator, union-attr]
        if i == 0:
            config = json.loads((path / "config.json").read_text())
            config["architectures"] = [type(module).__name__]
        (path / "config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths


def batches(model: str, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        if model.startswith("llama"):
            ids = torch.randint(0, 128, (EXAMPLES, 128), generator=generator)
            made.append({"input_ids": ids, "labels": ids})
        else:
            pixels = torch.randn(EXAMPLES, 3, 224, 224, generator=generator)
            labels = torch.randint(0, 1000, (EXAMPLES,), generator=generator)
            made.append({"pixel_values": pixels, "labels": labels})
    return made


def recipe_of(case: Case, folder: Path) -> Recipe:
    root = folder / case.model / case.dtype
    sources = {f"source{k}": str(root / f"source{k}") for k in range(1, case.sources + 1)}
    if case.elements:
        return Recipe(sources, coefficients=Complement(Sigmoid(Element())), init=Uniform())
    return Recipe(sources, base=str(root / "base"))


def merge_of(case: Case, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """An opened merge and its raw coefficients."""
    plan = open_plan(recipe_of(case, folder))
    return plan, plan.initial_raw()


def step_of(case: Case, folder: Path) -> Callable[[], None]:
    """One training step of a merge, or forward and backward of the plain model."""
    data = batches(case.model, case.tasks)
    if case.sources == 0:
        module = architecture(case.model)
        tuned = torch.optim.Adam(module.parameters(), lr=1e-4) if case.elements else None

        def plain() -> None:
            for batch in data:
                module(**batch).loss.backward()
            if tuned is not None:
                tuned.step()
            module.zero_grad(set_to_none=True)

        return plain
    merged = MergedModel(recipe_of(case, folder), memory=case.memory).train()  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(merged.parameters(), lr=1e-3)

    def step() -> None:
        os.environ["GRADMERGE_KERNELS"] = case.kernels
        loss, _ = merged.accumulate([lambda b=b: merged(**b).loss for b in data])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---- time ---------------------------------------------------------------------------------------


def cpu_seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def time_group(cases: Sequence[Case], folder: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """CPU time of cases that share a reference, in turns."""
    first = cases[0]
    reference = step_of(Case(first.model, tasks=first.tasks, elements=first.elements), folder)
    steps = [step_of(case, folder) for case in cases]
    for step in (reference, *steps):
        step()  # page in the files, size the buffers
    plain: list[list[float]] = [[] for _ in cases]
    ours: list[list[float]] = [[] for _ in cases]
    groups = itertools.groupby(range(len(cases)), key=lambda i: cases[i].sources)
    together = [list(members) for _, members in groups]
    for turn in range(repeats):
        for members in together:
            # one plain step for all cases of a number of sources, before or after them in turn
            if turn % 2 == 0:
                beside = cpu_seconds(reference)
                for i in members:
                    ours[i].append(cpu_seconds(steps[i]))
            else:
                for i in reversed(members):
                    ours[i].append(cpu_seconds(steps[i]))
                beside = cpu_seconds(reference)
            for i in members:
                plain[i].append(beside)
    floor = min(min(times) for times in plain)
    for i, case in enumerate(cases):
        paired = statistics.median(o / p for o, p in zip(ours[i], plain[i], strict=True))
        common = case.tasks == 1 and not case.elements
        target = TARGETS.get((case.model, case.memory, case.sources)) if common else None
        best = min(ours[i])
        yield record(case, "CPU time", "s", best, floor, median_paired_ratio=paired, target=target)


def kernel_group(
    model: str, dtype: str, counts: Sequence[int], folder: Path, repeats: int
) -> Iterator[dict[str, Any]]:
    """CPU time of merging and contracting all weights, compiled kernels over torch's operations."""
    for count in counts:
        step_case = Case(model, dtype, count)
        plan, raws = merge_of(step_case, folder)
        out = {key: torch.zeros(plan.tensors[key].shape) for key in plan.learned}
        grads = {key: torch.randn_like(tensor) for key, tensor in out.items()}

        def merge(out: dict[str, Tensor] = out, plan: Any = plan, raws: Any = raws) -> None:
            for key, tensor in out.items():
                plan.combine(key, plan.raw(key, raws), tensor)

        def contract(grads: dict[str, Tensor] = grads, plan: Any = plan, raws: Any = raws) -> None:
            for key, grad in grads.items():
                plan.contract(key, grad, plan.raw(key, raws))

        for name, work in (("merge", merge), ("contraction", contract)):
            best = {"native": float("inf"), "torch": float("inf")}
            for _ in range(repeats + 1):
                for kernels in best:
                    os.environ["GRADMERGE_KERNELS"] = kernels
                    best[kernels] = min(best[kernels], cpu_seconds(work))
            quantity = f"{name} alone, native over torch"
            yield record(step_case, quantity, "s", best["native"], best["torch"])


# ---- memory -------------------------------------------------------------------------------------


def anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not report RssAnon")


@contextmanager
def peak_of(interval: float = 0.003) -> Iterator[list[float]]:
    """Sample anonymous memory by a thread; the list's one entry is the peak in MB."""
    peak = [anonymous_mb()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            peak[0] = max(peak[0], anonymous_mb())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def worker(case: Case, folder: Path, malloc: str, threads: int, steps: int = 2) -> None:
    """Run one case in this process and print its peak."""
    torch.set_num_threads(threads)
    if malloc == "release":
        release_freed_memory()
    import transformers  # noqa: F401  counted in every case alike

    imported = anonymous_mb()
    step = step_of(case, folder)
    with peak_of() as peak:
        for _ in range(steps):
            step()
    print(json.dumps({"peak": peak[0], "imported": imported}))


def peak_in_subprocess(case: Case, folder: Path, malloc: str, threads: int) -> float:
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(case))]
    command += ["--folder", str(folder), "--malloc", malloc, "--threads", str(threads)]
    # No allocator setting of the caller's environment may reach one of the two and not the other.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(json.loads(out.stdout.splitlines()[-1])["peak"])


def memory_group(
    cases: Sequence[Case], folder: Path, malloc: str, threads: int
) -> Iterator[dict[str, Any]]:
    """Peaks of cases of one model, each beside a plain run with the same number of batches."""
    plain: dict[int, float] = {}
    for case in cases:
        if case.tasks not in plain:
            reference = Case(case.model, tasks=case.tasks, elements=case.elements)
            plain[case.tasks] = peak_in_subprocess(reference, folder, malloc, threads)
        peak = peak_in_subprocess(case, folder, malloc, threads)
        quantity = f"peak anonymous memory, malloc {malloc}"
        reference_peak = plain[case.tasks]
        target = None if case.elements else 1.0
        if target and case.memory == "streamed":
            weights, layer = weight_mb(case.model)
            target = (reference_peak - weights + 2 * layer) / reference_peak
        yield record(case, quantity, "MB", peak, reference_peak, target=target)


def weight_mb(model: str) -> tuple[float, float]:
    """Weights of the network and of one of its layers, MB in float32."""
    module = architecture(model)
    blocks = next(m for m in module.modules() if isinstance(m, nn.ModuleList))
    return tuple(sum(p.numel() for p in m.parameters()) * 4 / 2**20 for m in (module, blocks[0]))  # type: ignore[return-value]


# ---- the whole ----------------------------------------------------------------------------------


def record(
    case: Case, quantity: str, unit: str, ours: float, reference: float, **more: float | None
) -> dict[str, Any]:
    entry = {
        "case": f"{case.name}: {quantity}",
        "quantity": quantity,
        **asdict(case),
        "ours": ours,
        "reference": reference,
        "ratio": ours / reference,
        "unit": unit,
        **more,
    }
    target = f"  target {more['target']:.3f}" if more.get("target") else ""
    median = more.get("median_paired_ratio")
    paired = f"  (median of pairs {median:.3f})" if median else ""
    numbers = f"{ours:9.3f} {reference:9.3f} {unit:<3} {entry['ratio']:6.3f}"
    print(f"{entry['case']:<78} {numbers}{paired}{target}", flush=True)
    return entry


def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    counts = options.sources
    records: list[dict[str, Any]] = []
    for model in options.models:
        for dtype in options.dtypes:
            write_sources(folder, model, dtype, max(counts))
            cases = [
                Case(model, dtype, k, memory, kernels=kernels)
                for k in counts
                for memory in options.modes
                for kernels in options.kernels
            ]
            several = [Case(model, dtype, max(counts), "resident", options.tasks)]
            # a step of many batches is slow, and it says the same for every model and dtype
            once = model == options.models[0] and dtype == options.dtypes[-1]
            if "time" in options.parts:
                records += time_group(cases, folder, options.repeats)
            if "memory" in options.parts:
                records += memory_group(cases, folder, options.malloc or "release", options.threads)
            if "kernels" in options.parts and native_kernels() is not None:
                records += kernel_group(model, dtype, counts, folder, options.repeats)
            if "tasks" in options.parts and once:
                records += time_group(several, folder, max(1, options.repeats // 2))
                records += memory_group(
                    several, folder, options.malloc or "release", options.threads
                )
            if "elements" in options.parts and once:
                pairs = [Case(model, dtype, 2, memory, elements=True) for memory in options.modes]
                records += time_group(pairs, folder, options.repeats)
                records += memory_group(pairs, folder, options.malloc or "release", options.threads)
            for file in (folder / model / dtype).rglob("*.safetensors"):
                file.unlink()
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the records there")
    parser.add_argument("--models", nargs="+", default=["llama", "vit"], help="llama, vit, vit-32")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--sources", nargs="+", type=int, default=[2, 4, 8], help="how many")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parts = ["time", "memory", "tasks", "kernels", "elements"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--tasks", type=int, default=8, help="tasks a step in the multi-task case")
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=["auto"],
        choices=["auto", "native", "torch"],
        help="what merges on the CPU: compiled kernels (auto: if there is a compiler) or torch",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--malloc",
        choices=["release", "default"],
        help="release: large freed blocks go back to the system; default: glibc's own ways "
        "(default: default for time, release for memory)",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny network, for tests")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where sources go (default: temporary)")
    options = parser.parse_args(arguments)
    if options.worker:
        worker(Case(**json.loads(options.worker)), options.folder, options.malloc, options.threads)
        return
    if options.quick:
        options.models, options.dtypes, options.sources = ["llama-tiny"], ["bf16"], [2]
        options.tasks, options.repeats = 2, 2
    torch.set_num_threads(options.threads)
    if options.malloc == "release":
        release_freed_memory()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        records = run(options, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
