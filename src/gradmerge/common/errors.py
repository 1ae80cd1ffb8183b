"""Errors and problem reports.

An error states what was expected, what was found (file, tensor, shape, value), why it matters and
what to do. Checks that can find several faults collect `Problem`s and raise them together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradmerge.common.secrets import mask


class GradmergeError(ValueError):
    """Base class of all errors that gradmerge raises deliberately; they show no secrets."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(mask(arg) if isinstance(arg, str) else arg for arg in args))


class SourceError(GradmergeError):
    """A source cannot be opened or read."""


class CompatibilityError(GradmergeError):
    """The sources are incompatible; the message lists every problem."""


class ConfigError(GradmergeError):
    """An option has an invalid value."""


class NonFiniteError(GradmergeError):
    """A weight, loss, coefficient or option is NaN or infinite."""


class OutputError(GradmergeError):
    """Something cannot be written: the disk is full, or the place is read-only or taken."""


class ProcessError(GradmergeError):
    """Another process of a fit on several devices has ended."""


class FingerprintError(GradmergeError):
    """A coefficient checkpoint was trained on different source weights."""


def require(holds: bool, option: str, expected: str, got: object) -> None:
    """Reject the value of an option.

    Args:
        holds: condition that the value must meet.
        option: name of the option, e.g. ``Trim.density``.
        expected: condition in words.
        got: value.

    Raises:
        ConfigError: the condition does not hold.
    """
    if not holds:
        raise ConfigError(f"{option}: expected {expected}, got {got}.")


@dataclass(frozen=True)
class Problem:
    """One finding of a check, reported on three lines."""

    kind: str
    """Short name, as accepted by `allow`, e.g. ``shape`` or ``config.rope_theta``."""
    where: str
    """File, folder or source concerned."""
    what: str
    """Tensor, field or token concerned."""
    expected: str
    got: str
    todo: str
    fatal: bool = True

    def __str__(self) -> str:
        return (
            f"[{self.kind}] {self.where}: {self.what}\n"
            f"    expected {self.expected}, got {self.got}\n"
            f"    {self.todo}"
        )


def report(problems: Sequence[Problem], limit: int = 30) -> str:
    """Return all problems as one text, fatal ones first."""
    ordered = sorted(problems, key=lambda problem: not problem.fatal)
    lines = [
        f"  {'error' if problem.fatal else 'warning'} {problem}" for problem in ordered[:limit]
    ]
    if len(ordered) > limit:
        lines.append(f"  ... and {len(ordered) - limit} more of the same kinds")
    return "\n".join(lines)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` (leading space included), or "" if no known name is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """Return the first few names and the number of the others."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
