"""Regular expressions of users and of files, matched by one engine with a bound on its time.

Expressions mean what they mean in `re`. An expression such as `([a-z]+)+X` divides a name in
exponentially many ways before it fails, and adapters, checkpoints and configurations of others
hold expressions; so the time that each expression may take is limited.
"""

from __future__ import annotations

import difflib
import functools
import re
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from gradmerge.common.errors import ConfigError, nearest

SECONDS = 2.0
"""Time that one expression may take, over all names that it is matched with."""
LONGEST = 10_000
"""Characters of an expression."""


class _Expression:
    """A compiled expression, and the time that is left to it."""

    def __init__(self, pattern: str) -> None:
        import regex  # it has a time limit, which `re` has not

        self._compiled: Any = regex.compile(pattern)
        self._pattern, self._left = pattern, SECONDS

    def find(self, text: str, whole: bool) -> tuple[int, int] | None:
        start = time.thread_time()
        match = self._compiled.fullmatch if whole else self._compiled.search
        found = None
        try:
            found = match(text, timeout=max(self._left, 1e-3))
        except TimeoutError:
            self._left = 0.0
        self._left -= time.thread_time() - start
        if self._left <= 0:  # the engine itself does not notice what many short matches take
            raise ConfigError(
                f"the regular expression {self._pattern!r} takes more than {SECONDS:g} s to match "
                f"{text!r}.\nA repetition within a repetition, such as (a+)+, tries every way to "
                "divide a name; write it with one of the two."
            )
        return None if found is None else found.span()


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> _Expression:
    if len(pattern) > LONGEST:
        raise ConfigError(
            f"a regular expression of {len(pattern)} characters: expected at most {LONGEST}."
        )
    try:
        re.compile(pattern)  # its syntax is the one that counts
        return _Expression(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"invalid regular expression {pattern[:200]!r}: {why}.") from error


@functools.lru_cache(maxsize=1 << 17)
def search(pattern: str, text: str, whole: bool = False) -> tuple[int, int] | None:
    """Return the start and the end of the first match of an expression, or None.

    Args:
        pattern: regular expression.
        text: text, such as the name of a tensor.
        whole: match the whole text.

    Raises:
        ConfigError: the expression is invalid, or takes too long.
    """
    return _compiled(pattern).find(text, whole)


def matches(patterns: Iterable[str], text: str) -> bool:
    """Return whether an expression matches a part of a text."""
    return any(search(pattern, text) is not None for pattern in patterns)


def require_pattern(who: str, pattern: object) -> None:
    """Reject an invalid regular expression.

    Args:
        who: name of the option, for error messages.
        pattern: the expression.

    Raises:
        ConfigError: it is not text, does not compile, or is too long.
    """
    if not isinstance(pattern, str):
        raise ConfigError(f"{who}: expected a regular expression, got {pattern!r}.")
    try:
        _compiled(pattern)
    except ConfigError as error:
        raise ConfigError(f"{who}: {error}") from error


def require_matches(given: Mapping[str, Iterable[str]], names: Collection[str], of: str) -> None:
    """Reject expressions that match nothing, which are misspelled most often.

    Args:
        given: expressions, or exact names, by option.
        names: names of which each expression must match one.
        of: what the names are of, e.g. "tensor of the sources".

    Raises:
        ConfigError: some match nothing, or take too long; the message lists all of them.
    """
    known, lost = dict.fromkeys(names), []
    for who, patterns in given.items():
        for pattern in patterns:
            try:
                if pattern in known or any(search(pattern, name) is not None for name in known):
                    continue
                problem = f"{pattern!r} matches no {of}.{nearest_part(pattern, known)}"
            except ConfigError as error:
                problem = str(error)
            lost.append(f"{who}: {problem}")
    if len(lost) == 1:
        raise ConfigError(f"{lost[0]} Correct it or remove it: it has no effect.")
    if lost:
        head = f"{len(lost)} patterns have no effect; correct them or remove them:"
        raise ConfigError("\n  ".join([head, *lost]))


def nearest_part(pattern: str, names: Iterable[str]) -> str:
    """Return a hint at the name that an expression may mean, by the parts of names, or ""."""
    parts = {part: name for name in reversed(list(names)) for part in name.split(".")}
    words = re.findall(r"[^\W_]\w*", re.sub(r"\\[a-zA-Z]", " ", pattern))
    for word in sorted(set(words) - parts.keys(), key=len, reverse=True):
        match = difflib.get_close_matches(word, list(parts), n=1, cutoff=0.6)
        if match:
            return f" Did you mean {match[0]!r}, as in {parts[match[0]]}?"
    return nearest(pattern, parts.values())
