"""Kinds for language models that predict the next token: plain text, and prompts with answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.training.kinds.base import (
    AbstractKind,
    Example,
    Sequences,
    Split,
    Tally,
    as_example,
    cut,
    labels_tensor,
    require_loss,
)
from gradmerge.training.loaders import Shared

# Tokens of a text, and which of them have a loss.
Marked = tuple[Sequence[int], Sequence[bool]]


class AbstractCausal(AbstractKind):
    """Texts some of whose tokens have a loss."""

    predicts = ("the next token",)

    @abstractmethod
    def marked(self, split: Split, index: int, row: Mapping[str, Any]) -> Marked:
        """Return the tokens of a row, and which of them have a loss."""

    @override
    def prepare(self, split: Split) -> Any:
        tally, examples = Tally(loss_tokens=0), []
        length, side = split.data.max_length, split.data.truncation
        for index, row in split:
            with split.preparing(index):
                ids, loss = self.marked(split, index, row)
            if not ids:
                raise ConfigError(
                    f"{split.where}, row {index}: expected a text with tokens, got none."
                )
            tally.truncated += len(ids) > length
            examples.append(_example(split, cut(ids, length, side), cut(loss, length, side), tally))
        tally.examples = len(examples)
        require_loss(tally, split)
        if not split.data.packs:
            return Sequences(examples, tally)
        windows = pack(examples, length)
        return Sequences(
            windows, replace(tally, examples=len(windows), packed=True), len(split.rows)
        )


def _example(split: Split, ids: Sequence[int], loss: Sequence[bool], tally: Tally) -> Example:
    """Return the example of some tokens and count them; nothing predicts the first token."""
    example = as_example(input_ids=ids, attention_mask=[1] * len(ids))
    labels = labels_tensor(example["input_ids"], [False, *loss[1:]])
    learned = labels[labels != -100]
    tally.tokens += len(ids)
    tally.loss_tokens = (tally.loss_tokens or 0) + len(learned)
    tally.without_loss += len(learned) == 0
    text = split.processor.decode(learned, skip_special_tokens=True)
    size = len(text.encode()) / max(1, len(learned))
    return {**example, "labels": labels, "bytes_per_token": size}


def pack(examples: Sequence[Example], length: int) -> list[Example]:
    """Put whole examples into windows of at most `length` tokens, each where it first fits.

    Positions restart at every example, by which transformers keeps the examples of a window from
    seeing one another; this needs a forward pass without attention mask and cache.
    """
    windows: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        size = len(example["input_ids"])
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            place = len(windows)
            windows.append([])
            room.append(length)
        windows[place].append(example)
        room[place] -= size
    return [_window(window) for window in windows]


def _window(examples: Sequence[Example]) -> Example:
    counts = [int((example["labels"] != -100).sum()) for example in examples]
    sizes = [example["bytes_per_token"] for example in examples]
    weighted = sum(n * size for n, size in zip(counts, sizes, strict=True))
    return {
        "input_ids": torch.cat([example["input_ids"] for example in examples]),
        "labels": torch.cat([example["labels"] for example in examples]),
        "position_ids": torch.cat([torch.arange(len(e["input_ids"])) for e in examples]),
        "bytes_per_token": weighted / max(1, sum(counts)),
        "use_cache": Shared(False),
    }


class CausalLM(AbstractCausal):
    """Plain text, cut from the concatenated documents into windows, or one example per row."""

    roles: ClassVar = {"text": ("text", "content", "sentence")}

    @override
    def prepare(self, split: Split) -> Any:
        return windows_of(split) if split.data.packs else super().prepare(split)

    @override
    def marked(self, split: Split, index: int, row: Mapping[str, Any]) -> Marked:
        ids = ended(split, split.processor(split.text(row, "text", index))["input_ids"])
        return ids, [True] * len(ids)


def ended(split: Split, ids: Sequence[int]) -> list[int]:
    """Return tokens with the tokenizer's end-of-text token, if it has one, at the end."""
    end = split.processor.eos_token_id
    return [*ids] if end is None or (len(ids) and ids[-1] == end) else [*ids, end]


class Windows(Dataset[Example]):
    """Windows of equal length over the concatenation of the first `rows_used` documents."""

    labels = None
    labelled = True

    def __init__(self, tokens: Tensor, bytes_per_token: float, documents: int) -> None:
        self.tokens, self.bytes_per_token, self.rows_used = tokens, bytes_per_token, documents
        count, length = tokens.shape
        self.tally = Tally(count, tokens.numel(), count * (length - 1), packed=True)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Example:
        window = self.tokens[index]
        return {"input_ids": window, "labels": window, "bytes_per_token": self.bytes_per_token}


def windows_of(split: Split) -> Windows:
    """Cut the concatenated documents into windows of `max_length` tokens; `limit` counts windows.

    Raises:
        ConfigError: there is no full window.
    """
    limit = (split.data.limit or {}).get(split.stage)
    tokenizer, length = split.processor, split.data.max_length
    ids: list[int] = []
    num_bytes = documents = 0
    wanted = None if limit is None else limit * length
    for index, row in split:
        text = split.text(row, "text", index)
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
            f"{split.where}: expected at least one window of {length} tokens (max_length), got "
            f"{len(ids)} tokens in all. Reduce max_length or add text."
        )
    kept = count if limit is None else min(count, limit)
    tokens = torch.tensor(ids[: kept * length]).view(kept, length)
    return Windows(tokens, num_bytes / len(ids), documents)


# ---- prompts and answers -------------------------------------------------------------------------


def joined(split: Split, prompt: str, answer: str) -> Marked:
    """Return the tokens of a prompt and its answer, with the end of text; the answer has a loss.

    They are those of the joined text if it begins with the tokens of the prompt, which a model is
    given when it generates; else prompt and answer are tokenized apart.
    """
    asked = asking(split, prompt)
    whole = _unended(split, split.processor(prompt + answer)["input_ids"])
    if whole[: len(asked)] != asked:
        whole = asked + split.processor(answer, add_special_tokens=False)["input_ids"]
    ids = ended(split, whole) if answer else whole
    return ids, [False] * len(asked) + [True] * (len(ids) - len(asked))


def asking(split: Split, prompt: str) -> list[int]:
    """Return the tokens of a prompt that is to be continued."""
    return _unended(split, split.processor(prompt)["input_ids"])


def _unended(split: Split, ids: Sequence[int]) -> list[int]:
    end = split.processor.eos_token_id
    ended_by_itself = end is not None and end != split.processor.bos_token_id
    return [*ids[:-1]] if ended_by_itself and len(ids) and ids[-1] == end else [*ids]


class Completion(AbstractCausal):
    """A prompt and its completion, joined as they stand; the completion has a loss."""

    roles: ClassVar = {
        "prompt": ("prompt", "question", "query", "input"),
        "completion": ("completion", "answer", "response", "output"),
    }

    @override
    def marked(self, split: Split, index: int, row: Mapping[str, Any]) -> Marked:
        prompt, completion = (split.text(row, role, index) for role in self.roles)
        return joined(split, prompt, completion)

    @override
    def question(self, split: Split, index: int, row: Mapping[str, Any]) -> tuple[list[int], str]:
        prompt, completion = (split.text(row, role, index) for role in self.roles)
        return asking(split, prompt), completion
