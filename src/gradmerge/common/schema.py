"""Shapes of gradmerge's own side files, checked when a file is opened.

A shape is a type (`float` takes whole numbers, too, and must be finite), a tuple of alternatives, a
predicate with a docstring, `[shape]` for a list, `{str: shape}` for a mapping with any keys, or a
mapping from fields to shapes, in which a field that ends in `?` may be missing. Fields beyond it
are left alone, as later versions may write more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from gradmerge.common.errors import GradmergeError, SourceError, shorten
from gradmerge.common.names import is_name

_LARGEST = 1 << 63


def a_name(value: Any) -> bool:
    """names without separators"""  # noqa: D403, D415
    return is_name(value)


def a_count(value: Any) -> bool:
    """a whole number from 0"""  # noqa: D403, D415
    return type(value) is int and 0 <= value < _LARGEST


def a_number(value: Any) -> bool:
    """a number"""  # noqa: D403, D415
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def an_amount(value: Any) -> bool:
    """a finite number from 0"""  # noqa: D403, D415
    return _is_number(value) and value >= 0


def require_shape(
    where: object,
    found: Any,
    shape: Any,
    remedy: str,
    kind: type[GradmergeError] = SourceError,
) -> None:
    """Reject plain data that do not have a shape; the message names every field that differs.

    Args:
        where: file, for the message.
        found: the data.
        shape: the shape (see the module).
        remedy: what to do, as a sentence.
        kind: class of the error.

    Raises:
        GradmergeError: some fields differ.
    """
    wrong = list(_differences(found, shape, ""))
    if wrong:
        raise kind(f"{where} is damaged: {shorten(wrong, 3)}. {remedy}")


def _differences(found: Any, shape: Any, at: str) -> Iterator[str]:
    if isinstance(shape, tuple):
        tried = [list(_differences(found, one, at)) for one in shape]
        if all(tried):
            # the alternative that has the right form, if there is one, says what is wrong in it
            inner = [t for t in tried if not t[0].startswith(f"{at or 'the file'}: ")]
            yield from inner[0] if inner else [_differs(found, shape, at)]
    elif isinstance(shape, list) and isinstance(found, (list, tuple)):
        for i, value in enumerate(found):
            yield from _differences(value, shape[0], f"{at}[{i}]")
    elif isinstance(shape, Mapping) and isinstance(found, Mapping):
        dot = f"{at}." if at else ""
        for key, inner in shape.items():
            if not isinstance(key, str):  # any keys of this shape
                for own, value in found.items():
                    if next(_differences(own, key, ""), None) is not None:
                        place = at or "the file"
                        yield f"{place}: expected keys that are {_words(key)}, got {own!r:.60}"
                    else:
                        yield from _differences(value, inner, f"{dot}{own}")
            elif key.removesuffix("?") in found:
                yield from _differences(found[key.removesuffix("?")], inner, dot + key.rstrip("?"))
            elif not key.endswith("?"):
                yield f"{dot}{key}: expected {_words(inner)}, got none"
    elif not _fits(found, shape):
        yield _differs(found, shape, at)


def _differs(found: Any, shape: Any, at: str) -> str:
    got = repr(found)
    return f"{at or 'the file'}: expected {_words(shape)}, got {got[:60]}{'...' * (len(got) > 60)}"


def _fits(found: Any, shape: Any) -> bool:
    if isinstance(shape, (list, Mapping)):
        return False
    if shape is None:
        return found is None
    if shape is float:
        return _is_number(found)
    if shape is int:
        return type(found) is int and abs(found) < _LARGEST
    if isinstance(shape, type):
        return isinstance(found, shape)
    return bool(shape(found))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < _LARGEST if isinstance(value, int) else math.isfinite(value)


def _words(shape: Any) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_words, shape))
    if isinstance(shape, list):
        return "a list"
    if isinstance(shape, Mapping):
        return "a mapping"
    words = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false"}
    if shape in words:
        return words[shape]
    if isinstance(shape, type):
        return "a mapping" if shape is dict else f"a {shape.__name__}"
    return "null" if shape is None else str(shape.__doc__)
