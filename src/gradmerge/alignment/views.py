"""A checkpoint read with its units in another order."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from gradmerge.alignment.symmetry.spec import LinearMap, Maps, PermutationSpec, share_moved
from gradmerge.sources import Checkpoint, TensorInfo


class AlignedView(Checkpoint):
    """A checkpoint whose tensors (buffers and heads, too) are mapped by a specification.

    Names, shapes and dtypes stay. The fingerprint is that of the checkpoint on disk.

    Args:
        inner: the checkpoint.
        spec: groups and axes.
        maps: of its units, by group.
    """

    def __init__(self, inner: Checkpoint, spec: PermutationSpec, maps: Maps) -> None:
        self.inner = inner
        self.spec = spec
        self.maps = {name: change for name, change in maps.items() if share_moved(change) > 0}
        self._kept: dict[str, Tensor] = {}

    @property
    @override
    def label(self) -> str:
        return self.inner.label

    @property
    @override
    def infos(self) -> Mapping[str, TensorInfo]:
        return self.inner.infos

    @property
    @override
    def folder(self) -> Path | None:
        return self.inner.folder

    @property
    @override
    def tokenizer_folder(self) -> Path | None:
        return self.inner.tokenizer_folder

    @property
    @override
    def config(self) -> Mapping[str, Any] | None:
        return self.inner.config

    @override
    def read(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        if not self._changes(name):
            return self.inner.read(name)
        return self.spec.apply(self.maps, name, self.inner.read(name)).contiguous()

    def _changes(self, name: str) -> bool:
        return bool(self.spec.touched(name) & self.maps.keys())

    def keep(self) -> None:
        """Write the tensors that change to temporary files (`TMPDIR`) and map them from there.

        Training reads them at every step.
        """
        self.inner.keep()
        for i, name in enumerate(self.infos):
            if name in self._kept or not self._changes(name):
                continue
            path = self._keep_folder / f"{i}.safetensors"
            save_file({name: self.read(name)}, path)
            with safe_open(path, framework="pt") as file:
                self._kept[name] = file.get_tensor(name)

    @cached_property
    def _keep_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="gradmerge-aligned-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    @override
    def fingerprint(self) -> str:
        return self.inner.fingerprint()


def original_of(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint on disk if its view mixes units, and so computes another function.

    A view that only permutes units computes the same, and is returned itself.
    """
    if isinstance(checkpoint, AlignedView):
        mixes = any(isinstance(change, LinearMap) for change in checkpoint.maps.values())
        return checkpoint.inner if mixes else checkpoint
    return checkpoint
