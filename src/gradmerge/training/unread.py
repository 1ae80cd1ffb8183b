"""Reasons why the files of a dataset cannot be read: which file, and where in it."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradmerge.common.failures import cause


def explain_unread(data: Any, error: BaseException) -> str:
    """Return why the data of a task cannot be read.

    Args:
        data: description of the task (`TaskData`).
        error: what `datasets` raised; the reason behind it is told.
    """
    import datasets

    generic = datasets.exceptions.DatasetGenerationError
    while type(error) is generic and error.__cause__ is not None:
        error = error.__cause__
    cache, place = str(datasets.config.HF_DATASETS_CACHE), str(getattr(error, "filename", None))
    if place.startswith("/") and (cache.startswith(place) or place.startswith(cache)):
        return (
            f"the cache of datasets, {cache}, cannot be written: {cause(error)}. Set HF_HOME or "
            "HF_DATASETS_CACHE to a folder that can."
        )
    kinds: dict[str, Any] = {}
    for split, path in _files(data):
        found = _fault_of(str(data.path), path)
        if isinstance(found, dict):  # readable on its own: its columns
            kinds = kinds or found
            found = "" if found == kinds else f"its columns {found} differ in type from {kinds}"
        if found:
            of_split = f" (split {split})" if split else ""
            return f"cannot read {path}{of_split}: {found}. Repair or remove it."
    return (
        f"cannot read {data.path} (files {data.data_files}, splits {data.splits}): {cause(error)}."
    )


def _files(data: Any) -> Iterator[tuple[str, str]]:
    """Yield the split and path of each local data file."""
    given = data.data_files or {}
    splits = given if isinstance(given, dict) else {"": given}
    for split, patterns in splits.items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            for path in sorted(glob.glob(str(pattern), recursive=True)):
                if Path(path).is_file():
                    yield split, path


def _fault_of(builder: str, path: str) -> str | dict[str, str]:
    """Return why one file cannot be read on its own, or the types of its columns if it can."""
    import datasets

    try:
        rows = datasets.load_dataset(builder, data_files=[path], split="train", streaming=True)
        kinds: dict[str, str] = {}
        for row in rows:
            kinds |= {
                name: type(value).__name__ for name, value in row.items() if value is not None
            }
    except Exception as error:  # every format raises its own
        line = _invalid_line(path) if builder == "json" else ""
        return line or cause(error)
    return kinds


def _invalid_line(path: str) -> str:
    """Return the first line of a JSON file, or of one of JSON lines, that is not JSON."""
    with open(path, "rb") as file:
        lines = file.readlines()
    if lines and lines[0].lstrip().startswith(b"["):
        lines = [b"".join(lines)]
    for number, line in enumerate(lines, start=1):
        try:
            json.loads(line if line.strip() else b"null")
        except (ValueError, RecursionError) as error:
            at = getattr(error, "lineno", 1) - 1
            return f"line {number + at}: {cause(error)}"
    return ""
