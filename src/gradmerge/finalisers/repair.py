"""REPAIR: merged channels are given the means and deviations that they have in the sources."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gradmerge.errors import ConfigError
from gradmerge.finalisers.base import AbstractFinaliser, FinalSite


@dataclass(frozen=True)
class Correction:
    """`tensor' = scale tensor + shift`, a channel at a time."""

    scale: Tensor
    """`[channels]`, float64."""
    shift: Tensor | None = None
    """`[channels]`, float64; None for zero."""
    axis: int = 0
    """The tensor's axis of channels."""
    groups: int = 1
    """Of a tensor `[in, out / groups, ...]` whose first axis is cut into so many: channels of the
    first group come first."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """The corrected tensor; a new one."""
        if self.groups > 1:
            scale = self.scale.to(tensor.device, tensor.dtype).unflatten(0, (self.groups, -1))
            cut = tensor.unflatten(0, (self.groups, -1))
            return (cut * scale[(slice(None), None, ..., *[None] * (cut.dim() - 3))]).flatten(0, 1)
        shape = [1] * tensor.dim()
        shape[self.axis] = -1
        corrected = tensor * self.scale.to(tensor.device, tensor.dtype).view(shape)
        if self.shift is not None:
            corrected += self.shift.to(tensor.device, tensor.dtype).view(shape)
        return corrected


@dataclass(frozen=True)
class REPAIR(AbstractFinaliser):
    """Channels' statistics corrected layer by layer and folded into the weights (2211.08403).

    With mean m and deviation s of each output channel of a layer on the tasks' adaptation data,

        W' = diag(s_t / s) W        b' = (b - m) s_t / s + m_t

    where `m_t`, `s_t` are means over the sources of their own channels' (each with its own weights
    and buffers, on the same data, all tasks together). A source whose units an alignment mixes
    (`CCA`, `OptimalTransport`) has no channels of the merge, and does not count among them; the
    report says which do. Layers are corrected in the order in which
    the network calls them, and what a layer sees comes through corrected ones. Averaged networks
    need it: the deviation of an average of channels that are not perfectly correlated is smaller
    than theirs, from layer to layer (variance collapse).

    Corrected is the output of every linear layer and convolution (of one to three axes, transposed
    or not), attention projections among them; where `weight_norm` computes the weight, through its
    g. Of those that feed a BatchNorm it is that BatchNorm's, whose statistics are recomputed (as
    the recipe says) and whose gain and bias are corrected. A layer without bias, or whose bias is
    frozen, gets the scale alone. What gives an output of the network is left alone (each head of
    several): a layer whose output no other reads, through any operators, on any batch, or whose
    output the network gives out as it is (the tensor itself, or a view of it). Left alone, too, and
    named in the report: weights that are shared, called several times in the pass of any batch or
    source (a correction for one call would change what the next sees), transformed before use or
    computed by other parametrisations, recurrent layers, `MultiheadAttention`'s own weights, frozen
    tensors, and experts that no row reaches. A layer that some batches do not call is corrected by
    those that do. Embeddings and other norms stay. Rows of padding do not count, in every layout
    that tells them (`observation.without_padding`); except for a BatchNorm, which
    normalises by them, and with a decoder of its own, whose tokens have another mask.

    It is off while coefficients learn: statistics are those of weights that a step changes, there
    is no gradient through them, and they take passes over data. Those are one of each source once
    (two of the first), and then, each time, one of the merged network to the point of each layer,
    half a pass per layer; where all data are one batch, which is corrected on the fly, only one.
    """

    # without annotations: the parser would look for their names in a subclass's module
    needs_data = True

    interpolate: Literal["mean", "coefficients"] = "mean"
    """How those sources weigh in the targets: alike, or by their mean coefficient at the layer
    (with a sum of 1)."""
    batches: int = 16
    """Batches a task, at most, of the adaptation split."""
    skip: list[str] = field(default_factory=list)
    """Regular expressions of weights that are left alone."""

    def __post_init__(self) -> None:
        """Check the options."""
        if self.interpolate not in ("mean", "coefficients"):
            raise ConfigError(
                f"REPAIR: interpolate: expected mean or coefficients, got {self.interpolate!r}."
            )
        if self.batches < 1:
            raise ConfigError(f"REPAIR: batches: expected 1 or more, got {self.batches}.")
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"REPAIR: skip: {pattern!r} is no regular expression: {error}"
                ) from error

    def finish(self, theta: Tensor, site: FinalSite) -> Tensor:
        """What no correction was found for stays (`Finalisation` applies those that were)."""
        return theta


def correction_of(
    mean: Tensor, deviation: Tensor, target_mean: Tensor, target_deviation: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Scale and shift that give channels other means and deviations, `y' = scale y + shift`, and
    how many channels are constant (to rounding): those cannot be scaled, and get the mean alone.
    """
    constant = deviation <= 1e-6 * (mean.abs() + target_deviation)
    one = torch.ones_like(deviation)
    scale = torch.where(constant, one, target_deviation / torch.where(constant, one, deviation))
    return scale, target_mean - scale * mean, int(constant.sum())
