"""Memory for short-lived merged tensors, and returning freed memory to the operating system."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from gradmerge.common.atomic import require_space, writing
from gradmerge.common.errors import ConfigError

_M_MMAP_THRESHOLD = -3
# Sizes shared by fewer tensors (embeddings) recur too rarely to be worth keeping.
_REPEATED = 3
# Idle blocks per size: one is enough, because layers are processed one after another.
_IDLE = 1
# Below this size the allocator's own reuse is just as good.
_SMALL = 1 << 16
# What Linux reads ahead at a time, at least; it cuts longer requests off.
_WINDOW = 1 << 17
_WILL_NEED = 3
# Of copies in page-locked memory, in bytes: a cache line of the device or more.
_ALIGNED = 512
_ELSEWHERE = "Temporary files go to TMPDIR; set it to a folder on a larger disk."


class BlockPool:
    """Memory blocks that are reused from layer to layer.

    A block becomes free when the last tensor on it is destroyed. With the C library's allocator the
    same tensors would be scattered among longer-lived activations, and their pages would be
    released and faulted in again at every layer. Idle blocks are kept only for repeated sizes, one
    per size, so about one layer of weights is idle at most.

    Args:
        sizes: number of entries of each tensor that will be requested.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        counts = Counter(sizes)
        self._counts = counts
        self._repeated = {size for size, count in counts.items() if count >= _REPEATED}
        self._idle: dict[int, list[mmap.mmap]] = {}
        self._lent: dict[int, weakref.ref[memoryview]] = {}

    def __reduce__(self) -> tuple[type[BlockPool], tuple[list[int]]]:
        """Give a copy blocks of its own."""
        return BlockPool, (list(self._counts.elements()),)

    def keeps(self, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Return whether a tensor gets a block that is kept for reuse."""
        size = torch.Size(shape).numel()
        is_large = size * dtype.itemsize >= _SMALL
        return is_large and size in self._repeated and hasattr(mmap, "MAP_PRIVATE")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised CPU tensor."""
        if not self.keeps(shape, dtype):
            return torch.empty(shape, dtype=dtype)
        length = torch.Size(shape).numel() * dtype.itemsize
        idle = self._idle.setdefault(length, [])
        block = idle.pop() if idle else _map(length)
        # Only the tensor's storage holds this view, so the view is destroyed with the storage.
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
    """Make glibc return freed blocks of at least `threshold` bytes to the system immediately.

    By default glibc raises this threshold to the largest block freed so far, up to 32 MB, and keeps
    smaller ones for reuse: with streamed memory the heap would then hold many freed layers between
    live activations. The price is a page fault for each page of a new block.

    Returns:
        True if the C library accepted the setting (False on libraries other than glibc).
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, threshold))
    except (AttributeError, OSError):
        return False


def in_file(
    shape: Sequence[int], dtype: torch.dtype, folder: str | os.PathLike[str] | None = None
) -> Tensor:
    """Return an uninitialised tensor that is mapped to a temporary file.

    The operating system may write its pages out and evict them from memory. The file has no name,
    so its space is released with the tensor or the process.

    Args:
        shape: its shape.
        dtype: its dtype.
        folder: existing folder of the file; default: `TMPDIR`.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
    """
    size = torch.Size(shape).numel()
    if not size:
        return torch.empty(shape, dtype=dtype)
    place = Path(folder or tempfile.gettempdir())
    with writing(place, _ELSEWHERE), _temporary(place) as file:
        _reserve(file, size * dtype.itemsize)
        opened = f"/proc/self/fd/{file.fileno()}"
        name = opened if os.path.exists(opened) else file.name
        # the mapping stays valid after the file is closed
        flat = torch.from_file(str(name), shared=True, size=size, dtype=dtype)
    return flat.view(*shape)


def in_shared_file(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor that is mapped to a file, which is made if there is none.

    Processes that map the same file see the same numbers. The mapping stays valid after the file
    is removed.

    Raises:
        OutputError: the disk is full, or the file cannot be written.
    """
    size = torch.Size(shape).numel()
    if not size:
        return torch.empty(shape, dtype=dtype)
    with writing(path, _ELSEWHERE):
        with path.open("ab") as file:
            if not file.tell():
                _reserve(file, size * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(*shape)


def _reserve(file: IO[bytes], size: int) -> None:
    if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a crash on access
        os.posix_fallocate(file.fileno(), 0, size)


def require_temporary_space(size: int, what: str) -> None:
    """Reject a `TMPDIR` with less free space than the tensors that will be mapped to files there.

    Raises:
        OutputError: there is less.
    """
    require_space(Path(tempfile.gettempdir()), size, what, _ELSEWHERE)


def _temporary(folder: Path) -> Any:
    """Open a temporary file, without a name where the system can do that (Linux)."""
    make = tempfile.TemporaryFile if sys.platform == "linux" else tempfile.NamedTemporaryFile
    return make(prefix="gradmerge-", dir=folder)


class PageLocked:
    """Copies of tensors in host memory that a CUDA device can read by itself, block by block.

    torch's own page-locked memory takes powers of two. The memory is freed with this object.

    Args:
        locks: lock the pages; tensors without numbers have none.
    """

    _BLOCKS = 1 << 26, 1 << 30
    """Sizes of the first block, and of the largest ones; each doubles what there is until then."""

    def __init__(self, locks: bool = True) -> None:
        self._locks = locks
        self._blocks: list[Tensor] = []
        self._used: list[int] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor in page-locked memory.

        Raises:
            ConfigError: the system locks no more pages (`ulimit -l`).
        """
        size = -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        room = (len(block) - used for block, used in zip(self._blocks, self._used, strict=True))
        at = next((i for i, free in enumerate(room) if free >= size), len(self._blocks))
        if at == len(self._blocks):
            first, most = self._BLOCKS
            so_far = sum(len(block) for block in self._blocks)
            self._blocks.append(self._new(max(size, min(most, max(first, so_far)))))
            self._used.append(0)
        start = self._used[at]
        self._used[at] += size
        own = self._blocks[at][start : start + tensor.nbytes]
        return own.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _new(self, size: int) -> Tensor:
        block = torch.empty(size, dtype=torch.uint8)
        if self._locks:
            runtime: Any = torch.cuda.cudart()
            error = int(runtime.cudaHostRegister(block.data_ptr(), size, 0))
            if error:
                with suppress(Exception):  # which the next kernel would report as its own
                    torch.zeros(1, device="cuda")
                raise ConfigError(
                    f"placement: expected {size:,} more bytes of page-locked memory, got CUDA "
                    f"error {error}. Raise `ulimit -l`, or use placement mapped."
                )
            weakref.finalize(self, runtime.cudaHostUnregister, block.data_ptr())
        return block


def read_ahead(address: int, size: int) -> None:
    """Have the system read the file behind mapped memory, unless it seems to be in memory.

    Three pages are looked at. Other memory is left as it is, and so is everything where the system
    cannot do that.
    """
    calls = _mapped_calls() if size >= _WINDOW else None
    if calls is None:
        return
    know, advise = calls
    page = mmap.PAGESIZE
    start, end, seen = address - address % page, address + size, ctypes.c_ubyte()
    for part in (0, 1, 2):
        place = start + part * (end - 1 - start) // 2
        # an error, too, means that there is nothing to read
        if know(place - place % page, page, ctypes.byref(seen)) == 0 and not seen.value & 1:
            break
    else:
        return
    for place in range(start, end, _WINDOW):
        advise(place, min(_WINDOW, end - place), _WILL_NEED)


@functools.cache
def _mapped_calls() -> tuple[Any, Any] | None:
    """Return `mincore` and `madvise`, where the system has them."""
    try:
        library = ctypes.CDLL(None)
        know, advise = library.mincore, library.madvise
    except (AttributeError, OSError, TypeError):
        return None
    know.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return know, advise


def trim_heap() -> bool:
    """Return free heap memory between small blocks to the system (glibc).

    Returns:
        True if the C library supports it (False on libraries other than glibc).
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return False
    return True


def reset_peak_memory() -> None:
    """Forget the peak of this process's memory, where the system can do that (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the largest resident memory of this process in bytes, since it began or was reset.

    0 where the system does not tell.
    """
    with suppress(OSError, StopIteration), Path("/proc/self/status").open() as file:
        line = next(line for line in file if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def anonymous_memory() -> int:
    """Return the resident memory of this process that belongs to no file, in bytes.

    0 where the system does not tell.
    """
    return _stated(Path("/proc/self/status"), "RssAnon")


def host_memory() -> tuple[int, int]:
    """Return the host's memory in bytes: what processes may still take, and all of it.

    The limit of a container (cgroup) counts where it is lower. Both are 0 where the system does
    not tell.
    """
    info = Path("/proc/meminfo")
    free, whole = _stated(info, "MemAvailable"), _stated(info, "MemTotal")
    for limit, used, cache in _CGROUPS:
        with suppress(OSError, ValueError):
            most = int(Path(limit).read_text())
            if most < whole:
                taken = int(Path(used).read_text()) - _stated(Path(cache), "inactive_file", 1)
                free, whole = min(free, max(0, most - taken)), most
    return free, whole


_CGROUPS = (
    (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory.current",
        "/sys/fs/cgroup/memory.stat",
    ),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def _stated(file: Path, name: str, unit: int = 1024) -> int:
    """Return a number of a table of names and numbers; 0 if it is not there."""
    with suppress(OSError), file.open(encoding="ascii") as lines:
        for line in lines:
            words = line.replace(":", " ").split()
            if words[:1] == [name]:
                return int(words[1]) * unit
    return 0
