"""Progress of long work: a line that updates on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

_shown = False


def show_progress(shown: bool) -> None:
    """Show progress from now on, or be silent, as at the start: a library prints nothing."""
    global _shown
    _shown = shown


@contextmanager
def progress_shown(shown: bool) -> Iterator[None]:
    """Show progress, or be silent, within the context."""
    before = _shown
    show_progress(shown)
    try:
        yield
    finally:
        show_progress(before)


class Progress:
    """Progress of one piece of work on standard error; what is done within two seconds is silent.

    Args:
        what: the work, as `hashing the sources`.
        total: amount of work; 0 if that is not known.
        unit: what is counted.
        scale: how many units are one of the amounts.
    """

    def __init__(self, what: str, total: float, unit: str = "", scale: float = 1.0) -> None:
        self._what, self._total, self._unit, self._scale = what, total, unit, scale
        self._done, self._note, self._printed = 0.0, "", False
        self._lock = threading.Lock()
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._began = time.monotonic()
        # a log gets few lines, the first of them late
        self._next = self._began + (2.0 if self._terminal else 10.0)

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count work that is done; may be called from several threads.

        Args:
            amount: how much.
            note: what to show at the end of the line from now on.
        """
        with self._lock:
            self._done += amount
            self._note = note or self._note
            now = time.monotonic()
            if not _shown or now < self._next or sys.stderr is None:
                return
            self._next = now + (0.2 if self._terminal else 10.0)
            self._print(now)

    def _print(self, now: float) -> None:
        done, total = self._done / self._scale, self._total / self._scale
        parts = [f"{_number(done)}{f' of {_number(total)}' if total else ''} {self._unit}".rstrip()]
        if 0 < self._done < self._total:
            left = (now - self._began) * (self._total - self._done) / self._done
            parts.append(f"{duration(left)} left")
        line = f"{self._what}: {', '.join([*parts, self._note]).removesuffix(', ')}"
        # the rest of an earlier line is erased
        print(f"\r{line}\x1b[K" if self._terminal else line, end="", file=sys.stderr)
        print(end="" if self._terminal else "\n", file=sys.stderr, flush=True)
        self._printed = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._printed and self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _number(value: float) -> str:
    return f"{value:.1f}" if value != int(value) else f"{value:.0f}"


def duration(seconds: float) -> str:
    """Return a time in words.

    Examples:
        >>> duration(8.24), duration(95), duration(4000)
        ('8.2 s', '1 min 35 s', '1 h 6 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
