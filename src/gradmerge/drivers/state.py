"""Records on disk by which a job resumes, and fingerprints of its data.

    <root>/driver/job.json                the job: its configuration and fingerprints
    <root>/driver/steps/<name>/step.json  a finished step: its content and its result

Records are plain data, written atomically. Nothing is ever deleted: restarting a job moves the
folder of the earlier one aside.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from gradmerge.common import files
from gradmerge.common.atomic import whole_file
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.common.finite import as_json
from gradmerge.common.schema import require_shape
from gradmerge.common.secrets import masked
from gradmerge.common.spec import completed, modernise
from gradmerge.training.data import MergeDataModule

JOB, STEP, STATE = "job.json", "step.json", "last.ckpt"

# Rows hashed of a dataset that is not a table, rows hashed at a time of one that is, and rows
# that are read twice because a dataset may draw its examples anew each time.
_SAMPLE, _BATCH, _TWICE = 4096, 256, 16

_REMEDY = (
    "give another folder (--trainer.default_root_dir), or start again: --driver.restart true (the "
    "folder is moved aside, nothing is deleted)."
)


# ---- data ----------------------------------------------------------------------------------------


def describe_contents(data: MergeDataModule) -> dict[str, dict[str, str]]:
    """Return the size and a content hash of each split, by task and split.

    A `datasets.Dataset` is hashed whole, as stored (nothing is decoded or transformed), with the
    files that it names; neither paths nor times of change count. Of any other dataset with more
    than 4096 rows a fixed sample is hashed. Rows beyond a task's `limit` do not count (except
    where it counts windows). A dataset that draws its examples anew each time is
    known by its length alone.

    Raises:
        ConfigError: a split has no length or no rows by index, or a value cannot be hashed.
    """
    found: dict[str, dict[str, str]] = {}
    for name, task in data.tasks.items():
        limits = (task.limit or {}) if task.limits_rows else {}
        found[name] = {
            stage: _describe_split(f"task {name}, {stage}", split, limits.get(stage))
            for stage, split in data.splits(name).items()
        }
    return found


def _describe_split(place: str, split: Any, limit: int | None) -> str:
    indexed = hasattr(split, "__len__") and hasattr(split, "__getitem__")
    if isinstance(split, IterableDataset) or not indexed:
        raise ConfigError(
            f"{place}: expected a dataset with a length and rows by index, which a job hashes to "
            f"detect changes on resume, got {type(split).__module__}.{type(split).__qualname__}. "
            "Load it whole (`datasets.load_dataset` without `streaming`), or give a list of rows."
        )
    import datasets

    count = len(split) if limit is None else min(limit, len(split))
    hashed = _hash_table if isinstance(split, datasets.Dataset) else _hash_rows
    try:
        return f"{count} examples, {hashed(split, count)}"
    except Exception as error:  # anything that a row's own pickling raises
        raise ConfigError(
            f"{place}: expected rows of tensors, arrays, images, text, numbers and containers of "
            f"them, which a job hashes to detect changes on resume, got one that cannot be read or "
            f"hashed ({type(error).__name__}: {error})."
        ) from error


def _hash_table(table: Any, count: int) -> str:
    """Hash the first rows as they are stored, independently of their chunks in memory."""
    from datasets.fingerprint import Hasher
    from datasets.table import embed_table_storage

    stored, content = table.with_format("arrow"), Hasher()
    for start in range(0, count, _BATCH):
        rows = embed_table_storage(stored[start : min(start + _BATCH, count)])
        content.update(str(rows.schema.remove_metadata()))
        rows = rows.take(list(range(len(rows)))).combine_chunks()  # compact, where a slice is not
        for batch in rows.to_batches():
            content.update(batch.serialize().to_pybytes())
    return f"content {content.hexdigest()}"


def _hash_rows(split: Any, count: int) -> str:
    # in random order, so that the rows left out are everywhere
    sample = random.Random(0).sample(range(count), min(count, _SAMPLE))
    rows = [_hash_row(split[i]) for i in sample]
    if rows[:_TWICE] != [_hash_row(split[i]) for i in sample[:_TWICE]]:
        return "drawn anew each time"
    part = "" if len(sample) == count else f" of {len(sample)}"
    return f"content{part} {_hash_row(rows)}"


def _hash_row(row: Any) -> str:
    from datasets.fingerprint import Hasher

    def hash_value(value: Any) -> list[str]:
        """Hash a value that JSON does not have, alike in every process."""
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, frozenset):
            value = set(value)
        elif isinstance(value, Tensor):
            dense = value.detach().to_dense().cpu().resolve_conj().resolve_neg()
            flat = dense.contiguous().flatten().view(torch.uint8).numpy()
            value = str(value.dtype), tuple(value.shape), flat
        return [kind, Hasher.hash(value)]

    return str(Hasher.hash(json.dumps(row, default=hash_value)))


# ---- records -------------------------------------------------------------------------------------


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file atomically."""
    with whole_file(path) as work, work.open("w", encoding="utf-8") as file:
        file.write(json.dumps(as_json(content), indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path, **fields: Any) -> dict[str, Any] | None:
    """Return a record, or None if there is no such file.

    Args:
        path: the file.
        **fields: shape of each field; see `gradmerge.common.schema`.

    Raises:
        ConfigError: it is damaged.
    """
    remedy = f"It is the record from which a driver resumes: restore it, {_REMEDY}"
    try:
        found = files.read_json(path, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"{error}\n{remedy}") from error
    if found is None:
        return None
    require_shape(path, found, fields, remedy, ConfigError)
    return dict(modernise(found))


def plain(content: Any) -> Any:
    """Return plain data as JSON reads it back: tuples become lists, keys become text."""
    return json.loads(json.dumps(as_json(content)))


def require_same(path: Path, kept: Any, got: Any) -> None:
    """Reject plain data that differ from those on record; the error lists the differences."""
    found = list(_differences(completed(kept), completed(got)))
    if found:
        raise ConfigError(
            f"{path.parent} holds another job, which cannot be resumed with these settings: "
            f"{shorten(found, 6)}. Run the command that started it, {_REMEDY}"
        )


def require_same_job(path: Path, kept: Any, got: Any, say: Callable[[str], None]) -> None:
    """Reject a job that differs from the one on record.

    Version 0.1 hashed examples in another way: only their numbers are compared then.
    """
    if ", sha256" in json.dumps(kept.get("examples")):
        say(
            f"{path} was written by an earlier version, whose hashes of data cannot be compared: "
            "only the numbers of examples are checked"
        )
        kept, got = ({**job, "examples": _numbers(job["examples"])} for job in (kept, got))
    require_same(path, kept, got)


def _numbers(examples: Any) -> Any:
    if isinstance(examples, str):
        return examples.partition(",")[0]
    return {name: _numbers(inner) for name, inner in examples.items()}


def _differences(kept: Any, got: Any, place: str = "") -> Iterator[str]:
    """Yield one line for each entry in which two pieces of plain data differ."""
    if isinstance(kept, Mapping) and isinstance(got, Mapping):
        for key in {**kept, **got}:
            inner = f"{place}.{key}" if place else str(key)
            yield from _differences(kept.get(key), got.get(key), inner)
    elif isinstance(kept, list) and isinstance(got, list) and len(kept) == len(got):
        for i, (first, second) in enumerate(zip(kept, got, strict=True)):
            yield from _differences(first, second, f"{place}[{i}]")
    elif kept != got:
        was, now = (json.dumps(value) for value in (kept, got))
        yield f"{place}: was {_short(was)}, is {_short(now)}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class StepRecord:
    """The folder of one step of a job, with its record once the step is finished."""

    folder: Path
    """Holds the checkpoint, logs and result of the step."""
    content: dict[str, Any]
    """Definition of the step as plain data."""

    @property
    def result(self) -> dict[str, Any] | None:
        """The result as plain data, or None until the step is finished."""
        found = read_json(self.folder / STEP, step=dict, result=dict)
        if found is None:
            return None
        require_same(self.folder / STEP, masked(found["step"]), masked(self.content))
        return dict(found["result"])

    def finish(self, result: Mapping[str, Any]) -> None:
        """Record the result; call it once the step's files are complete."""
        write_json(self.folder / STEP, {"step": self.content, "result": dict(result)})


def has_states(folder: Path) -> bool:
    """Return whether any step of the job in this folder is finished or has a state to resume."""
    return any(path.name in (STEP, STATE) for path in folder.glob("steps/*/*"))


def set_aside(folder: Path) -> Path | None:
    """Rename a folder to the first free name; return it, or None if there is no such folder."""
    if not folder.exists():
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside
