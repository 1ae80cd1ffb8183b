"""The weights of a mergekit file as starting coefficients."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gradmerge.coefficients.base import MergeTensor, Slot
from gradmerge.coefficients.init import AbstractInit, InitContext, over_slot
from gradmerge.errors import ConfigError, nearest
from gradmerge.mergekit.content import ModelReference, Problems
from gradmerge.mergekit.document import read_document
from gradmerge.mergekit.table import tabulate

_Weights = Mapping[str, Mapping[ModelReference, float]]


@dataclass(frozen=True)
class FromMergekit(AbstractInit):
    """The weights of a mergekit YAML, with its gradients and filters resolved for each tensor.

    Of `linear`, `passthrough` and `task_arithmetic` these are the whole method. Of methods that
    prune and elect (ties, dare, della, breadcrumbs) they are the weights of the task vectors times
    lambda, of those on a sphere (slerp, nuslerp, multislerp, karcher) and model_stock the weights
    that they begin with. With origin base, a sum of models has to have weights that sum to 1; with
    origin zero, the file's base has to be a source.
    """

    path: str
    """The mergekit YAML."""
    models: dict[str, str] = field(default_factory=dict)
    """Source -> the file's model that it stands for, as the file writes it; only for those that are
    not found by path or by their last part's name. `base` is the base."""

    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        """See `AbstractInit.coefficient`.

        Raises:
            ConfigError: the file cannot be read, its models are not those of the merge, or its
                weights cannot be reached from this origin.
        """
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ConfigError(f"FromMergekit: {self.path}: no such file.")
        weights = _weights(str(path), path.stat().st_mtime_ns, context.names or (tensor.name,))
        if tensor.name not in weights:
            raise ConfigError(
                f"FromMergekit: {self.path} gives no weights for {tensor.name}."
                f"{nearest(tensor.name, weights)}"
            )
        row = self._by_source(weights[tensor.name], context)
        total = sum(row.values())
        if context.origin != "zero" and abs(total - 1) > 1e-4:
            raise ConfigError(
                f"FromMergekit: {self.path}: the weights of {tensor.name} sum to {total:.6g}, but "
                f"from origin {context.origin} they always sum to 1, the origin's own among them. "
                "Set `origin: zero`, or weights that sum to 1."
            )
        values = [row[name] for name in context.sources]
        return over_slot(torch.tensor(values, dtype=torch.float64), slot)

    def _by_source(
        self, weights: Mapping[ModelReference, float], context: InitContext
    ) -> dict[str, float]:
        """Weights by source name, and of the base under `base` where it is no source."""
        known = list(context.sources)
        if context.origin == "base":
            known.insert(0, "base")
        found = {
            name: _match(self.models.get(name), name, context.labels.get(name, name), weights)
            for name in known
        }
        lost = [name for name, model in found.items() if model is None]
        left = [model for model in weights if model not in found.values() and weights[model] != 0]
        twice = len(set(found.values())) < len(found) and not lost
        # a base that has no weight in the file need not stand there
        if lost == ["base"] and not left:
            return {"base": 0.0, **{k: weights[m] for k, m in found.items() if m is not None}}
        if lost or left or twice:
            models = ", ".join(map(str, weights))
            raise ConfigError(
                f"FromMergekit: {self.path} merges {models}; this merge has "
                f"{', '.join(f'{name} ({context.labels.get(name, name)})' for name in known)}"
                f" and origin {context.origin}. "
                + (f"Not in the file: {', '.join(lost)}. " if lost else "")
                + (f"Not in this merge: {', '.join(map(str, left))}. " if left else "")
                + "Name the same models in both, or say which is which: `models: {SOURCE: MODEL}`."
            )
        return {name: weights[model] for name, model in found.items() if model is not None}


def _match(
    stated: str | None, name: str, label: str, weights: Mapping[ModelReference, float]
) -> ModelReference | None:
    """The file's model that is a source: as stated, else by path, else by the last part's name."""
    if stated is not None:
        return next((model for model in weights if str(model) == stated), None)
    names = {Path(label).name} if name == "base" else {name, Path(label).name}
    for same in (
        [model for model in weights if str(model) == label or _same_path(str(model), label)],
        [model for model in weights if _last(model) in names],
    ):
        if len(same) == 1:
            return same[0]
    return None


def _same_path(first: str, second: str) -> bool:
    paths: Sequence[Path] = [Path(text).expanduser() for text in (first, second)]
    return all(path.exists() for path in paths) and paths[0].resolve() == paths[1].resolve()


def _last(model: ModelReference) -> str:
    return Path(model.lora or model.path).name


@functools.lru_cache(maxsize=4)
def _weights(path: str, changed: int, names: tuple[str, ...]) -> _Weights:
    """The file's weights, by tensor; `changed` is when it was written."""
    document = read_document(path)
    problems = Problems()
    table = tabulate(document, names, problems)
    problems.stop(path)
    weights = table.weights(problems)
    problems.stop(path)
    return weights
