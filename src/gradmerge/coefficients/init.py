"""Where training starts, in coefficient space; the link pulls it back to raw numbers."""

from __future__ import annotations

import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from gradmerge._typing import Origin
from gradmerge.coefficients.base import Layout, MergeTensor, Slot
from gradmerge.errors import ConfigError, nearest
from gradmerge.sources.names import depth_of
from gradmerge.spec import Setting, settle


@dataclass(frozen=True)
class InitContext:
    """What an init may look at."""

    sources: tuple[str, ...]
    """Names of the sources, in order."""
    tensors: Mapping[str, MergeTensor]
    """The tensors to merge, by name."""
    direction_norms: Callable[[], Tensor]
    """Squared norms of the directions over all tensors, `[sources]`; reads all weights."""
    origin: Origin = "base"
    """What directions are measured from."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Where each source is from, and `base`: a path or hub id."""
    names: tuple[str, ...] = ()
    """All tensors of the merge, also those whose coefficients are not learned."""


class AbstractInit(ABC):
    """Starting coefficients of one tensor."""

    @abstractmethod
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        """Coefficients `[sources, *slot]` for this tensor."""


@dataclass(frozen=True)
class Constant(AbstractInit):
    """Stated numbers: one for all, one per source, or either by tensor."""

    value: Setting = 0.3
    """One number, one per source in order, or either by regular expression of tensor names."""

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        values = settle("Constant", self.value, tensor.name, context.sources)
        return over_slot(torch.tensor(values, dtype=torch.float64), slot)


@dataclass(frozen=True)
class Uniform(AbstractInit):
    """`1 / K` everywhere: with origin zero or mean, the plain average."""

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        num = len(context.sources)
        return torch.full((num, *slot.shape), 1 / num, dtype=torch.float64)


@dataclass(frozen=True)
class Scaled(AbstractInit):
    """Another init's coefficients times one factor."""

    inner: AbstractInit = field(default_factory=lambda: Constant(1.0))
    """The init."""
    factor: float = 1.0
    """What its coefficients are multiplied with."""

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        return self.factor * self.inner.coefficient(tensor, slot, context)


@dataclass(frozen=True)
class Mixup(AbstractInit):
    """Random mixing ratios (M3, arXiv 2502.15434): Beta(alpha, alpha) for two sources.

    More sources: Dirichlet(alpha, ..., alpha). The paper draws one ratio a merge; a draw a tensor
    or an entry are extensions. Seeded, so it reproduces; a fit logs the mean draw of each source
    (`init/<source>`) and keeps it in the checkpoint and the provenance.
    """

    alpha: float = 1.0
    """Concentration; below 1 most draws sit near one source, where a sigmoid is saturated."""
    per: Literal["model", "tensor", "element"] = "model"
    """What shares a draw: everything, a slot of the granularity, or each coefficient."""
    scale: float = 1.0
    """Factor on the ratios (task arithmetic's scale where the origin is a base)."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check alpha."""
        require_alpha("Mixup", self.alpha)

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        num = len(context.sources)
        # A slot that several tensors share gets one draw, whichever tensor asks.
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
    """1 on the first `floor(share * r)` of a direction's r singular components, else 0.

    A truncated decomposition as the start of AdaRank (arXiv 2503.22178): 1.0 keeps all, CART keeps
    0.16. Tensors that are not decomposed (of one axis, or `Component.whole`) start at 1.
    """

    share: float = 1.0
    """Share of the components that are kept at the start, in [0, 1]."""

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 <= self.share <= 1:
            raise ConfigError(f"LeadingComponents: expected a share in [0, 1], got {self.share}.")

    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        """See `AbstractInit.coefficient`.

        Raises:
            ConfigError: the granularity is not `Component`.
        """
        # a place of its own for one number: a matrix that Component leaves whole
        alone = slot.kind == "scalar" and slot.index is None
        if slot.kind != "component" and not alone and len(tensor.shape) > 1:
            raise ConfigError(
                f"LeadingComponents: the coefficients of {tensor.name} run over "
                f"{slot.spread_over}, not over singular components. Set coefficients: Component, "
                "or take another init."
            )
        start = torch.ones(len(context.sources), *slot.shape, dtype=torch.float64)
        if slot.kind == "component":
            start[:, int(self.share * slot.shape[0]) :] = 0
        return start


@dataclass(frozen=True)
class DepthRamp(AbstractInit):
    """From `first` at the embeddings to `last` at the head, linear in depth (LiNeS, 2410.17146).

    Depth is the number of the block in a tensor's name. Of the tensors outside of blocks,
    embeddings and stems (by name) come before the first block and all others after the last.
    """

    first: float = 0.2
    last: float = 0.4

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        share = depth_of(tensor.name, context.tensors)
        value = self.first + (self.last - self.first) * share
        return torch.full((len(context.sources), *slot.shape), value, dtype=torch.float64)


@dataclass(frozen=True)
class MetaGPT(AbstractInit):
    """`c_k = |B_k|^2 / sum_j |B_j|^2` (MetaGPT, arXiv 2406.11385): closed form, no data."""

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        squared = context.direction_norms().double()
        if squared.sum() == 0:
            raise ConfigError("MetaGPT: all directions are zero; the sources equal their origin.")
        return over_slot(squared / squared.sum(), slot)


@dataclass(frozen=True)
class FromFile(AbstractInit):
    """Coefficients of an earlier merge (its coefficients.safetensors), matched by tensor name.

    A coarser file starts a finer granularity: a coefficient per tensor spreads over its columns.
    """

    path: str
    """coefficients.safetensors of an exported folder."""

    @override
    def coefficient(self, tensor: MergeTensor, slot: Slot, context: InitContext) -> Tensor:
        if not Path(self.path).is_file():
            raise ConfigError(f"FromFile: {self.path}: no such file.")
        try:
            with safe_open(self.path, framework="pt") as file:
                names = list(file.keys())
                if tensor.name not in names:
                    raise ConfigError(
                        f"FromFile: {self.path} holds no coefficients for {tensor.name}."
                        f"{nearest(tensor.name, names)}"
                    )
                loaded: Tensor = file.get_tensor(tensor.name).double()
                metadata = file.metadata() or {}
                stored = json.loads(metadata.get("sources", "null"))
                spread = json.loads(metadata.get("slots", "{}")).get(tensor.name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"FromFile: {self.path}: no readable safetensors: {error}."
            ) from error
        if stored is None and len(loaded) != len(context.sources):
            raise ConfigError(
                f"FromFile: {self.path} is for {len(loaded)} sources, this merge has "
                f"{len(context.sources)}."
            )
        if stored is not None:
            lost = [name for name in context.sources if name not in stored]
            if lost or len(stored) != len(context.sources):
                raise ConfigError(
                    f"FromFile: {self.path} is for the sources {stored}, this merge has "
                    f"{list(context.sources)}."
                )
            loaded = loaded[[stored.index(name) for name in context.sources]]
        # entries that share a coefficient have a mean; components have none
        other = spread not in (None, "scalar", slot.spread_over)
        if other and (slot.shape != () or spread == "component"):
            raise ConfigError(
                f"FromFile: {self.path}: the coefficients of {tensor.name} run over {spread}, "
                f"those of this merge over {slot.spread_over}. Take the granularity that they "
                "were learned with, or a coarser file."
            )
        if tuple(loaded.shape[1:]) == slot.shape:
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
    """The raw parameters at the start, `{key: [rows, ...]}` in float32.

    A coefficient that several tensors share starts at the mean of what the init gives each.
    """
    # reads all weights, so once for all tensors
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
            raise ConfigError(f"{key}: expected {num_rows} raw rows, got {value.shape[0]}.")
    return {key: raw[key] for key in layout.shapes}


def require_alpha(who: str, alpha: float) -> None:
    """Refuse a concentration that is no distribution's.

    Raises:
        ConfigError: it is not positive.
    """
    if alpha <= 0:
        raise ConfigError(
            f"{who}: alpha must be positive, got {alpha}. In M3 an alpha of 0 or less stands for "
            "the first model alone: say that with init Constant 1 on it and 0 on the others."
        )


def over_slot(per_source: Tensor, slot: Slot) -> Tensor:
    """`[sources]` to `[sources, *slot]`."""
    column = per_source.reshape(-1, *([1] * len(slot.shape)))
    return column.expand(-1, *slot.shape).clone()
