"""Gram matrices on activations of the layers merged so far, block after block (RegMean++)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from gradmerge.calibration.fisher import Passes
from gradmerge.calibration.observers import (
    Grams,
    LinearLayer,
    before_call,
    blocks,
    linear_layers,
    removing,
)
from gradmerge.engine.predict import rows_of
from gradmerge.preprocess import AbstractPreprocess, Site
from gradmerge.sources.collected import Statistic


class Stages(Passes):
    """Passes of a step, whose inputs may come through layers that are already merged."""

    def collect(self, step: AbstractPreprocess) -> None:
        """Write the statistics that a step needs."""
        if self.needs.kind == "fisher":
            self.fisher()
        elif self.needs.activations == "merged":
            self.grams_through_merged_layers(step)
        else:
            self.grams()

    def grams_through_merged_layers(self, step: AbstractPreprocess) -> None:
        """Collect the Gram matrices of each block's layers on inputs from the blocks merged before
        it, and merge the block.

        A pass begins at the network's input, so b blocks cost about b / 2 whole passes.
        """
        layers = linear_layers(self.plan)
        block_of = blocks(self.merged.skeleton, layers)
        calls = self._calls(layers, block_of)
        order = [name for name in calls if name in layers]
        stages: dict[str, list[str]] = {}
        for name in order:
            stages.setdefault(block_of[name] or layers[name].places[0], []).append(name)
        theta = {
            name: self._merge(step, name, {}) for name in self.plan.tensors if name not in calls
        }
        others: dict[str, set[str]] = {source: set() for source in self.found}
        for number, (place, names) in enumerate(stages.items()):
            watched = {name: layers[name] for name in names}
            once = all(calls[block_of[n] or n] == 1 and len(layers[n].modules) == 1 for n in names)
            stop = self.merged.skeleton.get_submodule(place) if once else None
            statistics: dict[tuple[str, str], Statistic] = {}
            within = self._within(place) if block_of[names[0]] else set()
            before = {name: tensor for name, tensor in theta.items() if name not in within}
            for source in self.found:
                with torch.no_grad():
                    grams = self.observe(source, Grams(watched), before, stop)
                others[source] |= grams.others
                values = {name: {"gram": gram} for name, gram in grams.inputs.items()}
                self.write(source, values, grams.rows, layers, f"-{number}")
                for name, parts in values.items():
                    rows, axis = grams.rows[name], layers[name].axis
                    statistics[source, name] = Statistic(parts, rows, axis, 0.0)
            for name in names:
                theta[name] = self._merge(step, name, statistics)
        for source in self.found:
            self.report_grams(source, others[source])

    def _calls(
        self, layers: Mapping[str, LinearLayer], block_of: Mapping[str, str]
    ) -> Counter[str]:
        """Count the calls of each layer (by tensor) and block in one pass, in their order."""
        calls: Counter[str] = Counter()

        def note(name: str, _: Tensor) -> None:
            calls[name] += 1

        handles = [
            before_call(module, partial(note, name))
            for name, layer in layers.items()
            for module in layer.modules
        ]
        for block in {block for block in block_of.values() if block}:
            module = self.merged.skeleton.get_submodule(block)
            handles.append(before_call(module, partial(note, block)))
        source = next(iter(self.found))
        with self.merged.as_source(source), removing(handles):
            rows_of(self.merged, *next(self.batches(source)))
        return calls

    def _within(self, block: str) -> set[str]:
        """Return the tensors of a block, in which a source's own weights are used."""
        assert self.plan.binding is not None
        return {
            name
            for name, places in self.plan.binding.parameters.items()
            if any(place.startswith(f"{block}.") for place in places)
        }

    def _merge(
        self,
        step: AbstractPreprocess,
        name: str,
        statistics: Mapping[tuple[str, str], Statistic],
    ) -> Tensor:
        """Return a tensor of the step's own merge, `A + c sum_k B'_k`, with c = 1 unless frozen.

        With every coefficient at 1 the origin cancels, so the sources stand for their directions.
        """
        terms = self.plan.terms(name)
        wide = [source.float() for source in terms.sources]
        site = Site(name, self.plan.source_names, _InMemory(statistics))
        theta = step(torch.stack(wide), site).sum(dim=0)
        if name in self.plan.fixed:
            origin = torch.stack(wide).mean(dim=0) if terms.mean_origin else terms.origin
            anchor = torch.zeros_like(theta) if origin is None else origin.float()
            theta = anchor + self.plan.fixed[name] * (theta - anchor)
        return theta.to(self.merged.dtype)


class _InMemory:
    """The statistics of one stage, as a step reads them."""

    def __init__(self, statistics: Mapping[tuple[str, str], Statistic]) -> None:
        self._statistics = statistics

    def read(self, kind: str, source: str, tensor: str) -> Statistic | None:
        return self._statistics.get((source, tensor))
