"""Memory for merged tensors that live briefly, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import mmap
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_M_MMAP_THRESHOLD = -3
# Sizes that fewer tensors have (embeddings) come too seldom to hold on to.
_REPEATED = 3
# Idle blocks of a size: one is enough while a layer follows the other.
_IDLE = 1
# Below this size the C library's own reuse is as good.
_SMALL = 1 << 16


class BlockPool:
    """Blocks of memory for one layer's weights after another.

    A block is free again when the last tensor over it dies. Through the C library's allocator the
    same tensors would lie scattered between longer-lived activations, and their pages would be
    given back and faulted in again at every layer. Idle blocks are kept for repeated sizes only,
    one a size, so at most about one layer of weights is idle.

    Args:
        sizes: entries of each tensor that will be asked for.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        counts = Counter(sizes)
        self._counts = counts
        self._repeated = {size for size, count in counts.items() if count >= _REPEATED}
        self._idle: dict[int, list[mmap.mmap]] = {}
        self._lent: dict[int, weakref.ref[memoryview]] = {}

    def __reduce__(self) -> tuple[type[BlockPool], tuple[list[int]]]:
        """A copy has blocks of its own."""
        return BlockPool, (list(self._counts.elements()),)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in the CPU's memory, contents undefined."""
        size = torch.Size(shape).numel()
        length = size * dtype.itemsize
        if length < _SMALL or size not in self._repeated or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.empty(shape, dtype=dtype)
        idle = self._idle.setdefault(length, [])
        block = idle.pop() if idle else _map(length)
        # The tensor's storage holds this view and nothing else does, so it dies with the storage.
        view = memoryview(block)
        tag = id(view)

        def give_back(_: object) -> None:
            del self._lent[tag]
            if len(idle) < _IDLE:
                idle.append(block)

        self._lent[tag] = weakref.ref(view, give_back)
        return torch.frombuffer(view, dtype=dtype).view(*shape)


def _map(length: int) -> mmap.mmap:
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def release_freed_memory(threshold: int = 1 << 20) -> bool:
    """Let every block of `threshold` bytes and more go back to the system once it is freed (glibc).

    By default glibc raises its threshold to the largest block freed so far, up to 32 MB, and keeps
    smaller ones for reuse: in streamed memory the heap then holds many freed layers between live
    activations. The price is a page fault for each page of a new block.

    Returns:
        Whether the C library took the setting (other than glibc has none).
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, threshold))
    except (AttributeError, OSError):
        return False


def in_file(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in a file of the folder for temporary files (`TMPDIR`), contents undefined.

    The system may write its pages out and drop them from memory. The file has no name, so it goes
    with the tensor, or with the process.
    """
    size = torch.Size(shape).numel()
    if not size:
        return torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryDirectory(prefix="gradmerge-") as folder:
        # a mapping outlives its file's name
        flat = torch.from_file(f"{folder}/tensor", shared=True, size=size, dtype=dtype)
    return flat.view(*shape)


def trim_heap() -> bool:
    """Give what is free between small blocks of the heap back to the system (glibc).

    Returns:
        Whether the C library could (other than glibc has no such call).
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return False
    return True
