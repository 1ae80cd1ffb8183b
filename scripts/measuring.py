"""Time and memory of a block, for the benchmarks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


def anonymous() -> int:
    """Anonymous resident memory of this process, in bytes; mapped files do not count."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@contextmanager
def measured(result: dict[str, float]) -> Iterator[None]:
    """Wall and CPU time of the block in seconds, and how far anonymous memory rose, in bytes."""
    before = peak = anonymous()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.004):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        result["wall"], result["cpu"] = time.perf_counter() - wall, time.process_time() - cpu
        stop.set()
        watcher.join()
        result["memory"] = float(max(peak, anonymous()) - before)
