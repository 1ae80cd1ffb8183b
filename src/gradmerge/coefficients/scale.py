"""One scale a tensor and source beside finer coefficients (AdaRank, arXiv 2503.22178)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradmerge.coefficients.base import AbstractCoefficients, Layout, MergeTensor
from gradmerge.coefficients.granularity import Column, Component, Partition, Row
from gradmerge.coefficients.link import AbstractLink, HardMask
from gradmerge.errors import ConfigError


@dataclass(frozen=True)
class WithScale(AbstractLink):
    """`c_kj = s_k m_kj`, one learned number `s_k` a tensor and source beside what is wrapped, m.

    With `HardMask` over `Component` it is AdaRank (arXiv 2503.22178; the authors' code learns a
    coefficient a tensor and source beside the masks, at one rate). With `Column` and others all of
    a tensor's coefficients can move together. A tensor that has a single coefficient a source (a
    bias) has the scale alone: no mask, and any real number.

    Raw numbers are `[sources, 1 + n]` of n wrapped coefficients, the scale first. Gradients:
    `dL/ds_k = sum_j m_kj dL/dc_kj` and `dL/dm_kj = s_k dL/dc_kj`. At the start `s_k` is the
    coefficient of largest magnitude, so that masks are told by init `Scaled` of `LeadingComponents`
    and one number alone by `Constant`.
    """

    inner: AbstractCoefficients = field(default_factory=lambda: HardMask(Component()))
    """Column, Row, Partition or Component, or a link of them."""
    start: float = 1.0
    """The scale where all coefficients of a tensor and source start at 0, which tell none."""

    def __post_init__(self) -> None:
        """Check what is wrapped."""
        inner = self.inner
        while isinstance(inner, AbstractLink):
            inner = inner.inner
        if not isinstance(inner, (Column, Row, Partition, Component)):
            raise ConfigError(
                "WithScale: expected Column, Row, Partition or Component inside, came "
                f"{type(inner).__name__}. One number a tensor needs no scale beside it, and of "
                "one a weight (Element) the scale is one direction among them already."
            )

    def layout(self, tensors: Sequence[MergeTensor]) -> Layout:
        """That of what is wrapped, with room for the scale."""
        slots = self.inner.layout(tensors).slots
        shapes = {slot.key: tuple(1 + n for n in slot.shape) for slot in slots.values()}
        return Layout(slots, shapes)

    def num_rows(self, num_sources: int) -> int:
        """One row a source.

        Raises:
            ConfigError: what is wrapped has another number of rows.
        """
        rows = self.inner.num_rows(num_sources)
        if rows != num_sources:
            raise ConfigError(
                f"WithScale: expected one row of raw numbers a source inside, came {rows} for "
                f"{num_sources} sources ({type(self.inner).__name__}), which leave no place for a "
                "scale of each. Leave that link or the scale out."
            )
        return rows

    def link(self, raw: Tensor) -> Tensor:
        """See `AbstractCoefficients.link`."""
        return raw if raw.dim() == 1 else raw[:, :1] * self.inner.link(raw[:, 1:])

    def pull_back(self, coefficient: Tensor) -> Tensor:
        """See `AbstractCoefficients.pull_back`."""
        if coefficient.dim() == 1:
            return coefficient
        padded = torch.nn.functional.pad(coefficient, (1, 0))
        largest = padded.gather(1, padded.abs().argmax(dim=1, keepdim=True))
        scale = torch.where(largest == 0, self.start, largest).to(coefficient)
        return torch.cat([scale, self.inner.pull_back(coefficient / scale)], dim=1)
