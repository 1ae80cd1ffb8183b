"""Building the C kernels that work on frozen tensors on a CPU (`merging.c`, `selection.c`).

They are compiled once, in about a second, with the system's C compiler, and kept in the user's
cache folder. Without a compiler, or with `GRADMERGE_KERNELS=torch`, torch's own operations do the
same work in about twice the time.
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
from pathlib import Path

from gradmerge.errors import ConfigError
from gradmerge.operators._native.kernels import Kernels

_log = logging.getLogger(__name__)

_FILES = [Path(__file__).with_name(name) for name in ("common.h", "merging.c", "selection.c")]
_CHOICES = ("auto", "native", "torch")
# The first set of options that the compiler takes; a plain -O3 is some 25 % slower.
_OPTIONS = (["-O3", "-march=native"], ["-O3", "-mcpu=native"], ["-O3"])


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
            f"GRADMERGE_KERNELS: expected one of {', '.join(_CHOICES)}, got {choice!r}."
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
    # Several processes may build at once: each in its own file, renamed when whole.
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
