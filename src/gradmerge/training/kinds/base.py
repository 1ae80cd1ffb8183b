"""Base class of the kinds of task data, their columns, and prepared examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gradmerge.common.errors import ConfigError, nearest, shorten
from gradmerge.common.failures import reading
from gradmerge.training.examples import (
    Processor,
    Stage,
    TaskData,
    columns_of,
    first_rows,
    row_of,
)
from gradmerge.training.generation import Question
from gradmerge.training.labels import Labels

Example = dict[str, Any]
Names = tuple[str, ...]

# Up to this many bytes of prepared examples per split are kept in memory.
_KEEP_BYTES = 1 << 30


@dataclass(frozen=True)
class Split:
    """The rows of one split of a task, and what is needed to prepare them."""

    rows: Any
    """Rows by index, at most `limit` of them."""
    data: TaskData
    stage: Stage
    columns: Mapping[str, str]
    """Name of the column of each role that the data have."""
    processor: Any
    """Tokenizer or image processor."""
    network: nn.Module | None
    """The network without weights, or None if unknown."""
    seed: int
    """Seed of the data module."""
    where: str
    """Task and split, for error messages."""

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for index in range(len(self.rows)):
            yield index, row_of(self.rows, index, self.where)

    def get(self, row: Mapping[str, Any], role: str) -> Any:
        """Return a row's value of a role, or None."""
        return row[self.columns[role]] if role in self.columns else None

    def text(self, row: Mapping[str, Any], role: str, index: int) -> str:
        """Return a row's text of a role.

        Raises:
            ConfigError: it is missing, or of another type.
        """
        value, name = self.get(row, role), self.columns[role]
        if not isinstance(value, str):
            option = "text" if role == "text" else "columns"
            raise ConfigError(
                f"{self.where}, row {index}: expected a text in column {name!r}, got "
                f"{value!r:.40}. Remove the row, or choose another column (`{option}`)."
            )
        return value

    def tokenize(self, *texts: Any, **options: Any) -> Any:
        """Tokenize a text or a pair, cut to `max_length` tokens on the side of `truncation`."""
        tokenizer, before = self.processor, self.processor.truncation_side
        tokenizer.truncation_side = self.data.truncation  # its calls have no such argument
        try:
            given = {"truncation": True, "max_length": self.data.max_length, **options}
            return tokenizer(*texts, **given)
        finally:
            tokenizer.truncation_side = before

    @contextmanager
    def preparing(self, index: int) -> Iterator[None]:
        """Name the row of any exception of another library."""
        where, todo = f"{self.where}, row {index}", "Repair or remove it."
        with reading(where, "cannot be prepared", todo, ConfigError):
            yield


@dataclass
class Tally:
    """Tokens of a prepared split, and those that have a loss."""

    examples: int = 0
    """Number of examples, or windows."""
    tokens: int = 0
    """Number of tokens of all examples."""
    loss_tokens: int | None = None
    """Number of tokens that have a loss; None where a loss does not belong to tokens."""
    truncated: int = 0
    """Rows that were cut to `max_length`."""
    without_loss: int = 0
    """Examples without a token that has a loss."""
    packed: bool = False
    """True if the examples are windows."""

    def __str__(self) -> str:
        parts = [f"{self.examples:,} {'windows' if self.packed else 'examples'}"]
        if self.loss_tokens is not None:
            parts.append(f"{self.loss_tokens:,} of {self.tokens:,} tokens have a loss")
        elif self.tokens:
            parts.append(f"{self.tokens:,} tokens")
        if self.truncated:
            parts.append(f"{self.truncated:,} rows truncated")
        if self.without_loss:
            parts.append(f"{self.without_loss:,} without a loss")
        return ", ".join(parts)


class Sequences(Dataset[Example]):
    """Examples that are prepared at once, so that their tokens can be counted and checked."""

    def __init__(
        self,
        examples: Sequence[Example],
        tally: Tally,
        rows_used: int | None = None,
        labels: Labels | None = None,
    ) -> None:
        self.examples, self.tally, self.labels = examples, tally, labels
        self.rows_used = len(examples) if rows_used is None else rows_used
        self.labelled = all("labels" in example or "reading" in example for example in examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return dict(self.examples[index])


class Classified(Dataset[Example]):
    """Texts or images with labels, prepared on first access and cached up to a size limit."""

    def __init__(
        self,
        split: Split,
        convert: Callable[[Mapping[str, Any]], Example],
        labels: Labels | None,
        shared: Mapping[str, Any] | None = None,
    ) -> None:
        self.rows, self.where, self.convert, self.labels = split.rows, split.where, convert, labels
        self.labelled = labels is not None
        self.rows_used = len(self.rows)
        self.tally = Tally(len(self.rows))
        self._shared = shared or {}
        self._preparing = replace(split, network=None).preparing  # other processes get a copy
        self._kept: dict[int, Example] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if index in self._kept:
            return self._kept[index]
        if index >= len(self):
            raise IndexError("index out of range")  # by which iteration ends
        row = row_of(self.rows, index, self.where)
        with self._preparing(index):
            example = self.convert(row)
        if not all(value.numel() for value in example.values()):
            raise ConfigError(f"{self.where}, row {index}: expected a text with tokens, got none.")
        self._bytes += sum(value.nbytes for value in example.values())
        if self.labels is not None:
            example["labels"] = torch.tensor(self.labels.values[index])
        example.update(self._shared)
        if self._bytes < _KEEP_BYTES:
            self._kept[index] = example
        return example


class AbstractKind(ABC):
    """A kind of examples: its columns, their conversion, and the networks that take them.

    A kind is one class: an entry in `KINDS` and in `TaskData.kind` makes it known.
    """

    roles: ClassVar[Mapping[str, Names]]
    """Usual names of the column of each role that must be there, the preferred one first."""
    optional: ClassVar[Mapping[str, Names]] = {}
    """The same of roles that may be missing."""
    predicts: ClassVar[Names]
    """What the networks predict that take this kind (`AbstractReading.predicts`)."""
    input: ClassVar[str] = "input_ids"
    """Main input of these networks."""
    processor: ClassVar[Processor | None] = "tokenizer"
    """What converts the rows."""
    deduplicated: ClassVar[bool] = True
    """True if repeated rows are dropped before a single split is cut."""

    @abstractmethod
    def prepare(self, split: Split) -> Any:
        """Convert a split to an indexable dataset of mappings of tensors.

        Raises:
            ConfigError: a row cannot be converted, or none is left.
        """

    def question(self, split: Split, index: int, row: Mapping[str, Any]) -> tuple[list[int], str]:
        """Return the tokens that ask for a text, and that text.

        Raises:
            ConfigError: the kind has no texts to generate, or the row has none.
        """
        raise _no_texts(split)

    def compared(self, columns: Mapping[str, str]) -> Names:
        """Return the columns by which examples of two splits are compared."""
        return tuple(name for role, name in columns.items() if role in self.roles)

    def columns(self, data: TaskData, names: Sequence[str]) -> dict[str, str]:
        """Return the column of each role: the configured one, else the first usual name.

        Args:
            data: description of the task.
            names: columns of the data.

        Raises:
            ConfigError: a column is missing, or `columns` has an unknown role.
        """
        known = {**self.roles, **self.optional}
        given = dict(data.columns or {})
        unknown = [role for role in given if role not in known]
        if unknown:
            raise ConfigError(
                f"columns: unknown roles {shorten(unknown)} for kind {data.kind} (choose from "
                f"{', '.join(known)}).{nearest(unknown[0], known)}"
            )
        for role in ("text", "image", "label"):
            own = getattr(data, role)
            if role in known and role not in given and own != role:
                given[role] = own
        found: dict[str, str] = {}
        for role, usual in known.items():
            options = (given[role],) if role in given else usual
            column = next((name for name in options if name in names), None)
            if column is not None:
                found[role] = column
            elif role in self.roles or role in (data.columns or {}):
                raise _missing(role, options, names, data.kind)
        return found


def _missing(role: str, options: Names, names: Sequence[str], kind: str) -> ConfigError:
    wanted = f"{options[0]!r}" if len(options) == 1 else f"for {role} ({' or '.join(options)})"
    return ConfigError(
        f"expected a column {wanted}, got {', '.join(names)}.{nearest(options[0], names)}\n"
        f"Name it (`columns: {{{role}: NAME}}`), or choose another kind than {kind}."
    )


def split_of(
    rows: Any,
    kind: AbstractKind,
    data: TaskData,
    stage: Stage,
    processor: Any,
    network: nn.Module | None,
    seed: int,
    where: str,
) -> Split:
    """Return a split with its columns, limited to the number of rows in use.

    Raises:
        ConfigError: it has no rows, or lacks a column.
    """
    names = columns_of(rows, where) if kind.roles else []
    try:
        columns = kind.columns(data, names)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    limited = first_rows(rows, (data.limit or {}).get(stage)) if data.limits_rows else rows
    return Split(limited, data, stage, columns, processor, network, seed, where)


def _no_texts(split: Split) -> ConfigError:
    return ConfigError(
        f"{split.where}: expected a task with texts to generate (kind chat, completion, "
        f"instruction or seq2seq, and a network that generates) for `generation`, got kind "
        f"{split.data.kind}. Remove `generation`."
    )


def questions(split: Split, kind: AbstractKind) -> list[Question]:
    """Return what texts are generated for, of the first rows of a split.

    Prompts of more than `max_length` tokens lose their beginning.

    Raises:
        ConfigError: the kind or the network does not generate, or a row has no answer.
    """
    options, network = split.data.generation, split.network
    assert options is not None
    if not getattr(network, "can_generate", lambda: True)():
        raise _no_texts(split)
    found = []
    for index, row in split:
        if options.limit is not None and index >= options.limit:
            break
        with split.preparing(index):
            ids, wanted = kind.question(split, index, row)
        found.append(Question(ids[-split.data.max_length :], wanted, row))
    return found


# ---- tokens -----------------------------------------------------------------------------------


def as_example(**values: Iterable[int]) -> Example:
    """Return an example of integer tensors."""
    return {name: torch.tensor(list(value), dtype=torch.long) for name, value in values.items()}


def cut(ids: Sequence[Any], length: int, side: str) -> Sequence[Any]:
    """Return the tokens without those beyond `length`, which are lost on a side."""
    return ids[:length] if side == "right" else ids[max(0, len(ids) - length) :]


def require_loss(tally: Tally, split: Split) -> None:
    """Reject a split in which no token has a loss.

    Raises:
        ConfigError: nothing could be learned from it, or scored on it.
    """
    if tally.loss_tokens == 0:
        cause = (
            f"{tally.truncated} of its rows are cut to max_length: {split.data.max_length} tokens"
            if tally.truncated
            else "its texts to learn are empty"
        )
        raise ConfigError(
            f"{split.where}: expected tokens with a loss, got none in {tally.examples} examples: "
            f"{cause}.\nIncrease max_length, set truncation: left, or name other `columns`."
        )


def labels_tensor(ids: Tensor, loss: Sequence[bool]) -> Tensor:
    """Return the tokens that have a loss, and -100 elsewhere."""
    return torch.where(torch.tensor(list(loss), dtype=torch.bool), ids, -100)
