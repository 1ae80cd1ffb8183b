"""Sources divided among processes: what each reads, holds and exchanges in a step.

    python benchmarks/sharded.py --json sharded.json

A Llama of 60M parameters in bfloat16, K sources and a base, one coefficient per tensor, a batch of
2 x 64 tokens in each process, on gloo. `sources` is what a process has in memory of the mapped
files after two steps, which is what it has read of them; `anonymous` is its highest RssAnon, with
interpreter and imports; `exchanged` is what collectives carried per step: gathered merged rows,
scattered gradients, and gradients of coefficients. The coefficients' gradient is compared with
that of one process that has all batches.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import harness

BATCH = 2, 64


def mapped(folder: Path) -> int:
    """Return the bytes of files in a folder that this process has in memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def losses(merged: Any, ranks: range) -> list[Any]:
    """Return the loss of each process's batch."""
    import torch

    def run(rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rank)
        ids = torch.randint(0, 16_384, BATCH, generator=generator)
        loss: torch.Tensor = merged(input_ids=ids, labels=ids, task="a").loss
        return loss

    return [lambda rank=rank: run(rank) for rank in ranks]  # type: ignore[misc]


def merged_of(folder: Path, count: int, memory: str) -> Any:
    """Open a merge of `count` sources."""
    from gradmerge import MergedModel, Recipe
    from gradmerge.engine.opening import open_plan

    names = "abcdefgh"[:count]
    sources = {name: str(folder / name) for name in names}
    plan = open_plan(Recipe(sources, base=str(folder / "base")))
    plan.checked_later = True
    return MergedModel(plan, memory=memory, tasks={"a": "a"}).train()  # type: ignore[arg-type]


def one_process(folder: Path, count: int, memory: str, world: int) -> Any:
    """Return the gradient of the mean of all processes' losses."""
    merged = merged_of(folder, count, memory)
    runs = [lambda run=run: run() / world for run in losses(merged, range(world))]
    loss, _ = merged.accumulate(runs)
    loss.backward()
    return merged.raw["tensor"].grad


def work(
    rank: int, world: int, store: str, folder: Path, count: int, memory: str, divided: bool
) -> None:
    """Take two steps as one of `world` processes and write what was measured."""
    import torch
    from torch import distributed

    from gradmerge.engine import sharded

    torch.set_num_threads(1)
    harness.quieten()
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    merged = merged_of(folder, count, memory)
    moved: Counter[str] = Counter()
    for name in ("gather", "scatter"):
        call = getattr(sharded, name)

        def counted(out: Any, given: Any, group: Any, name: str = name, call: Any = call) -> None:
            moved[name] += max(out.nbytes, given.nbytes)
            call(out, given, group)

        setattr(sharded, name, counted)
    if divided:
        merged.state.plan = sharded.ShardedPlan.of(merged.plan, torch.device("cpu"))
    result: dict[str, float] = {}
    with harness.measured(result):
        for _ in range(2):
            moved.clear()
            merged.zero_grad()
            loss, _ = merged.accumulate(losses(merged, range(rank, rank + 1)))
            loss.backward()
    grad = merged.raw["tensor"].grad
    distributed.all_reduce(grad.div_(world))
    found = {
        "sources": mapped(folder),
        "anonymous": result["peak"],
        "exchanged": sum(moved.values()) + grad.nbytes,
        "cpu": result["cpu"] / 2,
    }
    torch.save((found, grad), f"{store}-{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


def case(folder: Path, world: int, count: int, memory: str, divided: bool) -> dict[str, Any]:
    """Run processes and return the largest figures of any of them."""
    import torch

    with tempfile.TemporaryDirectory() as place:
        store = str(Path(place) / "store")
        options = (world, store, folder, count, memory, divided)
        torch.multiprocessing.spawn(work, options, nprocs=world)  # type: ignore[no-untyped-call]
        ranks = [torch.load(f"{store}-{rank}") for rank in range(world)]
    want = harness.ask(one_process, folder, count, memory, world)
    worst = max(float((grad - want).abs().max() / want.abs().max()) for _, grad in ranks)
    most = {key: max(found[key] for found, _ in ranks) for key in ranks[0][0]}
    return {
        "processes": world,
        "sources K": count,
        "memory": memory,
        "divided": divided,
        **most,
        "error": worst,
    }


def main() -> None:
    """Measure all cases and print a table."""
    parser = harness.make_parser(__doc__, "sharded")
    parser.add_argument("--size", default="60m", choices=harness.LLAMAS)
    options: argparse.Namespace = parser.parse_args()
    folder = options.cache / options.size
    harness.make_models(folder, harness.llama(options.size, "bfloat16"), "abcdefgh", 1e-3)
    rows = []
    for memory in ("resident", "streamed"):
        for world, count, divided in ((2, 2, False), (2, 8, False), (2, 2, True), (2, 8, True)):
            rows.append(case(folder, world, count, memory, divided))
        rows += [case(folder, 4, count, memory, True) for count in (2, 8)]
    harness.write_json(options.json, rows)
    head = ["processes", "K", "memory", "divided", "sources MB", "anonymous MB", "exchanged MB"]
    print(
        harness.table(
            [*head, "CPU s", "error"],
            [
                [
                    *(str(row[key]) for key in ("processes", "sources K", "memory", "divided")),
                    *(f"{row[key] / 1e6:.3g}" for key in ("sources", "anonymous", "exchanged")),
                    f"{row['cpu']:.2f}",
                    f"{row['error']:.0e}",
                ]
                for row in rows
            ],
        )
    )


if __name__ == "__main__":
    main()
