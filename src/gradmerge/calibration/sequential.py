"""Gram matrices on activations of the layers merged so far, block after block (RegMean++)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradmerge.calibration.fisher import Passes
from gradmerge.calibration.observers import LinearLayer, Observer, linear_layers
from gradmerge.engine.outputs import rows_of
from gradmerge.preprocess import AbstractPreprocess, Site
from gradmerge.sources.collected import Statistic


class Stages(Passes):
    """Passes of a step, whose inputs may come through layers that are already merged."""

    _stage: dict[str, Mapping[str, Statistic]]
    """Statistics of the layers that are merged next, by source and tensor."""

    def collect(self, step: AbstractPreprocess) -> None:
        """Write the statistics that a step needs."""
        if self.needs.kind == "fisher":
            self.fisher()
        elif self.needs.activations == "merged":
            self._grams_through_merged_layers(step)
        else:
            layers = linear_layers(self.plan)
            for source in self.found:
                self.grams(source, layers, {})
                self.report_grams(source)

    def _grams_through_merged_layers(self, step: AbstractPreprocess) -> None:
        """Collect the Gram matrices of each block's layers on inputs from the blocks merged before
        it, and merge the block.

        A pass begins at the network's input, so b blocks cost about b / 2 whole passes.
        """
        layers, self._stage = linear_layers(self.plan), {}
        block_of = {name: self._block_of(layer) for name, layer in layers.items()}
        calls = self._calls(layers, set(block_of.values()))
        stages = defaultdict(list)
        for name in calls:
            if name in layers:
                stages[block_of[name]].append(name)
        theta = {name: self._merge(step, name) for name in self.plan.tensors if name not in calls}
        for block, names in stages.items():
            watched = {name: layers[name] for name in names}
            once = calls[block] == 1 and all(len(la.modules) == 1 for la in watched.values())
            stop = self.merged.skeleton.get_submodule(block) if once else None
            own = self._within(block)
            before = {name: tensor for name, tensor in theta.items() if name not in own}
            self._stage = {
                source: self.grams(source, watched, before, stop) for source in self.found
            }
            theta |= {name: self._merge(step, name) for name in names}
        for source in self.found:
            self.report_grams(source)

    def _block_of(self, layer: LinearLayer) -> str:
        """Return the innermost member of an `nn.ModuleList` that holds a layer, or its own place.

        A tied weight belongs to its first layer's block.
        """
        place = next(iter(layer.modules))
        parts = place.split(".")
        for depth in range(len(parts), 0, -1):
            parent = self.merged.skeleton.get_submodule(".".join(parts[: depth - 1]))
            if isinstance(parent, nn.ModuleList):
                return ".".join(parts[:depth])
        return place

    def _calls(self, layers: Mapping[str, LinearLayer], blocks: set[str]) -> Counter[str]:
        """Count the calls of each layer (by tensor) and block in one pass, in their order."""
        watched = [(name, module) for name, la in layers.items() for module in la.modules.values()]
        watched += [(block, self.merged.skeleton.get_submodule(block)) for block in blocks]
        calls, source = _Calls(watched), next(iter(self.found))
        with self.merged.as_source(source), calls.watching():
            rows_of(self.merged, *next(self.batches(source)))
        return calls.count

    def _within(self, block: str) -> set[str]:
        """Return the tensors of a block, in which a source's own weights are used."""
        assert self.plan.binding is not None
        return {
            name
            for name, places in self.plan.binding.owners.items()
            if any(place.startswith(f"{block}.") for place in places)
        }

    def read(self, kind: str, source: str, tensor: str) -> Statistic | None:
        """Return the statistic of a source at a tensor that is merged next."""
        return self._stage.get(source, {}).get(tensor)

    def _merge(self, step: AbstractPreprocess, name: str) -> Tensor:
        """Return a tensor of the step's own merge, `A + c sum_k B'_k`, with c = 1 unless frozen.

        With every coefficient at 1 the origin cancels, so the sources stand for their directions.
        """
        terms = self.plan.terms(name)
        wide = [source.float() for source in terms.sources]
        site = Site(name, self.plan.source_names, self)
        theta = step(torch.stack(wide), site).sum(dim=0)
        if name in self.plan.fixed:
            origin = torch.stack(wide).mean(dim=0) if terms.mean_origin else terms.origin
            anchor = torch.zeros_like(theta) if origin is None else origin.float()
            theta = anchor + self.plan.fixed[name] * (theta - anchor)
        return theta.to(self.merged.dtype)


class _Calls(Observer):
    def __init__(self, watched: Sequence[tuple[str, nn.Module]]) -> None:
        self.watched = watched
        self.count: Counter[str] = Counter()

    @override
    def before(self, key: str, module: nn.Module, inputs: Tensor) -> None:
        self.count[key] += 1
