"""The end of a command by SIGTERM: what is half done is removed, and the exit status says it."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from gradmerge.common.errors import ProcessError

_LOST = re.compile(r"gloo|NCCL|Dist\w*Error|Connection (closed|reset|refused)|Broken pipe")
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


@contextmanager
def named_loss() -> Iterator[None]:
    """Name the error of a process that communicated with one which has ended.

    Raises:
        ProcessError: it has.
    """
    try:
        yield
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        if "LOCAL_RANK" not in os.environ or not _LOST.search(f"{type(error).__name__} {first}"):
            raise
        raise ProcessError(
            "another process of this fit has ended, and this one was waiting for it; its own "
            f"message, if it had time for one, is above ({first[-160:]}).\nIf it was killed, free "
            "memory or use fewer devices. Resume with --ckpt_path last."
        ) from error


def watch_children(processes: Sequence[Any], patience: float = 20) -> None:
    """End this process and those that it started soon after one of them has failed.

    If they were communicating, an error of that comes first.

    Args:
        processes: the started processes.
        patience: seconds for that error to come.
    """

    def watch() -> None:
        while not any(process.poll() for process in processes):
            if all(process.poll() == 0 for process in processes):
                return
            time.sleep(1)
        time.sleep(patience)
        with suppress(OSError):
            failed = next(process for process in processes if process.poll())
            print(
                f"gradmerge: process {failed.pid} of this fit has ended with status "
                f"{failed.returncode}",
                file=sys.stderr,
                flush=True,
            )
        for process in processes:
            process.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="gradmerge-children").start()


def watch_processes() -> None:
    """Make the processes of a fit on several devices end together, each with a named error."""
    from lightning.pytorch.strategies.launchers import subprocess_script

    # Lightning's own would kill this process before it can say why
    subprocess_script._launch_process_observer = watch_children  # type: ignore[assignment, attr-defined]
    watch_parent()


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
