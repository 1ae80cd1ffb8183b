"""Which entries share a coefficient, and how raw numbers become coefficients.

A tensor's coefficients are `c = link(z)` with `z` the raw trainable numbers in float32. A `Slot`
says where a tensor's `z` stands in the module's parameters and how it spreads over its entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradmerge._typing import Raw

_PERMUTED = 1 << 18

Kind = Literal["scalar", "axis", "partition", "element", "component"]


@dataclass(frozen=True)
class MergeTensor:
    """A tensor to be merged, as granularities need to know it."""

    name: str
    shape: tuple[int, ...]
    input_axis: int = 1
    """Axis that runs over the layer's inputs."""

    @property
    def is_bias(self) -> bool:
        """Whether this is a 1-D bias (it belongs to outputs, not inputs)."""
        # `bias_ih_l0` of recurrent layers and `in_proj_bias` of attention are biases too
        return len(self.shape) == 1 and "bias" in self.name.rpartition(".")[-1]


@dataclass(frozen=True)
class Slot:
    """The place of one tensor's raw coefficients.

    `raw[key]` has shape `[rows, width]` for shared tables (`index` picks a column) and
    `[rows, *shape]` otherwise (behind a scale, `[rows, 1 + n]`: see `WithScale`).
    """

    key: str
    kind: Kind
    shape: tuple[int, ...]
    """Compact shape: `()` scalar, `(d,)` along `axis`, `(parts,)`, `(components,)`, or the tensor's
    own shape."""
    index: int | None = None
    axis: int = 0
    seed: int = 0

    @property
    def spread_over(self) -> str:
        """What the compact shape stands for, as `coefficients.safetensors` records it."""
        detail = {"axis": f" {self.axis}", "partition": f" of seed {self.seed}"}
        return self.kind + detail.get(self.kind, "")

    def read(self, raw: Raw) -> Tensor:
        """`z` of this tensor, `[rows, *slot]`: a view of the parameters."""
        table = raw[self.key]
        return table if self.index is None else table[:, self.index]

    def parts(self, num_elements: int, device: torch.device) -> Tensor:
        """The part that each entry belongs to (partition only), `[num_elements]`, reproducible.

        Parts are equal in size to within one entry; in large tensors, where a permutation costs too
        much a step, to within what independent draws give (below 2% for ten parts).
        """
        generator = torch.Generator().manual_seed(self.seed)
        if num_elements <= _PERMUTED:
            parts = torch.randperm(num_elements, generator=generator) % self.shape[0]
        else:
            parts = torch.randint(self.shape[0], (num_elements,), generator=generator)
        return parts.to(device)


@dataclass(frozen=True)
class Layout:
    """All slots of a merge and the shapes of the raw parameters."""

    slots: Mapping[str, Slot]
    """By tensor name."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of a raw parameter without its first axis, by key."""


class AbstractCoefficients(ABC):
    """A granularity, possibly wrapped by links."""

    @property
    def by_entry(self) -> bool:
        """Whether `link` treats each entry of a slot by itself (over all rows), so that a slot may
        be taken part by part.
        """
        return False

    @abstractmethod
    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        """Place every tensor's raw coefficients."""

    @abstractmethod
    def num_rows(self, num_sources: int) -> int:
        """Rows of the raw parameters for K sources.

        Raises:
            ConfigError: the link does not fit this number of sources.
        """

    @abstractmethod
    def link(self, raw: Tensor) -> Tensor:
        """Coefficients `c` of raw `z`: `[rows, *slot]` to `[sources, *slot]`, differentiable."""

    @abstractmethod
    def pull_back(self, coefficient: Tensor) -> Tensor:
        """A `z` with `link(z) = c`: `[sources, *slot]` to `[rows, *slot]`.

        Raises:
            ConfigError: the link cannot reach these coefficients.
        """


def parameter_key(name: str) -> str:
    """A tensor name as a key of `nn.ParameterDict`, which forbids dots."""
    return name.replace(".", "/")
