"""Description of a task's data, and conversion of its rows to tokens, pixels and labels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from gradmerge.common.errors import ConfigError, nearest, require
from gradmerge.common.failures import reading
from gradmerge.training.labels import Labels, column_of

Kind = Literal["causal_lm", "text_classification", "image_classification", "tensors"]
Stage = Literal["adaptation", "selection", "test"]
Convert = Callable[[Mapping[str, Any]], dict[str, Any]]
STAGES: tuple[Stage, ...] = ("adaptation", "selection", "test")

# Up to this many bytes of prepared examples per split are kept in memory.
_KEEP_BYTES = 1 << 30
_LONGEST = 2**31 - 1


@dataclass(frozen=True)
class TaskData:
    """The dataset of one task: its source, its splits, and the columns to read.

    Each task has three disjoint splits: coefficients are learned on `adaptation`, checkpoints and
    settings are chosen on `selection`, and `test` is for the final scores.
    """

    path: str | Mapping[str, Any]
    """Hub id, name of a builder (csv, json, parquet, imagefolder, or text: one example per
    non-blank line), or a folder written by `save_to_disk`; from Python also a mapping of the three
    splits to datasets."""
    kind: Kind = "causal_lm"
    """Kind of examples: causal_lm, text_classification, image_classification, or tensors (examples
    that are already mappings of model inputs)."""
    name: str | None = None
    """Configuration of a hub dataset."""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Local files, or a mapping from split to files."""
    splits: dict[str, str] | None = None
    """Split expression for each of adaptation, selection and test, e.g. `train[:256]`. Default: the
    splits with these names, or train, validation and test; a single split is cut by `fractions`."""
    fractions: tuple[float, float, float] = (0.5, 0.2, 0.3)
    """Shares of adaptation, selection and test in a single split, cut after a seeded shuffle."""
    text: str = "text"
    """Text column."""
    image: str = "image"
    """Image column."""
    label: str = "label"
    """Label column (class numbers); a dataset without it is unlabelled."""
    max_length: int = 512
    """Maximum tokens per text; for causal_lm, tokens per window of the concatenated documents."""
    limit: dict[str, int] | None = None
    """Maximum number of examples (causal_lm: windows) by split, e.g. `{test: 1000}`."""
    source: str | None = None
    """Source that provides the task's head and teacher. Default: the source named like the task."""
    revision: str | None = None
    """Revision of a hub dataset."""

    def __post_init__(self) -> None:
        """Check the options that need no data."""
        if not isinstance(self.path, (str, Path, Mapping)):
            raise ConfigError(
                "path: expected the name of a data set or of a builder (json, csv, imagefolder, "
                f"...) as text, got {self.path!r}."
            )
        if isinstance(self.path, Mapping) and not set(STAGES) & self.path.keys():
            raise ConfigError(
                f"path: expected text, or from Python a mapping of {', '.join(STAGES)} to "
                f"datasets, got a mapping of {', '.join(map(str, self.path)) or 'nothing'}."
            )
        for option, given in (("splits", self.splits), ("limit", self.limit)):
            for key in given or {}:
                if key not in STAGES:
                    raise ConfigError(
                        f"{option}: unknown split {key!r} (choose from {', '.join(STAGES)})."
                        f"{nearest(key, STAGES)}"
                    )
        one = math.isclose(sum(self.fractions), 1, abs_tol=1e-6)
        if len(self.fractions) != 3 or not one or min(self.fractions) <= 0:
            raise ConfigError(
                f"fractions: expected three positive shares that sum to 1, got {self.fractions}."
            )
        least = 2 if self.kind == "causal_lm" else 1  # a token, and the next one to predict
        allowed = least <= self.max_length <= _LONGEST
        require(allowed, "max_length", f"{least} to {_LONGEST} tokens", self.max_length)
        for stage, count in (self.limit or {}).items():
            require(count >= 1, f"limit.{stage}", "at least 1 example", count)


def load_processor(folder: str | Path | None, kind: Kind, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer or image processor of a model folder.

    Code that ships with it runs only if the recipe trusts it.

    Raises:
        ConfigError: no folder is given, or it has none.
    """
    import transformers

    if folder is None:
        raise ConfigError(
            "expected a source folder with a tokenizer, got none. Set data.processor."
        )
    auto = (
        transformers.AutoImageProcessor
        if kind == "image_classification"
        else transformers.AutoTokenizer
    )
    what = f"cannot load its {auto.__name__.removeprefix('Auto').lower()}"
    with reading(folder, what, "Set data.processor to a folder that has one.", ConfigError):
        return auto.from_pretrained(str(folder), trust_remote_code=trust_remote_code)


def padding_id(tokenizer: Any, network: Any, classifies: bool) -> int:
    """Return the padding token: the tokenizer's, else the network's, else 0.

    A decoder for sequence classification reads the last token that differs from the padding token
    of its config, so for these networks the config takes precedence.

    Args:
        tokenizer: tokenizer or image processor, or None.
        network: the network, or None if unknown.
        classifies: true if texts to classify are batched.

    Raises:
        ConfigError: the network needs a padding token, but its config has none.
    """
    config: Any = getattr(network, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    own = getattr(config, "pad_token_id", None)
    given = getattr(tokenizer, "pad_token_id", None)
    if network is not None and _looks_for_padding(network):
        if own is None and classifies:
            token = f"{given}, the tokenizer's" if given is not None else "its eos_token_id"
            raise ConfigError(
                f"{type(network).__name__} classifies by the last token that is not padding, but "
                f"its config has no pad_token_id. Set pad_token_id in the config.json of every "
                f"source (e.g. {token}), or set data.batch_size and data.eval_batch_size to 1."
            )
        given = own if own is not None else given
    found = given if given is not None else own
    return 0 if found is None else int(found)


def _looks_for_padding(network: Any) -> bool:
    """Return true for a decoder classifier, whose forward compares with the padding token."""
    kind = type(network)
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    names = getattr(code, "co_names", ())
    return kind.__name__.endswith("ForSequenceClassification") and "pad_token_id" in names


def prepare(split: Any, data: TaskData, stage: Stage, processor: Any, where: str) -> Any:
    """Convert a split to an indexable dataset of mappings of tensors.

    Args:
        split: rows by index.
        data: description of the task.
        stage: name of the split.
        processor: tokenizer or image processor.
        where: task and split, for error messages.

    Raises:
        ConfigError: a column is missing, labels are text, or no example is left.
    """
    if len(split) == 0:
        raise ConfigError(f"{where}: expected at least one example, got none.")
    rows = first_rows(split, (data.limit or {}).get(stage))
    if data.kind == "tensors":
        return rows
    column = data.image if data.kind == "image_classification" else data.text
    names = columns(split, where)
    if column not in names:
        raise ConfigError(
            f"{where}: expected a column {column!r}, got {', '.join(names)}."
            f"{nearest(column, names)}"
        )
    if data.kind == "causal_lm":
        limit = (data.limit or {}).get(stage)
        return _windows(split, processor, column, data.max_length, limit, where)
    labels = Labels.read(rows, data.label, where) if data.label in names else None
    if data.kind == "image_classification":
        convert: Convert = partial(_pixels, processor, column)
    else:
        for index, text in enumerate(column_of(rows, column)):
            require_text(text, column, f"{where}, row {index}")
        convert = partial(_tokens, processor, column, data.max_length)
    return Classified(rows, convert, labels, where)


def columns(split: Any, where: str) -> list[str]:
    """Return the names of the columns of a split.

    Raises:
        ConfigError: its rows are not mappings.
    """
    known = getattr(split, "column_names", None)
    if isinstance(known, list):
        return known
    first = row_of(split, 0, where)
    if not isinstance(first, Mapping):
        kind = type(first).__name__
        raise ConfigError(f"{where}: expected rows that map columns to values, got {kind}.")
    return list(first)


def row_of(rows: Any, index: int, where: str) -> Any:
    """Return a row of a split.

    Raises:
        ConfigError: it cannot be read, such as a damaged image.
    """
    with reading(f"{where}, row {index}", "cannot be read", "Repair or remove it.", ConfigError):
        return rows[index]


def require_text(value: Any, column: str, where: str) -> None:
    """Reject a value that is not a text.

    Raises:
        ConfigError: it is missing, or of another type.
    """
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: expected a text in column {column!r}, got {value!r:.40}. Remove the row, or "
            "choose another column (`text`)."
        )


def rows_used(prepared: Any) -> int:
    """Return the number of leading rows of a split that its prepared examples use."""
    return prepared.documents if isinstance(prepared, Windows) else len(prepared)


def first_rows(rows: Any, limit: int | None) -> Any:
    """Return the first rows of a split, or all without a limit."""
    return rows if limit is None else Subset(rows, range(min(limit, len(rows))))


class Classified(Dataset[dict[str, Any]]):
    """Texts or images with labels, prepared on first access and cached up to a size limit."""

    def __init__(self, rows: Any, convert: Convert, labels: Labels | None, where: str) -> None:
        self.rows, self.convert, self.labels, self.where = rows, convert, labels, where
        self._kept: dict[int, dict[str, Any]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self._kept:
            return self._kept[index]
        if index >= len(self):
            raise IndexError("index out of range")  # by which iteration ends
        row = row_of(self.rows, index, self.where)
        todo = "Repair or remove it."
        with reading(f"{self.where}, row {index}", "cannot be prepared", todo, ConfigError):
            example = self.convert(row)
        if not all(value.numel() for value in example.values()):
            raise ConfigError(f"{self.where}, row {index}: expected a text with tokens, got none.")
        if self.labels is not None:
            example["labels"] = torch.tensor(self.labels.values[index])
        self._bytes += sum(value.nbytes for value in example.values())
        if self._bytes < _KEEP_BYTES:
            self._kept[index] = example
        return example


def _pixels(processor: Any, column: str, row: Mapping[str, Any]) -> dict[str, Any]:
    image = row[column]
    image = image.convert("RGB") if getattr(image, "mode", "RGB") != "RGB" else image
    return {"pixel_values": processor(image, return_tensors="pt")["pixel_values"][0]}


def _tokens(tokenizer: Any, column: str, length: int, row: Mapping[str, Any]) -> dict[str, Any]:
    found = tokenizer(row[column], truncation=True, max_length=length, return_tensors="pt")
    return {key: value[0] for key, value in found.items()}


class Windows(Dataset[dict[str, Any]]):
    """Windows of equal length over the concatenation of the first `documents` documents."""

    def __init__(self, tokens: Tensor, bytes_per_token: float, documents: int) -> None:
        self.tokens, self.bytes_per_token, self.documents = tokens, bytes_per_token, documents

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        window = self.tokens[index]
        return {"input_ids": window, "labels": window, "bytes_per_token": self.bytes_per_token}


def _windows(
    split: Any, tokenizer: Any, column: str, length: int, limit: int | None, where: str
) -> Windows:
    ids: list[int] = []
    num_bytes = documents = 0
    wanted = None if limit is None else limit * length
    for i in range(len(split)):
        text = row_of(split, i, where)[column]
        require_text(text, column, f"{where}, row {i}")
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        num_bytes += len(text.encode())
        documents += 1
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if wanted is not None and len(ids) >= wanted:
            break
    count = len(ids) // length
    if count == 0:
        raise ConfigError(
            f"{where}: expected at least one window of {length} tokens (max_length), got "
            f"{len(ids)} tokens in all. Reduce max_length or add text."
        )
    kept = count if limit is None else min(count, limit)
    tokens = torch.tensor(ids[: kept * length]).view(kept, length)
    return Windows(tokens, num_bytes / len(ids), documents)
