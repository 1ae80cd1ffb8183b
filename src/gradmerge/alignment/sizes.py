"""An example in other sizes: batches and lengths that a network may take another way with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Example = Mapping[str, Any]
Found = TypeVar("Found")
_Axes = Mapping[str, Mapping[int, bool]]
"""Axes that are lengths, by argument, and whether each is a place of a picture."""


def at_other_sizes(
    example: Example, attempt: Callable[[Example], Found]
) -> Iterator[tuple[Example, Found]]:
    """A smaller and a larger input, as far as the network takes them, and what came of them.

    The smaller one is a batch of one (of two, where the example is one) of half the length, the
    larger one has one or two more examples of twice the length. A length is the second axis of
    tokens, one of the last two axes of floating-point inputs of three axes, and the places of
    larger ones (pictures, which are only made smaller). What the network refuses is tried with
    another batch alone, then with another length alone.

    Args:
        example: arguments of the network's forward by name.
        attempt: runs the network; raises where it refuses an input.
    """
    tensors = [value for value in example.values() if isinstance(value, Tensor) and value.ndim]
    rows = len(tensors[0]) if tensors else 0
    if not rows:
        return
    for batch, longer in ((1 if rows > 1 else 2, False), (rows + 1 if rows > 1 else 3, True)):
        lengths = list(_lengths(example))
        tried = [_resized(example, rows, batch, axes, longer) for axes in [*lengths, {}]]
        tried += [_resized(example, rows, rows, axes, longer) for axes in lengths]
        for other in tried:
            try:
                found = attempt(other)
            except Exception:  # whatever a network raises on a size that is not its own
                continue
            yield other, found
            break


def _lengths(example: Example) -> Iterator[_Axes]:
    """Axes that may be lengths, by argument."""
    tensors = {name: value for name, value in example.items() if isinstance(value, Tensor)}
    tokens = {name: t for name, t in tensors.items() if not t.is_floating_point() and t.ndim > 1}
    if tokens:
        known = {value.shape[1] for value in tokens.values()}
        for names in (tensors, tokens):  # with masks in floating point, or without pictures
            yield {
                name: {i: False for i in range(1, value.ndim) if value.shape[i] in known}
                for name, value in tensors.items()
                if name in names
            }
        return
    for axis in (1, 2):
        found = {
            name: {axis: False} if value.ndim == 3 else dict.fromkeys(range(2, value.ndim), True)
            for name, value in tensors.items()
            if value.ndim > 2
        }
        if found:
            yield found


def _resized(example: Example, rows: int, batch: int, axes: _Axes, longer: bool) -> Example:
    """Entries are left out at the end, or repeated from the start."""
    found: dict[str, Any] = {}
    for name, value in example.items():
        if isinstance(value, Tensor) and value.ndim:
            if len(value) == rows:
                value = _cycled(value, 0, batch)
            for axis, of_picture in axes.get(name, {}).items():
                value = _cycled(value, axis, _length(value.shape[axis], of_picture, longer))
        found[name] = value
    return found


def _length(size: int, of_picture: bool, longer: bool) -> int:
    if of_picture:
        return size if longer else max(1, size // 2 + size // 4)
    return 2 * size + 1 if longer else max(1, size // 2)


def _cycled(value: Tensor, axis: int, size: int) -> Tensor:
    return value.index_select(axis, torch.arange(size) % value.shape[axis])
