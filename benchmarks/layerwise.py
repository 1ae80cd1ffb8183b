"""Memory of the layer-wise driver, beside a fit end to end on the same files.

    python benchmarks/layerwise.py --json layerwise.json

Each run is a process of its own. It learns a tiny model first, so that all code is loaded, gives
free memory back, takes its anonymous resident memory (RssAnon), learns one coefficient per weight
and source for a few steps, and exports. The table holds the peak above that start, and its known
parts: coefficients, their gradient and Adam's two moments, of the block that is learned (end to
end: of the model); hidden states that are kept between blocks; and what autograd saves of one pass
of a block, other than weights. The rest is a multiple of one block of one source in float32; the
target is three.

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
TOKENS, EXAMPLES, BATCH, STEPS = 64, 16, 8, 3
# Kind and name of each run, and the memory that hidden states may take, in GB.
RUNS = (
    ("layerwise", "layer-wise", 4.0),
    ("layerwise", "layer-wise, all spilled", 0.0),
    ("fit", "end to end", 0.0),
)


def make_models(size: str, layers: int, cache: Path) -> Path:
    config = harness.llama(size, "bfloat16", num_hidden_layers=layers)
    folder = cache / f"layers-{size}-{layers}"
    harness.make_models(folder, config, SOURCES, 0.01)
    return folder


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


def learn(kind: str, models: Path, place: Path, tokens: int, memory: float) -> None:
    from gradmerge import MergeModule, export_merged
    from gradmerge.drivers import Job, LayerWise
    from gradmerge.objectives import KLToSource, Objective

    recipe, data = recipe_of(models), data_of(tokens)
    if kind == "layerwise":

        def make_trainer(place: Path, callbacks: Any, overrides: dict[str, Any]) -> Any:
            options = {"default_root_dir": place, "callbacks": list(callbacks), **overrides}
            return harness.quiet_trainer(**options)

        job = Job(recipe, data, place, make_trainer, options={"learning_rate": 0.01})
        LayerWise(steps=STEPS, activation_memory=memory).run(job)
        return
    objective = Objective([KLToSource()])
    module = MergeModule(recipe, objective, "streamed", learning_rate=0.01, score_experts=False)
    trainer = harness.quiet_trainer(default_root_dir=place, max_steps=STEPS, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    export_merged(module.merged, place / "merged")


def run(kind: str, warm: Path, folder: Path, output: Path, memory: float) -> dict[str, float]:
    """Measure one run, in this process, after one of a tiny model, for which all code is loaded."""
    from gradmerge.common.memory import trim_heap
    from gradmerge.operators._native import native_kernels

    native_kernels()  # compiled once per machine, not once per merge
    learn(kind, warm, output / "warm", 8, memory)
    result: dict[str, float] = {"held": 0.0, "spilled": 0.0, "saved": 0.0}
    watch(result)
    gc.collect()
    trim_heap()
    with harness.measured(result):
        learn(kind, folder, output, TOKENS, memory)
    return result


def watch(result: dict[str, float]) -> None:
    """Have the driver record what it holds of hidden states, and what autograd saves."""
    import torch

    from gradmerge.drivers.layerwise.activations import ActivationStore
    from gradmerge.engine.leaves import Leaves

    put, accumulate = ActivationStore.put, Leaves.accumulate

    def watched(self: ActivationStore, name: str, tensor: torch.Tensor) -> None:
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

    ActivationStore.put = watched  # type: ignore[method-assign]
    Leaves.accumulate = counting  # type: ignore[method-assign]


def scoring(folder: Path, batches: int, tokens: int) -> dict[str, float]:
    """Return the least seconds of each way to score the same batches, in turn, in this process."""
    import torch

    from gradmerge.drivers.layerwise.chain import BlockChain
    from gradmerge.drivers.layerwise.files import Starts
    from gradmerge.drivers.layerwise.scores import score
    from gradmerge.engine.opening import open_plan
    from gradmerge.export.history import History
    from gradmerge.objectives import Objective

    plan = open_plan(recipe_of(folder))
    chain = BlockChain(plan, None, torch.float32, torch.device("cpu"))
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
        score(chain, Objective(), lambda: asked, False, History(), 0)

    taken: dict[str, list[float]] = {"whole": [], "by blocks": []}
    with torch.no_grad():
        for _ in range(3):
            for way, seconds in zip((whole, by_blocks), taken.values(), strict=True):
                began = time.perf_counter()
                way()
                seconds.append(time.perf_counter() - began)
    return {way: min(seconds) for way, seconds in taken.items()}


def main() -> None:
    parser = harness.make_parser(__doc__, "bench")
    parser.add_argument("--size", choices=harness.LLAMAS, default="5m")
    parser.add_argument("--layers", type=int, default=24, help="blocks")
    parser.add_argument("--scoring", type=int, help="instead: time the scores of so many batches")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each example to score")
    args = parser.parse_args()
    folder, warm = (make_models(s, args.layers, args.cache.resolve()) for s in (args.size, "tiny"))
    if args.scoring:
        least = scoring(folder, args.scoring, args.tokens)
        ratio = least["by blocks"] / least["whole"]
        print(
            f"{args.scoring} batches, the whole merged for each: {least['whole']:.1f} s; block "
            f"by block: {least['by blocks']:.1f} s, {ratio:.2f} of it"
        )
        return
    block, whole = 4 * entries(folder, ".layers.0."), 4 * entries(folder)
    rows = []
    for kind, name, memory in RUNS:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            found = harness.ask(run, kind, warm, folder, Path(work), memory)
        found["state"] = 4.0 * len(SOURCES) * (block if kind == "layerwise" else whole)
        found["rest"] = found["memory"] - found["state"] - found["held"] - found["saved"]
        rows.append({"run": name, **found, "rest_in_blocks": found["rest"] / block})
    harness.write_json(args.json, {"size": args.size, "layers": args.layers, "rows": rows})
    columns = ("memory", "state", "held", "spilled", "saved", "rest")
    cells = [
        [row["run"], *(f"{row[c] / 1e6:.0f}" for c in columns), f"{row['rest_in_blocks']:.2f}"]
        for row in rows
    ]
    print(f"MB; a block of one source is {block / 1e6:.1f} MB in float32")
    print(harness.table(["run", "peak", *columns[1:], "rest in blocks"], cells, pad=True))


if __name__ == "__main__":
    main()
