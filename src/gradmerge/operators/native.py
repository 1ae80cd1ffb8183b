"""Building and calling the C kernels that merge and contract on a CPU (`kernels.c`).

They are compiled once, in about a second, with the system's C compiler, and kept in the user's
cache folder. Without a compiler, or with `GRADMERGE_KERNELS=torch`, torch's own operations do the
same work in about twice the time.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradmerge.errors import ConfigError

_log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernels.c")
_CHOICES = ("auto", "native", "torch")
# The first set of options that the compiler takes; a plain -O3 is some 25 % slower.
_OPTIONS = (["-O3", "-march=native"], ["-O3", "-mcpu=native"], ["-O3"])
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
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
            and tensor.dtype in _TYPES
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
        """`out = sum_s weight_s * term_s`; see `kernels.c`. All tensors are contiguous."""
        weights = weights.to(torch.float32).contiguous()
        pointers, types = _arrays(terms)

        def run(begin: int, end: int) -> None:
            self.library.gradmerge_merge(
                ctypes.c_void_p(out.data_ptr()),
                _TYPES[out.dtype],
                pointers,
                types,
                len(terms),
                ctypes.c_void_p(weights.data_ptr()),
                rule,
                ctypes.c_int64(width),
                ctypes.c_int64(inner),
                _address(parts),
                ctypes.c_int64(begin),
                ctypes.c_int64(end),
            )

        _shared_out(run, out.numel())

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
        """`[terms, width]`: sums of `grad * (term - anchor)` in float64; see `kernels.c`.

        With `products` (a coefficient an entry) nothing is summed, and the result is float32.
        """
        pointers, types = _arrays(terms)
        ranges = _ranges(grad.numel())
        dtype = torch.float32 if products else torch.float64
        # threads write apart: each has its own sums, but entries of the products are disjoint
        copies = 1 if products else len(ranges)
        result = torch.zeros(copies, len(terms), width, dtype=dtype)

        def run(begin: int, end: int) -> None:
            own = 0 if products else ranges.index((begin, end))
            target = ctypes.c_void_p(result[own].data_ptr())
            self.library.gradmerge_contract(
                None if products else target,
                target if products else None,
                ctypes.c_void_p(grad.data_ptr()),
                _TYPES[grad.dtype],
                _address(anchor),
                0 if anchor is None else _TYPES[anchor.dtype],
                int(mean),
                pointers,
                types,
                len(terms),
                ctypes.c_int64(width),
                ctypes.c_int64(inner),
                _address(parts),
                ctypes.c_int64(begin),
                ctypes.c_int64(end),
            )

        _shared_out(run, grad.numel())
        return result[0] if copies == 1 else result.sum(dim=0)


def _address(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _arrays(
    terms: Sequence[Tensor],
) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int]]:
    pointers = (ctypes.c_void_p * len(terms))(*(term.data_ptr() for term in terms))
    return pointers, (ctypes.c_int * len(terms))(*(_TYPES[term.dtype] for term in terms))


def _ranges(size: int) -> list[tuple[int, int]]:
    """Entries of each thread: as many threads as torch uses, where the tensor is worth them."""
    threads = max(1, min(torch.get_num_threads(), size // _ENTRIES_A_THREAD))
    bounds = [size * i // threads for i in range(threads + 1)]
    return list(itertools.pairwise(bounds))


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="gradmerge")


def _shared_out(run: Callable[[int, int], None], size: int) -> None:
    """Call `run` on each thread's entries; ctypes lets go of the interpreter lock meanwhile."""
    first, *others = _ranges(size)
    if not others:
        run(*first)
        return
    pending = [_pool(torch.get_num_threads(), os.getpid()).submit(run, *own) for own in others]
    run(*first)
    for one in pending:
        one.result()


def native_kernels() -> Kernels | None:
    """The kernels, compiled at first use; None where torch's operations are to be used.

    Raises:
        ConfigError: `GRADMERGE_KERNELS` is none of auto, native and torch, or it is native and they
            cannot be built.
    """
    return _load(os.environ.get("GRADMERGE_KERNELS", "auto"))


@functools.cache
def _load(choice: str) -> Kernels | None:
    if choice not in _CHOICES:
        raise ConfigError(
            f"GRADMERGE_KERNELS: expected one of {', '.join(_CHOICES)}, came {choice!r}."
        )
    if choice == "torch":
        return None
    try:
        library = _open()
        return Kernels(library, bool(library.gradmerge_has_float16()))
    except _NoCompilerError as error:
        reason = str(error)
        # nothing is wrong with such a machine: no warning
        _log.info("%s; merging with torch's operations", reason)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        reason = f"the C kernels could not be built or loaded: {error}"
        if choice == "auto":
            warnings.warn(
                f"{reason}. Merging goes on with torch's operations, at about half the speed; "
                "GRADMERGE_KERNELS=torch silences this.",
                stacklevel=2,
            )
    if choice == "native":
        raise ConfigError(
            f"GRADMERGE_KERNELS=native: {reason}. Install a C compiler (cc, gcc or clang, or name "
            "one in CC), or unset the variable."
        )
    return None


def _open() -> ctypes.CDLL:
    path = _build()
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # a damaged file (a full disk when it was written): once more
        path.unlink()
        return ctypes.CDLL(str(_build()))


class _NoCompilerError(Exception):
    pass


def _compiler() -> str:
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise _NoCompilerError("no C compiler was found")
    return found


def _processor() -> str:
    """What -march=native depends on: a home folder may serve unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kinds = ("model name", "flags", "features", "cpu part")
    return "\n".join(sorted({line for line in lines if line.lower().startswith(kinds)}))


def _cache_folder() -> Path:
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "gradmerge"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written to
        pass
    else:
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.mkdtemp(prefix="gradmerge-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _build() -> Path:
    """Path of the compiled library, built unless it stands there already."""
    compiler = _compiler()
    made_of = [_SOURCE.read_text(), compiler, repr(_OPTIONS), platform.platform(), _processor()]
    key = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    folder = _cache_folder()
    target = folder / f"kernels-{key}.so"
    if target.exists():
        return target
    # Several processes may build at once: each in its own file, renamed when whole.
    handle, name = tempfile.mkstemp(suffix=".so", prefix="building-", dir=folder)
    os.close(handle)
    try:
        for options in _OPTIONS:
            command = [compiler, *options, "-shared", "-fPIC", "-o", name, str(_SOURCE)]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if ran.returncode == 0:
                os.replace(name, target)
                return target
        raise OSError(f"{' '.join(command)}: {ran.stderr.strip()[-500:]}")
    finally:
        Path(name).unlink(missing_ok=True)
