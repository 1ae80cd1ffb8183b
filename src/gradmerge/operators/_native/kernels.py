"""Calls of the C kernels: tensors are passed as addresses, and threads share their entries."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmerge.operators.base import Spread, Terms, width_and_inner
from gradmerge.operators.chunks import stored_weights

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Bytes of a real number, and the bits that are all set in NaN and infinity.
_EXPONENTS = {
    torch.float64: (8, 0x7FF << 52),
    torch.float32: (4, 0x7F800000),
    torch.float16: (2, 0x7C00),
    torch.bfloat16: (2, 0x7F80),
    torch.float8_e5m2: (1, 0x7C),
    torch.float8_e4m3fn: (1, 0x7F),
    torch.complex64: (4, 0x7F800000),
    torch.complex128: (8, 0x7FF << 52),
}
# Minimum number of entries per thread.
_ENTRIES_PER_THREAD = 1 << 17

GIVEN, FROM_ZERO, FROM_BASE, FROM_MEAN, FROM_DIRECTIONS = range(5)


@dataclass(frozen=True)
class Kernels:
    """Loaded library of C kernels."""

    library: ctypes.CDLL
    float16: bool
    """True if the compiler supports 16-bit IEEE numbers."""

    def take(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the kernels support all these tensors."""
        return all(
            tensor.device.type == "cpu"
            and tensor.layout == torch.strided
            and tensor.dtype in TYPES
            and (self.float16 or tensor.dtype != torch.float16)
            and tensor.data_ptr() % tensor.element_size() == 0
            for tensor in tensors
        )

    def finite_test(self, flat: Tensor) -> Callable[[int, int], bool] | None:
        """Return a test whether the bytes from start to end are finite numbers (see `finite.c`).

        Returns None for tensors that it cannot look at.
        """
        width, mask = _EXPONENTS.get(flat.dtype, (0, 0))
        place, test = flat.data_ptr(), self.library.gradmerge_finite
        if not width or place % width or not flat.is_contiguous() or flat.device.type != "cpu":
            return None
        # converted faster than by wrapping each argument: this runs for each piece of a hash
        test.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint64)
        return lambda start, end: test(place + start, (end - start) // width, width, mask) != 0

    def combine(self, terms: Terms, coefficient: Tensor, spread: Spread, out: Tensor) -> Tensor:
        """Merge as `AbstractOperator.combine` does, with coefficients `[sources, slot]`."""
        rule, weights = GIVEN, coefficient
        if spread.kind == "element" and out.numel() > 1:
            # weights of all entries at once would need as much memory as the stored tensors
            rule = FROM_MEAN if terms.mean_origin else FROM_ZERO
            if terms.origin is not None:
                rule = FROM_DIRECTIONS if terms.directions else FROM_BASE
        else:
            weights = stored_weights(terms, coefficient.double())
        width, inner = width_and_inner(terms.shape, spread, weights)
        weights = weights.to(torch.float32).contiguous()
        flat = [term.reshape(-1) for term in terms.stored]
        pointers, types = _arrays(flat)

        def run(begin: int, end: int) -> None:
            self.library.gradmerge_merge(
                address(out),
                TYPES[out.dtype],
                pointers,
                types,
                len(flat),
                address(weights),
                rule,
                *integers(width, inner),
                address(spread.parts),
                *integers(begin, end),
            )

        run_shared(run, out.numel())
        return out

    def contract(self, terms: Terms, grad: Tensor, coefficient: Tensor, spread: Spread) -> Tensor:
        """Contract as `AbstractOperator.contract` does.

        Sums are float64; with a coefficient per entry nothing is summed and they are float32.
        """
        width, inner = width_and_inner(
            terms.shape, spread, coefficient.view(len(terms.sources), -1)
        )
        products = spread.kind == "element"
        flat = [source.reshape(-1) for source in terms.sources]
        origin = None if terms.directions else terms.origin
        grad, anchor = grad.reshape(-1), None if origin is None else origin.reshape(-1)
        pointers, types = _arrays(flat)
        shares = ranges(grad.numel())
        dtype = torch.float32 if products else torch.float64
        # each thread has its own sums, whereas the products of threads are disjoint
        copies = 1 if products else len(shares)
        result = torch.zeros(copies, len(flat), width, dtype=dtype)

        def run(begin: int, end: int) -> None:
            own = 0 if products else shares.index((begin, end))
            target = address(result[own])
            self.library.gradmerge_contract(
                None if products else target,
                target if products else None,
                address(grad),
                TYPES[grad.dtype],
                address(anchor),
                0 if anchor is None else TYPES[anchor.dtype],
                int(terms.mean_origin),
                pointers,
                types,
                len(flat),
                *integers(width, inner),
                address(spread.parts),
                *integers(begin, end),
            )

        run_shared(run, grad.numel())
        total = result[0] if copies == 1 else result.sum(dim=0)
        return total.view(coefficient.shape).to(coefficient.dtype)


def address(tensor: Tensor | None) -> ctypes.c_void_p | None:
    """Return the address of the first entry; None if there is no tensor."""
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def integers(*values: int) -> Iterator[ctypes.c_int64]:
    """Return values as C integers of 64 bits."""
    return map(ctypes.c_int64, values)


def _arrays(
    terms: Sequence[Tensor],
) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int]]:
    pointers = (ctypes.c_void_p * len(terms))(*(term.data_ptr() for term in terms))
    return pointers, (ctypes.c_int * len(terms))(*(TYPES[term.dtype] for term in terms))


def ranges(size: int) -> list[tuple[int, int]]:
    """Split entries among threads: as many as torch uses, or fewer for small tensors."""
    threads = max(1, min(torch.get_num_threads(), size // _ENTRIES_PER_THREAD))
    bounds = [size * i // threads for i in range(threads + 1)]
    return list(itertools.pairwise(bounds))


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the threads of this process (a forked process does not inherit its parent's)."""
    return ThreadPoolExecutor(threads, thread_name_prefix="gradmerge")


def run_shared(run: Callable[[int, int], None], size: int) -> None:
    """Call `run` on the entries of each thread; ctypes releases the interpreter lock meanwhile."""
    first, *others = ranges(size)
    if not others or getattr(_here, "busy", False):
        # a pool thread that waited for the pool could wait for itself
        for own in (first, *others):
            run(*own)
        return
    pending = [_pool(torch.get_num_threads(), os.getpid()).submit(run, *own) for own in others]
    try:
        run(*first)
    finally:
        wait(pending)  # they write to memory that the caller may release
    for one in pending:
        one.result()


_here = threading.local()


def run_each(calls: Sequence[Callable[[], None]]) -> None:
    """Run calls in parallel, on as many threads as torch uses, each call on a single thread."""
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
