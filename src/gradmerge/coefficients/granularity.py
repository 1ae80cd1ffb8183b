"""Granularities: one coefficient per model, group, tensor, column, row, part, component, entry."""

from __future__ import annotations

import math
import re
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from typing_extensions import override

from gradmerge.coefficients.base import (
    AbstractCoefficients,
    Layout,
    MergeTensor,
    Slot,
    parameter_key,
)
from gradmerge.errors import ConfigError


class AbstractGranularity(AbstractCoefficients):
    """A granularity alone has the identity link: any real coefficient."""

    def num_rows(self, num_sources: int) -> int:
        """One row a source."""
        return num_sources

    @property
    def by_entry(self) -> bool:
        """Raw numbers are the coefficients."""
        return True

    def link(self, raw: torch.Tensor) -> torch.Tensor:
        """The identity."""
        return raw

    def pull_back(self, coefficient: torch.Tensor) -> torch.Tensor:
        """The identity."""
        return coefficient


class _Own(AbstractGranularity):
    """A granularity with raw coefficients of each tensor's own."""

    @override
    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        slots = {tensor.name: self.slot(tensor) for tensor in tensors}
        return Layout(slots, {slot.key: slot.shape for slot in slots.values()})

    @abstractmethod
    def slot(self, tensor: MergeTensor) -> Slot:
        """Where this tensor's raw coefficients stand."""


def _require_pattern(who: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{who}: {pattern!r} is no regular expression: {error}") from error


def _table(key: str, columns: dict[str, int]) -> Layout:
    slots = {name: Slot(key, "scalar", (), index=column) for name, column in columns.items()}
    return Layout(slots, {key: (max(columns.values(), default=-1) + 1,)})


@dataclass(frozen=True)
class Model(AbstractGranularity):
    """One coefficient per source for the whole model (task-wise merging)."""

    @override
    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        return _table("model", {tensor.name: 0 for tensor in tensors})


@dataclass(frozen=True)
class Group(AbstractGranularity):
    r"""One coefficient per source and group of tensors.

    A tensor joins the first pattern that it matches; the matched text names the group, so
    ``layers\.\d+\.`` alone makes one group a transformer block, and
    ``layers\.\d+\.(self_attn|mlp)`` one per block's attention and one its MLP. Tensors that match
    nothing share one group.
    """

    patterns: tuple[str, ...] = (r"(layers?|h|blocks?)\.\d+\.",)
    """Regular expressions, tried in order."""

    def __post_init__(self) -> None:
        """Check the patterns."""
        for pattern in self.patterns:
            _require_pattern("Group", pattern)

    @override
    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        order: dict[str, int] = {}
        columns = {}
        for tensor in tensors:
            matches = (re.search(pattern, tensor.name) for pattern in self.patterns)
            found = next((match for match in matches if match), None)
            group = tensor.name[: found.end()] if found else ""
            columns[tensor.name] = order.setdefault(group, len(order))
        return _table("group", columns)


@dataclass(frozen=True)
class Tensor(AbstractGranularity):
    """One coefficient per source and named tensor (AdaMerging's "layer-wise")."""

    @override
    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        return _table("tensor", {tensor.name: i for i, tensor in enumerate(tensors)})


@dataclass(frozen=True)
class Column(_Own):
    """One coefficient per source and input column of a weight matrix (DAM, arXiv 2410.08371).

    Convolutions: one an input channel. 1-D gains: one per entry. 1-D biases, which belong to
    outputs: one per tensor.
    """

    @override
    def slot(self, tensor: MergeTensor) -> Slot:
        key = parameter_key(tensor.name)
        if len(tensor.shape) == 0 or tensor.is_bias:
            return Slot(key, "scalar", ())
        axis = tensor.input_axis if len(tensor.shape) > 1 else 0
        return Slot(key, "axis", (tensor.shape[axis],), axis=axis)


@dataclass(frozen=True)
class Row(_Own):
    """One coefficient per source and output row of a weight matrix; 1-D tensors: one per entry."""

    @override
    def slot(self, tensor: MergeTensor) -> Slot:
        key = parameter_key(tensor.name)
        if len(tensor.shape) == 0:
            return Slot(key, "scalar", ())
        axis = 1 - tensor.input_axis if len(tensor.shape) > 1 else 0
        return Slot(key, "axis", (tensor.shape[axis],), axis=axis)


@dataclass(frozen=True)
class Partition(_Own):
    """One coefficient per source and part of a random K-way partition of each tensor (aTLAS x K).

    Source: Zhang et al. 2024, arXiv 2407.02880. The partition depends on the seed and the tensor's
    name and size alone; its parts are (nearly) equal in size.
    """

    num_parts: int = 10
    """Parts a tensor; smaller tensors get one per entry."""
    seed: int = 0
    """Seed of the partition."""

    def __post_init__(self) -> None:
        """Check the number of parts."""
        if self.num_parts < 1:
            raise ConfigError(f"Partition: num_parts must be at least 1, got {self.num_parts}.")

    @override
    def slot(self, tensor: MergeTensor) -> Slot:
        size = 1
        for length in tensor.shape:
            size *= length
        seed = self.seed * 1_000_003 + zlib.crc32(tensor.name.encode())
        parts = (min(self.num_parts, size),)
        return Slot(parameter_key(tensor.name), "partition", parts, seed=seed)


@dataclass(frozen=True)
class Component(_Own):
    """One coefficient per source and singular component of its direction (AdaRank, 2503.22178).

    Tensors of two axes and more are matrices `[out, rest]` with `min(out, rest)` components, sorted
    by singular value; 1-D tensors have one coefficient. Wants operator `Components`.
    """

    whole: str | None = None
    """Regular expression of tensors that are not decomposed: one coefficient per source, too."""

    def __post_init__(self) -> None:
        """Check the pattern."""
        if self.whole is not None:
            _require_pattern("Component: whole", self.whole)

    @override
    def slot(self, tensor: MergeTensor) -> Slot:
        key = parameter_key(tensor.name)
        whole = self.whole is not None and re.search(self.whole, tensor.name)
        if whole or len(tensor.shape) < 2 or 0 in tensor.shape:
            return Slot(key, "scalar", ())
        rank = min(tensor.shape[0], math.prod(tensor.shape[1:]))
        return Slot(key, "component", (rank,))


@dataclass(frozen=True)
class Element(_Own):
    """One coefficient per source and single weight (NP Merge, arXiv 2412.15467)."""

    @override
    def slot(self, tensor: MergeTensor) -> Slot:
        return Slot(parameter_key(tensor.name), "element", tensor.shape)
