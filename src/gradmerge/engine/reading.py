"""Readings: how a network's outputs on a batch become rows of logits and labels.

A row is one decision: a class of an image or text, the next token, the start of an answer. Terms of
an objective and scores see rows only. What a network predicts is known by its class; a batch that
is read in another way carries its own reading under the key `reading`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.objectives import next_token_rows

Rows = tuple[Tensor, "Tensor | None", "Tensor | None"]
Measure = Literal["language", "classes", "masked", "spans", "pairs", "similarity"]
Pooling = Literal["mean", "cls", "last", "max"]

# Entries of a batch that are not inputs of the network.
NOT_INPUTS = frozenset({"labels", "bytes_per_token", "reading", "start_positions", "end_positions"})

# Logit of a position that cannot be an answer: exp of it is 0, and differences of it are finite.
_NEVER = -1e4


class AbstractReading(ABC):
    """Conversion of a network's outputs to rows."""

    predicts: str
    """What the network predicts, for error messages."""

    @abstractmethod
    def rows(self, output: Any, batch: Mapping[str, Any], network: nn.Module) -> Rows:
        """Return logits `[rows, classes]`, labels `[rows]`, and a mask of the rows kept, or None.

        Raises:
            ConfigError: the output is of another kind.
        """

    @property
    @abstractmethod
    def measures(self) -> tuple[Measure, ...]:
        """The kinds of scores that rows may have; the first unless their labels are numbers."""

    def measure(self, labels: Tensor | None) -> Measure:
        """Return the kind of scores that rows with these labels have."""
        return self.measures[-1 if labels is not None and labels.is_floating_point() else 0]


@dataclass
class Logits(AbstractReading):
    """Logits of the output, `[batch, classes]` or `[batch, tokens, classes]`."""

    predicts: str
    scored: Measure = "classes"
    shift: bool = False
    """True if position t predicts token t + 1."""
    mask: str = "attention_mask"
    """Key of the mask of the tokens that are predicted."""

    @override
    def rows(self, output: Any, batch: Mapping[str, Any], network: nn.Module) -> Rows:
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"{type(network).__name__}: expected a tensor of logits or an output with "
                f"`logits`, got {type(output).__name__}."
            )
        mask = batch.get(self.mask)
        rows, labels, keep = next_token_rows(logits, batch.get("labels"), mask, self.shift)
        # only now, since a vocabulary is large and the answers of a chat are few of its tokens
        return wide(rows), labels, keep

    @property
    @override
    def measures(self) -> tuple[Measure, ...]:
        return (self.scored,)


@dataclass
class Spans(AbstractReading):
    """Start and end of an answer (extractive question answering), two rows per example.

    The classes are the positions of the padded text; those of padding have probability 0. Labels
    are `[batch, 2]`, or `start_positions` and `end_positions` as in transformers.
    """

    predicts: str = "start and end positions"

    @override
    def rows(self, output: Any, batch: Mapping[str, Any], network: nn.Module) -> Rows:
        logits = torch.stack([wide(output.start_logits), wide(output.end_logits)], dim=1)
        if (mask := batch.get("attention_mask")) is not None:
            logits = logits.masked_fill(mask[:, None].to(logits.device) == 0, _NEVER)
        labels = batch.get("labels")
        if labels is None and "start_positions" in batch:
            labels = torch.stack([batch["start_positions"], batch["end_positions"]], dim=1)
        return logits.flatten(0, 1), None if labels is None else labels.reshape(-1), None

    @property
    @override
    def measures(self) -> tuple[Measure, ...]:
        return ("spans",)


@dataclass
class Pairs(AbstractReading):
    """Cosine similarities of pairs of texts; rows 2i and 2i + 1 of a batch are a pair (a_i, b_i).

    Without labels, row i is `scale * cos(a_i, b_j)` over the batch's b_j, with the label i: the
    cross-entropy is InfoNCE with the other pairs as negatives (arXiv 1807.03748). With labels, the
    wanted similarities, row i is the single number `cos(a_i, b_i)`.
    """

    pooling: Pooling = "mean"
    scale: float = 20.0
    predicts: str = "embeddings"

    @override
    def rows(self, output: Any, batch: Mapping[str, Any], network: nn.Module) -> Rows:
        hidden = wide(output.last_hidden_state)
        mask = batch.get("attention_mask")
        mask = torch.ones(hidden.shape[:2]) if mask is None else mask
        embedded = functional.normalize(pool(hidden, mask.to(hidden.device), self.pooling), dim=-1)
        first, second = embedded[0::2], embedded[1::2]
        if (wanted := batch.get("labels")) is not None:
            return (first * second).sum(dim=-1, keepdim=True), wanted, None
        labels = torch.arange(len(first), device=hidden.device)
        return self.scale * first @ second.mT, labels, None

    @property
    @override
    def measures(self) -> tuple[Measure, ...]:
        return ("pairs", "similarity")


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Return one embedding per text, `[batch, width]`, of its tokens' `[batch, tokens, width]`."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":  # of the text, whichever side is padded
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        last = (positions * (mask != 0)).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    kept = (mask != 0)[..., None]
    if pooling == "max":
        return hidden.masked_fill(~kept, -torch.inf).amax(dim=1)
    return (hidden * kept).sum(dim=1) / kept.sum(dim=1)


@dataclass
class ZeroShot(AbstractReading):
    """Similarity of images and texts that describe the classes (CLIP, arXiv 2103.00020).

    The texts of a class, `templates` in a row, are averaged as CLIP does: the mean of their
    normalised embeddings, normalised again.
    """

    templates: int = 1
    texts: str = ""
    """Digest of the texts: batches with the same may share the embeddings of the classes."""
    predicts: str = "the similarity of images and texts"

    def centres(self, embedded: Tensor) -> Tensor:
        """Return an embedding per class, `[classes, width]`, of normalised ones per text."""
        mean = embedded.unflatten(0, (-1, self.templates)).mean(dim=1)
        return functional.normalize(mean, dim=-1)

    @override
    def rows(self, output: Any, batch: Mapping[str, Any], network: nn.Module) -> Rows:
        logits, texts = wide(output.logits_per_image), wide(output.text_embeds)
        if self.templates > 1:
            bias: Any = getattr(network, "logit_bias", None)  # SigLIP's
            shift = 0.0 if bias is None else wide(bias)
            mean = (logits - shift).unflatten(1, (-1, self.templates)).mean(dim=2)
            centre = texts.unflatten(0, (-1, self.templates)).mean(dim=1)
            logits = mean / centre.norm(dim=-1) + shift
        return logits, batch.get("labels"), None

    @property
    @override
    def measures(self) -> tuple[Measure, ...]:
        return ("classes",)


NEXT_TOKEN = Logits("the next token", "language", shift=True)
TARGET = Logits("a target text", "language", mask="decoder_attention_mask")
MASKED = Logits("masked tokens", "masked")
TOKENS = Logits("a class per token")
CLASSES = Logits("classes")
SPANS, EMBEDDINGS, SIMILARITY = Spans(), Pairs(), ZeroShot()

_BY_NAME: tuple[tuple[tuple[str, ...], AbstractReading], ...] = (
    (("ForCausalLM", "LMHeadModel"), NEXT_TOKEN),
    (("ForQuestionAnswering", "ForQuestionAnsweringSimple"), SPANS),
    (("ForTokenClassification",), TOKENS),
    (("ForMaskedLM",), MASKED),
    (("Classification",), CLASSES),
)


def reading_of(network: nn.Module, batch: Mapping[str, Any] | None = None) -> AbstractReading:
    """Return how a network's outputs are read: as a batch says, else by the network's class."""
    own = (batch or {}).get("reading")
    if own is not None:
        return own
    name = type(network).__name__
    for endings, reading in _BY_NAME:
        if name.endswith(endings):
            return reading
    config: Any = getattr(network, "config", None)
    if config is None:
        return CLASSES
    if getattr(config, "is_encoder_decoder", False):
        return TARGET
    if name.endswith("ForConditionalGeneration"):  # a decoder that also sees or hears
        return NEXT_TOKEN
    if hasattr(network, "get_image_features") and hasattr(network, "get_text_features"):
        return SIMILARITY
    return EMBEDDINGS if name.endswith("Model") else CLASSES


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
