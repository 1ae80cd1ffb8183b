"""Geometry of task vectors: norms, cosines and sign conflicts, in one pass over the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from gradmerge.sources.base import Checkpoint

_CHUNK = 1 << 20


@dataclass
class DirectionStatistics:
    """Sums over all entries of the directions `B_k = theta_k - A`."""

    gram: Tensor
    """Inner products `<B_j, B_k>`, `[sources, sources]`, float64."""
    conflicts: Tensor
    """Entries where both directions are non-zero and of opposite sign, `[sources, sources]`."""
    shared: Tensor
    """Entries where both directions are non-zero, `[sources, sources]`."""
    origin_squared: float
    """`|A|^2` (0 without a base)."""
    entries: int

    @property
    def norms(self) -> Tensor:
        """`|B_k|`, `[sources]`."""
        return self.gram.diagonal().sqrt()

    @property
    def cosines(self) -> Tensor:
        """Pairwise cosines, `[sources, sources]`; 0 where a direction is zero."""
        scale = torch.outer(self.norms, self.norms)
        return torch.where(scale > 0, self.gram / scale.clamp_min(1e-300), 0.0)

    @property
    def sign_conflict(self) -> Tensor:
        """Share of opposite signs among the entries that both change, `[sources, sources]`."""
        return self.conflicts / self.shared.clamp_min(1)


def direction_statistics(
    sources: Sequence[Checkpoint],
    base: Checkpoint | None,
    names: Sequence[str],
    mean_origin: bool = False,
    signs: bool = True,
) -> DirectionStatistics:
    """Read the named tensors once, in chunks, and sum in float32 or wider.

    Args:
        sources: the checkpoints `theta_k`.
        base: the origin `A`, if it is a checkpoint.
        names: tensors to compare.
        mean_origin: without a base, measure from the mean of the sources instead of zero.
        signs: count sign conflicts, too.
    """
    num = len(sources)
    gram, conflicts, shared = torch.zeros(3, num, num, dtype=torch.float64)
    origin_squared, entries = 0.0, 0
    for name in names:
        flat = [source.read(name).reshape(-1) for source in sources]
        anchor = None if base is None else base.read(name).reshape(-1)
        device, every = flat[0].device, flat if anchor is None else [*flat, anchor]
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in every), torch.float32)
        for start in range(0, flat[0].numel(), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            part = torch.stack([tensor[chunk].to(device, dtype) for tensor in flat])
            if anchor is not None:
                origin = anchor[chunk].to(device, dtype)
                origin_squared += float(torch.dot(origin, origin))
                part -= origin
            elif mean_origin:
                part -= part.mean(dim=0)
            gram += (part @ part.T).to("cpu", torch.float64)
            if signs:
                sign = part.sign()
                product = sign @ sign.T  # agreeing minus conflicting
                both = sign.abs() @ sign.abs().T
                shared += both.to("cpu", torch.float64)
                conflicts += ((both - product) / 2).to("cpu", torch.float64)
            entries += part.shape[1]
    return DirectionStatistics(gram, conflicts, shared, origin_squared, entries)
