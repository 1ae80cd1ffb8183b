"""One clear line instead of a crash, where a mapped file is cut off while it is read."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from functools import cache

_reasons: list[Callable[[], str]] = []


def add_reason(reason: Callable[[], str]) -> None:
    """Add a function that names what went wrong, or returns an empty string."""
    _reasons.append(reason)


@cache
def explain_bus_errors() -> bool:
    """Make the process print a message and exit with status 2 at a bus error (SIGBUS).

    Reading a mapped page that a file no longer has cannot be undone, nor raise an exception: the
    handlers of Python run only after the instruction that failed, which would be repeated for ever.
    A handler of the C library is called at once, on the thread that reads.

    Returns:
        True if the system has this signal.
    """
    number = getattr(signal, "SIGBUS", None)
    if number is None:
        return False
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, _HANDLER]
    library.signal.restype = ctypes.c_void_p
    library.signal(number, _stop)
    return True


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _report(_: int) -> None:
    reasons = [text for reason in _reasons if (text := reason())]
    text = reasons[0] if reasons else "a mapped file was cut off, or its disk is full"
    os.write(2, f"gradmerge: stopped while it read: {text}.\n".encode())
    os._exit(2)


_stop = _HANDLER(_report)  # kept as long as the process, which may call it at any time
