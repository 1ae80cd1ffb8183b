"""Statistics of each source on its own tasks' adaptation data: Fisher information and Grams."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from gradmerge.alignment import AbstractAlignment
from gradmerge.calibration.observers import Enough, Grams, LinearLayer, mask_of
from gradmerge.common.errors import ConfigError, NonFiniteError, shorten
from gradmerge.common.finite import non_finite
from gradmerge.common.spec import to_plain
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.outputs import Batch, rows_of
from gradmerge.objectives.base import UNLABELLED
from gradmerge.preprocess import AbstractPreprocess
from gradmerge.sources.collected import Needs, Statistic

Report = Callable[[str], None]


@dataclass
class Found:
    """The record of what was written for one source."""

    tasks: list[str]
    examples: int = 0
    norm: float = 0.0
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)


class Passes:
    """One kind of statistic of all sources, each on batches of its own tasks, by task."""

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
        self._numbers = count()
        self._changing: dict[str, set[str]] = {source: set() for source in tasks}
        """Weights that their layers change before use, by source."""
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
    def _running(self, source: str, weights: Mapping[str, Tensor]) -> Iterator[torch.Generator]:
        """Run the network as a source, except for the given weights; yield a generator for it."""

        def read(name: str) -> Tensor:
            return weights[name] if name in weights else self.plan.read(source, name)

        seed = self.needs.seed * 1_000_003 + zlib.crc32(source.encode())
        with self.merged.as_source(source), self.merged.as_weights(read):
            yield torch.Generator().manual_seed(seed)

    def _log_likelihood(self, task: str, batch: Batch, draws: torch.Generator) -> Tensor:
        """Return `log p(y | x)` summed over the batch's decisions, with y as the step wants it."""
        logits, labels, _ = rows_of(self.merged, task, batch)
        if labels is not None and labels.is_floating_point():
            raise ConfigError(
                f"task {task}: expected class numbers as labels, whose likelihood has a gradient "
                "to collect, got numbers of another kind. Collect from another task."
            )
        if self.needs.labels == "model":
            chances = logits.detach().softmax(dim=-1)
            labels = torch.multinomial(chances, 1, generator=draws).squeeze(1)
        elif labels is None:
            raise ConfigError(
                f"task {task} has no labels, which labels: data needs; name its label column, or "
                "set labels: model."
            )
        return -functional.cross_entropy(logits, labels, reduction="sum", ignore_index=UNLABELLED)

    def fisher(self) -> None:
        """Collect means over examples of each merged tensor's squared gradient."""
        assert self.plan.binding is not None
        names = [name for name in self.plan.tensors if name in self.plan.binding.owners]
        for source, found in self.found.items():
            stored = {name: self.plan.read(source, name).to(self.merged.dtype) for name in names}
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in stored.items()}
            means: dict[str, Tensor] = {}
            with self._running(source, leaves) as draws, torch.enable_grad():
                for task, batch in self.batches(source, self.needs.per == "example"):
                    value = self._log_likelihood(task, batch, draws)
                    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
                    for name, grad in zip(leaves, grads, strict=True):
                        if grad is not None:
                            square = grad.square()
                            means[name] = means[name].add_(square) if name in means else square
            for mean in means.values():
                mean.div_(max(1, found.examples))
            found.norm = sum(float(mean.double().square().sum()) for mean in means.values()) ** 0.5
            self.write(
                source,
                {
                    name: Statistic({"fisher": mean}, found.examples, 1, found.norm)
                    for name, mean in means.items()
                },
            )
            self.report(f"{source}: Fisher information from {found.examples} examples")

    def grams(
        self,
        source: str,
        layers: Mapping[str, LinearLayer],
        weights: Mapping[str, Tensor],
        stop: nn.Module | None = None,
    ) -> dict[str, Statistic]:
        """Write Gram matrices of layers' inputs, for `kfac` also of their outputs' gradients.

        Given weights replace the source's own, and `stop` ends a pass.
        """
        kfac = self.needs.kind == "kfac"
        grams = Grams(layers, gradients=kfac, stop=stop)
        running = self._running(source, weights)
        with running as draws, torch.set_grad_enabled(kfac), grams.watching():
            for task, batch in self.batches(source):
                grams.mask = mask_of(self.merged.skeleton, batch)
                with suppress(Enough):
                    if kfac:
                        self._log_likelihood(task, batch, draws).backward()
                    else:
                        rows_of(self.merged, task, batch)
        found = grams.statistics(self.found[source].examples)
        self.write(source, found)
        self._changing[source] |= grams.others
        return found

    def report_grams(self, source: str) -> None:
        """Report how many tensors have Gram matrices, and which layers have none."""
        found, others = self.found[source], self._changing[source]
        self.report(
            f"{source}: Gram matrices of {len(found.tensors)} of {len(self.plan.tensors)} tensors "
            f"from {found.examples} examples"
        )
        if not self._named.issuperset(others):
            self._named |= others
            self.report(
                f"{len(others)} layers change their weight before use and are averaged: "
                f"{shorten(sorted(others))}"
            )

    def write(self, source: str, statistics: Mapping[str, Statistic]) -> None:
        """Write a source's statistics by tensor to one file, and index them."""
        tensors = {
            f"{part}:{name}": tensor
            for name, statistic in statistics.items()
            for part, tensor in statistic.values.items()
        }
        file = self.save(tensors)
        for name, found in statistics.items():
            place = {"file": file, "parts": list(found.values), "rows": found.rows}
            self.found[source].tensors[name] = {**place, "axis": found.axis}

    def save(self, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors to the next file, and return its name."""
        file = f"{self.needs.kind}-{next(self._numbers)}.safetensors"
        kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        for key, tensor in kept.items():
            if (flaw := non_finite(tensor)) is not None:
                raise NonFiniteError(
                    f"statistics of {key}: expected finite numbers, got NaN or infinity in {flaw}. "
                    "The source overflows on its data: collect in float32, or look for extreme "
                    "examples."
                )
        save_file(kept, self.folder / file)
        return file

    def record(self, step: AbstractPreprocess | AbstractAlignment) -> dict[str, Any]:
        """Return what was collected for a step, of which weights, as plain data."""
        sources = {
            name: {
                "fingerprint": self.plan.fingerprints[name],
                "files": self.plan.side_hashes.get(name, {}),
                **asdict(found),
            }
            for name, found in self.found.items()
        }
        return {"needs": asdict(self.needs), "step": to_plain(step), "sources": sources}
