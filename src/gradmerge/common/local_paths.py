"""Places on the user's machine, which nothing that is passed on names.

Exported folders are published: their records name sources and data by the last part of a path, and
models on the hub by their id.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# `/a/b`, `~/a`, `C:\a`, `\\host\a`; not `https://a/b`, fractions and expressions such as `a/b`.
_ABSOLUTE = re.compile(r"(?:~[\w.-]*)?/[^/\s]+/|~[\w.-]*/|[A-Za-z]:[\\/]\w[^\\/\s]*[\\/]|\\\\\w")
_TOKEN = re.compile(r"[^\s'\"`,;()\[\]{}<>=|]+")


def without_places(value: Any, within: bool = True) -> Any:
    """Return nested plain data with names in place of local paths.

    A path is what is absolute, or names a file or folder below another from here; a name alone
    stays as it is.

    Args:
        value: mappings, lists and scalars.
        within: also within texts. Settings of models hold templates, which must not change.

    Examples:
        >>> without_places({"base": "/home/me/models/base", "at": ["https://a.org/b", "x/y@main"]})
        {'base': 'base', 'at': ['https://a.org/b', 'x/y@main']}
    """
    if isinstance(value, str):
        if not within:
            return _last(value) if is_place(value) else value
        return value if "://" in value and " " not in value else _named(value)
    if isinstance(value, Mapping):
        return {
            without_places(key, within): without_places(item, within) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [without_places(item, within) for item in value]
    return value


def _named(text: str) -> str:
    if is_place(text):
        return _last(text)
    lines = text.split("\n")
    if len(lines) > 1:
        return "\n".join(_named(line) for line in lines)
    return _TOKEN.sub(lambda found: _of_token(found[0]), text)


def _of_token(text: str) -> str:
    end = text.rstrip(".:")  # of a sentence
    if "://" in end or not is_place(end):
        return text
    return _last(end) + text[len(end) :]


def absolute_places(text: str) -> list[str]:
    """Return the absolute paths within a text, without repetition."""
    tokens = (token.rstrip(".:") for token in _TOKEN.findall(text))
    return list(dict.fromkeys(token for token in tokens if _ABSOLUTE.match(token)))


def is_place(text: str) -> bool:
    """Return whether a text is a path on this machine that says more than a name."""
    if "\n" in text or len(text) > 4096 or not ("/" in text or "\\" in text):
        return False
    if _ABSOLUTE.match(text) or text.startswith(("./", "../")):
        return " " not in text or _exists(text)
    return _exists(text)


def _exists(text: str) -> bool:
    with suppress(OSError, ValueError, RuntimeError):
        path = Path(text).expanduser()
        return path.exists() or ("*" in text and bool(glob.glob(str(path))))
    return False


def _last(text: str) -> str:
    parts = [part for part in re.split(r"[\\/]", text) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else os.curdir


def yaml_without_places(text: str) -> str:
    """Return a YAML document with names in place of local paths."""
    import yaml

    try:
        found = without_places(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError):
        return str(without_places(text))
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
