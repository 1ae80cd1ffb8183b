"""Memory of the layer-wise driver, beside a fit end to end on the same files.

    python benchmarks/layerwise.py --json layerwise.json

A Llama (24 layers by default) is made here: random weights, base and two sources, the sources a
little off the base. Each run is a process of its own. It learns a tiny model first, so that all
code is loaded, gives free memory back (`malloc_trim`), takes its anonymous resident memory
(RssAnon), learns one coefficient per weight and source for a few steps with Adam, and exports; the
layer-wise driver scores the merge and the experts in the end, which the peak counts, too. Mapped
files are the system's cache and not counted. The report holds the peak above that start, and its
known parts: of the block that is learned (end to end: of the model) the coefficients, their
gradient and Adam's two moments; the hidden states that are kept between blocks; and what autograd
saves of one forward pass of a block for its backward, other than weights (counted as it is saved).
The rest is shown as a multiple of one block of one source in float32, the dtype of the computation;
the target is three.

`--scoring N` times the final scores, of N batches: one block merged once for all, beside the whole
network merged for each batch.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness

SOURCES = ("a", "b")
TOKENS, EXAMPLES, BATCH = 64, 16, 8
SIZES = {
    "5m": {"hidden_size": 640, "intermediate_size": 1792, "num_attention_heads": 10},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
}
RUNS = (
    ("layerwise", "layer-wise", 4.0),
    ("layerwise", "layer-wise, all spilled", 0.0),
    ("fit", "end to end", 0.0),
)


def entries(folder: Path, part: str = "") -> int:
    """Count the entries of one source's tensors with this in their names."""
    from safetensors import safe_open

    with safe_open(folder / "base" / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if part in name]  # noqa: SIM118
        return sum(file.get_tensor(name).numel() for name in names)


def recipe_of(folder: Path) -> Any:
    from gradmerge import Recipe
    from gradmerge.coefficients import Constant, Element

    sources = {name: str(folder / name) for name in SOURCES}
    base = str(folder / "base")
    return Recipe(sources, base=base, coefficients=Element(), init=Constant(0.3))


def data_of(tokens: int) -> Any:
    import torch

    from gradmerge import MergeDataModule, TaskData

    torch.manual_seed(0)
    tasks = {}
    for source in SOURCES:
        drawn = torch.randint(3, 1000, (3, EXAMPLES, tokens))
        path = {
            split: [{"input_ids": row, "labels": row} for row in rows]
            for split, rows in zip(("adaptation", "selection", "test"), drawn, strict=True)
        }
        tasks[source] = TaskData(path=path, kind="tensors")
    return MergeDataModule(tasks, batch_size=BATCH)


def learn(kind: str, models: Path, place: Path, tokens: int, steps: int, memory: float) -> None:
    """Learn for some steps, and export."""
    from gradmerge import MergeModule, export_merged
    from gradmerge.drivers import Job, LayerWise
    from gradmerge.objectives import KLToSource, Objective

    recipe, data = recipe_of(models), data_of(tokens)
    if kind == "layerwise":

        def make_trainer(place: Path, callbacks: Any, overrides: dict[str, Any]) -> Any:
            options = {"default_root_dir": place, "callbacks": list(callbacks)}
            return harness.quiet_trainer(**{**options, **overrides})

        job = Job(recipe, data, place, make_trainer, options={"learning_rate": 0.01})
        LayerWise(steps=steps, activation_memory=memory).run(job)
        return
    objective = Objective([KLToSource()])
    module = MergeModule(recipe, objective, "streamed", learning_rate=0.01, score_experts=False)
    trainer = harness.quiet_trainer(default_root_dir=place, max_steps=steps, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    export_merged(module.merged, place / "merged")


def run(
    kind: str, warm: str, folder: str, output: str, steps: int, memory: float
) -> dict[str, float]:
    """Measure one run, in this process, after one of a tiny model, for which all code is loaded."""
    from gradmerge._memory import trim_heap
    from gradmerge.operators._native import native_kernels

    native_kernels()  # compiled once per machine, not once per merge
    learn(kind, Path(warm), Path(output) / "warm", 8, steps, memory)
    result: dict[str, float] = {"held": 0.0, "spilled": 0.0, "saved": 0.0}
    watch(result)
    gc.collect()
    trim_heap()
    with harness.measured(result):
        learn(kind, Path(folder), Path(output), TOKENS, steps, memory)
    return result


def watch(result: dict[str, float]) -> None:
    """Have the driver record what it holds of hidden states, and what autograd saves."""
    import torch

    from gradmerge.drivers.layerwise.activations import Activations
    from gradmerge.engine.leaves import Leaves

    put, accumulate = Activations.put, Leaves.accumulate

    def watched(self: Activations, name: str, tensor: torch.Tensor) -> None:
        put(self, name, tensor)
        result["held"] = max(result["held"], float(self.held))
        result["spilled"] = max(result["spilled"], float(self.spilled))

    def counted(leaves: Leaves, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss()
        weights = {t.untyped_storage().data_ptr() for t in leaves.values()}
        saved = sum(size for place, size in sizes.items() if place not in weights)
        result["saved"] = max(result["saved"], float(saved))
        return value

    def counting(self: Leaves, losses: Any, scale: float = 1.0) -> Any:
        return accumulate(self, [partial(counted, self, loss) for loss in losses], scale)

    Activations.put = watched  # type: ignore[method-assign]
    Leaves.accumulate = counting  # type: ignore[method-assign]


def scoring(folder: Path, batches: int, tokens: int, runs: int) -> dict[str, float]:
    """Return the least seconds of each way to score the same batches, in turn, in this process."""
    import torch

    from gradmerge.drivers.layerwise.chain import Chain
    from gradmerge.drivers.layerwise.files import Starts
    from gradmerge.drivers.layerwise.scores import score
    from gradmerge.engine.opening import open_plan
    from gradmerge.objectives import Objective

    plan = open_plan(recipe_of(folder))
    chain = Chain(plan, None, torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    drawn = torch.randint(3, 1000, (batches, BATCH, tokens))
    asked = [(SOURCES[i % 2], {"input_ids": ids, "labels": ids}) for i, ids in enumerate(drawn)]
    chain.verify({"input_ids": drawn[0, :1]}, SOURCES[0])
    starts = Starts(plan, torch.float32)
    chain.model.state.raw = dict(starts)
    merged = partial(chain.theta, finished=True)

    def whole() -> None:
        for task, batch in asked:
            chain.source = task
            with chain.weights(merged):
                chain.run_network(batch)

    def by_blocks() -> None:
        score(chain, Objective(), lambda: asked, experts=False)

    taken: dict[str, list[float]] = {"whole": [], "by blocks": []}
    with torch.no_grad():
        for _ in range(runs):
            for way, seconds in zip((whole, by_blocks), taken.values(), strict=True):
                began = time.perf_counter()
                way()
                seconds.append(time.perf_counter() - began)
    return {way: min(seconds) for way, seconds in taken.items()}


def show(name: str, found: dict[str, float], block: int) -> None:
    mb = {key: value / 1e6 for key, value in found.items()}
    print(
        f"{name}: peak {mb['memory']:.0f} MB = coefficients, gradient and moments "
        f"{mb['state']:.0f} + hidden states {mb['held']:.0f} (spilled {mb['spilled']:.0f}) + saved "
        f"for backward {mb['saved']:.0f} + rest {mb['rest']:.0f}, {found['rest'] / block:.2f} "
        f"blocks; {found['wall']:.0f} s",
        flush=True,
    )


def main() -> None:
    harness.answer(run)
    parser = harness.make_parser(__doc__, "bench")
    parser.add_argument("--size", choices=SIZES, default="5m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--layers", type=int, default=24, help="blocks")
    parser.add_argument("--steps", type=int, default=3, help="steps per block; of the fit")
    parser.add_argument("--scoring", type=int, help="instead: time the scores of so many batches")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each example to score")
    parser.add_argument("--runs", type=int, default=3, help="of each way to score")
    args = parser.parse_args()
    number = "" if args.layers == 24 else f"-{args.layers}"

    def models(size: str) -> Path:
        fields = {**SIZES[size], "vocab_size": 1024, "num_hidden_layers": args.layers}
        config = harness.llama(
            args.dtype, num_key_value_heads=fields["num_attention_heads"], **fields
        )
        folder = args.cache.resolve() / f"layers-{size}-{args.dtype}{number}"
        harness.make_models(folder, config, SOURCES, 0.01)
        return folder

    folder = models(args.size)
    if args.scoring:
        least = scoring(folder, args.scoring, args.tokens, args.runs)
        ratio = least["by blocks"] / least["whole"]
        print(
            f"{args.scoring} batches, the whole merged for each: {least['whole']:.1f} s; block "
            f"by block: {least['by blocks']:.1f} s, {ratio:.2f} of it"
        )
        return
    warm = models("tiny")
    block, whole = 4 * entries(folder, ".layers.0."), 4 * entries(folder)
    stored = sum(f.stat().st_size for f in folder.glob("*/model.safetensors"))
    print(f"a block of one source: {block / 1e6:.1f} MB in float32; files {stored / 1e6:.0f} MB")
    rows = []
    for kind, name, memory in RUNS:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            found = harness.ask(__file__, kind, warm, folder, work, args.steps, memory)
        found["state"] = 4.0 * len(SOURCES) * (block if kind == "layerwise" else whole)
        found["rest"] = found["memory"] - found["state"] - found["held"] - found["saved"]
        rows.append({"run": name, **found, "rest_in_blocks": found["rest"] / block})
        show(name, found, block)
    made = {"size": args.size, "layers": args.layers, "dtype": args.dtype, "block": block}
    harness.write_json(args.json, {**made, "rows": rows})


if __name__ == "__main__":
    main()
