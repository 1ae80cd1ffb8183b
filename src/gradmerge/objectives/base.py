"""Base classes of loss terms and regularisers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gradmerge.common.errors import ConfigError

# Label of a position without a label, the convention of torch and transformers.
UNLABELLED = -100


@dataclass(frozen=True)
class Predictions:
    """Predictions of one batch: one row per decision (an image, a text, or a token to predict)."""

    logits: Tensor
    """Logits `[rows, classes]`, float32 or wider."""
    labels: Tensor | None = None
    """Labels `[rows]`, if the task has any; -100 in rows without one."""
    teacher: Tensor | None = None
    """Logits of the task's own source on the same rows, if a term needs them."""
    shared: bool = False
    """True if every process holds rows of one global batch, over which the mean is taken. Terms
    then call collectives: all processes run the same tasks in the same order, possibly with no
    rows."""
    ensemble: Sequence[Tensor] | None = None
    """Logits of each source on the same rows, if a term needs them."""


class AbstractTerm(ABC):
    """Loss on the predictions of one task."""

    weight: float

    @property
    def needs_labels(self) -> bool:
        """True if the task must have labels."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """True if the task's own source must run on the same batch."""
        return False

    @property
    def needs_ensemble(self) -> bool:
        """True if all sources must run on the same batch."""
        return False

    @property
    def adds_over_rows(self) -> bool:
        """True if the loss of a batch is the mean of its rows' own losses, without other inputs.

        Evaluation may then give it some rows at a time.
        """
        return False

    @abstractmethod
    def loss(self, predictions: Predictions) -> Tensor:
        """Return the mean over rows, a scalar, before `weight`; zero, not NaN, without rows.

        With `predictions.shared` the mean is over the rows of all processes, whose gradients are
        averaged afterwards.
        """


class AbstractRegulariser(ABC):
    """Penalty on the coefficients, independent of data."""

    weight: float

    @abstractmethod
    def penalty(self, coefficients: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        """Return a scalar, before `weight`.

        Args:
            coefficients: `c` of each learned tensor by name, `[sources, *slot]`.
            start: coefficients at the start of training.
        """


def next_token_rows(
    logits: Tensor, labels: Tensor | None, mask: Tensor | None, shift: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Flatten predictions to rows and drop positions that are not to be predicted.

    Args:
        logits: `[batch, classes]` or `[batch, tokens, vocab]`.
        labels: `[batch]` or `[batch, tokens]`; -100 marks positions without a label.
        mask: `[batch, tokens]`, 0 on padding.
        shift: True if position t predicts token t + 1 (causal language models).

    Returns:
        Logits `[rows, classes]`, labels `[rows]`, and a mask of the kept rows (None if all are
        kept), by which the logits of a teacher can be filtered in the same way.

    Raises:
        ConfigError: the logits have neither two nor three axes.
    """
    if logits.dim() == 2:
        return logits, labels, None
    if logits.dim() != 3:
        raise ConfigError(
            f"expected logits of shape [batch, classes] or [batch, tokens, vocab], got "
            f"{tuple(logits.shape)}."
        )
    if shift:
        labels = None if labels is None else labels[:, 1:]
        mask = None if mask is None else mask[:, 1:]
    keep = None if mask is None or bool(mask.all()) else mask.reshape(-1) != 0
    if labels is not None:
        labels = labels.reshape(-1)
        labelled = labels != UNLABELLED
        if not bool(labelled.all()):
            keep = labelled if keep is None else keep & labelled
    length = logits.shape[1] - shift
    if keep is None:
        return logits[:, :length].flatten(0, 1), labels, None
    # The rows are taken from the whole tensor, of which no shifted copy is made.
    index = keep.nonzero()[:, 0]
    index = index + index // length * (logits.shape[1] - length)
    rows = logits.flatten(0, 1).index_select(0, index.to(logits.device))
    return rows, None if labels is None else labels[keep], keep
