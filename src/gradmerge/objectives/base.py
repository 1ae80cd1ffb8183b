"""What is optimised: a weighted sum of terms over tasks, and regularisers on the coefficients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gradmerge.errors import ConfigError

# The label of a position that has none, as everywhere in torch and transformers.
UNLABELLED = -100


@dataclass(frozen=True)
class Predictions:
    """One batch's predictions, one row a decision (an image, a text, or a token to predict)."""

    logits: Tensor
    """`[rows, classes]`, float32 or wider."""
    labels: Tensor | None = None
    """`[rows]`, where the task has labels; -100 where a row has none."""
    teacher: Tensor | None = None
    """Logits of the task's own source on the same rows, where a term asks for them."""
    shared: bool = False
    """Whether every process holds rows of one global batch, which the mean is over (training in
    several processes). Terms then call collectives: every process has the same tasks, in one order,
    if need be with no row."""
    ensemble: Sequence[Tensor] | None = None
    """Logits of each source on the same rows, where a term asks for them."""


class AbstractTerm(ABC):
    """A loss of one task's predictions."""

    weight: float

    @property
    def needs_labels(self) -> bool:
        """Whether the task must have labels."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """Whether the task's source is run on the same batch."""
        return False

    @property
    def needs_ensemble(self) -> bool:
        """Whether all sources are run on the same batch."""
        return False

    @abstractmethod
    def loss(self, predictions: Predictions) -> Tensor:
        """A scalar, the mean over rows, before `weight`; zero, not NaN, where there is no row.

        Where `predictions.shared`, rows are those of all processes, whose gradients are averaged
        afterwards (see `gradmerge.objectives.regularisers`).
        """


class AbstractRegulariser(ABC):
    """A penalty on the coefficients, independent of data."""

    weight: float

    @abstractmethod
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        """A scalar, before `weight`.

        Args:
            coefficients: `c` of each learned tensor by name, `[sources, *slot]`.
            start: the same at the start of training.
        """


def next_token_rows(
    logits: Tensor, labels: Tensor | None, mask: Tensor | None, shift: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Flatten predictions to rows and drop positions that are not to be predicted.

    Args:
        logits: `[batch, classes]` or `[batch, tokens, vocab]`.
        labels: `[batch]` or `[batch, tokens]`; -100 marks positions without a label.
        mask: `[batch, tokens]`, 0 on padding.
        shift: position t predicts token t + 1 (causal language models).

    Returns:
        Logits `[rows, classes]`, labels `[rows]`, and the kept rows (None when all are kept), so
        that a teacher's logits can be cut in the same way.
    """
    if logits.dim() == 2:
        return logits, labels, None
    if logits.dim() != 3:
        raise ConfigError(
            f"expected logits of shape [batch, classes] or [batch, tokens, vocab], got "
            f"{tuple(logits.shape)}."
        )
    if shift:
        logits = logits[:, :-1]
        labels = None if labels is None else labels[:, 1:]
        mask = None if mask is None else mask[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1])
    keep = None if mask is None or bool(mask.all()) else mask.reshape(-1) != 0
    if labels is not None:
        labels = labels.reshape(-1)
        labelled = labels != UNLABELLED
        if not bool(labelled.all()):
            keep = labelled if keep is None else keep & labelled
    if keep is None:
        return flat, labels, None
    return flat[keep], None if labels is None else labels[keep], keep
