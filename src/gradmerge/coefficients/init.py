"""Starting values of the coefficients; the link maps them back to raw numbers."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.coefficients.base import Layout, MergeTensor, Slot
from gradmerge.common.errors import ConfigError, require
from gradmerge.common.spec import Setting, settle
from gradmerge.common.typing import Origin
from gradmerge.sources.coefficients import CoefficientFile
from gradmerge.sources.names import depth_of


@dataclass(frozen=True)
class InitContext:
    """Information about the merge that an init may use."""

    sources: tuple[str, ...]
    """Names of the sources, in order."""
    tensors: Mapping[str, MergeTensor]
    """Tensors to merge, by name."""
    direction_norms: Callable[[], Tensor]
    """Squared norms of the directions over all tensors, `[sources]`; a call reads all weights."""
    origin: Origin = "base"
    """Origin from which directions are measured."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Path or hub id of each source and of `base`."""
    names: tuple[str, ...] = ()
    """All tensors of the merge, including those whose coefficients are not learned."""


class AbstractInit(ABC):
    """Starting coefficients; subclasses define them one tensor at a time."""

    @abstractmethod
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        """Return the coefficients `[sources, *slot]` of one tensor."""


@dataclass(frozen=True)
class Constant(AbstractInit):
    """Given numbers: one for all sources, one per source, or either by tensor."""

    value: Setting = 0.3
    """One number, one per source in order, or either by regular expression of tensor names."""

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        values = settle("Constant", self.value, tensor.name, context.sources)
        return over_slot(torch.tensor(values, dtype=torch.float64), slot)


@dataclass(frozen=True)
class Uniform(AbstractInit):
    """`1 / K` everywhere: the plain average with origin zero or mean."""

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        num = len(context.sources)
        return torch.full((num, *slot.shape), 1 / num, dtype=torch.float64)


@dataclass(frozen=True)
class Scaled(AbstractInit):
    """Coefficients of another init, multiplied by one factor."""

    inner: AbstractInit = field(default_factory=lambda: Constant(1.0))
    """Init to scale."""
    factor: float = 1.0
    """Factor on its coefficients."""

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        return self.factor * self.inner.coefficient(tensor, slot, context)


@dataclass(frozen=True)
class Mixup(AbstractInit):
    """Random mixing ratios, drawn from Beta(alpha, alpha) for two sources and from
    Dirichlet(alpha, ..., alpha) for more (M3, arXiv 2502.15434).

    The paper draws one ratio per merge; draws per tensor or per coefficient are extensions. Draws
    are seeded and reproducible; a fit logs the mean ratio of each source (`init/<source>`) and
    stores it in checkpoint and provenance.
    """

    alpha: float = 1.0
    """Concentration; below 1 most draws lie near a single source, where a sigmoid saturates."""
    per: Literal["model", "tensor", "element"] = "model"
    """Scope of a draw: the whole model, each slot of the granularity, or each coefficient."""
    scale: float = 1.0
    """Factor on the ratios (task arithmetic's scale if the origin is a base)."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        """Validate alpha."""
        require_alpha("Mixup", self.alpha)

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        num = len(context.sources)
        # a slot shared by several tensors gets the same draw for each of them
        place = "" if self.per == "model" else f"{slot.key}:{slot.index}"
        shape = slot.shape if self.per == "element" else ()
        alphas = torch.full((num,), self.alpha, dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + zlib.crc32(place.encode()))
            draw = torch.distributions.Dirichlet(alphas).sample(torch.Size(shape))
        ratio = self.scale * draw.movedim(-1, 0)
        return ratio if self.per == "element" else over_slot(ratio, slot)


@dataclass(frozen=True)
class LeadingComponents(AbstractInit):
    """1 on the first `floor(share * r)` of the r singular components of a direction, 0 on the rest.

    A truncated decomposition, the starting point of AdaRank (arXiv 2503.22178): 1.0 keeps all
    components; CART keeps 0.16. Tensors that are not decomposed (with one axis, or matching
    `Component.whole`) start at 1. Requires granularity `Component`.
    """

    share: float = 1.0
    """Fraction of the components that are kept at the start, in [0, 1]."""

    def __post_init__(self) -> None:
        """Validate the share."""
        require(0 <= self.share <= 1, "LeadingComponents.share", "a share in [0, 1]", self.share)

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        # one number in a parameter of its own: a matrix that Component does not decompose
        alone = slot.kind == "scalar" and slot.index is None
        if slot.kind != "component" and not alone and len(tensor.shape) > 1:
            raise ConfigError(
                f"LeadingComponents: the coefficients of {tensor.name} run over "
                f"{slot.spread_over}, not over singular components. Use granularity Component or "
                "another init."
            )
        start = torch.ones(len(context.sources), *slot.shape, dtype=torch.float64)
        if slot.kind == "component":
            start[:, int(self.share * slot.shape[0]) :] = 0
        return start


@dataclass(frozen=True)
class DepthRamp(AbstractInit):
    """Linear in depth, from `first` at the embeddings to `last` at the head (LiNeS, arXiv
    2410.17146).

    Depth is the block number in the tensor's name. Outside the blocks, embeddings and stems (by
    name) count as before the first block, all other tensors as after the last.
    """

    first: float = 0.2
    """Coefficient at the embeddings."""
    last: float = 0.4
    """Coefficient at the head."""

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        share = depth_of(tensor.name, context.names or context.tensors)
        value = self.first + (self.last - self.first) * share
        return torch.full((len(context.sources), *slot.shape), value, dtype=torch.float64)


@dataclass(frozen=True)
class MetaGPT(AbstractInit):
    """Closed form without data: `c_k = |B_k|^2 / sum_j |B_j|^2` (MetaGPT, arXiv 2406.11385)."""

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        squared = context.direction_norms().double()
        if squared.sum() == 0:
            raise ConfigError("MetaGPT: all directions are zero: every source equals the origin.")
        return over_slot(squared / squared.sum(), slot)


@dataclass(frozen=True)
class FromFile(AbstractInit):
    """Coefficients of an earlier merge (its coefficients.st), matched by tensor name.

    A coarser file may start a finer granularity: a coefficient per tensor is copied to its columns.
    """

    path: str
    """An exported folder, or its file coefficients.st (coefficients.safetensors in older ones)."""

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        loaded, spread = CoefficientFile(self.path).read(tensor.name, context.sources)
        # entries that share a coefficient can be averaged; components cannot
        other = spread not in (None, "scalar", slot.spread_over)
        if other and (slot.shape != () or spread == "component"):
            raise ConfigError(
                f"FromFile: {self.path}: the coefficients of {tensor.name} run over {spread}, "
                f"those of this merge over {slot.spread_over}. Use the granularity with which they "
                "were learned, or a coarser file."
            )
        if loaded.shape[1:] == slot.shape:
            return loaded
        if loaded.dim() == 1:
            return over_slot(loaded, slot)
        if slot.shape == ():
            return loaded.flatten(1).mean(dim=1)
        raise ConfigError(
            f"FromFile: {self.path}: {tensor.name} has coefficients of shape "
            f"{tuple(loaded.shape[1:])}, expected {slot.shape} or one per source."
        )


def initial_raw(
    layout: Layout,
    init: AbstractInit,
    context: InitContext,
    num_rows: int,
    pull_back: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return the raw parameters at the start, `{key: [rows, ...]}` in float32.

    A coefficient shared by several tensors starts at the mean of their starting values.
    """
    # computed once for all tensors, because it reads all weights
    context = replace(context, direction_norms=cache(context.direction_norms))
    wanted: dict[str, Tensor] = {}
    sums: dict[tuple[str, int], list[Tensor]] = {}
    raw = {}
    for name, slot in layout.slots.items():
        value = init.coefficient(context.tensors[name], slot, context).double()
        if slot.index is None:
            raw[slot.key] = pull_back(value).float()
        else:
            sums.setdefault((slot.key, slot.index), []).append(value)
            wanted.setdefault(slot.key, value.new_zeros(len(value), *layout.shapes[slot.key]))
    for (key, index), values in sums.items():
        wanted[key][:, index] = torch.stack(values).mean(dim=0)
    raw.update({key: pull_back(value).float() for key, value in wanted.items()})
    for key, value in raw.items():
        if value.shape[0] != num_rows:
            raise ConfigError(f"{key}: expected {num_rows} rows of raw numbers, got {len(value)}.")
    return {key: raw[key] for key in layout.shapes}


def require_alpha(who: str, alpha: float) -> None:
    """Reject a concentration that is not positive.

    Raises:
        ConfigError: alpha is not positive.
    """
    if alpha <= 0:
        raise ConfigError(
            f"{who}: alpha must be positive, got {alpha}. In M3, alpha <= 0 selects the first "
            "model alone: use init Constant with 1 for it and 0 for the others."
        )


def over_slot(per_source: Tensor, slot: Slot) -> Tensor:
    """Expand `[sources]` to `[sources, *slot]`."""
    column = per_source.reshape(-1, *([1] * len(slot.shape)))
    return column.expand(-1, *slot.shape).clone()
