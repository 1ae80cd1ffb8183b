"""A plan of which only the headers are known: the real steps run on it, without any weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.coefficients import AbstractInit
from gradmerge.engine.placement import Item, Place
from gradmerge.engine.plan import Plan
from gradmerge.engine.rows import Rows
from gradmerge.engine.traced import Trace, fake_mode
from gradmerge.finalisers import Finalisation
from gradmerge.sources.sharing import same_place


class HeaderPlan(Plan):
    """A plan whose tensors are fake: of the stored shapes and dtypes, without numbers.

    Merges and contractions are counted in `trace` and allocate what they return. Tensors that are
    the same in all sources are known only where the files are, so more may seem to be merged than
    will be.
    """

    processes = 1
    """Number of processes that divide the sources."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.fake, self.trace = fake_mode(), Trace()
        self._words: dict[str, Place] = {}
        super().__init__(*args, **options)
        self.finalisation = Finalisation((), self._final_site)

    @override
    def _find_unchanged(self) -> frozenset[str]:
        if self.base is None or self.recipe.resolved_origin != "base":
            return frozenset()
        checkpoints = [self.base, *self.sources.values()]
        return frozenset(name for name in self.tensors if same_place(name, checkpoints))

    @override
    def _open_statistics(self, folder: str | None) -> None:
        return None

    @override
    def _norms(self, name: str) -> dict[str, float]:
        return dict.fromkeys(self.sources, 1.0)

    @override
    def initial_raw(self, init: AbstractInit | None = None) -> dict[str, Tensor]:
        with self.fake:
            return {
                key: torch.zeros(self.num_rows, *shape) for key, shape in self.layout.shapes.items()
            }

    @override
    def _stored(self, source: str, name: str) -> Tensor:
        checkpoint = self.base if source == "base" and self.base else self.serving[source]
        if name not in checkpoint.infos:
            self.require_private(source)
        info = checkpoint.infos[name]
        with self.fake:
            return self.trace.mapped(torch.empty(info.shape, dtype=info.dtype))

    @override
    def _item(self, item: Item) -> Tensor:
        if item.kind == "stored":
            return super()._item(item)
        shape, dtype = self.form(item)
        with self.fake:
            return self.trace.mapped(torch.empty(shape, dtype=dtype))

    @override
    def buffer(self, name: str) -> Tensor:
        info = self.reference.infos[name]
        return torch.zeros(info.shape, dtype=info.dtype)

    @override
    def prepare_learning(self) -> None:
        """Read nothing; directions would be kept in files."""
        self._processed.keep()

    @override
    def require_unchanged(self) -> None:
        """Read nothing."""

    @override
    def require_finite(self) -> None:
        """Read nothing."""

    @override
    def rows(self, name: str) -> Rows | None:
        return None if self.processes == 1 else self.share(name, 0, self.processes)

    @override
    def place(self, words: Mapping[str, Place], device: torch.device, asked: object = "") -> None:
        self._words = dict(words)
        with self.trace.counting("sources"):
            super().place(words, device, asked)

    @override
    def combine(
        self, name: str, own: Tensor | float, out: Tensor, rows: Rows | None = None
    ) -> Tensor:
        self._read_for(name, "merged", out.device)
        return self.trace.assign(out, "merged")

    @override
    def contract(
        self, name: str, grad: Tensor, z: Tensor, slopes: bool = False, rows: Rows | None = None
    ) -> tuple[Tensor, Tensor | None]:
        self._read_for(name, "contracted", grad.device)
        found = self.trace.assign(torch.empty_like(z), "coefficients")
        return found, torch.empty_like(found) if slopes else None

    def _read_for(self, name: str, work: str, device: torch.device) -> None:
        """Count a pass over the terms of a tensor; a device other than the CPU gets copies."""
        items = self.items(name)
        found = self._placement.fetch(items, device)
        self.trace.work[work] += math.prod(self.form(items.each[0])[0])
        for item, tensor in zip(items, found, strict=True):
            self.trace.work["read"] += tensor.nbytes
            self.trace.work[self._words[item.owner]] += tensor.nbytes

    @property
    def disk(self) -> int:
        """Bytes of temporary files: directions after preprocessing, in float32."""
        entries = sum(math.prod(tensor.shape) for tensor in self.tensors.values())
        return 4 * entries * len(self.sources) if self.recipe.preprocess else 0
