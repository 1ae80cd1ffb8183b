"""What the parser of configurations does too often."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

# Of the options that jsonargparse copies for each entry of a list: those that are the whole value.
_WHOLE = ("orig_val", "prev_val")


def copy_values_once() -> None:
    """Keep the parser from copying a whole mapping of lists for every number in it.

    A table with a coefficient for each of 291 tensors and 3 sources took it seven seconds.
    """
    try:
        from jsonargparse import _typehints
    except ImportError:  # another version of the parser: slower, nothing else
        return
    typehints: Any = _typehints
    if getattr(typehints, "deepcopy", None) is deepcopy:
        typehints.deepcopy = _copy


def _copy(value: Any) -> Any:
    if isinstance(value, dict) and "sub_add_kwargs" in value:
        return {key: part if key in _WHOLE else deepcopy(part) for key, part in value.items()}
    return deepcopy(value)
