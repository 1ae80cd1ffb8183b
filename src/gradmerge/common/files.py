"""Readers of JSON and YAML with bounds.

JSON and YAML are written by strangers: their size, depth, numbers and references are limited, and
a key that says two things is an error. All that is read goes through `parse_json` and
`require_bounded`.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradmerge.common.errors import ConfigError, GradmergeError, SourceError

LARGEST = 1 << 28
"""Bytes of a JSON or YAML file."""
DEEPEST = 64
"""Levels of nested lists and mappings."""
MOST_NODES = 1_000_000
"""Nodes of a YAML document with all aliases expanded."""
MOST_DIGITS = 100
"""Digits of a whole number."""


def read_bytes(path: Path, kind: type[GradmergeError] = SourceError) -> bytes:
    """Return the content of a small file.

    Raises:
        GradmergeError: it cannot be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise kind(f"{path}: cannot be read: {error.strerror or error}.") from error
    if len(content) > LARGEST:
        raise kind(f"{path}: expected at most {LARGEST >> 20} MiB, got a larger file.")
    return content


def near(missing: str | Path) -> str:
    """Return a hint at an existing path that is close to one that does not exist."""
    path = Path(missing).expanduser()
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f" Its parent {path.parent} does not exist, either."
    match = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f" Did you mean {path.parent / match[0]}?" if match else ""


# ---- JSON ----------------------------------------------------------------------------------------


def read_json(
    path: Path, kind: type[GradmergeError] = SourceError, plain: bool = False
) -> dict[str, Any] | None:
    """Return a JSON file as a dict, or None if it does not exist.

    Args:
        path: the file.
        kind: class of the error.
        plain: take the last of several values of a key, as most readers do, and any depth: for
            vocabularies, which are large, and of which one level is read.

    Raises:
        GradmergeError: the file cannot be read, or holds something else.
    """
    if not path.is_file():
        if os.path.lexists(path):
            raise kind(f"{path}: expected a file, got a folder, a pipe or a link to nothing.")
        return None
    found = parse_json(read_bytes(path, kind), path, kind, plain)
    if not isinstance(found, dict):
        raise kind(f"{path}: expected a JSON object, got {type(found).__name__}.")
    return found


def parse_json(
    content: bytes | str,
    where: object,
    kind: type[GradmergeError] = SourceError,
    plain: bool = False,
) -> Any:
    """Return JSON as plain data.

    Args:
        content: the text, as UTF-8 if it is bytes.
        where: file, for error messages.
        kind: class of the error.
        plain: see `read_json`.

    Raises:
        GradmergeError: it is not JSON, exceeds a limit, or has a key with two values.
    """
    try:
        text = content if isinstance(content, str) else content.decode()
        if plain:
            found = json.loads(text)
        else:
            found = json.loads(text, parse_int=_whole, object_pairs_hook=_unambiguous)
            _require_depth(found)
        if "\\ud" in text or "\\uD" in text:  # halves of surrogate pairs cannot be written again
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        why = _TOO_DEEP if isinstance(error, RecursionError) else str(error)
        why = "half of a surrogate pair in a text" if isinstance(error, UnicodeEncodeError) else why
        raise kind(f"{where}: expected JSON, got: {why}") from error
    return found


_TOO_DEEP = f"more than {DEEPEST} levels of nested lists and objects"


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _unambiguous(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"the key {key!r} twice, with different values")
    return found


def _require_depth(found: Any) -> None:
    level = [found]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


# ---- YAML ----------------------------------------------------------------------------------------


def read_yaml(path: Path, kind: type[GradmergeError] = ConfigError) -> Any:
    """Return a YAML file as plain data.

    Raises:
        GradmergeError: the file cannot be read, is not YAML, exceeds a limit, or has a key twice.
    """
    import yaml

    try:
        text = read_bytes(path, kind).decode()
        require_bounded(text)
        return yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise kind(
            f"{path}: expected YAML in UTF-8, got byte {error.object[error.start]:#04x} at "
            f"position {error.start}. Save the file as UTF-8."
        ) from error
    # ValueError: dates such as 2020-13-45, and numbers
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, kind):
            raise
        raise kind(f"{path}: expected YAML, got: {error}") from error


def require_bounded(text: str) -> None:
    """Reject a YAML document that exceeds a limit or has a key twice, before it is built.

    Raises:
        yaml.YAMLError: it does, or is not YAML.
    """
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    # open collections: whether a key comes next (None in a list), keys so far, nodes, anchor
    stack: list[_Level] = [_Level(None)]
    sizes: dict[str | None, int | None] = {}  # nodes of each anchor; None while it is open
    for event in yaml.parse(text, Loader=loader):
        level, size, anchor = stack[-1], 1, getattr(event, "anchor", None)
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            stack.append(_Level(anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(stack) > DEEPEST + 1:
                raise _marked(event, f"more than {DEEPEST} levels of nested lists and mappings")
            if anchor is not None:
                sizes[anchor] = None
            continue
        if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            closed, level = stack.pop(), stack[-1]
            size, anchor = closed.size, closed.anchor
        elif isinstance(event, yaml.AliasEvent):
            known = sizes.get(anchor, 1)
            if known is None:
                raise _marked(event, f"the alias *{anchor} within what it stands for")
            size, anchor = known, None
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > MOST_DIGITS and event.value.lstrip("+-").isdecimal():
                raise _marked(event, f"a number of {len(event.value)} digits")
            if level.at_key and event.value in level.keys and event.value != "<<":
                raise _marked(event, f"the key {event.value!r} twice in one mapping")
            if level.at_key:
                level.keys.add(event.value)
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        level.add(size)
        if level.size > MOST_NODES:
            raise _marked(event, f"more than {MOST_NODES} values once all aliases are expanded")


class _Level:
    """An open list or mapping of a YAML document."""

    def __init__(self, anchor: str | None, is_mapping: bool = False) -> None:
        self.anchor, self.is_mapping, self.at_key = anchor, is_mapping, is_mapping
        self.keys: set[str] = set()
        self.size = 1

    def add(self, size: int) -> None:
        """Count a finished value."""
        self.size += size
        self.at_key = self.is_mapping and not self.at_key


def _marked(event: Any, problem: str) -> Exception:
    import yaml

    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
