"""Compilation of the C kernels for frozen tensors on a CPU (`merging.c`, `selection.c`).

They are compiled once, in about a second, with the system's C compiler, and cached in the user's
cache folder. Without a compiler, or with `GRADMERGE_KERNELS=torch`, torch operations do the same
work in about twice the time.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from gradmerge.common.errors import ConfigError
from gradmerge.operators._native.kernels import Kernels

_log = logging.getLogger(__name__)

_FILES = [Path(__file__).with_name(name) for name in ("common.h", "merging.c", "selection.c")]
_CHOICES = ("auto", "native", "torch")
# Options in order of preference; plain -O3 is about 25% slower.
_OPTIONS = (["-O3", "-march=native"], ["-O3", "-mcpu=native"], ["-O3"])


def native_kernels() -> Kernels | None:
    """Return the kernels, compiled at first use, or None if torch operations are to be used.

    Raises:
        ConfigError: `GRADMERGE_KERNELS` is not one of auto, native and torch, or is native and the
            kernels cannot be built.
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
        return Kernels(library, bool(library.gradmerge_has_float16()))
    except _NoCompilerError as error:
        reason = str(error)
        # a machine without a compiler is fine: no warning
        _log.info("%s; merging with torch operations", reason)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        reason = f"the C kernels could not be built or loaded: {error}"
        if choice == "auto":
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
    path = _build()
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # a damaged file (perhaps the disk was full): build it again
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
    """Describe the processor (for -march=native): machines may share a home folder."""
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
    except (OSError, RuntimeError):  # no home folder, or not writable
        pass
    else:
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.mkdtemp(prefix="gradmerge-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _build() -> Path:
    """Return the path of the compiled library, building it if necessary."""
    compiler = _compiler()
    made_of = [
        *(file.read_text() for file in _FILES),
        compiler,
        repr(_OPTIONS),
        platform.platform(),
        _processor(),
    ]
    key = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    folder = _cache_folder()
    target = folder / f"kernels-{key}.so"
    if target.exists():
        return target
    # several processes may build at once, each in its own file, which is renamed when complete
    handle, name = tempfile.mkstemp(suffix=".so", prefix="building-", dir=folder)
    os.close(handle)
    try:
        sources = [str(file) for file in _FILES if file.suffix == ".c"]
        for options in _OPTIONS:
            command = [compiler, *options, "-shared", "-fPIC", "-o", name, *sources]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if ran.returncode == 0:
                os.replace(name, target)
                return target
        raise OSError(f"{' '.join(command)}: {ran.stderr.strip()[-500:]}")
    finally:
        Path(name).unlink(missing_ok=True)
