"""Kinds for networks that fill texts in, translate them, find answers in them, or embed them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.engine.reading import Pairs, Pooling
from gradmerge.objectives.base import UNLABELLED
from gradmerge.training.kinds.base import (
    AbstractKind,
    Example,
    Sequences,
    Split,
    Tally,
    as_example,
    require_loss,
)
from gradmerge.training.kinds.causal import CausalLM
from gradmerge.training.loaders import Shared


def encoded(split: Split, tally: Tally, *texts: str, **options: Any) -> Any:
    """Tokenize a text or a pair, and count its tokens and whether it was cut."""
    found, length = split.tokenize(*texts, **options), split.data.max_length
    count = len(found["input_ids"])
    tally.tokens += count
    if count >= length:
        tally.truncated += len(split.processor(*texts)["input_ids"]) > length
    return found


class Seq2Seq(AbstractKind):
    """A source text and the target text that an encoder-decoder makes of it."""

    roles: ClassVar = {
        "source": ("source", "input", "document", "article", "question", "text"),
        "target": ("target", "output", "summary", "highlights", "answer"),
    }
    predicts = ("a target text",)

    @override
    def prepare(self, split: Split) -> Any:
        tally, examples = Tally(loss_tokens=0), []
        for index, row in split:
            source, target = (split.text(row, role, index) for role in self.roles)
            with split.preparing(index):
                asked = encoded(split, tally, source)
                answer = split.tokenize(text_target=target)["input_ids"]
            size = len(target.encode()) / max(1, len(answer))
            tally.loss_tokens = (tally.loss_tokens or 0) + len(answer)
            tally.tokens += len(answer)
            tally.without_loss += not answer
            labels = torch.tensor(answer, dtype=torch.long)
            example = as_example(
                input_ids=asked["input_ids"], attention_mask=asked["attention_mask"]
            )
            example.update(labels=labels, bytes_per_token=size)
            examples.append(example | _decoded(split.network, labels))
        tally.examples = len(examples)
        require_loss(tally, split)
        return Sequences(examples, tally)

    @override
    def question(self, split: Split, index: int, row: Mapping[str, Any]) -> tuple[list[int], str]:
        source, target = (split.text(row, role, index) for role in self.roles)
        return list(encoded(split, Tally(), source)["input_ids"]), target


def _decoded(network: Any, labels: Tensor) -> Example:
    """Return the decoder's inputs, which are the labels moved one place to the right."""
    shifted: Any = getattr(network, "prepare_decoder_input_ids_from_labels", None)
    if shifted is not None:
        ids = shifted(labels=labels[None])[0]
    else:
        config: Any = getattr(network, "config", None)
        start = getattr(config, "decoder_start_token_id", None)
        ids = torch.cat([labels.new_tensor([0 if start is None else start]), labels[:-1]])
    return {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}


class QuestionAnswering(AbstractKind):
    """A question, a context, and the place of the answer in it (the columns of SQuAD).

    `answers` is `{text: [...], answer_start: [...]}`, of which the first answer is wanted; without
    any answer it is the first token. An answer beyond `max_length` has no label.
    """

    roles: ClassVar = {"question": ("question",), "context": ("context",)}
    optional: ClassVar = {"answers": ("answers", "answer")}
    predicts = ("start and end positions",)

    @override
    def prepare(self, split: Split) -> Any:
        tally, examples = Tally(loss_tokens=0), []
        labelled = "answers" in split.columns
        for index, row in split:
            question, context = (split.text(row, role, index) for role in self.roles)
            with split.preparing(index):
                found = encoded(
                    split,
                    tally,
                    question,
                    context,
                    truncation="only_second",
                    return_offsets_mapping=True,
                )
                offsets = found.pop("offset_mapping")
                example = as_example(**found)
                if labelled:
                    answers = split.get(row, "answers")
                    span = _span(answers, context, offsets, found.sequence_ids())
                    example.update(as_example(labels=span))
                    known = UNLABELLED not in span
                    tally.loss_tokens = (tally.loss_tokens or 0) + 2 * known
                    tally.without_loss += not known
            examples.append(example)
        tally.examples = len(examples)
        if labelled:
            require_loss(tally, split)
        else:
            tally.loss_tokens = None
        return Sequences(examples, tally)


def _span(answers: Any, context: str, offsets: Any, parts: Any) -> tuple[int, int]:
    """Return the first and last token of the first answer."""
    texts, starts = answers["text"], answers["answer_start"]
    if not len(texts):
        return 0, 0
    first = int(starts[0])
    last = first + len(texts[0])
    if context[first:last] != texts[0]:
        raise ValueError(f"the context has {context[first:last]!r} where {texts[0]!r} should start")
    inside = [
        place
        for place, ((begin, end), part) in enumerate(zip(offsets, parts, strict=True))
        if part == 1 and begin < last and end > first
    ]
    whole = inside and offsets[inside[0]][0] <= first and offsets[inside[-1]][1] >= last
    return (inside[0], inside[-1]) if whole else (UNLABELLED, UNLABELLED)


class MaskedLM(AbstractKind):
    """Texts with hidden tokens, as BERT was trained (arXiv 1810.04805).

    A share `masked` of the tokens is to be predicted; 80% of these are replaced by the mask token,
    10% by a random one. The choice depends on the seed, the split and the row alone, so all
    evaluations hide the same tokens.
    """

    roles: ClassVar = CausalLM.roles
    predicts = ("masked tokens",)

    @override
    def prepare(self, split: Split) -> Any:
        from transformers import DataCollatorForLanguageModeling

        tally, examples = Tally(loss_tokens=0), []
        hide = DataCollatorForLanguageModeling(split.processor, mlm_probability=split.data.masked)
        stage = sum(split.stage.encode())
        for index, row in split:
            text = split.text(row, "text", index)
            with split.preparing(index):
                found = encoded(split, tally, text, return_special_tokens_mask=True)
                special = torch.tensor([found.pop("special_tokens_mask")])
                example = as_example(**found)
                seed = (split.seed * 1_000_003 + stage) * 1_000_003 + index
                hide.generator = torch.Generator().manual_seed(seed % 2**63)
                ids, labels = hide.torch_mask_tokens(example["input_ids"][None].clone(), special)
            count = int((labels != UNLABELLED).sum())
            tally.loss_tokens = (tally.loss_tokens or 0) + count
            tally.without_loss += count == 0
            examples.append({**example, "input_ids": ids[0], "labels": labels[0]})
        tally.examples = len(examples)
        require_loss(tally, split)
        return Sequences(examples, tally)


class Embeddings(AbstractKind):
    """Pairs of texts that belong together, or whose similarity is known (sentence-transformers).

    Without a column of scores, the other pairs of a batch are negatives (`CrossEntropy`); with it,
    the cosine of the pair is to equal the score (`SquaredError`).
    """

    roles: ClassVar = {
        "first": ("anchor", "query", "question", "sentence1", "text1", "premise"),
        "second": ("positive", "passage", "answer", "sentence2", "text2", "hypothesis"),
    }
    optional: ClassVar = {"score": ("score", "similarity_score", "similarity")}
    predicts = ("embeddings",)

    @override
    def prepare(self, split: Split) -> Any:
        tally, examples = Tally(), []
        pooling = split.data.pooling or pooling_of(split.processor)
        reading = Shared(Pairs(pooling, split.data.similarity_scale))
        for index, row in split:
            texts = [split.text(row, role, index) for role in self.roles]
            with split.preparing(index):
                found = [as_example(**encoded(split, tally, text)) for text in texts]
                # a list of sequences is as many rows of the batch
                example: Example = {key: [each[key] for each in found] for key in found[0]}
                if "score" in split.columns:
                    example["labels"] = torch.tensor(float(split.get(row, "score")))
            examples.append({**example, "reading": reading})
        tally.examples = len(examples)
        return Sequences(examples, tally)


_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}


def pooling_of(tokenizer: Any) -> Pooling:
    """Return the pooling that a folder of sentence-transformers states; else the mean.

    Raises:
        ConfigError: it is another one.
    """
    path = Path(str(getattr(tokenizer, "name_or_path", ""))) / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    stated = json.loads(path.read_text())
    mode = stated.get("pooling_mode")
    names = [mode] if mode else [key for key in stated if key.startswith("pooling_mode_")]
    given = [key for key in names if mode or stated[key]]
    known: dict[str, Pooling] = {
        **_POOLINGS,
        "mean": "mean",
        "cls": "cls",
        "lasttoken": "last",
        "max": "max",
    }
    if len(given) == 1 and given[0] in known:
        return known[given[0]]
    raise ConfigError(
        f"{path}: expected one pooling of {', '.join(_POOLINGS)}, got "
        f"{', '.join(map(str, chain(given))) or 'none'}. Set `pooling` of the task."
    )
