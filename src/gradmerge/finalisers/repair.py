"""REPAIR: give merged channels the means and deviations that they have in the sources."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gradmerge.common.errors import ConfigError
from gradmerge.common.patterns import require_pattern
from gradmerge.common.spec import PATTERNS
from gradmerge.finalisers.base import AbstractFinaliser, FinalSite


@dataclass(frozen=True)
class Correction:
    """`tensor' = scale tensor + shift` per channel."""

    scale: Tensor
    """`[channels]`, float64."""
    shift: Tensor | None = None
    """`[channels]`, float64; None for zero."""
    axis: int = 0
    """The tensor's axis of channels."""
    groups: int = 1
    """Groups along the first axis of a tensor `[in, out / groups, ...]`; the scale lists the
    channels of the first group first."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the corrected tensor, a new one."""
        scale = self.scale.to(tensor.device, tensor.dtype)
        shape = [1] * tensor.dim()
        shape[self.axis] = -1
        if self.groups > 1:  # each row of the tensor has the channels of its group
            rows = len(tensor) // self.groups
            scale = scale.unflatten(0, (self.groups, -1)).repeat_interleave(rows, dim=0)
            shape[:2] = scale.shape
        corrected = tensor * scale.view(shape)
        if self.shift is not None:
            corrected += self.shift.to(tensor.device, tensor.dtype).view(shape)
        return corrected


@dataclass(frozen=True)
class REPAIR(AbstractFinaliser):
    """Correct the channels' statistics layer by layer, folded into the weights (2211.08403).

    With mean m and deviation s of each output channel of a layer on the tasks' adaptation data,

        W' = diag(s_t / s) W        b' = (b - m) s_t / s + m_t

    where `m_t`, `s_t` are means over the sources, each with its own weights and buffers on the data
    of all tasks. The deviation of an average of imperfectly correlated channels is smaller than
    theirs, more so from layer to layer (variance collapse). Layers are corrected in the order in
    which the network calls them, on inputs that come through corrected layers. A source whose units
    an alignment mixes (`CCA`, `OptimalTransport`) has no channels of the merge and sets no target;
    the report names those that do.

    Corrected are all linear layers and convolutions (1 to 3 axes, transposed or not; under
    `weight_norm` by its g). Where one feeds a BatchNorm, that BatchNorm is corrected instead, by
    gain and bias, after its statistics are recomputed (if the recipe says so). Without a bias, or
    with a frozen one, a layer gets the scale alone. Output layers are not rescaled: those whose
    output reaches no other layer (by a path with a gradient) on any batch, or is returned unchanged
    by the network, as a tensor or a view. Also left alone, and named in the report: weights that
    are shared, transformed before use, computed by other parametrisations, or called several times
    in a pass of any batch or source; recurrent layers and `MultiheadAttention`'s own weights;
    frozen tensors; and experts that no row reaches. Embeddings and other norms stay. A layer that
    some batches do not call is corrected by those that do. Rows of padding do not count, in every
    layout that identifies them, except for a BatchNorm, which normalises by them, and in
    encoder-decoders, whose decoder's tokens have another mask.

    REPAIR is off while coefficients learn: the statistics belong to weights that every step
    changes, and no gradient passes through them. It takes one pass over the data per source (two of
    the first) once, and then per refresh one pass of the merge up to each layer, about half a pass
    per layer; a single pass if all data are one batch, which is corrected on the fly.
    """

    # without annotations: the parser would look for their names in a subclass's module
    needs_data = True

    interpolate: Literal["mean", "coefficients"] = "mean"
    """Weights of the sources in the targets: equal, or their mean coefficients at the layer,
    normalised to a sum of 1."""
    batches: int = 16
    """Most batches per task, of the adaptation split."""
    skip: list[str] = field(default_factory=list, metadata=PATTERNS)
    """Regular expressions for weights that are left alone."""

    def __post_init__(self) -> None:
        """Check the options."""
        if self.interpolate not in ("mean", "coefficients"):
            raise ConfigError(
                f"REPAIR: interpolate: expected mean or coefficients, got {self.interpolate!r}."
            )
        if self.batches < 1:
            raise ConfigError(f"REPAIR: batches: expected 1 or more, got {self.batches}.")
        for pattern in self.skip:
            require_pattern("REPAIR.skip", pattern)

    def finish(self, theta: Tensor, site: FinalSite) -> Tensor:
        """Return the tensor as it is: `Finalisation` applies the corrections."""
        return theta


def correction_of(
    mean: Tensor, deviation: Tensor, target_mean: Tensor, target_deviation: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Return the scale and shift that give channels the target mean and deviation, and the number
    of channels that are constant (up to rounding), which get the mean alone.
    """
    constant = deviation <= 1e-6 * (mean.abs() + target_deviation)
    scale = torch.where(constant, 1.0, target_deviation / deviation)
    return scale, target_mean - scale * mean, int(constant.sum())
