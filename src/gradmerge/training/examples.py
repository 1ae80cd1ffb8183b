"""From a dataset's rows to what a model takes: tokens, pixels, labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gradmerge.errors import ConfigError, nearest

Kind = Literal["causal_lm", "text_classification", "image_classification", "tensors"]

# Prepared images are kept in memory up to this many bytes per split; beyond, on demand.
_KEEP_BYTES = 1 << 30


def load_processor(folder: str | None, kind: Kind) -> Any:
    """The tokenizer or image processor of a model folder.

    Raises:
        ConfigError: there is none.
    """
    import transformers

    if folder is None:
        raise ConfigError("no source has a folder with a tokenizer; set data.processor.")
    auto = (
        transformers.AutoImageProcessor
        if kind == "image_classification"
        else transformers.AutoTokenizer
    )
    try:
        return auto.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder}: no {auto.__name__.removeprefix('Auto').lower()} can be loaded from it: "
            f"{str(error).rstrip('.')}. Give the folder of one that has it: data.processor."
        ) from error


def padding_id(tokenizer: Any, network: Any, classifies: bool) -> int:
    """The token that fills up shorter rows: the tokenizer's, else the network's, else 0.

    A decoder that classifies takes the last token that is not the padding of its own config, so
    there the config's comes first.

    Args:
        tokenizer: tokenizer or image processor, if there is one.
        network: the network, where it is known.
        classifies: whether rows of a text classification are put into batches.

    Raises:
        ConfigError: the network needs a padding token, and its config has none.
    """
    config: Any = getattr(network, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    own = getattr(config, "pad_token_id", None)
    given = getattr(tokenizer, "pad_token_id", None)
    if network is not None and _looks_for_padding(network):
        if own is None and classifies:
            token = f"{given}, the tokenizer's" if given is not None else "that of its eos_token"
            raise ConfigError(
                f"{type(network).__name__} classifies by the last token that is not padding, but "
                "its config has no pad_token_id, so a batch cannot be padded. Set pad_token_id in "
                f"the config.json of every source (e.g. {token}), or set data.batch_size and "
                "data.eval_batch_size to 1."
            )
        given = own if own is not None else given
    found = given if given is not None else own
    return 0 if found is None else int(found)


def _looks_for_padding(network: Any) -> bool:
    """Whether it is a decoder that classifies: its forward compares with the padding token."""
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
    """Examples as mappings of tensors, by index.

    Args:
        split: rows by index.
        kind: what the rows are.
        processor: tokenizer or image processor.
        columns: names of the columns `text`, `image` and `label`.
        max_length: tokens a text or window.
        limit: at most this many examples.
        where: task and split, for messages.

    Raises:
        ConfigError: a column is missing, or nothing is left.
    """
    if kind == "tensors":
        return split if limit is None else First(split, limit)
    column = columns["image" if kind == "image_classification" else "text"]
    if len(split) == 0:
        raise ConfigError(f"{where}: no examples.")
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
            f"{where}: the labels in column {label!r} are text ({split[0][label]!r}); expected "
            "class numbers in the order of the source's id2label."
        )
    return _Classified(rows, kind, processor, column, label, max_length)


def rows_used(prepared: Any) -> int:
    """How many of a split's rows, from the first on, its prepared examples are made of."""
    return prepared.documents if isinstance(prepared, _Windows) else len(prepared)


class First(Dataset[Any]):
    """The first examples of a dataset."""

    def __init__(self, inner: Any, limit: int) -> None:
        self.inner, self.length = inner, min(limit, len(inner))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(f"example {index} of {self.length}")
        return self.inner[index]


class _Classified(Dataset[dict[str, Any]]):
    """Texts or images with labels, prepared once and kept while they fit."""

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
    """Equal windows over the first `documents` documents, concatenated."""

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
            f"{where}: {len(ids)} tokens are too few for one window of max_length {length}."
        )
    kept = count if limit is None else min(count, limit)
    tokens = torch.tensor(ids[: kept * length]).view(kept, length)
    return _Windows(tokens, num_bytes / len(ids), documents)
