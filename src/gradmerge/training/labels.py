"""Labels of a split: class numbers, checked in all rows before anything is learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.data import Subset

from gradmerge.common.errors import ConfigError, shorten
from gradmerge.objectives.base import UNLABELLED

_LARGEST = 2**31 - 1
_SHOWN = 3


@dataclass
class Labels:
    """The labels of one split, one class number or -100 per row."""

    where: str
    """Task and split, for error messages."""
    column: str
    """Name of the column."""
    values: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, rows: Any, column: str, where: str) -> Labels:
        """Read the labels of all rows.

        Raises:
            ConfigError: a label is not a class number.
        """
        given = column_of(rows, column)
        found = [_number(value) for value in given]
        labels = cls(where, column, [UNLABELLED if n is None else n for n in found])
        labels._require(lambda at: found[at] is not None, given, "0 or more")
        return labels

    def require_below(self, classes: int) -> None:
        """Reject labels that the network has no class for.

        Raises:
            ConfigError: a label is too large.
        """
        expected = f"0 to {classes - 1} (the network has {classes} classes)"
        self._require(lambda at: self.values[at] < classes, self.values, expected)

    def _require(self, holds: Callable[[int], bool], given: Sequence[Any], expected: str) -> None:
        wrong = [at for at in range(len(given)) if not holds(at)]
        if wrong:
            shown = ", ".join(f"{_shown(given[at])} (row {at})" for at in wrong[:_SHOWN])
            more = len(wrong) - _SHOWN
            raise ConfigError(
                f"{self.where}: expected class numbers in column {self.column!r}, {expected}, got "
                f"{shown}{f' and {more} more' if more > 0 else ''}.\nNumber the classes in the "
                f"order of the source's id2label; {UNLABELLED} marks a row without a label."
            )


def column_of(rows: Any, column: str) -> list[Any]:
    """Return one column of a split, without decoding the others if it is of `datasets`."""
    if isinstance(rows, Subset) and hasattr(rows.dataset, "select"):
        rows = rows.dataset.select(rows.indices)
    if hasattr(rows, "with_format"):
        return list(rows.with_format(None)[column])
    return [rows[at][column] for at in range(len(rows))]


def _number(value: Any) -> int | None:
    """Return a class number or -100, or None for anything else."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a scalar of torch or numpy
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # pandas writes class numbers as 1.0 if a row of the file has none
    valid = value == UNLABELLED or 0 <= value <= _LARGEST
    return int(value) if valid and value == int(value) else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def read_tensors(examples: Any, where: str) -> Labels | None:
    """Check examples that are mappings of model inputs, and return their labels.

    Returns:
        The largest label of each example; None if they have none, or labels of another kind than
        class numbers, which an objective of one's own may want.

    Raises:
        ConfigError: an example is not a mapping, or has other keys than the first.
    """
    keys: set[Any] = set()
    found: list[int] = []
    for at in range(len(examples)):
        example = examples[at]
        if not isinstance(example, Mapping):
            raise ConfigError(
                f"{where}: expected mappings of model inputs (kind: tensors), got "
                f"{type(example).__name__} in row {at}."
            )
        keys = keys or set(example)
        if set(example) != keys:
            raise ConfigError(
                f"{where}: expected the same inputs in every row, got {shorten(sorted(keys))} in "
                f"row 0 and {shorten(sorted(example))} in row {at}."
            )
        for key, value in example.items():
            if value is None or isinstance(value, (str, bytes)):
                raise ConfigError(
                    f"{where}: expected tensors or numbers as model inputs (kind: tensors), got "
                    f"{type(value).__name__} as {key} in row {at}. Choose another `kind`, or "
                    "remove that column."
                )
        label = example.get("labels")
        if isinstance(label, Tensor) and label.numel() and not label.is_floating_point():
            least = int(label.min())
            found.append(least if least < 0 and least != UNLABELLED else int(label.max()))
        elif label is not None:
            number = _number(label)
            found.append(0 if number is None else number)
    if not found:
        return None
    return Labels.read([{"labels": value} for value in found], "labels", where)
