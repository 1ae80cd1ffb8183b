"""Memory of the layer-wise driver, beside a fit end to end on the same files.

    python scripts/bench_layerwise.py --json layerwise.json

A Llama, of 24 layers unless told, made here: random weights, base and two sources, the sources a
little off the base. Each run is a process of its own. It learns a tiny model first, so that all
code is loaded, gives free memory back (`malloc_trim`), takes its anonymous resident memory
(RssAnon), learns one coefficient a weight and source for a few steps with Adam, and exports; the
layer-wise driver scores the merge and the experts in the end, which the peak counts, too. Mapped
files are the system's cache and not counted. Reported are the peak above that start, and its parts
that are known: of the block that is learned (end to end: of the model) the coefficients, their
gradient and Adam's two moments; the hidden states that are kept between blocks; and what autograd
saves of one forward pass of a block for its backward, other than weights (counted as it is saved).
What is left is shown as a multiple of one block of one source in float32, the dtype of the
computation; the target is three.

`--scoring N` times the scores in the end, of N batches: one block merged once for all, beside the
whole network merged for each batch.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gradmerge.engine.opening import open_plan
from local_llama import make_llamas
from measuring import measured

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SOURCES = ("a", "b")
TOKENS, EXAMPLES, BATCH = 64, 16, 8
SIZES = {
    "5m": {"hidden_size": 640, "intermediate_size": 1792, "num_attention_heads": 10},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
}


def make_models(folder: Path, size: str, dtype: str, layers: int) -> None:
    """Base and sources, once."""
    heads = {"num_key_value_heads": SIZES[size]["num_attention_heads"]}
    stack = {"vocab_size": 1024, "num_hidden_layers": layers}
    make_llamas(folder, SOURCES, 0.01, dtype, **stack, **heads, **SIZES[size])


def entries(folder: Path, part: str = "") -> int:
    """Entries of one source's tensors with this in their names."""
    from safetensors import safe_open

    with safe_open(folder / "base" / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if part in name]  # noqa: SIM118
        return sum(file.get_tensor(name).numel() for name in names)


def run(
    kind: str, warm: Path, folder: Path, output: Path, steps: int, memory: float
) -> dict[str, float]:
    """One run, in this process, after one of a tiny model, for which all code is loaded."""
    import lightning
    import torch

    from gradmerge import MergeDataModule, MergeModule, Recipe, TaskData
    from gradmerge._memory import trim_heap
    from gradmerge.coefficients import Constant, Element
    from gradmerge.drivers import Job, LayerWise
    from gradmerge.drivers.layerwise.block import MergedBlock
    from gradmerge.drivers.layerwise.cache import Activations
    from gradmerge.export.folder import export_merged
    from gradmerge.objectives import KLToSource, Objective
    from gradmerge.operators._native import native_kernels

    native_kernels()  # compiled once a machine, not once a merge

    def make_trainer(place: Path, callbacks: Any, overrides: dict[str, Any]) -> lightning.Trainer:
        settings = {
            "default_root_dir": place,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "callbacks": list(callbacks),
        }
        return lightning.Trainer(**{**settings, **overrides})

    def learn(models: Path, place: Path, tokens: int) -> None:
        torch.manual_seed(0)
        tasks = {}
        for source in SOURCES:
            drawn = torch.randint(3, 1000, (3, EXAMPLES, tokens))
            splits = ("adaptation", "selection", "test")
            path = {
                split: [{"input_ids": row, "labels": row} for row in rows]
                for split, rows in zip(splits, drawn, strict=True)
            }
            tasks[source] = TaskData(path=path, kind="tensors")
        data = MergeDataModule(tasks, batch_size=BATCH)
        recipe = Recipe(
            {name: str(models / name) for name in SOURCES},
            base=str(models / "base"),
            coefficients=Element(),
            init=Constant(0.3),
        )
        if kind == "layerwise":
            job = Job(recipe, data, place, make_trainer, options={"learning_rate": 0.01})
            LayerWise(steps=steps, activation_memory=memory).run(job)
        else:
            module = MergeModule(
                recipe,
                Objective([KLToSource()]),
                "streamed",
                learning_rate=0.01,
                score_experts=False,
            )
            trainer = make_trainer(place, [], {"max_steps": steps, "limit_val_batches": 0})
            trainer.fit(module, datamodule=data)
            export_merged(module.merged, place / "merged")

    result: dict[str, float] = {"held": 0.0, "spilled": 0.0, "saved": 0.0}
    learn(warm, output / "warm", 8)
    put = Activations.put

    def watched(self: Activations, name: str, tensor: torch.Tensor) -> None:
        put(self, name, tensor)
        result["held"] = max(result["held"], float(self.held))
        result["spilled"] = max(result["spilled"], float(self.spilled))

    Activations.put = watched  # type: ignore[method-assign]
    accumulate = MergedBlock.accumulate

    def counted(block: MergedBlock, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss()
        weights = {t.untyped_storage().data_ptr() for t in block._theta.values()}
        saved = sum(size for place, size in sizes.items() if place not in weights)
        result["saved"] = max(result["saved"], float(saved))
        return value

    def counting(self: MergedBlock, losses: Any, raws: Any) -> Any:
        return accumulate(self, [partial(counted, self, loss) for loss in losses], raws)

    MergedBlock.accumulate = counting  # type: ignore[method-assign]
    gc.collect()
    trim_heap()
    with measured(result):
        learn(folder, output, TOKENS)
    return result


def scoring(folder: Path, batches: int, tokens: int, runs: int) -> dict[str, float]:
    """Least seconds of each way to score the same batches, in turn, in this process."""
    import time

    import torch

    from gradmerge import Recipe
    from gradmerge.coefficients import Constant, Element
    from gradmerge.drivers.layerwise.blocks import find_blocks
    from gradmerge.drivers.layerwise.cache import Activations
    from gradmerge.drivers.layerwise.chain import Chain
    from gradmerge.drivers.layerwise.scores import FinishedMerge

    recipe = Recipe(
        {name: str(folder / name) for name in SOURCES},
        base=str(folder / "base"),
        coefficients=Element(),
        init=Constant(0.3),
    )
    plan = open_plan(recipe)
    chain = Chain(plan, find_blocks(plan, None), torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    drawn = torch.randint(3, 1000, (batches, BATCH, tokens))
    asked = [(SOURCES[i % 2], {"input_ids": ids}) for i, ids in enumerate(drawn)]
    chain.verify({"input_ids": drawn[0, :1]}, SOURCES[0])
    raw = plan.initial_raw()

    def read(source: str, name: str) -> torch.Tensor:
        return plan.materialise(name, raw, torch.float32)

    taken: dict[str, list[float]] = {"whole": [], "by blocks": []}
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=folder) as work:
        for _ in range(runs):
            for way, seconds in taken.items():
                store = Activations(Path(work) / "activations", 2**32)
                network = FinishedMerge(chain, {name: name for name in SOURCES}, read, store)
                began = time.perf_counter()
                if way == "by blocks":
                    network.pass_blocks(asked)
                for task, inputs in asked:
                    network(task=task, **inputs)
                seconds.append(time.perf_counter() - began)
    return {way: min(seconds) for way, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="5m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--layers", type=int, default=24, help="blocks")
    parser.add_argument("--steps", type=int, default=3, help="steps a block; of the fit")
    parser.add_argument("--scoring", type=int, help="instead: time of scoring so many batches")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each example to score")
    parser.add_argument("--runs", type=int, default=3, help="of each way to score")
    parser.add_argument("--cache", default=".cache/bench", help="where the models are kept")
    parser.add_argument("--json", help="file to write all figures to")
    parser.add_argument("--run", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        kind, warm, folder, output, steps, memory = args.run
        found = run(kind, Path(warm), Path(folder), Path(output), int(steps), float(memory))
        print(json.dumps(found))
        return
    number = "" if args.layers == 24 else f"-{args.layers}"
    folder = Path(args.cache).resolve() / f"layers-{args.size}-{args.dtype}{number}"
    warm = folder.with_name(f"layers-tiny-{args.dtype}{number}")
    make_models(folder, args.size, args.dtype, args.layers)
    if args.scoring:
        least = scoring(folder, args.scoring, args.tokens, args.runs)
        ratio = least["by blocks"] / least["whole"]
        print(
            f"{args.scoring} batches, a merge of the whole for each: {least['whole']:.1f} s; block "
            f"by block: {least['by blocks']:.1f} s, {ratio:.2f} of it"
        )
        return
    make_models(warm, "tiny", args.dtype, args.layers)
    block, whole = 4 * entries(folder, ".layers.0."), 4 * entries(folder)
    stored = sum(f.stat().st_size for f in folder.glob("*/model.safetensors"))
    print(f"a block of one source: {block / 1e6:.1f} MB in float32; files {stored / 1e6:.0f} MB")
    rows = []
    for kind, name, memory in (
        ("layerwise", "layer-wise", 4.0),
        ("layerwise", "layer-wise, all spilled", 0.0),
        ("fit", "end to end", 0.0),
    ):
        with tempfile.TemporaryDirectory(dir=folder) as work:
            command = [sys.executable, __file__, "--run", kind, str(warm), str(folder), work]
            command += [str(args.steps), str(memory)]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise SystemExit(f"{name} failed:\n{ran.stderr[-3000:]}")
        found = json.loads(ran.stdout.splitlines()[-1])
        found["state"] = 4.0 * len(SOURCES) * (block if kind == "layerwise" else whole)
        found["rest"] = found["memory"] - found["state"] - found["held"] - found["saved"]
        rows.append({"run": name, **found, "rest_in_blocks": found["rest"] / block})
        print(
            f"{name}: peak {found['memory'] / 1e6:.0f} MB = coefficients, gradient and moments "
            f"{found['state'] / 1e6:.0f} + hidden states {found['held'] / 1e6:.0f} (spilled "
            f"{found['spilled'] / 1e6:.0f}) + saved for backward {found['saved'] / 1e6:.0f} + rest "
            f"{found['rest'] / 1e6:.0f}, {found['rest'] / block:.2f} blocks; {found['wall']:.0f} s",
            flush=True,
        )
    if args.json:
        content = {
            "size": args.size,
            "layers": args.layers,
            "dtype": args.dtype,
            "block": block,
            "rows": rows,
        }
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
