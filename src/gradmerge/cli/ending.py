"""The end of a command by SIGTERM: what is half done is removed, and the exit status says it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

TERMINATED = 128 + 15
"""Exit status of a command that SIGTERM has ended."""


@contextmanager
def ended_by_signal(command: str) -> Iterator[None]:
    """Make SIGTERM leave the context as an exception, so that temporary files are removed."""
    owner = os.getpid()
    # a fit takes over the signal while it learns, to save its state first
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        if os.getpid() != owner:  # a worker: its parent tidies up
            os._exit(TERMINATED)
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit as stopped:
        if stopped.code == TERMINATED:
            print(f"gradmerge {command}: ended by SIGTERM", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def watch_parent(patience: float = 20) -> None:
    """End this process soon after the one that started it, if it is one of a fit on many devices.

    It could otherwise wait for a killed process for half an hour. If the two were communicating, an
    error of that comes first.

    Args:
        patience: seconds for that error to come.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(patience)
        with suppress(OSError):
            print("gradmerge: the process that started this one has died", file=sys.stderr)
        os._exit(1)

    if os.environ.get("LOCAL_RANK", "0") not in ("", "0"):
        threading.Thread(target=watch, daemon=True, name="gradmerge-parent").start()
