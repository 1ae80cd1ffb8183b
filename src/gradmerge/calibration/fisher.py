"""Each source on its own tasks' adaptation data, for one kind of statistic."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from gradmerge.calibration.observers import Grams, LinearLayer, linear_layers, mask_of
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.plan import Plan
from gradmerge.engine.predict import Batch, rows_of
from gradmerge.errors import ConfigError, shorten
from gradmerge.objectives.base import UNLABELLED
from gradmerge.sources.collected import Needs

Report = Callable[[str], None]


@dataclass
class Found:
    """What was written of one source."""

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
        self.merged, self.loaders = merged, loaders
        self.needs, self.folder, self.report = needs, folder, report
        self.plan: Plan = merged.plan
        self.found = {source: Found(list(own)) for source, own in tasks.items()}
        self._named: set[str] = set()

    # ---- the passes -----------------------------------------------------------------------------

    def batches(self, source: str, single: bool = False) -> Iterator[tuple[str, Batch]]:
        """The adaptation batches of a source's tasks, if asked for one example at a time."""
        for task in self.found[source].tasks:
            loader = self.loaders[task]
            if single:
                loader = DataLoader(loader.dataset, batch_size=1, collate_fn=loader.collate_fn)
            for batch in loader:
                yield task, batch

    def mask(self, batch: Batch) -> Tensor | None:
        """Which tokens are no padding; see `mask_of`."""
        return mask_of(self.merged.skeleton, batch)

    def log_likelihood(self, task: str, batch: Batch, generator: torch.Generator) -> Tensor:
        """`log p(y | x)` summed over the batch's decisions, with y as the step wants it."""
        logits, labels, _ = rows_of(self.merged, task, batch)
        if self.needs.labels == "model":
            chances = logits.detach().softmax(dim=-1)
            labels = torch.multinomial(chances, 1, generator=generator).squeeze(1)
        elif labels is None:
            raise ConfigError(
                f"task {task} has no labels, which labels: data needs; name its label column, or "
                "set labels: model."
            )
        return -functional.cross_entropy(logits, labels, reduction="sum", ignore_index=UNLABELLED)

    def generator(self, source: str) -> torch.Generator:
        """Draws that depend on the seed and the source's name."""
        return torch.Generator().manual_seed(
            self.needs.seed * 1_000_003 + zlib.crc32(source.encode())
        )

    # ---- Fisher ---------------------------------------------------------------------------------

    def fisher(self) -> None:
        """Means over examples of the squared gradient of each merged tensor."""
        assert self.plan.binding is not None
        names = [name for name in self.plan.tensors if name in self.plan.binding.parameters]
        for source in self.found:
            kept = {
                name: self.plan.read(source, name).to(self.merged.dtype).clone().requires_grad_()
                for name in names
            }
            sums: dict[str, Tensor] = {}
            generator = self.generator(source)
            examples = 0
            weights = self.merged.as_weights(partial(self.one_of, kept, source))
            with self.merged.statistics.of_source(source), weights:
                for task, batch in self.batches(source, self.needs.per == "example"):
                    examples += length(batch)
                    with torch.enable_grad():
                        value = self.log_likelihood(task, batch, generator)
                    grads = torch.autograd.grad(value, list(kept.values()), allow_unused=True)
                    for name, grad in zip(kept, grads, strict=True):
                        if grad is not None:
                            square = grad.square()
                            sums[name] = sums[name].add_(square) if name in sums else square
            means = {name: value.div_(max(1, examples)) for name, value in sums.items()}
            norm = sum(float(mean.double().square().sum()) for mean in means.values()) ** 0.5
            self.found[source].examples, self.found[source].norm = examples, norm
            self.write(source, {name: {"fisher": mean} for name, mean in means.items()}, {}, "")
            self.report(f"{source}: Fisher information from {examples} examples")

    def one_of(self, kept: Mapping[str, Tensor], source: str, name: str) -> Tensor:
        """A tensor out of those at hand, else the source's own."""
        return kept[name] if name in kept else self.plan.read(source, name)

    # ---- Gram matrices --------------------------------------------------------------------------

    def grams(self) -> None:
        """Of each linear layer's inputs in the source itself; with `kfac` of its outputs'
        gradients.
        """
        layers = linear_layers(self.plan)
        kfac = self.needs.kind == "kfac"
        for source in self.found:
            grams = Grams(layers, outputs=kfac)
            generator = self.generator(source)
            examples = 0
            read = partial(self.one_of, {}, source)
            if kfac:
                # a graph is recorded from the first layer on only if something asks for gradients
                read = partial(self._asking, source)
            with (
                self.merged.statistics.of_source(source),
                self.merged.as_weights(read),
                torch.set_grad_enabled(kfac),
                grams.watching(),
            ):
                for task, batch in self.batches(source):
                    examples += length(batch)
                    grams.mask = self.mask(batch)
                    if kfac:
                        self.log_likelihood(task, batch, generator).backward()
                    else:
                        rows_of(self.merged, task, batch)
            for output in grams.outputs.values():
                output.div_(max(1, examples))
            self.found[source].examples = examples
            names = ("input", "output") if kfac else ("gram",)
            every = (grams.inputs, grams.outputs) if kfac else (grams.inputs,)
            values = {
                name: {part: kind[name] for part, kind in zip(names, every, strict=True)}
                for name in layers
                if all(name in kind for kind in every)
            }
            self.write(source, values, grams.rows, "", layers)
            self.report_grams(source, len(values), grams.others)

    def report_grams(self, source: str, count: int, others: Collection[str]) -> None:
        """Say how many tensors have Gram matrices, and of which layers none can be had."""
        self.report(
            f"{source}: Gram matrices of {count} of {len(self.plan.tensors)} tensors from "
            f"{self.found[source].examples} examples"
        )
        if not self._named.issuperset(others):
            self._named |= set(others)
            self.report(
                f"{len(others)} layers change their weight before use and are averaged: "
                f"{shorten(sorted(others))}"
            )

    def _asking(self, source: str, name: str) -> Tensor:
        tensor = self.plan.read(source, name)
        if not tensor.dtype.is_floating_point:
            return tensor
        return tensor.to(self.merged.dtype).detach().requires_grad_()

    # ---- writing --------------------------------------------------------------------------------

    def write(
        self,
        source: str,
        values: Mapping[str, Mapping[str, Tensor]],
        rows: Mapping[str, int],
        suffix: str,
        layers: Mapping[str, LinearLayer] | None = None,
    ) -> None:
        """A file of a source's tensors, by part, and what the index says of them."""
        file = f"{self.needs.kind}-{list(self.found).index(source)}{suffix}.safetensors"
        save_file(
            {
                f"{part}:{name}": tensor.detach().cpu().contiguous()
                for name, parts in values.items()
                for part, tensor in parts.items()
            },
            self.folder / file,
        )
        for name, parts in values.items():
            self.found[source].tensors[name] = {
                "file": file,
                "parts": list(parts),
                "rows": rows.get(name, self.found[source].examples),
                "axis": layers[name].axis if layers else 1,
            }


def length(batch: Batch) -> int:
    """Examples of a batch."""
    tensors: list[Tensor] = [value for value in batch.values() if isinstance(value, Tensor)]
    return len(tensors[0]) if tensors else 0
