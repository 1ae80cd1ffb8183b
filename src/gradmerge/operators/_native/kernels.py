"""Calling the C kernels: tensors become addresses, and threads share their entries."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# A thread is not worth starting for fewer entries.
_ENTRIES_A_THREAD = 1 << 17

GIVEN, FROM_ZERO, FROM_BASE, FROM_MEAN, FROM_DIRECTIONS = range(5)


@dataclass(frozen=True)
class Kernels:
    """The loaded library."""

    library: ctypes.CDLL
    float16: bool
    """Whether the compiler knew 16-bit IEEE numbers."""

    def take(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all tensors have a type and a place that the kernels work on."""
        return all(
            tensor.device.type == "cpu"
            and tensor.layout == torch.strided
            and tensor.dtype in TYPES
            and (self.float16 or tensor.dtype != torch.float16)
            and tensor.data_ptr() % tensor.element_size() == 0
            for tensor in tensors
        )

    def merge(
        self,
        out: Tensor,
        terms: Sequence[Tensor],
        weights: Tensor,
        rule: int,
        width: int,
        inner: int,
        parts: Tensor | None,
    ) -> None:
        """`out = sum_s weight_s * term_s`; see `merging.c`. All tensors are contiguous."""
        weights = weights.to(torch.float32).contiguous()
        pointers, types = _arrays(terms)

        def run(begin: int, end: int) -> None:
            self.library.gradmerge_merge(
                ctypes.c_void_p(out.data_ptr()),
                TYPES[out.dtype],
                pointers,
                types,
                len(terms),
                ctypes.c_void_p(weights.data_ptr()),
                rule,
                ctypes.c_int64(width),
                ctypes.c_int64(inner),
                address(parts),
                ctypes.c_int64(begin),
                ctypes.c_int64(end),
            )

        run_shared(run, out.numel())

    def contract(
        self,
        grad: Tensor,
        terms: Sequence[Tensor],
        anchor: Tensor | None,
        mean: bool,
        width: int,
        inner: int,
        parts: Tensor | None,
        products: bool,
    ) -> Tensor:
        """`[terms, width]`: sums of `grad * (term - anchor)` in float64; see `merging.c`.

        With `products` (a coefficient per entry) nothing is summed, and the result is float32.
        """
        pointers, types = _arrays(terms)
        shares = ranges(grad.numel())
        dtype = torch.float32 if products else torch.float64
        # threads write apart: each has its own sums, but entries of the products are disjoint
        copies = 1 if products else len(shares)
        result = torch.zeros(copies, len(terms), width, dtype=dtype)

        def run(begin: int, end: int) -> None:
            own = 0 if products else shares.index((begin, end))
            target = ctypes.c_void_p(result[own].data_ptr())
            self.library.gradmerge_contract(
                None if products else target,
                target if products else None,
                ctypes.c_void_p(grad.data_ptr()),
                TYPES[grad.dtype],
                address(anchor),
                0 if anchor is None else TYPES[anchor.dtype],
                int(mean),
                pointers,
                types,
                len(terms),
                ctypes.c_int64(width),
                ctypes.c_int64(inner),
                address(parts),
                ctypes.c_int64(begin),
                ctypes.c_int64(end),
            )

        run_shared(run, grad.numel())
        return result[0] if copies == 1 else result.sum(dim=0)


def address(tensor: Tensor | None) -> ctypes.c_void_p | None:
    """Where a tensor's first entry is; None for none."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _arrays(
    terms: Sequence[Tensor],
) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int]]:
    pointers = (ctypes.c_void_p * len(terms))(*(term.data_ptr() for term in terms))
    return pointers, (ctypes.c_int * len(terms))(*(TYPES[term.dtype] for term in terms))


def ranges(size: int) -> list[tuple[int, int]]:
    """Entries of each thread: as many threads as torch uses, where the tensor is worth them."""
    threads = max(1, min(torch.get_num_threads(), size // _ENTRIES_A_THREAD))
    bounds = [size * i // threads for i in range(threads + 1)]
    return list(itertools.pairwise(bounds))


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="gradmerge")


def run_shared(run: Callable[[int, int], None], size: int) -> None:
    """Call `run` on each thread's entries; ctypes lets go of the interpreter lock meanwhile."""
    first, *others = ranges(size)
    if not others or getattr(_here, "busy", False):
        # a thread of the pool that waited for the pool would wait for itself
        for own in (first, *others):
            run(*own)
        return
    pending = [_pool(torch.get_num_threads(), os.getpid()).submit(run, *own) for own in others]
    try:
        run(*first)
    finally:
        wait(pending)  # they write to memory that the caller may let go of
    for one in pending:
        one.result()


_here = threading.local()


def run_each(calls: Sequence[Callable[[], None]]) -> None:
    """Run calls side by side, on as many threads as torch uses; within one, nothing is shared
    out.
    """
    if len(calls) < 2 or torch.get_num_threads() < 2:
        for call in calls:
            call()
        return
    pool = _pool(torch.get_num_threads(), os.getpid())
    for one in [pool.submit(_alone, call) for call in calls]:
        one.result()


def _alone(call: Callable[[], None]) -> None:
    _here.busy = True
    try:
        call()
    finally:
        _here.busy = False
