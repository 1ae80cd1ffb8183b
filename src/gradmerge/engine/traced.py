"""Memory and work of a program, counted while it runs on tensors without numbers.

On fake tensors (shape, dtype and device only) the real code of a step runs in about a second,
whatever the size of the network, and every storage that it would allocate is seen.
"""

from __future__ import annotations

import sys
import weakref
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gradmerge.common.memory import BlockPool

Part = Literal["merged", "coefficients", "sources", "rest"]
PARTS: tuple[Part, ...] = ("merged", "coefficients", "sources", "rest")
_ATEN = torch.ops.aten
# glibc: the first and the largest threshold between heap and mapped blocks, and the unit of blocks.
_SMALLEST, _LARGEST, _UNIT = 128 << 10, 32 << 20, 16
# What a gap must have beyond the size of an aligned block, as torch asks for.
_ALIGNMENT = 96


@dataclass
class Peak:
    """The largest number of bytes of live tensors on a device, and their parts at that time."""

    size: int = 0
    parts: dict[Part, int] = field(default_factory=dict)


@dataclass
class _Entry:
    """A live storage."""

    reference: Any
    size: int
    device: str
    part: Part
    number: int
    pooled: bool = False


class Trace(TorchDispatchMode):
    """Counts the live bytes of tensors by device, and the work of operations, in its context.

    Tensors have no numbers, so questions about their values are answered: yes, and one. Masks then
    keep all of what they mask, which is the most that a batch of this shape can take.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.part: Part = "rest"
        """Part that new tensors belong to."""
        self.peaks: dict[str, Peak] = {}
        """Peak of each kind of device."""
        self.flops = 0
        """Floating-point operations of products, convolutions and attention."""
        self.moved = 0
        """Bytes that all other operations read and write."""
        self.work: Counter[str] = Counter()
        """Entries that are merged and contracted, and bytes of sources that these read."""
        self.log: list[tuple[int, int]] = []
        """Storages of the CPU in the order in which they are made and freed: number, and size or
        0."""
        self._live: dict[int, _Entry] = {}
        self._idle: dict[int, list[_Entry]] = {}
        self._now: dict[str, Counter[Part]] = {}
        self._count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, or answer what depends on numbers."""
        out = _answered(func, args)
        if out is None:
            out = func(*args, **(kwargs or {}))
        made = False
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                made |= self._add(tensor)
        self._count_work(func, args, kwargs or {}, out, made)
        return out

    def _count_work(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, made: bool
    ) -> None:
        packet = getattr(func, "_overloadpacket", None)
        if packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **kwargs, out_val=out))
        elif made or getattr(getattr(func, "_schema", None), "is_mutable", False):
            tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
            self.moved += sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def _add(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return False
        size, device = storage.nbytes(), tensor.device.type
        self._count += 1
        reference = weakref.ref(storage, lambda _: self._free(key))
        self._live[key] = _Entry(reference, size, device, self.part, self._count)
        self._change(device, self.part, size)
        if device == "cpu":
            self.log.append((self._count, size))
        return True

    def _free(self, key: int) -> None:
        entry = self._live.pop(key)
        if entry.pooled and not self._idle.get(entry.size):
            self._idle[entry.size] = [entry]  # stays, until the pool lends it again
            return
        self._change(entry.device, entry.part, -entry.size)
        if entry.device == "cpu" and entry.size:
            self.log.append((entry.number, 0))

    def hold(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Count tensors that were made outside the context."""
        with self.counting(part):
            for tensor in tensors:
                self._add(tensor)

    def pool(self, tensor: Tensor) -> Tensor:
        """Count a new tensor as one of a `BlockPool`, which keeps one idle block per size."""
        entry = self._live[tensor.untyped_storage()._cdata]
        entry.pooled = True
        if idle := self._idle.get(entry.size):
            before = idle.pop()
            self._change(before.device, before.part, -before.size)
            self.log.append((before.number, 0))
        return tensor

    def totals(self) -> Counter[str]:
        """Return the work so far."""
        return self.work + Counter(flops=self.flops, moved=self.moved)

    def _change(self, device: str, part: Part, size: int) -> None:
        now = self._now.setdefault(device, Counter())
        now[part] += size
        peak = self.peaks.setdefault(device, Peak())
        total = sum(now.values())
        if total > peak.size:
            peak.size, peak.parts = total, dict(now)

    def assign(self, tensor: Tensor, part: Part) -> Tensor:
        """Count a tensor to a part from now on, and return it."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        if entry is not None and entry.part != part:
            now = self._now[entry.device]
            now[entry.part] -= entry.size
            now[part] += entry.size
            entry.part = part
        return tensor

    def mapped(self, tensor: Tensor) -> Tensor:
        """Do not count a tensor, which is mapped from a file, and return it."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        if entry is not None:
            self._change(entry.device, entry.part, -entry.size)
            self.log.append((entry.number, 0))
            entry.size = 0
        return tensor

    @contextmanager
    def counting(self, part: Part) -> Iterator[None]:
        """Count new tensors to a part inside the context."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def resident(self, threshold: int | None) -> int:
        """Return the most resident memory of the CPU's tensors in bytes, by the C library's rules.

        Args:
            threshold: size from which blocks are returned to the system when freed; None for
                glibc's rule.
        """
        if not sys.platform.startswith("linux"):
            return self.peaks.get("cpu", Peak()).size
        return Heap(threshold).peak_of(self.log)


class TracedBlocks:
    """Stands for a `BlockPool` in a trace: tensors without numbers that are lent and kept alike.

    Args:
        trace: the trace.
        pool: the pool.
    """

    def __init__(self, trace: Trace, pool: BlockPool) -> None:
        self._trace, self._pool = trace, pool

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor."""
        tensor = torch.empty(shape, dtype=dtype)
        return self._trace.pool(tensor) if self._pool.keeps(shape, dtype) else tensor


class Heap:
    """Resident memory of a program under glibc's allocator, replayed from its blocks.

    Blocks of at least a threshold are mapped one by one and returned when freed. Smaller ones lie
    in a heap, each in the smallest gap that holds it. By default the threshold is that of the
    largest block freed so far, up to 32 MB, and what is freed of the heap stays resident: its end
    shrinks only where it is free, which small objects prevent (mallopt(3), `M_MMAP_THRESHOLD`).

    Args:
        threshold: a fixed threshold in bytes, with which the heap shrinks at its end.
    """

    def __init__(self, threshold: int | None = None) -> None:
        self._fixed = threshold is not None
        self._threshold = threshold or _SMALLEST
        self._blocks: dict[int, tuple[int | None, int]] = {}  # number: start or None, size
        self._gaps: list[tuple[int, int]] = []  # size, start
        self._by_start: dict[int, int] = {}
        self._by_end: dict[int, int] = {}
        self._end = self._mapped = 0

    def peak_of(self, log: Iterable[tuple[int, int]]) -> int:
        """Return the largest resident size while blocks are made (number, size) and freed."""
        peak = 0
        for number, size in log:
            if size:
                self._make(number, size)
                peak = max(peak, self._end + self._mapped)
            else:
                self._free(number)
        return peak

    def _make(self, number: int, size: int) -> None:
        size += -size % _UNIT + _UNIT
        if size >= self._threshold:
            self._mapped += size
            self._blocks[number] = None, size
            return
        at = bisect_left(self._gaps, (size + _ALIGNMENT, 0))
        if at < len(self._gaps):
            whole, start = self._gaps[at]
            self._drop(whole, start)
            if whole > size:
                self._gap(start + size, whole - size)
        else:
            start, self._end = self._end, self._end + size
        self._blocks[number] = start, size

    def _free(self, number: int) -> None:
        start, size = self._blocks.pop(number, (0, 0))
        if not size:
            return
        if start is None:
            self._mapped -= size
            if not self._fixed and size <= _LARGEST:
                self._threshold = max(self._threshold, size)
            return
        if start in self._by_end:  # the gap before it
            before = self._by_end[start]
            self._drop(before, start - before)
            start, size = start - before, size + before
        if start + size in self._by_start:  # the gap after it
            after = self._by_start[start + size]
            self._drop(after, start + size)
            size += after
        if self._fixed and start + size == self._end:
            self._end = start
        else:
            self._gap(start, size)

    def _gap(self, start: int, size: int) -> None:
        insort(self._gaps, (size, start))
        self._by_start[start], self._by_end[start + size] = size, size

    def _drop(self, size: int, start: int) -> None:
        del self._gaps[bisect_left(self._gaps, (size, start))]
        del self._by_start[start], self._by_end[start + size]


def _answered(func: Any, args: Sequence[Any]) -> Any:
    """Return the result of an operation that depends on numbers; None for all others."""
    if func is _ATEN._local_scalar_dense.default:
        dtype = args[0].dtype
        return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
    if func is _ATEN.equal.default:
        return True
    if func is _ATEN.nonzero.default:
        return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
    if func is _ATEN.masked_select.default:
        return args[0].new_empty((args[0].numel(),))
    if func is _ATEN.index.Tensor and any(_is_mask(index) for index in args[1]):
        return _kept_whole(*args)
    return None


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _kept_whole(tensor: Tensor, indices: Sequence[Any]) -> Any:
    """Return the shape of `tensor[mask]` with a mask that keeps everything; None otherwise."""
    (mask, *rest) = indices
    if not _is_mask(mask) or any(index is not None for index in rest):
        return None
    return tensor.new_empty((mask.numel(), *tensor.shape[mask.dim() :]))


def fake_mode() -> FakeTensorMode:
    """Return a mode in which tensors have no numbers, and real ones are taken as such."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def tracing(fake: FakeTensorMode, trace: Trace) -> Iterator[None]:
    """Run the code inside the context on fake tensors, its backward passes in the same thread."""
    with torch.autograd.set_multithreading_enabled(False), fake, trace:
        yield
