"""Errors and problem reports.

An error says what was expected, what got (file, tensor, shape, value), why it matters and what to
do. Checks that can find several faults collect `Problem`s and raise them together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class GradmergeError(ValueError):
    """Base of every error that gradmerge raises on purpose."""


class SourceError(GradmergeError):
    """A source cannot be opened or read."""


class CompatibilityError(GradmergeError):
    """Sources do not fit together; the message lists every problem."""


class ConfigError(GradmergeError):
    """An option has a value that cannot work."""


class FingerprintError(GradmergeError):
    """A checkpoint of coefficients was made from other source weights."""


@dataclass(frozen=True)
class Problem:
    """One finding of a check."""

    kind: str
    """Short name that `allow` accepts, e.g. ``shape`` or ``config.rope_theta``."""
    where: str
    """The file, folder or source concerned."""
    what: str
    """The tensor, field or token concerned."""
    expected: str
    got: str
    todo: str
    fatal: bool = True

    def __str__(self) -> str:
        return (
            f"[{self.kind}] {self.where}: {self.what}: expected {self.expected}, "
            f"got {self.got}. {self.todo}"
        )


def report(problems: Sequence[Problem], limit: int = 30) -> str:
    """All problems as one text, a line each, the fatal ones first."""
    ordered = sorted(problems, key=lambda problem: not problem.fatal)
    lines = [
        f"  {'error' if problem.fatal else 'warning'} {problem}" for problem in ordered[:limit]
    ]
    if len(ordered) > limit:
        lines.append(f"  ... and {len(ordered) - limit} more of the same kinds")
    return "\n".join(lines)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with a leading blank, or nothing when no known name is near."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def shorten(names: Sequence[str], limit: int = 5) -> str:
    """The first few names and a count of the rest."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
