"""Damage to plain data, field by field, for tests of the files that gradmerge reads back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

_DEEP: Any = []
for _ in range(60):
    _DEEP = [_DEEP]

WRONG: dict[str, Any] = {
    "null": None,
    "text": "x",
    "empty text": "",
    "a path": "../../x",
    "true": True,
    "nan": float("nan"),
    "inf": float("-inf"),
    "negative": -1,
    "huge": 10**90,
    "1e308": 1e308,
    "half": 0.5,
    "list": [],
    "list of null": [None],
    "mapping": {},
    "other mapping": {"x": {"y": 1}},
    "deep": _DEEP,
}


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested data; of long collections the first and the last entry."""
    if isinstance(data, dict):
        keys = list(data)
    elif isinstance(data, list):
        keys = list(range(len(data)))
    else:
        return
    for key in dict.fromkeys(keys if len(keys) < 20 else [keys[0], keys[-1]]):
        yield (*at, key)
        yield from places(data[key], (*at, key))


def mutations(data: Any) -> Iterator[tuple[str, Any]]:
    """Copies of nested data with one place missing, of another type or with another value."""
    for at in places(data):
        for what, value in {"missing": None, **WRONG}.items():
            changed = copy.deepcopy(data)
            holder = changed
            for key in at[:-1]:
                holder = holder[key]
            if what == "missing":
                del holder[at[-1]]
            else:
                holder[at[-1]] = value
            yield f"{'.'.join(map(str, at))}: {what}", changed
