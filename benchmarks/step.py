"""Cost of a training step of a merge, over forward and backward of one ordinary model.

    python benchmarks/step.py --json step.json

Time is CPU time. All cases of a model and dtype run in one process and take turns, the reference
beside each case and in alternating order, so that a busy machine slows both; the best of each
counts. Memory is the highest anonymous resident memory (RssAnon) during two steps, interpreter and
imports included, of each case in a fresh process. Merged weights and computation are float32 in
every case; `dtype` is that of the files. docs/benchmarks/training.md has the rest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import harness
from gradmerge import MergedModel, Recipe
from gradmerge.coefficients import Complement, Element, Sigmoid, Uniform
from gradmerge.common.memory import release_freed_memory
from gradmerge.engine.opening import open_plan
from gradmerge.operators._native import native_kernels

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
LLAMAS = {"llama": "60m", "llama-tiny": "tiny"}
MODES = ("resident", "streamed")
EXAMPLES = 8
TARGETS = {
    ("llama", "resident"): {2: 1.10, 8: 1.20},
    ("vit", "resident"): {2: 1.15, 8: 1.35},
    ("llama", "streamed"): {2: 1.35, 8: 1.80},
    ("vit", "streamed"): {2: 1.35, 8: 1.80},
}
"""Of CPU time, by model, memory and number of sources."""


@dataclass(frozen=True)
class Case:
    """One measured merge; `sources` = 0 is the plain reference."""

    model: str
    dtype: str = "fp32"
    sources: int = 0
    memory: str = "resident"
    tasks: int = 1
    elements: bool = False
    """One coefficient per weight; the reference, too, has an optimiser of all weights."""
    adapters: bool = False
    """The sources are LoRA adapters of rank 16 on the base."""

    @property
    def name(self) -> str:
        parts = [self.model, self.dtype, f"K={self.sources}", self.memory]
        parts += [f"{self.tasks} tasks"] if self.tasks > 1 else []
        parts += ["LoRA adapters"] if self.adapters else []
        return ", ".join([*parts, "one coefficient per weight"] if self.elements else parts)

    @property
    def reference(self) -> Case:
        return Case(self.model, tasks=self.tasks, elements=self.elements)


# ---- models, batches, steps ---------------------------------------------------------------------


def configuration(model: str, dtype: str) -> Any:
    if model in LLAMAS:
        return harness.llama(LLAMAS[model], dtype, use_cache=False)
    return transformers.ViTConfig(
        hidden_size=640,
        intermediate_size=2_560,
        num_hidden_layers=12,
        num_attention_heads=10,
        patch_size=16,
        image_size=224,
        num_labels=1000,
        architectures=["ViTForImageClassification"],
        dtype=dtype,
    )


def network(model: str) -> nn.Module:
    """Return the network in float32, with seeded random weights."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = configuration(model, "float32")
    return getattr(transformers, config.architectures[0])(config).eval()


def batch_of(model: str, generator: torch.Generator) -> dict[str, Tensor]:
    if model in LLAMAS:
        ids = torch.randint(0, 128, (EXAMPLES, 128), generator=generator)
        return {"input_ids": ids, "labels": ids}
    pixels = torch.randn(EXAMPLES, 3, 224, 224, generator=generator)
    labels = torch.randint(0, 1000, (EXAMPLES,), generator=generator)
    return {"pixel_values": pixels, "labels": labels}


def recipe_of(case: Case, folder: Path) -> Recipe:
    root = folder / case.model / case.dtype
    sources = {f"source{k}": str(root / f"source{k}") for k in range(1, case.sources + 1)}
    if case.adapters:
        return Recipe({n: f"{path}-adapter" for n, path in sources.items()}, str(root / "base"))
    if case.elements:
        return Recipe(sources, coefficients=Complement(Sigmoid(Element())), init=Uniform())
    return Recipe(sources, base=str(root / "base"))


def make_adapters(root: Path, names: Sequence[str], rank: int = 16) -> None:
    """Write LoRA adapters, in PEFT's format, of all matrices in the blocks of a base."""
    shapes = {
        name: tensor.shape
        for name, tensor in load_file(root / "base" / "model.safetensors").items()
        if tensor.dim() == 2 and ".layers." in name
    }
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for weight, (rows, columns) in shapes.items():
            module = f"base_model.model.{weight.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            tensors[f"{module}.lora_B.weight"] = 1e-3 * torch.randn(rows, rank, generator=generator)
        folder = root / f"{name}-adapter"
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": "all-linear",
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings))


def step_of(case: Case, folder: Path) -> Callable[[], None]:
    """One training step of a merge, or forward and backward of the plain model."""
    generator = torch.Generator().manual_seed(1)
    data = [batch_of(case.model, generator) for _ in range(case.tasks)]
    if case.sources == 0:
        module = network(case.model)
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
    reference = step_of(cases[0].reference, folder)
    steps = {case: step_of(case, folder) for case in cases}
    for step in (reference, *steps.values()):
        step()  # page in the files, size the buffers
    ours: dict[Case, list[float]] = {case: [] for case in cases}
    plain: dict[Case, list[float]] = {case: [] for case in cases}
    for turn in range(repeats):
        for case, step in steps.items():
            pair = [(plain, reference), (ours, step)]
            for times, run in pair if turn % 2 == 0 else pair[::-1]:
                times[case].append(cpu_seconds(run))
    floor = min(map(min, plain.values()))
    for case, times in ours.items():
        ratios = [own / beside for own, beside in zip(times, plain[case], strict=True)]
        common = case.tasks == 1 and not case.elements and not case.adapters
        targets = TARGETS.get((case.model, case.memory), {}) if common else {}
        paired, target = statistics.median(ratios), targets.get(case.sources)
        yield record(case, "CPU time", "s", min(times), floor, target, paired)


def kernel_group(case: Case, folder: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """CPU time of merging and contracting all weights, compiled kernels over torch's operations."""
    plan = open_plan(recipe_of(case, folder))
    raws = plan.initial_raw()
    out = {key: torch.zeros(plan.tensors[key].shape) for key in plan.learned}
    grads = {key: torch.randn_like(tensor) for key, tensor in out.items()}

    def merge() -> None:
        for key, tensor in out.items():
            plan.combine(key, plan.z(key, raws), tensor)

    def contract() -> None:
        for key, grad in grads.items():
            plan.contract(key, grad, plan.z(key, raws))

    for name, work in (("merge", merge), ("contraction", contract)):
        best = {"native": float("inf"), "torch": float("inf")}
        for _ in range(repeats + 1):
            for kernels in best:
                with patch.dict(os.environ, GRADMERGE_KERNELS=kernels):
                    best[kernels] = min(best[kernels], cpu_seconds(work))
        quantity = f"{name} alone, native over torch"
        yield record(case, quantity, "s", best["native"], best["torch"])


# ---- memory -------------------------------------------------------------------------------------


def peak_of(case: Case, folder: Path, malloc: str) -> float:
    """Return the MB that two steps of a case take at most, in this process."""
    torch.set_num_threads(1)
    if malloc == "release":
        release_freed_memory()
    step = step_of(case, folder)
    found: dict[str, float] = {}
    with harness.measured(found):
        step()
        step()
    return found["peak"] / 2**20


def memory_group(cases: Sequence[Case], folder: Path, malloc: str) -> Iterator[dict[str, Any]]:
    """Peaks of cases of one model, each beside a plain run with the same number of batches."""

    @cache
    def peak(case: Case) -> float:
        return harness.ask(peak_of, case, folder, malloc)

    for case in cases:
        beside = peak(case.reference)
        target = None if case.elements else 1.1 if case.adapters else 1.0
        if target and case.memory == "streamed" and not case.adapters:
            weights, layer = weight_mb(case.model)
            target = (beside - weights + 2 * layer) / beside
        quantity = f"peak anonymous memory, malloc {malloc}"
        yield record(case, quantity, "MB", peak(case), beside, target)


def weight_mb(model: str) -> tuple[float, float]:
    """Weights of the network and of one of its layers, MB in float32."""
    module = network(model)
    blocks = next(m for m in module.modules() if isinstance(m, nn.ModuleList))
    return tuple(sum(p.numel() for p in m.parameters()) * 4 / 2**20 for m in (module, blocks[0]))  # type: ignore[return-value]


# ---- the whole ----------------------------------------------------------------------------------


def record(
    case: Case,
    quantity: str,
    unit: str,
    ours: float,
    reference: float,
    target: float | None = None,
    paired: float | None = None,
) -> dict[str, Any]:
    name, ratio = f"{case.name}: {quantity}", ours / reference
    more = "" if paired is None else f"  (median of pairs {paired:.3f})"
    more += "" if target is None else f"  target {target:.3f}"
    print(f"{name:<78} {ours:9.3f} {reference:9.3f} {unit:<3} {ratio:6.3f}{more}", flush=True)
    figures = {"ours": ours, "reference": reference, "ratio": ratio, "unit": unit}
    figures |= {"median_paired_ratio": paired, "target": target}
    return {"case": name, "quantity": quantity, **asdict(case), **figures}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    counts, parts, repeats = options.sources, options.parts, options.repeats
    records: list[dict[str, Any]] = []

    def measure(cases: Sequence[Case], repeats: int, kinds: Sequence[str]) -> None:
        if "time" in kinds:
            records.extend(time_group(cases, Path(folder), repeats))
        if "memory" in kinds:
            records.extend(memory_group(cases, Path(folder), options.malloc or "release"))

    for model, dtype in itertools.product(options.models, options.dtypes):
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / model / dtype
            names = [f"source{k}" for k in range(1, max(counts) + 1)]
            harness.make_models(made, configuration(model, DTYPES[dtype]), names, 0.002)
            cases = [Case(model, dtype, k, memory) for k in counts for memory in options.modes]
            measure(cases, repeats, parts)
            if "kernels" in parts and native_kernels() is not None:
                for count in counts:
                    records += kernel_group(Case(model, dtype, count), Path(folder), repeats)
            # a step of many batches is slow, and it says the same for every model and dtype
            once = model == options.models[0] and dtype == options.dtypes[-1]
            if "tasks" in parts and once:
                several = [Case(model, dtype, max(counts), tasks=8)]
                measure(several, max(1, repeats // 2), ("time", "memory"))
            if "adapters" in parts and model in LLAMAS:
                make_adapters(made, names)
                pairs = [
                    Case(model, dtype, k, memory, adapters=adapters)
                    for k in counts
                    for memory in options.modes
                    for adapters in (True, False)
                ]
                measure(pairs, repeats, ("time", "memory"))
            if "elements" in parts and once:
                pairs = [Case(model, dtype, 2, memory, elements=True) for memory in options.modes]
                measure(pairs, repeats, ("time", "memory"))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the records there")
    parser.add_argument("--models", nargs="+", default=["llama", "vit"], choices=["llama", "vit"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--sources", nargs="+", type=int, default=[2, 4, 8], help="how many")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parts = ["time", "memory", "tasks", "kernels", "elements", "adapters"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--malloc",
        choices=["release", "default"],
        help="release: large freed blocks go back to the system; default: as glibc keeps them "
        "(default: default for time, release for memory)",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny network, for tests")
    options = parser.parse_args()
    if options.quick:
        options.models, options.dtypes, options.sources = ["llama-tiny"], ["bf16"], [2]
        options.repeats = 2
    torch.set_num_threads(1)
    if options.malloc == "release":
        release_freed_memory()
    harness.write_json(options.json, run(options))


if __name__ == "__main__":
    main()
