"""Places of the sources' tensors while a merge is learned: mapped files, or the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gradmerge.engine.rows import Rows

Read = Callable[[str, str], Tensor]
"""Reads a tensor, by the name of its source and its own."""


class Placement:
    """The stored tensors of sources, read from their files unless they were copied to a device.

    Args:
        read: reads a tensor from its file.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._copies: dict[tuple[str, str], tuple[tuple[int, int] | None, Tensor]] = {}

    def read(self, source: str, name: str, rows: Rows | None = None) -> Tensor:
        """Return a tensor, or some rows of it: the device's copy of just these if there is one."""
        kept = self._copies.get((source, name))
        if kept is not None and kept[0] == (None if rows is None else (rows.start, rows.stop)):
            return kept[1]
        whole = self._read(source, name)
        return whole if rows is None else rows.of(whole)

    def copy(self, wanted: Iterable[tuple[str, str, Rows | None]], device: torch.device) -> None:
        """Copy tensors, or some rows of them, to a device."""
        for source, name, rows in wanted:
            place = None if rows is None else (rows.start, rows.stop)
            self._copies[source, name] = place, self.read(source, name, rows).to(device)
