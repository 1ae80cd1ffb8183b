"""Gram matrices on activations of the layers merged so far, block after block (RegMean++)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradmerge.calibration.fisher import Passes, length
from gradmerge.calibration.observers import Enough, Grams, LinearLayer, blocks, linear_layers
from gradmerge.engine.predict import rows_of
from gradmerge.preprocess import AbstractPreprocess, Site
from gradmerge.sources.collected import Statistic


class Stages(Passes):
    """Passes whose inputs come through layers that are merged already."""

    def grams_through_merged_layers(self, step: AbstractPreprocess) -> None:
        """Block after block: Gram matrices of a block's layers on inputs from the blocks merged
        before, then the block's own merge. A block's pass begins at the network's input, so b
        blocks cost about b / 2 whole passes.
        """
        layers = linear_layers(self.plan)
        found = blocks(self.merged.skeleton, layers)
        calls = self._trace(layers, found)
        order = sorted((name for name in layers if name in calls), key=lambda n: calls[n][0])
        stages: dict[str, list[str]] = {}
        for name in order:
            stages.setdefault(found[name] or f"={name}", []).append(name)
        theta = {
            name: self._merge(step, name, {}) for name in self.plan.tensors if name not in calls
        }
        others: dict[str, set[str]] = {source: set() for source in self.found}
        for number, (block, names) in enumerate(stages.items()):
            watched = {name: layers[name] for name in names}
            statistics: dict[tuple[str, str], Statistic] = {}
            once = all(calls[n][1] == 1 and len(layers[n].modules) == 1 for n in names)
            for source in self.found:
                grams = self._stage(source, block, watched, theta, once)
                others[source] |= grams.others
                values = {name: {"gram": gram} for name, gram in grams.inputs.items()}
                self.write(source, values, grams.rows, f"-{number}", layers)
                for name, parts in values.items():
                    rows, axis = grams.rows[name], layers[name].axis
                    statistics[source, name] = Statistic(parts, rows, axis, 0.0)
            for name in names:
                theta[name] = self._merge(step, name, statistics)
        for source in self.found:
            examples = sum(length(batch) for _, batch in self.batches(source))
            self.found[source].examples = examples
            self.report_grams(source, len(self.found[source].tensors), others[source])

    def _trace(
        self, layers: Mapping[str, LinearLayer], found: Mapping[str, str]
    ) -> dict[str, tuple[int, int]]:
        """When each layer is called first, and how often it (or its block) is, in one pass."""
        order: list[str] = []
        times: dict[str, int] = {}
        hooks = []
        for name, layer in layers.items():
            for module in layer.modules:
                hook = partial(_note, order, name)
                hooks.append(module.register_forward_pre_hook(hook))
        for block in {block for block in found.values() if block}:
            module = self.merged.skeleton.get_submodule(block)
            hooks.append(module.register_forward_pre_hook(partial(_count, times, block)))
        source = next(iter(self.found))
        try:
            with self.merged.as_source(source):
                rows_of(self.merged, *next(self.batches(source)))
        finally:
            for handle in hooks:
                handle.remove()
        return {
            name: (
                order.index(name),
                times.get(found[name], 1) if found[name] else order.count(name),
            )
            for name in dict.fromkeys(order)
        }

    def _stage(
        self,
        source: str,
        block: str,
        watched: Mapping[str, LinearLayer],
        theta: Mapping[str, Tensor],
        stop: bool,
    ) -> Grams:
        """Gram matrices of a block's layers, with merged weights before it and the source's own
        within.
        """
        grams = Grams(watched)
        assert self.plan.binding is not None
        within = {
            name
            for name, places in self.plan.binding.parameters.items()
            if any(place.startswith(f"{block}.") for place in places)
        }
        before = {name: tensor for name, tensor in theta.items() if name not in within}
        hooks = []
        with (
            torch.no_grad(),
            self.merged.statistics.of_source(source),
            self.merged.as_weights(partial(self.one_of, before, source)),
            grams.watching(),
        ):
            if stop:
                alone = watched.get(block.removeprefix("="))
                module = (
                    self.merged.skeleton.get_submodule(block) if alone is None else alone.modules[0]
                )
                hooks.append(module.register_forward_hook(_stop))
            try:
                for task, batch in self.batches(source):
                    grams.mask = self.mask(batch)
                    with suppress(Enough):
                        rows_of(self.merged, task, batch)
            finally:
                for handle in hooks:
                    handle.remove()
        return grams

    def _merge(
        self,
        step: AbstractPreprocess,
        name: str,
        statistics: Mapping[tuple[str, str], Statistic],
    ) -> Tensor:
        """A tensor of the step's own merge, `A + c sum_k B'_k`, with c = 1 where it is not frozen.

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
    """Statistics of one stage, as a step reads them."""

    def __init__(self, statistics: Mapping[tuple[str, str], Statistic]) -> None:
        self._statistics = statistics

    def read(self, kind: str, source: str, tensor: str) -> Statistic | None:
        return self._statistics.get((source, tensor))


def _note(order: list[str], name: str, *_: Any) -> None:
    order.append(name)


def _count(times: dict[str, int], name: str, *_: Any) -> None:
    times[name] = times.get(name, 0) + 1


def _stop(*_: Any) -> None:
    raise Enough
