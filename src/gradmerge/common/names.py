"""Names that become parts of paths: of sources, tasks, shards and side files.

They are in configurations, checkpoints, indexes and other files that strangers write. A valid name
is one folder or file on every system, in the folder that it is joined to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, Literal

from gradmerge.common.errors import ConfigError, GradmergeError, shorten

LONGEST = 120
"""Bytes of a name; files are written under it with a prefix and a suffix."""
FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
"""Endings of files of weights, which are no part of their names."""
Dtype = Literal["float64", "float32", "bfloat16", "float16"]
"""Names of dtypes of weights."""
_DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{d}{i}" for d in ("COM", "LPT") for i in range(1, 10))}
_RULE = (
    f'a name of at most {LONGEST} bytes for a file or folder: without / \\ : * ? " < > | and '
    "control characters, not starting with a dot, not ending in a dot or a space"
)


def is_name(name: object) -> bool:
    """Return whether a name may become one part of a path, on any system.

    Examples:
        >>> [is_name(name) for name in ("a", "v1.2 (new)", "../a", "a/b", "C:", ".a", "nul.txt")]
        [True, True, False, False, False, False, False]
    """
    return (
        isinstance(name, str)
        and name.isprintable()  # no control characters, no halves of surrogates
        and 0 < len(name.encode()) <= LONGEST
        and not name.startswith((".", " "))
        and not name.endswith((".", " "))
        and not set(name) & set('/\\:*?"<>|')
        and name.partition(".")[0].strip().upper() not in _DEVICES
    )


def require_names(
    option: str, names: Iterable[Any], kind: type[GradmergeError] = ConfigError
) -> None:
    """Reject names that are not one part of a path, all at once.

    Args:
        option: option or file that holds the names, for the message.
        names: the names.
        kind: class of the error.

    Raises:
        GradmergeError: some are not valid.
    """
    wrong = [ascii(name)[:LONGEST] for name in names if not is_name(name)]
    if wrong:
        raise kind(f"{option}: expected {_RULE}; got {shorten(wrong)}.")


def require_file(where: object, file: object, kind: type[GradmergeError]) -> str:
    """Return the place of a file below a folder, as another file gives it, or reject it.

    Args:
        where: file that holds the name, for the message.
        file: the name, or a path with `/` of several.
        kind: class of the error.

    Raises:
        GradmergeError: the place is absolute, leads out of the folder, or has an invalid name.
    """
    if not isinstance(file, str) or not all(map(is_name, file.split("/"))):
        raise kind(
            f"{where}: expected names of files in its own folder, got {ascii(file)[:200]}: nothing "
            "outside of the folder is read. Write or download the folder again."
        )
    return file


def named(sources: Any) -> dict[str, Any]:
    """Name sources given as a list by the last part of their path, or source0, source1...

    The first of several with the same name keeps it; the others get a free number appended.
    """
    sources = list(sources)
    whole = [_whole_name(source) or f"source{i}" for i, source in enumerate(sources)]
    named: dict[str, Any] = {}
    for i, (source, name) in enumerate(zip(sources, whole, strict=True)):
        if name in named or name == "base":
            dash = "-" if name[-1].isdigit() else ""  # llama-3.2-1, not llama-3.21
            free = (f"{name}{dash}{number}" for number in count(i))
            name = next(n for n in free if n not in named and n not in whole)
        named[name] = source
    return named


def _whole_name(source: Any) -> str | None:
    if isinstance(source, Mapping):  # a component in a configuration
        source = (source.get("init_args") or {}).get("path")
    path = source if isinstance(source, (str, Path)) else getattr(source, "path", None)
    if not path:
        return None
    path = Path(str(path))
    while "*" in path.name:  # of a run, whose folder has a name
        path = path.parent
    name = path.name
    if name in ("", ".."):
        name = Path(str(path)).resolve().name
    stem, dot, suffix = name.rpartition(".")
    name = stem if stem and f"{dot}{suffix}" in FILE_SUFFIXES else name
    return name if is_name(name) else None


def dtype_name(given: str) -> str:
    """Return the name of a dtype, of which fp32, fp16 and bf16 are short forms.

    Examples:
        >>> dtype_name("bf16")
        'bfloat16'
    """
    return _DTYPES.get(given, given)
