"""Conversion of dataset rows to model inputs: tokens, pixels, labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gradmerge.errors import ConfigError, nearest

Kind = Literal["causal_lm", "text_classification", "image_classification", "tensors"]

# Up to this many bytes of prepared examples per split are kept in memory.
_KEEP_BYTES = 1 << 30


def load_processor(folder: str | None, kind: Kind) -> Any:
    """Load the tokenizer or image processor of a model folder.

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
    try:
        return auto.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder}: cannot load its {auto.__name__.removeprefix('Auto').lower()}: "
            f"{str(error).rstrip('.')}. Set data.processor to a folder that has one."
        ) from error


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


def prepare(
    split: Any,
    kind: Kind,
    processor: Any,
    columns: Mapping[str, str],
    max_length: int,
    limit: int | None,
    where: str,
) -> Any:
    """Convert a split to an indexable dataset of mappings of tensors.

    Args:
        split: rows by index.
        kind: kind of examples (`TaskData.kind`).
        processor: tokenizer or image processor.
        columns: names of the columns `text`, `image` and `label`.
        max_length: maximum tokens per text, or tokens per window.
        limit: maximum number of examples.
        where: task and split, for error messages.

    Raises:
        ConfigError: a column is missing, labels are text, or no example is left.
    """
    if kind == "tensors":
        return split if limit is None else First(split, limit)
    column = columns["image" if kind == "image_classification" else "text"]
    if len(split) == 0:
        raise ConfigError(f"{where}: expected at least one example, got none.")
    names = list(split[0])
    if column not in names:
        raise ConfigError(
            f"{where}: expected a column {column!r}, got {', '.join(names)}."
            f"{nearest(column, names)}"
        )
    if kind == "causal_lm":
        return _windows(split, processor, column, max_length, limit, where)
    rows = split if limit is None else First(split, limit)
    label = columns["label"] if columns["label"] in names else None
    if label is not None and isinstance(split[0][label], str):
        raise ConfigError(
            f"{where}: expected class numbers in column {label!r}, in the order of the source's "
            f"id2label, got text ({split[0][label]!r}). Map the labels to numbers first."
        )
    return _Classified(rows, kind, processor, column, label, max_length)


def rows_used(prepared: Any) -> int:
    """Return the number of leading rows of a split that its prepared examples use."""
    return prepared.documents if isinstance(prepared, _Windows) else len(prepared)


class First(Dataset[Any]):
    """The first `limit` examples of a dataset."""

    def __init__(self, inner: Any, limit: int) -> None:
        self.inner, self.length = inner, min(limit, len(inner))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(f"example {index} of {self.length}")
        return self.inner[index]


class _Classified(Dataset[dict[str, Any]]):
    """Texts or images with labels, prepared on first access and cached up to a size limit."""

    def __init__(
        self,
        rows: Any,
        kind: Kind,
        processor: Any,
        column: str,
        label: str | None,
        max_length: int,
    ) -> None:
        self.rows, self.kind, self.processor = rows, kind, processor
        self.column, self.label, self.max_length = column, label, max_length
        self._kept: dict[int, dict[str, Any]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self._kept:
            return self._kept[index]
        row = self.rows[index]
        if self.kind == "image_classification":
            image = row[self.column]
            image = image.convert("RGB") if getattr(image, "mode", "RGB") != "RGB" else image
            found = self.processor(image, return_tensors="pt")
            example: dict[str, Any] = {"pixel_values": found["pixel_values"][0]}
        else:
            found = self.processor(
                row[self.column], truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            example = {key: value[0] for key, value in found.items()}
        if self.label is not None:
            example["labels"] = torch.tensor(int(row[self.label]))
        self._bytes += sum(v.numel() * v.element_size() for v in example.values())
        if self._bytes < _KEEP_BYTES:
            self._kept[index] = example
        return example


class _Windows(Dataset[dict[str, Any]]):
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
) -> _Windows:
    ids: list[int] = []
    num_bytes = documents = 0
    wanted = None if limit is None else limit * length
    for i in range(len(split)):
        text = split[i][column]
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
    return _Windows(tokens, num_bytes / len(ids), documents)
