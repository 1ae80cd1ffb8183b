"""Compilation of the C kernels for frozen tensors on a CPU (`*.c` in this folder).

They are compiled once, in about a second, with the system's C compiler, and cached in the user's
cache folder, with a hash of the library in its name. A library that does not match its hash (the
disk was full), or that another user could have written, is not loaded but built again. Without a
compiler, or with `GRADMERGE_KERNELS=torch`, torch operations do the same work in about twice the
time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from gradmerge.common import finite
from gradmerge.common.atomic import Scratch
from gradmerge.common.cache import cache_folder, is_ours
from gradmerge.common.errors import ConfigError, OutputError
from gradmerge.operators._native.kernels import Kernels

_log = logging.getLogger(__name__)

_NAMES = ("common.h", "finite.c", "merging.c", "selection.c")
_FILES = [Path(__file__).with_name(name) for name in _NAMES]
# `triton` is about kernels on a GPU (`backends`); on a CPU it is `auto`.
_CHOICES = ("auto", "native", "torch", "triton")
# Options in order of preference; plain -O3 is about 25% slower.
_OPTIONS = (["-O3", "-march=native"], ["-O3", "-mcpu=native"], ["-O3"])


def native_kernels() -> Kernels | None:
    """Return the kernels, compiled at first use, or None if torch operations are to be used.

    Raises:
        ConfigError: `GRADMERGE_KERNELS` is not one of auto, native, torch and triton, or is native
            and the kernels cannot be built.
    """
    return _load(os.environ.get("GRADMERGE_KERNELS", "auto"))


def kernels_for(tensors: Sequence[Tensor]) -> Kernels | None:
    """Return the kernels if they support all these tensors, else None."""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    kernels = native_kernels()
    return kernels if kernels is not None and kernels.take(tensors) else None


@functools.cache
def _load(choice: str) -> Kernels | None:
    if choice not in _CHOICES:
        raise ConfigError(
            f"GRADMERGE_KERNELS: expected one of {', '.join(_CHOICES)}, got {choice!r}."
        )
    if choice == "torch":
        return None
    try:
        library = _open()
        kernels = Kernels(library, bool(library.gradmerge_has_float16()))
        finite.use(kernels.finite_test)
        return kernels
    except _NoCompilerError as error:
        reason = str(error)
        # a machine without a compiler is fine: no warning
        _log.info("%s; merging with torch operations", reason)
    except (OSError, OutputError, subprocess.SubprocessError, AttributeError) as error:
        reason = f"the C kernels could not be built or loaded: {error}"
        if choice != "native":
            warnings.warn(
                f"{reason}. Merging continues with torch operations, at about half the speed; set "
                "GRADMERGE_KERNELS=torch to silence this warning.",
                stacklevel=2,
            )
    if choice == "native":
        raise ConfigError(
            f"GRADMERGE_KERNELS=native: {reason}. Install a C compiler (cc, gcc or clang, or set "
            "CC), or unset the variable."
        )
    return None


def _open() -> ctypes.CDLL:
    compiler = _compiler()
    key = _key(compiler)
    folder = cache_folder()
    for path in folder.glob(f"kernels-{key}-*.so") if folder else ():
        if _is_intact(path):
            with suppress(OSError):  # a machine where it does not load
                return ctypes.CDLL(str(path))
    with Scratch("kernels", folder) as work:
        path = _compile(compiler, work)
        if folder:
            hashed = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
            path = path.replace(folder / f"kernels-{key}-{hashed}.so")
        return ctypes.CDLL(str(path))  # stays loaded without its file


def _is_intact(path: Path) -> bool:
    """Return whether a library is what we built, and remove it if it is ours but damaged."""
    try:
        found, content = path.lstat(), path.read_bytes()
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode) or not is_ours(found):
        return False
    if path.stem.rpartition("-")[2] == hashlib.sha256(content).hexdigest()[:32]:
        return True
    path.unlink(missing_ok=True)
    return False


class _NoCompilerError(Exception):
    pass


def _compiler() -> str:
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise _NoCompilerError("no C compiler was found")
    return found


def _processor() -> str:
    """Describe the processor (for -march=native): machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kinds = ("model name", "flags", "features", "cpu part")
    return "\n".join(sorted({line for line in lines if line.lower().startswith(kinds)}))


def _key(compiler: str) -> str:
    """Return a hash of all that determines the library."""
    made_of = [
        *(file.read_text() for file in _FILES),
        compiler,
        repr(_OPTIONS),
        platform.platform(),
        _processor(),
    ]
    return hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]


def _compile(compiler: str, work: Path) -> Path:
    """Compile the library in a folder, which also takes the compiler's temporary files."""
    path = work / "kernels.so"
    sources = [str(file) for file in _FILES if file.suffix == ".c"]
    environment = {**os.environ, "TMPDIR": str(work)}
    for options in _OPTIONS:
        command = [compiler, *options, "-shared", "-fPIC", "-o", str(path), *sources]
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env=environment
        )
        if ran.returncode == 0:
            path.chmod(0o700)  # whatever the user's mask is
            return path
    raise OSError(f"{' '.join(command)}: {ran.stderr.strip()[-500:]}")
