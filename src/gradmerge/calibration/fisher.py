"""Statistics of each source on its own tasks' adaptation data: Fisher information and Grams."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from gradmerge.calibration.observers import (
    Enough,
    Grams,
    LinearLayer,
    after_call,
    linear_layers,
    mask_of,
    removing,
)
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.predict import Batch, rows_of
from gradmerge.errors import ConfigError, shorten
from gradmerge.objectives.base import UNLABELLED
from gradmerge.sources.collected import Needs

Report = Callable[[str], None]


@dataclass
class Found:
    """The record of what was written for one source."""

    tasks: list[str]
    examples: int = 0
    norm: float = 0.0
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)


class Passes:
    """One kind of statistic of all sources.

    Args:
        merged: a merge of the sources, whose network runs as each of them.
        loaders: batches of each task's adaptation split.
        tasks: names of each source's tasks.
        needs: the statistic, and how it is collected.
        folder: where its files are written.
        report: called with a line for each source.
    """

    def __init__(
        self,
        merged: MergedModel,
        loaders: Mapping[str, DataLoader[Any]],
        tasks: Mapping[str, list[str]],
        needs: Needs,
        folder: Path,
        report: Report,
    ) -> None:
        self.merged, self.loaders, self.plan = merged, loaders, merged.plan
        self.needs, self.folder, self.report = needs, folder, report
        self.found = {source: Found(list(own)) for source, own in tasks.items()}
        self._named: set[str] = set()

    def batches(self, source: str, single: bool = False) -> Iterator[tuple[str, Batch]]:
        """Yield the batches of a source's tasks (or single examples), and count their examples."""
        found = self.found[source]
        found.examples = 0
        for task in found.tasks:
            loader = self.loaders[task]
            if single:
                loader = DataLoader(loader.dataset, batch_size=1, collate_fn=loader.collate_fn)
            for batch in loader:
                first = next((value for value in batch.values() if isinstance(value, Tensor)), ())
                found.examples += len(first)
                yield task, batch

    @contextmanager
    def running(self, source: str, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the network as a source within the context, except for the given weights."""

        def read(name: str) -> Tensor:
            return weights[name] if name in weights else self.plan.read(source, name)

        with self.merged.as_source(source), self.merged.as_weights(read):
            yield

    def log_likelihood(self, task: str, batch: Batch, draws: torch.Generator) -> Tensor:
        """Return `log p(y | x)` summed over the batch's decisions, with y as the step wants it."""
        logits, labels, _ = rows_of(self.merged, task, batch)
        if self.needs.labels == "model":
            chances = logits.detach().softmax(dim=-1)
            labels = torch.multinomial(chances, 1, generator=draws).squeeze(1)
        elif labels is None:
            raise ConfigError(
                f"task {task} has no labels, which labels: data needs; name its label column, or "
                "set labels: model."
            )
        return -functional.cross_entropy(logits, labels, reduction="sum", ignore_index=UNLABELLED)

    def draws(self, source: str) -> torch.Generator:
        """Return a generator seeded by the step's seed and the source's name."""
        seed = self.needs.seed * 1_000_003 + zlib.crc32(source.encode())
        return torch.Generator().manual_seed(seed)

    def fisher(self) -> None:
        """Collect means over examples of each merged tensor's squared gradient."""
        assert self.plan.binding is not None
        names = [name for name in self.plan.tensors if name in self.plan.binding.parameters]
        for source, found in self.found.items():
            stored = {name: self.plan.read(source, name).to(self.merged.dtype) for name in names}
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in stored.items()}
            draws = self.draws(source)
            sums: dict[str, Tensor] = {}
            with self.running(source, leaves), torch.enable_grad():
                for task, batch in self.batches(source, self.needs.per == "example"):
                    value = self.log_likelihood(task, batch, draws)
                    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
                    for name, grad in zip(leaves, grads, strict=True):
                        if grad is not None:
                            square = grad.square()
                            sums[name] = sums[name].add_(square) if name in sums else square
            means = {name: value.div_(max(1, found.examples)) for name, value in sums.items()}
            found.norm = sum(float(mean.double().square().sum()) for mean in means.values()) ** 0.5
            self.write(source, {name: {"fisher": mean} for name, mean in means.items()})
            self.report(f"{source}: Fisher information from {found.examples} examples")

    def grams(self) -> None:
        """Collect Gram matrices of each linear layer's inputs; for `kfac` also those of its
        outputs' gradients.
        """
        layers = linear_layers(self.plan)
        kfac = self.needs.kind == "kfac"
        for source, found in self.found.items():
            grams = self.observe(source, Grams(layers, gradients=kfac), {})
            for output in grams.outputs.values():
                output.div_(max(1, found.examples))
            parts = {"input": grams.inputs, "output": grams.outputs}
            if not kfac:
                parts = {"gram": grams.inputs}
            values = {
                name: {part: sums[name] for part, sums in parts.items()}
                for name in layers
                if all(name in sums for sums in parts.values())
            }
            self.write(source, values, grams.rows, layers)
            self.report_grams(source, grams.others)

    def observe(
        self,
        source: str,
        grams: Grams,
        weights: Mapping[str, Tensor],
        stop: nn.Module | None = None,
    ) -> Grams:
        """Show an observer a source's passes, with some weights replaced.

        Args:
            source: the source.
            grams: the observer.
            weights: the replaced weights by name.
            stop: the module that ends a pass; default: a pass is whole.
        """
        kfac = self.needs.kind == "kfac"
        draws = self.draws(source)
        with (
            self.running(source, weights),
            torch.set_grad_enabled(kfac),
            grams.watching(),
            removing([] if stop is None else [after_call(stop, _stop)]),
        ):
            for task, batch in self.batches(source):
                grams.mask = mask_of(self.merged.skeleton, batch)
                with suppress(Enough):
                    if kfac:
                        self.log_likelihood(task, batch, draws).backward()
                    else:
                        rows_of(self.merged, task, batch)
        return grams

    def report_grams(self, source: str, others: Collection[str]) -> None:
        """Report how many tensors have Gram matrices, and which layers have none."""
        found = self.found[source]
        self.report(
            f"{source}: Gram matrices of {len(found.tensors)} of {len(self.plan.tensors)} tensors "
            f"from {found.examples} examples"
        )
        if not self._named.issuperset(others):
            self._named |= set(others)
            self.report(
                f"{len(others)} layers change their weight before use and are averaged: "
                f"{shorten(sorted(others))}"
            )

    def write(
        self,
        source: str,
        values: Mapping[str, Mapping[str, Tensor]],
        rows: Mapping[str, int] = MappingProxyType({}),
        layers: Mapping[str, LinearLayer] = MappingProxyType({}),
        suffix: str = "",
    ) -> None:
        """Write a source's tensors by part to one file, and index them."""
        file = f"{self.needs.kind}-{list(self.found).index(source)}{suffix}.safetensors"
        tensors = {
            f"{part}:{name}": tensor.detach().cpu().contiguous()
            for name, parts in values.items()
            for part, tensor in parts.items()
        }
        save_file(tensors, self.folder / file)
        found = self.found[source]
        for name, parts in values.items():
            found.tensors[name] = {
                "file": file,
                "parts": list(parts),
                "rows": rows.get(name, found.examples),
                "axis": layers[name].axis if name in layers else 1,
            }


def _stop(_: Tensor) -> None:
    raise Enough
