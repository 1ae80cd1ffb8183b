"""Merges whose sources are divided among processes, and the same merges in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from gradmerge import MergedModel, Recipe
from gradmerge import coefficients as c
from gradmerge.coefficients import Constant, Uniform
from gradmerge.common.errors import NonFiniteError
from gradmerge.engine import sharded
from gradmerge.engine.opening import open_plan
from gradmerge.engine.plan import Plan
from gradmerge.engine.rows import Rows
from gradmerge.operators import DisjointMean, Karcher, MultiSlerp, NearSwap, Slerp
from gradmerge.preprocess import TSVM
from tiny import relatives


class Net(nn.Module):
    """Tied embeddings, odd numbers of rows, gains, biases, and a layer that some calls use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 13)
        self.down = nn.Linear(13, 6, bias=False)
        self.some = nn.Linear(6, 6, bias=False)
        self.gain = nn.LayerNorm(6)
        self.never = nn.Linear(9, 9)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)

    def forward(self, tokens: Tensor, some: bool = False) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.down(torch.tanh(self.body(hidden)))
        hidden = self.gain(hidden + self.some(hidden) if some else hidden)
        return hidden @ self.embed.weight.T


class Experts(nn.Module):
    """A stack of experts, each with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.zeros(6, 5, 11))
        self.out = nn.Linear(5, 4)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)

    def forward(self, tokens: Tensor, some: bool = False) -> Tensor:
        one = nn.functional.one_hot(tokens, 11).to(self.stack.dtype)
        return self.out(torch.einsum("bti,eoi->bto", one, self.stack).tanh())


CASES: dict[str, dict[str, Any]] = {
    "Model streamed": {"coefficients": c.Model(), "memory": "streamed"},
    "Tensor resident": {},
    "Column streamed": {"coefficients": c.Column(), "memory": "streamed"},
    "Row streamed": {"coefficients": c.Row(), "memory": "streamed"},
    "Partition": {"coefficients": c.Partition(num_parts=3)},
    "Element resident": {"coefficients": c.Element()},
    "Element streamed": {"coefficients": c.Element(), "memory": "streamed"},
    "pairs": {"coefficients": c.Element()},
    "Chunks": {"coefficients": c.Chunks(3.0)},
    "Softmax of Row": {"coefficients": c.Softmax(c.Row()), "init": Uniform()},
    "Complement of Element": {"coefficients": c.Complement(c.Element()), "init": Uniform()},
    "WithScale of Row": {"coefficients": c.WithScale(c.Row())},
    "experts": {"coefficients": c.Column(), "net": Experts},
    "expert rows": {"coefficients": c.Row(), "net": Experts},
    "five sources": {"count": 5},
    "origin mean": {"base": False, "init": Uniform()},
    "frozen": {"frozen": {"body": "mean"}},
    "TSVM": {"preprocess": [TSVM()], "coefficients": c.Column()},
    "DisjointMean": {"operator": DisjointMean(), "coefficients": c.Row()},
    "NearSwap": {"operator": NearSwap(), "init": Constant(0.05), "count": 1},
    "Slerp": {"operator": Slerp()},
    "Slerp per row": {"operator": Slerp(per="row")},
    "MultiSlerp": {"operator": MultiSlerp(), "coefficients": c.Column(), "init": Uniform()},
    "Karcher streamed": {"operator": Karcher(), "init": Uniform(), "memory": "streamed"},
}


FEW = ("Tensor resident", "Row streamed", "Element resident", "five sources", "Slerp", "pairs")
PAIRS = ("pairs",)


def merged_of(
    net: type[nn.Module] = Net,
    base: bool = True,
    count: int = 2,
    memory: Any = "resident",
    **options: Any,
) -> MergedModel:
    models = relatives(net(), count + 1)
    sources: dict[str, Any] = dict(zip("abcdef", models[1:], strict=False))
    settings = {"coefficients": c.Tensor(), "init": Constant(0.3), **options}
    recipe = Recipe(sources, base=models[0] if base else None, **settings)
    return MergedModel(recipe, memory=memory, tasks={"one": "a", "two": "a"})


@contextmanager
def counting(counts: dict[str, float]) -> Iterator[None]:
    """Count entries that are merged in a step, as a share of the model, and bytes exchanged."""
    combine = Plan.combine
    gather, scatter = sharded.gather, sharded.scatter

    def counted(self: Plan, name: str, own: Any, out: Tensor, rows: Rows | None = None) -> Tensor:
        counts["entries"] += out.numel() if isinstance(own, Tensor) else 0
        return combine(self, name, own, out, rows)

    def moved(call: Any) -> Any:
        def run(out: Tensor, given: Tensor, group: Any) -> Any:
            counts["moved"] += max(out.nbytes, given.nbytes)
            return call(out, given, group)

        return run

    Plan.combine = counted  # type: ignore[method-assign]
    sharded.gather, sharded.scatter = moved(gather), moved(scatter)
    try:
        yield
    finally:
        Plan.combine = combine  # type: ignore[method-assign]
        sharded.gather, sharded.scatter = gather, scatter


def gradients(name: str, rank: int | None, count: int) -> dict[str, Any]:
    """Gradients of the mean of the processes' losses, in this process of `count` or in one alone.

    Process 0 uses a layer that the others do not.
    """
    merged = merged_of(**CASES[name]).train()
    counts = {"entries": 0.0, "moved": 0.0}

    def losses(r: int) -> list[Any]:
        generator = torch.Generator().manual_seed(7 + r)
        tokens = torch.randint(0, 11, (2, 3, 5), generator=generator)
        some = merged.memory == "resident" and r == 0

        def run(i: int) -> Tensor:
            return merged(tokens[i], task=("one", "two")[i], some=some).square().mean()

        return [lambda: run(0), lambda: run(1)]

    if rank is None:
        runs = [lambda run=run: run() / count for r in range(count) for run in losses(r)]
        loss, _ = merged.accumulate(runs)
        loss.backward()
        return {"grads": grads_of(merged), "loss": loss.detach()}
    group = None
    if name in PAIRS:  # sources are divided within pairs of processes
        pairs = [distributed.new_group([r, r + 1]) for r in range(0, count, 2)]
        group = pairs[rank // 2]
    plan = merged.state.plan = sharded.ShardedPlan.of(merged.plan, torch.device("cpu"), group)
    plan.check()
    plan.keep_directions()
    plan.place(dict.fromkeys(plan.owners, ("mapped", "device")[rank % 2]), merged.device)
    with counting(counts):
        loss, _ = merged.accumulate(losses(rank))
    loss.backward()
    total = loss.detach().clone()
    grads = grads_of(merged)
    for value in (total, *grads.values()):
        distributed.all_reduce(value)
        value.div_(count)
    learned = sum(torch.Size(merged.plan.tensors[n].shape).numel() for n in merged.state.learned)
    return {"grads": grads, "loss": total, "share": counts["entries"] / learned, **counts}


def flaw() -> str:
    """What each process says of a source with NaN that one of them has read."""
    base, source = relatives(Net(), 2)
    source.body.weight.data[3, 2] = torch.nan
    plan = open_plan(Recipe({"a": source}, base=base, init=Constant(0.3)))
    plan.checked_later = True
    merged = MergedModel(plan)
    shared = sharded.ShardedPlan.of(merged.plan, torch.device("cpu"))
    try:
        shared.check()
    except NonFiniteError as error:
        return str(error)
    return ""


def grads_of(merged: MergedModel) -> dict[str, Tensor]:
    return {
        key: torch.zeros_like(raw) if raw.grad is None else raw.grad.clone()
        for key, raw in merged.raw.items()
    }
