"""Base class of operators, and the tensors and coefficients that they work on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradmerge.common.errors import ConfigError
from gradmerge.common.low_rank import LowRank
from gradmerge.common.typing import Origin, SpreadKind


@dataclass(frozen=True)
class Terms:
    """Frozen tensors to merge into one: all of the same shape, each in its own dtype."""

    sources: list[Tensor]
    """`theta_k`, or directions `B_k` (see `directions`)."""
    origin: Tensor | None
    """`A`; None if the origin is zero or the mean of the sources."""
    mean_origin: bool = False
    """True if the origin is the mean of the sources."""
    directions: bool = False
    """True if `sources` holds directions, with the origin already subtracted."""
    updates: list[LowRank | None] | None = None
    """The directions as products of two small matrices, None for a zero one; `sources` is empty."""
    masks: list[Tensor | None] | None = None
    """Mask of each direction, flat, one byte per entry: where it is 0, the direction is zero."""
    factors: list[float] | None = None
    """Factor on each direction; given together with `masks`."""
    facts: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Cache of an operator for values derived from these tensors. The tensors never change, so the
    same dictionary is passed at every call."""
    total: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    """Adds up numbers over all rows of a tensor, if these are some of them."""

    @property
    def count(self) -> int:
        """Number of sources."""
        return len(self.sources or self.updates or ())

    @property
    def shape(self) -> torch.Size:
        """Shape of the merged tensor."""
        return (self.sources or self.stored)[0].shape

    @property
    def stored(self) -> list[Tensor]:
        """Tensors that are read: the origin, if there is one, then the sources."""
        return self.sources if self.origin is None else [self.origin, *self.sources]

    def dense(self) -> Terms:
        """Return the same terms with masks applied: directions in float32 or wider."""
        if self.masks is None or self.factors is None:
            return self
        directions = []
        for source, mask, factor in zip(self.sources, self.masks, self.factors, strict=True):
            direction = source.to(self.accumulate_dtype, copy=True)
            if self.origin is not None and not self.directions:
                direction.sub_(self.origin.to(direction))
            if mask is not None:
                direction.masked_fill_(mask.view(self.shape).to(direction.device) == 0, 0)
            directions.append(direction.mul_(factor))
        return Terms(directions, self.origin, directions=True, facts=self.facts, total=self.total)

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """float64 if any term is float64, else float32."""
        wide = any(term.dtype == torch.float64 for term in self.stored)
        return torch.float64 if wide else torch.float32


@dataclass(frozen=True)
class Spread:
    """Assignment of coefficients `[sources, *slot]` to the entries of a tensor."""

    kind: SpreadKind
    """Entries that share a coefficient: all, a line across `axis`, a part, or none (each has its
    own); or coefficients of singular components."""
    axis: int = 0
    """Axis along which coefficients run (axis only)."""
    parts: Tensor | None = None
    """Part of each entry (partition only), `[entries]`, of any integer type (see `indices`)."""
    experts: int = 0
    """If the first axis counts experts, their number: each is a tensor with coefficients of its own
    (axis only), `[sources, experts * slot]`."""
    length: int = 0
    """Length of the axis, if its coefficients are those of runs along it, `[sources, runs]`, equal
    in length to within one (axis only). Operators get them `expanded`."""

    def indices(self, entries: slice) -> Tensor:
        """Return the parts of some entries as int64 (partition only)."""
        assert self.parts is not None
        return self.parts[entries].long()  # as an index, uint8 would be a mask

    def expanded(self, coefficient: Tensor) -> Tensor:
        """Return coefficients of runs as one per position of the axis, `[sources, length]`."""
        return coefficient[:, self._runs(coefficient)] if self.length else coefficient

    def summed(self, slope: Tensor, runs: int) -> Tensor:
        """Return the sums over runs of numbers per position, the adjoint of `expanded`."""
        if not self.length:
            return slope
        total = torch.zeros(len(slope), runs, dtype=torch.float64, device=slope.device)
        where = self._runs(total)
        return total.index_add_(1, where, slope.double()).to(slope.dtype)

    def _runs(self, compact: Tensor) -> Tensor:
        """Return the run of each position of the axis."""
        positions = torch.arange(self.length, device=compact.device)
        return positions * compact.shape[1] // self.length


@dataclass(frozen=True)
class FlatView:
    """View of a tensor as `[outer, width, inner]`, with coefficients along `width`.

    `width` is 1 for a scalar coefficient, and the number of entries for one per weight.
    """

    outer: int
    width: int
    inner: int

    @classmethod
    def of(cls, shape: torch.Size, spread: Spread) -> FlatView:
        """Return the view in which the coefficients of a spread run along one axis."""
        size = shape.numel()
        if spread.kind == "axis":
            outer = shape[: spread.axis].numel()
            return cls(outer, shape[spread.axis], shape[spread.axis + 1 :].numel())
        return cls(1, 1, size) if spread.kind == "scalar" else cls(1, size, 1)


def width_and_inner(shape: torch.Size, spread: Spread, weights: Tensor) -> tuple[int, int]:
    """Return the number of weights along a tensor, and of neighbours that share one.

    Args:
        shape: shape of the tensor.
        spread: assignment of the weights.
        weights: `[terms, width]`.
    """
    width = weights.shape[1]
    if width == 1:
        return 1, shape.numel()
    return width, FlatView.of(shape, spread).inner if spread.kind == "axis" else 1


class AbstractOperator(ABC):
    """Merge of one tensor of all sources, `theta = combine(terms, c)`, and its gradient in `c`."""

    # without annotations: the parser would resolve their names in the module of a subclass
    differentiable = True
    """True if coefficients can be learned: `contract` is the gradient of `combine`."""
    by_entry = False
    """True if each entry is merged and contracted from its own values and coefficients alone, so
    that a tensor with a coefficient per weight may be processed in flat parts."""
    by_rows = False
    """True if rows of a tensor can be merged apart, given sums over all of them (`Terms.total`).
    What `contract` returns of some rows then adds up to that of the tensor."""
    by_component = False
    """True if coefficients of singular components (spread `component`) are supported."""

    def require(self, num_sources: int, origin: Origin) -> None:  # noqa: B027 (most have none)
        """Reject an unsupported merge, before any checkpoint is opened.

        Raises:
            ConfigError: the number of sources or the origin is not supported.
        """

    @abstractmethod
    def combine(self, terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
        """Write the merged tensor into `out`, in its dtype and on its device, and return it.

        Args:
            terms: tensors to merge.
            coefficient: `c`, `[sources, *slot]`; no gradient is recorded.
            spread: assignment of coefficients to entries.
            out: result, contiguous.
        """

    @abstractmethod
    def contract(self, terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
        """Return `dL/dc`, `[sources, *slot]`, given `grad = dL/dtheta`."""


def require_base(who: str, origin: Origin) -> None:
    """Reject an origin other than the base.

    Raises:
        ConfigError: the origin is zero or the mean.
    """
    if origin != "base":
        raise ConfigError(
            f"{who}: expected directions from a base, got origin {origin}. Set `base` (and omit "
            "`origin`), or choose another operator."
        )
