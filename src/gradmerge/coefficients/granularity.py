"""Granularities: which entries of the network share a coefficient."""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from typing_extensions import override

from gradmerge.coefficients.base import (
    AbstractCoefficients,
    Layout,
    MergeTensor,
    Slot,
    parameter_key,
)
from gradmerge.common.errors import require
from gradmerge.common.patterns import matches, require_pattern, search
from gradmerge.common.spec import PATTERNS
from gradmerge.sources.coefficients import CoefficientFile


class AbstractGranularity(AbstractCoefficients):
    """Base class of granularities: subclasses define `layout`; the link is the identity.

    Raw numbers are the coefficients: any real number, one row per source.
    """

    @override
    def num_rows(self, num_sources: int) -> int:
        return num_sources

    @property
    @override
    def by_entry(self) -> bool:
        return True

    @override
    def link(self, raw: torch.Tensor) -> torch.Tensor:
        return raw

    @override
    def pull_back(self, coefficient: torch.Tensor) -> torch.Tensor:
        return coefficient


class _PerTensor(AbstractGranularity):
    """A granularity that gives each tensor a raw parameter of its own."""

    @override
    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        slots = {tensor.name: self.slot(tensor) for tensor in tensors}
        return Layout(slots, {slot.key: slot.shape for slot in slots.values()})

    @abstractmethod
    def slot(self, tensor: MergeTensor) -> Slot:
        """Return the location of the raw coefficients of one tensor."""


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

    The first pattern that matches a tensor's name decides, and the name up to the end of the match
    identifies the group: ``layers\.\d+\.`` alone gives one group per transformer block, and
    ``layers\.\d+\.(self_attn|mlp)`` one for the attention and one for the MLP of each block.
    Tensors that match no pattern form one group.
    """

    patterns: tuple[str, ...] = field(default=(r"(layers?|h|blocks?)\.\d+\.",), metadata=PATTERNS)
    """Regular expressions of tensor names, tried in order."""

    def __post_init__(self) -> None:
        """Validate the patterns."""
        for pattern in self.patterns:
            require_pattern("Group.patterns", pattern)

    @override
    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        order: dict[str, int] = {}
        columns = {}
        for tensor in tensors:
            spans = (search(pattern, tensor.name) for pattern in self.patterns)
            found = next((span for span in spans if span), None)
            group = tensor.name[: found[1]] if found else ""
            columns[tensor.name] = order.setdefault(group, len(order))
        return _table("group", columns)


@dataclass(frozen=True)
class Tensor(AbstractGranularity):
    """One coefficient per source and named tensor (what AdaMerging calls layer-wise)."""

    @override
    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        return _table("tensor", {tensor.name: i for i, tensor in enumerate(tensors)})


@dataclass(frozen=True)
class Column(_PerTensor):
    """One coefficient per source and input column of a weight matrix (DAM, arXiv 2410.08371).

    Convolutions have one per input channel, 1-D gains one per entry, and 1-D biases, which belong
    to outputs, one per tensor. Stacked experts `[experts, out, in]` have those of each expert.
    """

    @override
    def slot(self, tensor: MergeTensor) -> Slot:
        key, one = parameter_key(tensor.name), tensor.expert
        if len(one.shape) == 0 or one.is_bias:
            return _of_experts(Slot(key, "scalar", ()), tensor)
        axis = one.input_axis if len(one.shape) > 1 else 0
        return _of_experts(Slot(key, "axis", (one.shape[axis],), axis=axis), tensor)


@dataclass(frozen=True)
class Row(_PerTensor):
    """One coefficient per source and output row of a weight matrix (1-D tensors: one per entry).

    Stacked experts `[experts, out, in]` have those of each expert.
    """

    @override
    def slot(self, tensor: MergeTensor) -> Slot:
        key, one = parameter_key(tensor.name), tensor.expert
        if len(one.shape) == 0:
            return _of_experts(Slot(key, "scalar", ()), tensor)
        axis = 1 - one.input_axis if len(one.shape) > 1 else 0
        return _of_experts(Slot(key, "axis", (one.shape[axis],), axis=axis), tensor)


def _of_experts(slot: Slot, tensor: MergeTensor) -> Slot:
    """Give each expert of a stack the coefficients of one."""
    if not tensor.stacked:
        return slot
    count = tensor.shape[0]
    if slot.kind == "scalar":
        return replace(slot, kind="axis", shape=(count,), axis=0)
    return replace(slot, shape=(count * slot.shape[0],), experts=count)


@dataclass(frozen=True)
class Partition(_PerTensor):
    """One coefficient per source and part of a random K-way partition of each tensor (aTLAS x K).

    Source: Zhang et al. 2024, arXiv 2407.02880. The partition depends only on the seed and on the
    tensor's name and size; its parts are nearly equal in size.
    """

    num_parts: int = 10
    """Number of parts per tensor; tensors with fewer entries get one part per entry."""
    seed: int = 0
    """Seed of the random partition."""

    def __post_init__(self) -> None:
        """Validate the number of parts."""
        require(self.num_parts >= 1, "Partition.num_parts", "at least 1", self.num_parts)

    @override
    def slot(self, tensor: MergeTensor) -> Slot:
        seed = self.seed * 1_000_003 + zlib.crc32(tensor.name.encode())
        parts = (min(self.num_parts, math.prod(tensor.shape)),)
        return Slot(parameter_key(tensor.name), "partition", parts, seed=seed)


@dataclass(frozen=True)
class Chunks(AbstractGranularity):
    """One coefficient per source and run of neighbouring rows; important tensors have more runs
    (Expert Merging++, arXiv 2509.25712).

        m = max(1, floor(budget N I^power / sum over tensors of I^power)),   N tensors
        I = sum_k |c_k| sum |B_k|

    The rows of a tensor (entries of a vector) are cut in order into m runs, equal in length to
    within one row. Importance I is the size of what the sources change in the tensor, weighted by
    the coefficients of a first merge.
    """

    budget: float = 1.2
    """Runs per tensor to be distributed, on average. Tensors that get none have one all the same,
    so there are more in total; the paper uses 0.9 to 1.2."""
    power: float = 1.0
    """Exponent of the importance; 0 gives all tensors the same number."""
    first: str | None = None
    """Exported folder, or coefficients.st, of the first merge; its mean `|c_k|` per tensor counts,
    and tensors without coefficients in it have one run. Default: all `c_k` count as equal."""

    def __post_init__(self) -> None:
        """Validate budget and exponent."""
        require(self.budget > 0, "Chunks.budget", "a positive number", self.budget)
        require(self.power >= 0, "Chunks.power", "at least 0", self.power)

    @property
    @override
    def needs_norms(self) -> bool:
        return True

    @override
    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        shares = [self._importance(tensor) ** self.power for tensor in tensors]
        scale = self.budget * len(tensors) / (math.fsum(shares) or 1.0)
        slots = {}
        for tensor, share in zip(tensors, shares, strict=True):
            # the slack keeps a whole number whole, whatever float32 makes of equal shares
            rows = tensor.shape[0] if tensor.shape else 1
            count = min(rows, math.floor(scale * share * (1 + 1e-6)))
            slot = Slot(parameter_key(tensor.name), "scalar", ())
            if count > 1:
                slot = replace(slot, kind="axis", shape=(count,), length=rows)
            slots[tensor.name] = slot
        return Layout(slots, {slot.key: slot.shape for slot in slots.values()})

    def _importance(self, tensor: MergeTensor) -> float:
        """Return `sum_k |c_k| sum |B_k|`."""
        if self.first is None:
            return math.fsum(tensor.norms.values())
        file = CoefficientFile(self.first, "Chunks.first")
        if tensor.name not in file.names():
            return 0.0
        found, _ = file.read(tensor.name, tuple(tensor.norms))
        sizes = found.reshape(len(found), -1).abs().mean(dim=1).tolist()
        return math.fsum(c * norm for c, norm in zip(sizes, tensor.norms.values(), strict=True))


@dataclass(frozen=True)
class Component(_PerTensor):
    """One coefficient per source and singular component of its direction (AdaRank, arXiv
    2503.22178).

    Tensors with two or more axes are matrices `[out, rest]` with `min(out, rest)` components, in
    descending order of singular values; 1-D tensors have one coefficient per source. Requires the
    operator `Components`.
    """

    whole: str | None = None
    """Regular expression of tensors that are not decomposed and have one coefficient per source."""

    def __post_init__(self) -> None:
        """Validate the pattern."""
        if self.whole is not None:
            require_pattern("Component.whole", self.whole)

    @override
    def slot(self, tensor: MergeTensor) -> Slot:
        key = parameter_key(tensor.name)
        whole = self.whole is not None and matches([self.whole], tensor.name)
        if whole or len(tensor.shape) < 2 or 0 in tensor.shape:
            return Slot(key, "scalar", ())
        rank = min(tensor.shape[0], math.prod(tensor.shape[1:]))
        return Slot(key, "component", (rank,))


@dataclass(frozen=True)
class Element(_PerTensor):
    """One coefficient per source and individual weight (NP Merge, arXiv 2412.15467)."""

    @override
    def slot(self, tensor: MergeTensor) -> Slot:
        return Slot(parameter_key(tensor.name), "element", tensor.shape)
