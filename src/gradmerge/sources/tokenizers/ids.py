"""Fields of a config that hold the size of the vocabulary, or token ids."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

_IDS = re.compile(r"(_token_ids?|_token_index|(^|_)suppress_tokens|^bad_words_ids)$")


def with_size(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return a config with another size of the vocabulary, wherever it has the old one.

    A config that omits the size gets the field.
    """
    changed = copy.deepcopy(dict(config))
    sized = [fields for fields in _sections(changed) if fields.get("vocab_size") is not None]
    old = (sized or [changed])[0].get("vocab_size")
    for fields in sized or [changed]:
        if fields.get("vocab_size") == old:
            fields["vocab_size"] = size
    return changed


def _sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config and those nested in it."""
    yield config
    for key, value in config.items():
        if key.endswith("config") and isinstance(value, dict):
            yield from _sections(value)


def with_ids(
    config: Mapping[str, Any],
    owner: Mapping[str, Any],
    moved: Mapping[int, int],
    size: int,
) -> dict[str, Any]:
    """Return a config with the token ids of the merge's tokenizer.

    Args:
        config: the fields, with ids of its own tokenizer.
        owner: all fields of the config of the merge's tokenizer; ids that it sets are used.
        moved: own id -> id in the merge's tokenizer, for all other fields; missing ids become null.
        size: rows of the merged vocabulary; a larger padding id becomes null.
    """
    changed = dict(config)
    for key in {**owner, **config}:
        own, given = config.get(key), owner.get(key)
        if key.endswith("config") and isinstance(own, Mapping):
            inner = given if isinstance(given, Mapping) else {}
            changed[key] = with_ids(own, inner, moved, size)
        elif _IDS.search(key) and given is not None:
            changed[key] = copy.deepcopy(given)
        elif _IDS.search(key) and own is not None:
            changed[key] = _moved(own, moved)
    pad = changed.get("pad_token_id")
    if isinstance(pad, int) and pad >= size:  # networks reject it
        changed["pad_token_id"] = None
    return changed


def _moved(value: Any, moved: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        found = [_moved(item, moved) for item in value]
        return [item for item in found if item is not None] or None
    if isinstance(value, int) and not isinstance(value, bool):
        return moved.get(value)
    return value
