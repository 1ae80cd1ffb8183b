"""An example in other sizes: batches and lengths that a network may take another way with.

Running a network takes memory in proportion to its input, so that a large example is only cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Example = Mapping[str, Any]
Found = TypeVar("Found")
_Axes = Mapping[str, Mapping[int, bool]]
"""Axes that are lengths, by argument, and whether each is a place of a picture."""

_SMALL_IDS, _SMALL_NUMBERS = 64, 4096
"""Entries of ids and of floating-point inputs up to which the example may also be enlarged."""
_SHORT, _SHORTER = 7, 5


def at_other_sizes(
    example: Example, attempt: Callable[[Example], Found]
) -> Iterator[tuple[Example, Found]]:
    """Two inputs of other sizes, as far as the network takes them, and what came of them.

    The first is a batch of one (of two, where the example is one) of half the length, at most 7.
    The second is a batch of three (of two, where the example is three): of twice the length and one
    more, where the example is small (64 ids, 4,096 numbers), else of 5 at most. A length is the
    second axis of tokens, one of the last two axes of floating-point inputs of three axes, and the
    places of larger ones (pictures, which get three quarters of each side; then half of it, or
    their own where they are small). What the network refuses is tried with another batch alone (of
    a large example at most two, the most that is run of it), then with another length alone.

    Args:
        example: arguments of the network's forward by name.
        attempt: runs the network; raises where it refuses an input.
    """
    tensors = [value for value in example.values() if isinstance(value, Tensor) and value.ndim]
    rows = len(tensors[0]) if tensors else 0
    if not rows:
        return
    small = all(
        t.numel() <= (_SMALL_NUMBERS if t.is_floating_point() else _SMALL_IDS) for t in tensors
    )
    second = _longer if small else _shorter
    for batch, resize in ((1 if rows > 1 else 2, _short), (2 if rows == 3 else 3, second)):
        lengths = list(_lengths(example))
        tried = [_resized(example, rows, batch, axes, resize) for axes in lengths]
        if small or batch <= max(2, rows):
            tried.append(_resized(example, rows, batch, {}, resize))
        tried += [_resized(example, rows, rows, axes, resize) for axes in lengths]
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


def _resized(
    example: Example, rows: int, batch: int, axes: _Axes, resize: Callable[[int, bool], int]
) -> Example:
    """Entries are left out at the end, or repeated from the start."""
    found: dict[str, Any] = {}
    for name, value in example.items():
        if isinstance(value, Tensor) and value.ndim:
            if len(value) == rows:
                value = _cycled(value, 0, batch)
            for axis, of_picture in axes.get(name, {}).items():
                value = _cycled(value, axis, resize(value.shape[axis], of_picture))
        found[name] = value
    return found


def _short(size: int, of_picture: bool) -> int:
    return max(1, size // 2 + size // 4 if of_picture else min(size // 2, _SHORT))


def _shorter(size: int, of_picture: bool) -> int:
    return max(1, size // 2 if of_picture else min(size // 2, _SHORTER))


def _longer(size: int, of_picture: bool) -> int:
    return size if of_picture else 2 * size + 1


def _cycled(value: Tensor, axis: int, size: int) -> Tensor:
    return value.index_select(axis, torch.arange(size) % value.shape[axis])
