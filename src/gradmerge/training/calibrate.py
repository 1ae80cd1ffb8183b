"""Speed of this machine in the work of a step, measured in about two seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmerge.engine import contraction
from gradmerge.engine.headers import HeaderPlan
from gradmerge.operators import Terms
from gradmerge.training.planned import Estimate

_SECONDS = 0.25
"""Time that each measurement takes."""
_ENTRIES = 1 << 22
"""Size of the tensors that are merged, about."""


@dataclass(frozen=True)
class Speed:
    """Work of a device per second."""

    flops: float
    """Floating-point operations of a product of matrices in the dtype of the computation."""
    moved: float
    """Bytes that an operation entry by entry reads and writes."""
    merged: float
    """Entries that are merged from all sources."""
    contracted: float
    """Entries whose gradient is contracted with all sources."""
    copied: float
    """Bytes copied from the host's memory to the device; infinity on the CPU."""
    pinned: float
    """Bytes copied from page-locked memory, while the device computes; infinity on the CPU."""

    def seconds(self, found: Estimate) -> float:
        """Return the time of a step."""
        merging = found.merged / self.merged + found.contracted / self.contracted
        work = found.flops / self.flops + found.moved / self.moved + merging
        return max(work, found.pinned / self.pinned) + found.mapped / self.copied


def calibrate(plan: HeaderPlan, dtype: torch.dtype, device: torch.device) -> Speed:
    """Measure products, copies, merging and contraction on a device.

    Args:
        plan: the merge; a tensor of its shapes is merged and contracted with random numbers.
        dtype: dtype of the computation.
        device: the device.
    """
    wide = torch.randn(1024, 1024, dtype=dtype, device=device)
    product = 2 * 1024**3 / _best(lambda: wide @ wide, device)
    long = torch.randn(_ENTRIES, dtype=dtype, device=device)
    moved = 3 * long.nbytes / _best(lambda: long + long, device)
    merge, contract, entries = _merging(plan, dtype, device)
    copied = pinned = math.inf
    if device.type != "cpu":
        host = torch.empty(_ENTRIES, dtype=dtype)
        copied = host.nbytes / _best(lambda: host.to(device), device)
        locked = host.pin_memory()
        pinned = host.nbytes / _best(lambda: locked.to(device, non_blocking=True), device)
    seconds = _best(merge, device), _best(contract, device)
    return Speed(product, moved, entries / seconds[0], entries / seconds[1], copied, pinned)


def _merging(
    plan: HeaderPlan, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object], int]:
    """Return a merge and a contraction of the tensor whose size is nearest to `_ENTRIES`."""
    sizes = {name: math.prod(plan.tensors[name].shape) for name in plan.learned}
    name = min(sizes, key=lambda key: abs(sizes[key] - _ENTRIES))
    shape, recipe = plan.tensors[name].shape, plan.recipe
    names: Sequence[str] = list(plan.sources)

    def drawn(stored: torch.dtype) -> Tensor:
        return torch.randn(shape).to(device, stored)

    stored = [plan.sources[source].infos[name].dtype for source in names]
    directions = bool(recipe.preprocess)
    origin = plan.base.infos[name].dtype if recipe.resolved_origin == "base" and plan.base else None
    terms = Terms(
        [drawn(torch.float32 if directions else own) for own in stored],
        None if origin is None else drawn(origin),
        recipe.resolved_origin == "mean",
        directions=directions,
    )
    slot = plan.layout.slots[name]
    raw = torch.full((plan.num_rows, *slot.shape), 0.5, device=device)
    spread = plan._spread(name, device)
    out, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    coefficients, operator = recipe.coefficients, recipe.operator

    def merge() -> object:
        return contraction.combine(coefficients, operator, terms, raw, spread, out)

    def contract() -> object:
        return contraction.contract(coefficients, operator, terms, raw, spread, grad)

    return merge, contract, sizes[name]


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Return the least time of a call, after one that does not count."""

    def timed() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    end, best = time.perf_counter() + _SECONDS, math.inf
    while math.isinf(best) or time.perf_counter() < end:
        best = min(best, timed())
    return best
