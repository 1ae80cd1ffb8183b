"""A checkpoint read with its units in another order."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from gradmerge.alignment.symmetry.spec import LinearMap, Maps, PermutationSpec, share_moved
from gradmerge.sources import Checkpoint
from gradmerge.sources.base import View


class AlignedView(View):
    """A checkpoint whose tensors (buffers and heads, too) are mapped by a specification.

    Names, shapes and dtypes stay. The fingerprint is that of the checkpoint on disk.

    Args:
        inner: the checkpoint.
        spec: groups and axes.
        maps: of its units, by group.
    """

    def __init__(self, inner: Checkpoint, spec: PermutationSpec, maps: Maps) -> None:
        super().__init__(inner)
        self.spec = spec
        self.maps = {name: change for name, change in maps.items() if share_moved(change) > 0}

    @override
    def changes(self, name: str) -> bool:
        return bool(self.spec.touched(name) & self.maps.keys())

    @override
    def form(self, name: str) -> Tensor:
        return self.spec.apply(self.maps, name, self.inner.read(name)).contiguous()


def original_of(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint on disk if its view mixes units, and so computes another function.

    A view that only permutes units computes the same, and is returned itself.
    """
    if isinstance(checkpoint, AlignedView):
        mixes = any(isinstance(change, LinearMap) for change in checkpoint.maps.values())
        return checkpoint.inner if mixes else checkpoint
    return checkpoint
