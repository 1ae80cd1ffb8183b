"""The weights of a mergekit file as starting coefficients."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.coefficients.base import MergeTensor, Slot
from gradmerge.coefficients.init import AbstractInit, InitContext, over_slot
from gradmerge.common.errors import ConfigError, nearest, shorten
from gradmerge.mergekit.document import ModelReference, Problems, read_document
from gradmerge.mergekit.table import tabulate

_Weights = Mapping[ModelReference, float]


@dataclass(frozen=True)
class FromMergekit(AbstractInit):
    """The weights of a mergekit YAML, with gradients and filters resolved for each tensor.

    For `linear`, `passthrough` and `task_arithmetic` these are the whole method. For methods that
    prune and elect (ties, dare, della, breadcrumbs) they are the weights of the task vectors times
    lambda; for those on a sphere (slerp, nuslerp, multislerp, karcher) and model_stock, the weights
    that they start from. With origin base, the weights of a sum of models have to sum to 1; with
    origin zero, the file's base has to be a source.
    """

    path: str
    """The mergekit YAML."""
    models: dict[str, str] = field(default_factory=dict)
    """Source -> its model, as the file writes it; only needed for models that are not found by path
    or by the last part of their names. `base` is the base."""

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ConfigError(f"FromMergekit: {self.path}: no such file.")
        weights = _weights(str(path), path.stat().st_mtime_ns, context.names or (tensor.name,))
        if tensor.name not in weights:
            hint = nearest(tensor.name, weights)
            raise ConfigError(
                f"FromMergekit: {self.path} gives no weights for {tensor.name}.{hint}"
            )
        row = self._by_source(weights[tensor.name], context)
        total = sum(row.values())
        if context.origin != "zero" and abs(total - 1) > 1e-4:
            raise ConfigError(
                f"FromMergekit: {self.path}: the weights of {tensor.name} sum to {total:.6g}, but "
                f"from origin {context.origin} they always sum to 1, the origin's own included. "
                "Set `origin: zero`, or weights that sum to 1."
            )
        values = [row[name] for name in context.sources]
        return over_slot(torch.tensor(values, dtype=torch.float64), slot)

    def _by_source(self, weights: _Weights, context: InitContext) -> dict[str, float]:
        """Return weights by source name, and of the base under `base` unless it is one of them."""
        base = ["base"] if context.origin == "base" else []
        labels = {name: context.labels.get(name, name) for name in [*base, *context.sources]}
        found = {
            name: _match(self.models.get(name), name, label, weights)
            for name, label in labels.items()
        }
        lost = [name for name, model in found.items() if model is None]
        left = [model for model in weights if model not in found.values() and weights[model] != 0]
        # a base without weight need not be in the file
        if left or lost not in ([], ["base"]) or len(set(found.values())) < len(found):
            merged = shorten([f"{name} ({label})" for name, label in labels.items()])
            raise ConfigError(
                f"FromMergekit: {self.path} merges {shorten([*map(str, weights)])}; this merge has "
                f"{merged} and origin {context.origin}. "
                + (f"Not in the file: {', '.join(lost)}. " if lost else "")
                + (f"Not in this merge: {', '.join(map(str, left))}. " if left else "")
                + "Name the same models in both, or state which is which: "
                "`models: {SOURCE: MODEL}`."
            )
        return {name: 0.0 if model is None else weights[model] for name, model in found.items()}


def _match(stated: str | None, name: str, label: str, weights: _Weights) -> ModelReference | None:
    """Return the model of a source: as stated, else by path, else by the last part of its name."""
    if stated is not None:
        return next((model for model in weights if str(model) == stated), None)
    names = {Path(label).name} if name == "base" else {name, Path(label).name}
    for same in (
        [model for model in weights if _place(str(model)) == _place(label)],
        [model for model in weights if Path((model.adapter or model).path).name in names],
    ):
        if len(same) == 1:
            return same[0]
    return None


def _place(text: str) -> Path:
    return Path(text).expanduser().resolve()


@functools.lru_cache(maxsize=4)
def _weights(path: str, changed: int, names: tuple[str, ...]) -> dict[str, _Weights]:
    """Return the file's weights by tensor; `changed` is the time when it was written."""
    problems = Problems()
    table = tabulate(read_document(path), names, problems)
    problems.stop(path)
    weights = table.weights(problems)
    problems.stop(path)
    return dict(weights)
