"""Tensors that checkpoints have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from itertools import pairwise

import torch

from gradmerge.common.progress import Progress
from gradmerge.sources.base import Checkpoint

_FIRST, _CHUNK = 1 << 12, 1 << 20


def same_place(name: str, checkpoints: Sequence[Checkpoint]) -> bool:
    """Return whether all checkpoints read a tensor from the same place, as adapters do."""
    first, *others = (checkpoint.stored_as(name) for checkpoint in checkpoints)
    return first is not None and all(other == first for other in others)


def shared_tensors(names: Collection[str], checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return the tensors that have the same values in all checkpoints.

    Dtypes are compared by value. Tensors that are computed on reading are not compared, and of
    those that differ only the first entries are read, unless they are alike.

    Args:
        names: tensors to compare.
        checkpoints: two or more, of the same shapes.
    """
    sizes = {name: checkpoints[0].infos[name].num_bytes for name in names}
    found = []
    with Progress("comparing the sources", sum(sizes.values()), "GB", 1e9) as progress:
        for name, size in sizes.items():
            if same_place(name, checkpoints) or _same_values(name, checkpoints):
                found.append(name)
            progress.advance(size)
    return found


def _same_values(name: str, checkpoints: Sequence[Checkpoint]) -> bool:
    if any(checkpoint.stored_as(name) is None for checkpoint in checkpoints):
        return False
    first, *others = (checkpoint.read(name).reshape(-1) for checkpoint in checkpoints)
    dtypes = (tensor.dtype for tensor in (first, *others))
    # numbers of one byte (float8) are not compared by torch
    dtype = reduce(torch.promote_types, (d if d.itemsize > 1 else torch.float32 for d in dtypes))
    cuts = [0, *range(_FIRST, len(first), _CHUNK), len(first)]
    for start, stop in pairwise(cuts):
        own = first[start:stop].to(dtype)
        if not all(torch.equal(own, t[start:stop].to(own.device, dtype)) for t in others):
            return False
    return True


def share_of(names: Collection[str], sizes: Mapping[str, int]) -> str:
    """Return the count of tensors and their share of all parameters in words.

    Args:
        names: some of the tensors.
        sizes: numbers of entries of all tensors, by name.

    Examples:
        >>> share_of(["a"], {"a": 30, "b": 10})
        '1 of 2 tensors (75% of the parameters)'
    """
    share = sum(sizes[name] for name in names) / max(sum(sizes.values()), 1)
    return f"{len(names)} of {len(sizes)} tensors ({share:.0%} of the parameters)"
