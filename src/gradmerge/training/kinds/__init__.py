"""Kinds of task data: one class per kind, by the name under which a task asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import override

from gradmerge.training.examples import Kind
from gradmerge.training.kinds.base import AbstractKind, Split
from gradmerge.training.kinds.causal import CausalLM, Completion
from gradmerge.training.kinds.chat import Chat, Instruction
from gradmerge.training.kinds.classes import (
    ImageClassification,
    TextClassification,
    TokenClassification,
    ZeroShotImageClassification,
)
from gradmerge.training.kinds.texts import Embeddings, MaskedLM, QuestionAnswering, Seq2Seq


class Tensors(AbstractKind):
    """Examples that are mappings of model inputs already, with `labels` if they have any."""

    roles: ClassVar = {}
    predicts = ()
    processor = None
    deduplicated = False

    @override
    def compared(self, columns: Mapping[str, str]) -> tuple[str, ...]:
        return ("input_ids", "pixel_values")

    @override
    def prepare(self, split: Split) -> Any:
        return split.rows


KINDS: Mapping[Kind, AbstractKind] = {
    "causal_lm": CausalLM(),
    "chat": Chat(),
    "completion": Completion(),
    "instruction": Instruction(),
    "seq2seq": Seq2Seq(),
    "text_classification": TextClassification(),
    "token_classification": TokenClassification(),
    "question_answering": QuestionAnswering(),
    "masked_lm": MaskedLM(),
    "embeddings": Embeddings(),
    "image_classification": ImageClassification(),
    "zero_shot_image_classification": ZeroShotImageClassification(),
    "tensors": Tensors(),
}


# In the order of asking: the more specific columns first.
_ORDER: tuple[Kind, ...] = (
    "chat",
    "instruction",
    "token_classification",
    "question_answering",
    "completion",
    "embeddings",
    "seq2seq",
    "image_classification",
    "text_classification",
    "causal_lm",
)


def detect_kind(columns: Sequence[str], predicts: str | None = None) -> Kind | None:
    """Return the first kind whose required columns the data have under their usual names.

    Kinds are tried from the most specific columns to the least; `text_classification` also needs a
    column of labels.

    Args:
        columns: names of the columns.
        predicts: what the network predicts (`AbstractReading.predicts`), which excludes the kinds
            that do not fit it; None if unknown.

    Examples:
        >>> detect_kind(["prompt", "completion", "id"])
        'completion'
        >>> detect_kind(["text"])
        'causal_lm'
    """
    for name in _order(predicts):
        kind = KINDS[name]
        roles = {**kind.roles, **({} if name != "text_classification" else kind.optional)}
        fits = predicts is None or predicts in kind.predicts
        if fits and all(set(usual) & set(columns) for usual in roles.values()):
            return name
    return None


def _order(predicts: str | None) -> tuple[Kind, ...]:
    """Return the kinds to try; those that share their columns with others need a network."""
    extra: tuple[Kind, ...] = ("masked_lm", "zero_shot_image_classification")
    return _ORDER if predicts is None else (*_ORDER, *extra)
