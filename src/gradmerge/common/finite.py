"""Finite numbers: in tensors, in options, and in JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmerge.common.errors import ConfigError, shorten

CHUNK = 1 << 14
"""Entries that are summed together: so few that torch uses one thread, as others are at work."""
_PIECE = 1 << 19  # bytes
Test = Callable[[int, int], bool]
_fast: Callable[[Tensor], Test | None] | None = None
_SUMMED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class NonFinite:
    """Entries of a tensor that are NaN or infinite."""

    count: int
    total: int
    """Entries of the tensor."""
    first: tuple[int, ...]
    """Index of the first of them."""
    value: float
    """Its value."""
    infinite: bool
    """True if all of them are infinite, and none is NaN."""

    def __str__(self) -> str:
        return f"{self.count} of {self.total} entries, first {list(self.first)} = {self.value:g}"


def use(kernel: Callable[[Tensor], Test | None]) -> None:
    """Look for NaN and infinity by a compiled kernel from now on.

    Args:
        kernel: returns for a tensor a test whether its bytes from start to end are finite numbers,
            or None if it cannot look at it.
    """
    global _fast
    _fast = kernel


def has_numbers(dtype: torch.dtype) -> bool:
    """Return whether a dtype has NaN or infinity."""
    return dtype.is_floating_point or dtype.is_complex


def is_finite(flat: Tensor) -> bool:
    """Return whether all entries of a one-dimensional tensor are finite, in one pass.

    A sum is finite only if all its terms are, and is many times faster than a comparison of each.
    """
    if not has_numbers(flat.dtype):
        return True
    test = None if _fast is None else _fast(flat)
    if test is not None:
        return test(0, flat.numel() * flat.element_size())
    for part in flat.split(CHUNK) if flat.device.type == "cpu" else [flat]:
        real = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
        if real.dtype not in _SUMMED:  # eight bits
            real = real.float()
        if not math.isfinite(real.sum()) and not bool(real.isfinite().all()):
            return False
    return True


def non_finite(tensor: Tensor) -> NonFinite | None:
    """Return the entries that are NaN or infinite, or None if there are none."""
    flat = tensor.detach().reshape(-1)
    if is_finite(flat):
        return None
    count, first, infinite = 0, -1, True
    for at, part in enumerate(flat.split(CHUNK)):
        real = part if part.dtype in _SUMMED or part.is_complex() else part.float()
        bad = ~real.isfinite()
        if not bad.any():
            continue
        first = first if count else at * CHUNK + int(bad.nonzero()[0])
        count += int(bad.sum())
        infinite = infinite and not bool(real.isnan().any())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape))
    entry = flat[first]
    value = abs(complex(entry.item())) if entry.is_complex() else float(entry)
    return NonFinite(count, flat.numel(), index, value, infinite)


def scan(
    tensor: Tensor, data: memoryview, read: Callable[[memoryview], object]
) -> NonFinite | None:
    """Pass the bytes of a tensor to `read`, and return its entries that are NaN or infinite.

    Pieces are looked at while they are in the cache, so that memory is read once.
    """
    if not has_numbers(tensor.dtype) or tensor.device.type != "cpu":
        read(data)
        return non_finite(tensor)
    flat, finite = tensor.detach().reshape(-1), True
    test = None if _fast is None else _fast(flat)
    for start in range(0, len(data), _PIECE):
        end = min(start + _PIECE, len(data))
        read(data[start:end])  # then it is in the cache
        if test is not None:
            finite = test(start, end) and finite
        else:
            size = flat.element_size()
            finite = is_finite(flat[start // size : end // size]) and finite
    return None if finite else non_finite(flat.view(tensor.shape))


def non_finite_numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield the place (``a.b[0]``) and value of each NaN or infinity in plain data or options."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, float):
        if not math.isfinite(value):
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from non_finite_numbers(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from non_finite_numbers(item, f"{path}[{i}]")


def require_finite_options(options: Any) -> None:
    """Reject NaN and infinity in options, all at once; they have a meaning in none.

    Args:
        options: components, or options as parsed.

    Raises:
        ConfigError: the message names the options.
    """
    found = [f"{path}: {value:g}" for path, value in non_finite_numbers(options)]
    if found:
        raise ConfigError(
            f"expected finite numbers as options, got {shorten(found)}. Everything computed with "
            "them would be NaN or infinite."
        )


def as_json(value: Any, spelled: bool = False) -> Any:
    """Return nested plain data without NaN and infinity, which JSON does not have.

    Args:
        value: plain data.
        spelled: replace them as transformers does in its configs, instead of by null.
    """
    if isinstance(value, float) and not math.isfinite(value):
        names = {math.inf: "Infinity", -math.inf: "-Infinity"}
        return {"__float__": names.get(value, "NaN")} if spelled else None
    if isinstance(value, Mapping):
        return {key: as_json(item, spelled) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item, spelled) for item in value]
    return value
