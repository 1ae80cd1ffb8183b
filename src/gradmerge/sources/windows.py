"""Windows: the entries of one tensor that are, in another order or place, those of another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Axis = tuple[int, int]
"""Length and stride of an axis."""
Dim = tuple[Axis, ...]
"""Axes, outermost first, that one dimension runs over."""


@dataclass(frozen=True)
class Window:
    """Part of a contiguous tensor (the whole), seen as a tensor of another shape.

    Entry `(i_1, ..., i_n)` is the one at `offset` plus the strides of the axes that each index runs
    over. A dimension may run over several axes of the whole, as where rows are interleaved.
    """

    whole: str
    """Name of the whole."""
    dims: tuple[Dim, ...]
    """Axes of the whole, by dimension of the part."""
    offset: int = 0
    """Position of the first entry in the whole."""

    @classmethod
    def over(cls, whole: str, shape: Sequence[int]) -> Window:
        """Return the window of a whole tensor on itself."""
        strides = _strides(shape)
        return cls(whole, tuple(((n, s),) for n, s in zip(shape, strides, strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(math.prod(length for length, _ in dim) for dim in self.dims)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """Axes of all dimensions in order, those that continue each other taken together."""
        found: list[Axis] = []
        for length, stride in (axis for dim in self.dims for axis in dim if axis[0] != 1):
            if found and found[-1][1] == length * stride:
                found[-1] = (found[-1][0] * length, stride)
            else:
                found.append((length, stride))
        return tuple(found)

    @property
    def is_run(self) -> bool:
        """True if the entries lie one after the other in the whole."""
        return not self.axes or (len(self.axes) == 1 and self.axes[0][1] == 1)

    def of(self, whole: Tensor) -> Tensor:
        """Return the part of a whole, differentiable; without a copy if the entries are a run."""
        flat = whole.reshape(-1)
        if self.is_run:
            return flat[self.offset : self.offset + math.prod(self.shape)].view(self.shape)
        lengths, strides = zip(*self.axes, strict=True)
        return flat.as_strided(lengths, strides, flat.storage_offset() + self.offset).reshape(
            self.shape
        )

    def write(self, whole: Tensor, build: Callable[[Tensor], Tensor]) -> None:
        """Write the part of a contiguous whole, by a function that fills a contiguous tensor."""
        if self.is_run:
            build(self.of(whole))
            return
        part = build(whole.new_empty(self.shape))
        lengths, strides = zip(*self.axes, strict=True)
        offset = whole.storage_offset() + self.offset
        whole.as_strided(lengths, strides, offset).copy_(part.view(lengths))

    def inverse(self, part: str, whole: Sequence[int]) -> Window | None:
        """Return the whole of the given shape as a window of the part; None if it has more."""
        if math.prod(whole) != math.prod(self.shape):
            return None
        axes = [axis for dim in self.dims for axis in dim]
        own = _strides([length for length, _ in axes])
        outside = sorted(zip(axes, own, strict=True), key=lambda pair: -pair[0][1])
        line = tuple((length, stride) for (length, _), stride in outside if length != 1)
        return _reshaped(Window(part, (line,)), whole)

    def axis_of(self, whole: Sequence[int], axis: int) -> int | None:
        """Return the dimension of the part that runs along an axis of the whole, if just one does.

        Args:
            whole: shape of the whole.
            axis: an axis of it.
        """
        inner = _strides(whole)[axis]
        outer = inner * whole[axis]
        found = [
            i
            for i, dim in enumerate(self.dims)
            if any(length > 1 and inner <= stride < outer for length, stride in dim)
        ]
        return found[0] if len(found) == 1 else None


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _reshaped(window: Window, shape: Sequence[int]) -> Window:
    """Give a window another shape: its axes in order, split where the new shape needs it."""
    line = [axis for dim in window.dims for axis in dim if axis[0] != 1]
    sizes = list(shape)
    if -1 in sizes:
        known = math.prod(n for n in sizes if n != -1)
        sizes[sizes.index(-1)] = math.prod(n for n, _ in line) // max(1, known)
    dims = []
    for size in sizes:
        dim: list[Axis] = []
        while (missing := size // math.prod(n for n, _ in dim)) > 1:
            length, stride = line.pop(0)
            if length > missing:
                if length % missing:
                    raise ValueError(f"a view of {window.shape} as {tuple(shape)}")
                line.insert(0, (length // missing, stride))
                length, stride = missing, stride * (length // missing)
            elif missing % length:
                raise ValueError(f"a view of {window.shape} as {tuple(shape)}")
            dim.append((length, stride))
        dims.append(tuple(dim) or ((1, 1),))
    return Window(window.whole, tuple(dims), window.offset)


class Traced(Tensor):
    """A tensor without values that follows its window on a whole through views and copies.

    Functions that only move entries run on it as on any tensor; all others raise
    `ValueError`.
    """

    window: Window

    @staticmethod
    def __new__(cls, window: Window) -> Traced:
        """Make the tensor of a window."""
        meta = torch.device("meta")
        made = torch.Tensor._make_wrapper_subclass(cls, window.shape, device=meta)
        made.window = window
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Follow one operation."""
        rule = _RULES.get(func.overloadpacket.__name__)
        if rule is None or not isinstance(args[0], Traced):
            raise ValueError(f"{func} moves more than the entries of one tensor")
        found = rule(args[0].window, *args[1:], **(kwargs or {}))
        return [Traced(w) for w in found] if isinstance(found, list) else Traced(found)


def _same(window: Window, **_: Any) -> Window:
    return window


def _view(window: Window, shape: Sequence[int], *_: Any) -> Window:
    return _reshaped(window, shape)


def _permute(window: Window, order: Sequence[int]) -> Window:
    return Window(window.whole, tuple(window.dims[i] for i in order), window.offset)


def _transpose(window: Window, first: int = 0, second: int = 1) -> Window:
    order = list(range(len(window.dims)))
    order[first], order[second] = order[second], order[first]
    return _permute(window, order)


def _narrow(window: Window, dim: int, start: int, length: int) -> Window:
    """Keep `length` entries of a dimension from `start` on."""
    dim %= len(window.dims)
    axes, total = window.dims[dim], window.shape[dim]
    if length == total:
        return window
    inner = math.prod(n for n, _ in axes[1:])
    if start % inner or length % inner:
        raise ValueError(f"entries {start} to {start + length} of {axes}")
    (_, stride), rest = axes[0], axes[1:]
    dims = list(window.dims)
    dims[dim] = ((length // inner, stride), *rest)
    return Window(window.whole, tuple(dims), window.offset + start // inner * stride)


def _slice(
    window: Window, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Window:
    if step != 1:
        raise ValueError(f"a slice with step {step}")
    first, last, _ = slice(start, end).indices(window.shape[dim])
    return _narrow(window, dim, first, last - first)


def _select(window: Window, dim: int, index: int) -> Window:
    narrow = _narrow(window, dim, index % window.shape[dim], 1)
    dims = list(narrow.dims)
    del dims[dim % len(dims)]
    return Window(narrow.whole, tuple(dims), narrow.offset)


def _split(window: Window, size: int, dim: int = 0) -> list[Window]:
    total = window.shape[dim]
    return [_narrow(window, dim, i, min(size, total - i)) for i in range(0, total, size)]


def _split_with_sizes(window: Window, sizes: Sequence[int], dim: int = 0) -> list[Window]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_narrow(window, dim, i, size) for i, size in zip(starts, sizes, strict=True)]


def _unbind(window: Window, dim: int = 0) -> list[Window]:
    return [_select(window, dim, i) for i in range(window.shape[dim])]


def _squeeze(window: Window, dim: int | Sequence[int] | None = None) -> Window:
    shape = window.shape
    chosen = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % len(shape) for d in chosen if shape[d] == 1}
    kept = tuple(axes for i, axes in enumerate(window.dims) if i not in gone)
    return Window(window.whole, kept, window.offset)


def _unsqueeze(window: Window, dim: int) -> Window:
    at = dim % (len(window.dims) + 1)
    dims = (*window.dims[:at], ((1, 1),), *window.dims[at:])
    return Window(window.whole, dims, window.offset)


_RULES: dict[str, Callable[..., Window | list[Window]]] = {
    **dict.fromkeys(("clone", "contiguous", "alias", "detach", "lift_fresh"), _same),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view),
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "slice": _slice,
    "select": _select,
    "split": _split,
    "split_with_sizes": _split_with_sizes,
    "unbind": _unbind,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
}
