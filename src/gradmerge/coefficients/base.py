"""Base classes of granularities and links.

The coefficients of a tensor are `c = link(z)`, where `z` are raw trainable numbers in float32. A
`Slot` states where the `z` of a tensor are stored and how they spread over its entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from gradmerge.common.typing import Raw, SpreadKind

# Largest tensor that is partitioned by a permutation; larger ones draw each part independently.
_PERMUTED = 1 << 18


@dataclass(frozen=True)
class MergeTensor:
    """Name and shape of a tensor to merge, as granularities and inits see it."""

    name: str
    shape: tuple[int, ...]
    input_axis: int = 1
    """Axis along which the inputs of the layer run; of one expert, if they are stacked."""
    stacked: bool = False
    """True if the first axis counts experts, each with a weight or bias of its own."""
    norms: Mapping[str, float] = field(default_factory=dict, compare=False)
    """`sum |B_k|` over the entries of each source's direction by source, if the coefficients need
    them."""

    @property
    def is_bias(self) -> bool:
        """True for a 1-D bias, whose entries belong to outputs, not to inputs."""
        # `bias_ih_l0` of recurrent layers and `in_proj_bias` of attention are biases too
        return len(self.shape) == 1 and "bias" in self.name.rpartition(".")[-1]

    @property
    def expert(self) -> MergeTensor:
        """The weight or bias of one expert; the tensor itself if it is not a stack."""
        return replace(self, shape=self.shape[1:], stacked=False) if self.stacked else self


@dataclass(frozen=True)
class Slot:
    """Location of the raw coefficients of one tensor.

    `raw[key]` has shape `[rows, width]` for a table shared by several tensors (`index` selects a
    column) and `[rows, *shape]` otherwise (`[rows, 1 + n]` with `WithScale`).
    """

    key: str
    kind: SpreadKind
    shape: tuple[int, ...]
    """Compact shape: `()` for a scalar, `(d,)` along `axis`, `(parts,)`, `(components,)`, or the
    shape of the tensor. With `experts` it is `(experts * d,)`."""
    index: int | None = None
    axis: int = 0
    seed: int = 0
    experts: int = 0
    """Number of stacked experts, each of which has coefficients along `axis` of its own; 0 if the
    tensor is not a stack."""
    length: int = 0
    """Length of the axis, if its coefficients are those of runs along it; else 0."""

    @property
    def spread_over(self) -> str:
        """Description of the compact shape, as stored in `coefficients.st`."""
        detail = {"axis": f" {self.axis}", "partition": f" of seed {self.seed}"}
        stack = f" of {self.experts} experts" if self.experts else ""
        runs = " in runs" if self.length else ""
        return self.kind + detail.get(self.kind, "") + stack + runs

    def read(self, raw: Raw) -> Tensor:
        """Return `z` of this tensor, `[rows, *slot]`, as a view of the parameters."""
        table = raw[self.key]
        return table if self.index is None else table[:, self.index]

    def parts(self, num_elements: int, device: torch.device) -> Tensor:
        """Return the part of each entry (partition only), `[num_elements]`, reproducibly.

        Parts are equal in size to within one entry. In large tensors, for which a permutation per
        step is too expensive, parts are drawn independently and equal only in expectation (to
        within 2% for ten parts). They are int64 on a CPU, and take as few bytes as possible on
        other devices, where a plan keeps them.
        """
        generator = torch.Generator().manual_seed(self.seed)
        if num_elements <= _PERMUTED:
            parts = torch.randperm(num_elements, generator=generator) % self.shape[0]
        else:
            parts = torch.randint(self.shape[0], (num_elements,), generator=generator)
        if device.type != "cpu":
            kinds = (torch.uint8, torch.int16, torch.int32)
            parts = parts.to(next(k for k in kinds if self.shape[0] - 1 <= torch.iinfo(k).max))
        return parts.to(device)


@dataclass(frozen=True)
class Layout:
    """Slots of all tensors of a merge and shapes of the raw parameters."""

    slots: Mapping[str, Slot]
    """Slot by tensor name."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each raw parameter without its first axis, by key."""


class AbstractCoefficients(ABC):
    """Map from raw numbers to coefficients: a granularity, possibly wrapped by links."""

    @property
    def by_entry(self) -> bool:
        """True if `link` acts on each entry of a slot separately (over all rows), so that a slot
        may be processed in parts.
        """
        return False

    @property
    def needs_norms(self) -> bool:
        """True if `layout` reads `MergeTensor.norms`, for which all weights are read once."""
        return False

    @abstractmethod
    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        """Assign each tensor the location of its raw coefficients."""

    @abstractmethod
    def num_rows(self, num_sources: int) -> int:
        """Return the number of rows of the raw parameters.

        Raises:
            ConfigError: the link does not support this number of sources.
        """

    @abstractmethod
    def link(self, raw: Tensor) -> Tensor:
        """Return `c` for raw `z`: `[rows, *slot]` to `[sources, *slot]`, differentiable.

        A single row counts for all sources.
        """

    @abstractmethod
    def pull_back(self, coefficient: Tensor) -> Tensor:
        """Return a `z` with `link(z) = c`: `[sources, *slot]` to `[rows, *slot]`.

        Raises:
            ConfigError: the coefficients lie outside the range of the link.
        """


def linked(coefficients: AbstractCoefficients, raw: Tensor, num_sources: int) -> Tensor:
    """Return `c = link(z)`, `[sources, *slot]`, with a row that all share repeated."""
    found = coefficients.link(raw)
    if len(found) == num_sources:
        return found
    return found.expand(num_sources, *found.shape[1:]).contiguous()


_RESERVED = frozenset(dir(nn.ParameterDict()))


def parameter_key(name: str) -> str:
    """Return a tensor name as a key of `nn.ParameterDict`: no dots, no attribute of its own."""
    key = name.replace("/", "//").replace(".", "/")
    return f"{key}/" if key in _RESERVED else key
