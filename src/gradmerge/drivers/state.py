"""What a driver has done so far, on disk as plain data, so that a killed run goes on.

    <root>/driver/job.json                what the job is: its configuration, fingerprints
    <root>/driver/steps/<name>/step.json  a finished step: what it was, and what it gave

Each file is written whole or not at all. Nothing is ever deleted: a job that begins anew moves the
folder of the earlier one aside.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any
from uuid import UUID

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from gradmerge.errors import ConfigError, shorten
from gradmerge.spec import modernise
from gradmerge.training.data import MergeDataModule

# A split is read whole up to so many rows and bytes; beyond, a sample that is always the same.
ROWS, BYTES = 4096, 64 << 20
# Rows of a table are made objects so many at once, and no more than of so many bytes.
_CHUNK, _CHUNK_BYTES = 1024, 1 << 20
# Rows that are read twice: a dataset may draw its examples anew each time.
_TWICE = 16
_PLAIN = {bool, int, float, complex, str, type(None)}
# Whose `repr` says all that they hold, the same in every process.
_SAID = (Decimal, Fraction, PurePath, UUID, range, timedelta)


def describe_contents(data: MergeDataModule) -> dict[str, dict[str, str]]:
    """Size and content hash of every split, by task and split.

    Content is that of the rows as they are stored, in their order; of a task with `limit`, of the
    first rows alone (not for `causal_lm`, whose limit counts windows). Of a split with more than
    `ROWS` rows, or `BYTES` bytes, a fixed sample counts; of a table of `datasets` further every row
    of its smallest columns, up to `BYTES` together (of files that a path names, their sizes), and
    how long each row of the others is. What is neither is not seen to change: in a split from
    Python anything outside of the sample. When files were changed does not count. Examples that
    a dataset draws anew each time count by their number alone, and an object of a class that is not
    known here by its class: the line names it.

    Raises:
        ConfigError: a split has no length or no rows by index, or holds a value that cannot be
            hashed.
    """
    found: dict[str, dict[str, str]] = {}
    for name, task in data.tasks.items():
        limits = {} if task.kind == "causal_lm" else task.limit or {}
        found[name] = {
            stage: _described(f"task {name}, {stage}", split, limits.get(stage))
            for stage, split in data.splits(name).items()
        }
    return found


def _described(place: str, split: Any, limit: int | None) -> str:
    if isinstance(split, IterableDataset) or not all(
        hasattr(split, name) for name in ("__len__", "__getitem__")
    ):
        raise ConfigError(
            f"{place}: expected a dataset with a length and rows by index, got "
            f"{_name(split)}: a driver keeps a hash of the examples, so that "
            "a job does not go on with others, and a stream is read but once. Load it whole "
            "(`datasets.load_dataset` without `streaming`), or give a list of its rows."
        )
    try:
        return _counted(split, limit)
    except (_UnhashableError, RecursionError) as error:
        raise ConfigError(
            f"{place}: expected rows of tensors, arrays, text, numbers and lists, mappings or "
            f"dataclasses of them, got {error}: a driver keeps a hash of the examples, so that a "
            "job does not go on with others. Give such values as dense tensors in memory."
        ) from error


def _counted(split: Any, limit: int | None) -> str:
    count = len(split) if limit is None else min(limit, len(split))
    # in no order, so that what is left out lies everywhere
    rows = random.Random(0).sample(range(count), min(count, ROWS))
    stored = _stored(split)
    if stored is split and not _repeats(split, rows[:_TWICE]):
        return f"{count} examples, drawn anew each time"
    whole, read = _Hash(), 0
    for row in _rows(stored, rows):
        whole.add(row)
        read += 1
        if whole.bytes > BYTES:
            break
    if read < count and stored is not split:
        _add_columns(whole, stored, count)
    part = "" if read == count else f" of {read}"
    alone = f" ({', '.join(sorted(whole.unknown))}: class alone)" if whole.unknown else ""
    return f"{count} examples, sha256{part} {whole.hexdigest()[:16]}{alone}"


def _stored(split: Any) -> Any:
    """A dataset of `datasets` as it lies in its table: nothing is decoded or transformed."""
    return split.with_format("arrow") if _is_table(split) else split


def _is_table(split: Any) -> bool:
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(split, datasets.Dataset)


def _rows(split: Any, at: Sequence[int]) -> Iterator[Any]:
    if not _is_table(split):
        yield from (split[i] for i in at)
        return
    start, size = 0, 1
    while start < len(at):
        table = split[list(at[start : start + size])]
        rows, start = len(table), start + size
        # nested lists are ten times as large as objects
        part = max(1, rows * _CHUNK_BYTES // max(1, table.nbytes))
        for first in range(0, rows, part):
            yield from _unpacked(table.slice(first, part))
        size = min(_CHUNK, 4 * size, part)


def _unpacked(table: Any) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow table; numbers of one row stay an array."""
    columns = [_values(column.combine_chunks()) for column in table.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(table.column_names, values, strict=True))


def _values(column: Any) -> Sequence[Any]:
    import pyarrow

    kind = column.type
    found: Sequence[Any]
    if hasattr(kind, "shape") and not column.null_count:  # Array2D and so on
        found = column.to_numpy(zero_copy_only=False)
        return found
    if not pyarrow.types.is_list(kind) or not _is_number(kind.value_type):
        found = column.to_pylist()
        return found
    rows = (row.values for row in column)
    return [
        row.to_numpy(zero_copy_only=False)
        if row is not None and not row.null_count
        else row and row.to_pylist()
        for row in rows
    ]


def _is_number(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind))


def _add_columns(whole: _Hash, split: Any, count: int) -> None:
    """Take in what is cheap to read of all rows of a table."""
    whole.reads_files = False
    table, room = split.data, BYTES
    sizes = {name: table.column(name).nbytes * count // len(table) for name in table.column_names}
    small = set()
    for name in sorted(split.column_names, key=sizes.__getitem__):
        room -= sizes[name]
        if room >= 0:
            small.add(name)
    for name in split.column_names:
        whole.add(name)
        if name not in small:
            for lengths in _lengths(table.column(name)):
                own = lengths.fill_null(-1)
                own = own if split._indices is None else own.take(split._indices.column(0))
                whole.add(own.slice(0, count).to_numpy())
            continue
        one = split.select_columns([name])
        for start in range(0, count, _CHUNK):
            rows = one[start : min(start + _CHUNK, count)]
            whole.add(list(_values(rows.column(0).combine_chunks())))


def _lengths(column: Any) -> Iterator[Any]:
    """Of text, bytes and lists, also within structs, the length of each row."""
    import pyarrow
    import pyarrow.compute

    is_a, kind = pyarrow.types, column.type
    texts = (is_a.is_string, is_a.is_large_string, is_a.is_binary, is_a.is_large_binary)
    if is_a.is_struct(kind):
        for i in range(kind.num_fields):
            yield from _lengths(pyarrow.compute.struct_field(column, [i]))
    elif any(f(kind) for f in texts):
        yield pyarrow.compute.binary_length(column)
    elif is_a.is_list(kind) or is_a.is_large_list(kind):
        yield pyarrow.compute.list_value_length(column)


def _repeats(split: Any, at: Sequence[int]) -> bool:
    digests = []
    for _ in range(2):
        one = _Hash()
        for row in _rows(split, at):
            one.add(row)
        digests.append(one.hexdigest())
    return digests[0] == digests[1]


class _UnhashableError(Exception):
    """A value whose content cannot be read; what it is."""


class _Hash:
    """SHA-256 of nested values, each with its kind, so that no two run together."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.bytes = 0
        self.unknown: set[str] = set()
        self.reads_files = True  # else their sizes count

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def _put(self, kind: str, content: bytes = b"") -> None:
        self._hash.update(f"{kind}:{len(content)};".encode())
        self._hash.update(content)
        self.bytes += len(content)

    def add(self, value: Any) -> None:
        """Take in a value; of an object of an unknown class, its class alone."""
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, (bytes, bytearray)):
            self._put("bytes", bytes(value))
        elif type(value) in _PLAIN:
            self._put(type(value).__name__, _text(value))
        elif isinstance(value, Mapping):
            if value.keys() == {"bytes", "path"}:  # an image or a sound, as `datasets` stores it
                self._add_file(**value)
                return
            self._put("mapping", str(len(value)).encode())
            for key in value:
                self.add(str(key))
                self.add(value[key])
        elif isinstance(value, (list, tuple)):
            self._add_list(value)
        elif hasattr(value, "tobytes"):
            self._add_array(value)
        else:
            self._add_object(value, _name(value))

    def _add_tensor(self, value: Tensor) -> None:
        value = value.detach()
        try:
            if value.layout is not torch.strided:
                value = value.to_sparse_coo().coalesce()
                self._put(f"sparse{tuple(value.shape)}")
                self.add(value.indices())
                self.add(value.values())
                return
            flat = value.cpu().resolve_conj().resolve_neg().contiguous().flatten()
            content = flat.view(torch.uint8).numpy().tobytes()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            kind = f"a tensor of {value.dtype}, {value.layout}, on {value.device}"
            raise _UnhashableError(f"{kind} ({error})") from error
        self._put(f"{value.dtype}{tuple(value.shape)}", content)

    def _add_array(self, value: Any) -> None:
        """An array, an image."""
        form = [getattr(value, name, "") for name in ("dtype", "shape", "mode", "size")]
        kind = getattr(form[0], "kind", "")
        if getattr(form[0], "hasobject", False) or kind == "T":  # its bytes are addresses
            self._put(f"{form}")
            self.add(value.ravel().tolist())
            return
        self._put(f"{form}", value.tobytes())

    def _add_object(self, value: Any, name: str) -> None:
        if isinstance(value, Enum):
            self._put(name, value.name.encode())
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            self._put(name)
            self.add({f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)})
        elif isinstance(value, (date, time)):
            self._put(name, value.isoformat().encode())  # a zone by its offset
        elif isinstance(value, _SAID):
            self._put(name, _text(value))
        elif isinstance(value, Set):
            self._put(name)
            items = [_hash_of(item) for item in value]
            self.unknown.update(*(item.unknown for item in items))
            self._add_list(sorted(item.hexdigest() for item in items))
        elif isinstance(value, (int, float, complex, str)):  # of a class derived from them
            own: Any = next(kind for kind in type(value).__mro__ if kind in _PLAIN)
            self._put(name, _text(own.__repr__(value)))
        else:
            self.unknown.add(name)
            self._put(name)

    def _add_list(self, values: Sequence[Any]) -> None:
        if set(map(type, values)) <= _PLAIN:
            self._put("list", _text(list(values)))
            return
        self._put("list", str(len(values)).encode())
        for item in values:
            self.add(item)

    def _add_file(self, bytes: Any, path: Any) -> None:
        if bytes is None and isinstance(path, str) and Path(path).is_file():
            bytes = Path(path).read_bytes() if self.reads_files else Path(path).stat().st_size
        self._put("file")
        self.add(path if bytes is None else bytes)


def _hash_of(value: Any) -> _Hash:
    one = _Hash()
    one.add(value)
    return one


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _text(value: Any) -> bytes:
    return repr(value).encode("utf-8", "surrogatepass")


JOB, STEP, STATE = "job.json", "step.json", "last.ckpt"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with work.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    work.replace(path)


def read_json(path: Path, **fields: type | tuple[type, ...]) -> dict[str, Any] | None:
    """The content of a file, or None where there is none.

    Args:
        path: of the file.
        **fields: what it must hold, and of which types.

    Raises:
        ConfigError: it is damaged, or no such record.
    """
    try:
        found = modernise(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _no_record(path, f"something else ({error})") from error
    if not isinstance(found, dict):
        raise _no_record(path, type(found).__name__)
    for name, types in fields.items():
        if name not in found:
            raise _no_record(path, f"one without `{name}`")
        if not isinstance(found[name], types):
            raise _no_record(path, f"`{name}` of type {type(found[name]).__name__}")
    return found


def _no_record(path: Path, got: str) -> ConfigError:
    return ConfigError(
        f"{path}: expected the record of a driver, by which a job that was killed goes on, got "
        f"{got}: it was changed or damaged. Put it back, give another folder "
        "(--trainer.default_root_dir), or begin anew: --driver.restart true (the folder is moved "
        "aside, nothing is deleted)."
    )


def digest(content: Any) -> str:
    """SHA-256 of plain data."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(kept: Any, got: Any, place: str = "") -> Iterator[str]:
    """Where two pieces of plain data differ, one line each."""
    if isinstance(kept, Mapping) and isinstance(got, Mapping):
        for key in [*kept, *(key for key in got if key not in kept)]:
            inner = f"{place}.{key}" if place else str(key)
            yield from differences(kept.get(key), got.get(key), inner)
    elif isinstance(kept, list) and isinstance(got, list) and len(kept) == len(got):
        for i, (first, second) in enumerate(zip(kept, got, strict=True)):
            yield from differences(first, second, f"{place}[{i}]")
    elif kept != got:
        yield f"{place}: was {_short(kept)}, is {_short(got)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain(content: Any) -> Any:
    """As it comes back from a file: tuples become lists, keys become text."""
    return json.loads(json.dumps(content))


@dataclass(frozen=True)
class StepRecord:
    """One step of a driver: a folder, and its record once it is finished."""

    folder: Path
    """Where the step keeps its checkpoint, logs and result."""
    content: dict[str, Any]
    """What the step is, as plain data."""

    @property
    def checkpoint(self) -> Path:
        """Where the running step keeps its last state."""
        return self.folder / STATE

    @property
    def result(self) -> dict[str, Any] | None:
        """What the step gave, as plain data; None while it is not finished.

        Raises:
            ConfigError: the record is of another step, or damaged.
        """
        found = read_json(self.folder / STEP, step=dict, result=dict)
        if found is None:
            return None
        require_same(self.folder / STEP, found["step"], self.content)
        result: dict[str, Any] = found["result"]
        return result

    def finish(self, result: Mapping[str, Any]) -> None:
        """Record that the step is finished; call it once its files are complete."""
        content = {"step": self.content, "sha256": digest(self.content), "result": dict(result)}
        write_json(self.folder / STEP, content)


def require_same(path: Path, kept: Any, got: Any) -> None:
    """Refuse to go on with what was begun differently.

    Raises:
        ConfigError: what differs.
    """
    found = list(differences(kept, plain(got)))
    if found:
        raise ConfigError(
            f"{path.parent} holds another job, which this one must not go on with: "
            f"{shorten(found, 6)}. Run the command that began it, give another folder "
            "(--trainer.default_root_dir), or begin anew: --driver.restart true (the folder is "
            "moved aside, nothing is deleted)."
        )


def has_states(folder: Path) -> bool:
    """Whether any step of the job in this folder is finished, or has a state to go on from."""
    steps = folder / "steps"
    return any(path.is_file() for name in (STEP, STATE) for path in steps.glob(f"*/{name}"))


def set_aside(folder: Path) -> Path | None:
    """Give a folder another name, the first that is free; None where there is no such folder."""
    if not folder.exists():
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside
