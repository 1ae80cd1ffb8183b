"""Loss terms on predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from gradmerge.common.errors import ConfigError, require
from gradmerge.objectives.base import UNLABELLED, AbstractTerm, Predictions
from gradmerge.objectives.regularisers import log_mean_over_rows, mean_over_rows

# Lower bound of log p: where log p is -inf, p log p would be NaN instead of 0.
LEAST = -1e4


@dataclass(frozen=True)
class CrossEntropy(AbstractTerm):
    """Cross-entropy with the labels, for classification and next-token prediction.

        sum over labelled rows of -log p(label) / max(1, labelled rows)

    Rows with label -100 are ignored. A batch without labelled rows gives zero, with zero gradient.
    """

    weight: float = 1.0
    """Weight in the objective."""
    label_smoothing: float = 0.0
    """Share of the target that is distributed evenly over all classes, in [0, 1)."""

    def __post_init__(self) -> None:
        """Validate the smoothing."""
        share = self.label_smoothing
        require(0 <= share < 1, "CrossEntropy.label_smoothing", "a share in [0, 1)", share)

    @property
    @override
    def needs_labels(self) -> bool:
        return True

    @property
    @override
    def adds_over_rows(self) -> bool:
        return True

    @override
    def loss(self, predictions: Predictions) -> Tensor:
        logits, labels = predictions.logits, predictions.labels
        assert labels is not None
        if labels.is_floating_point():
            raise ConfigError(
                "CrossEntropy: expected class numbers as labels, got numbers of type "
                f"{str(labels.dtype).removeprefix('torch.')}. Give integers, or use SquaredError."
            )
        try:
            total = functional.cross_entropy(
                logits,
                labels,
                ignore_index=UNLABELLED,
                label_smoothing=self.label_smoothing,
                reduction="sum",
            )
        except IndexError as error:  # on a CPU
            classes = logits.shape[-1]
            raise ConfigError(
                f"CrossEntropy: expected class numbers from 0 to {classes - 1} as labels, or "
                f"{UNLABELLED}, got {int(labels.min())} to {int(labels.max())}. {error}"
            ) from error
        return mean_over_rows(total, (labels != UNLABELLED).sum(), predictions.shared)


@dataclass(frozen=True)
class SquaredError(AbstractTerm):
    """Squared difference of a predicted number and its label, for similarities and regression.

        sum over labelled rows of (prediction - label)^2 / max(1, labelled rows)

    Rows with label -100 are ignored. A batch without labelled rows gives zero, with zero gradient.
    """

    weight: float = 1.0
    """Weight in the objective."""

    @property
    @override
    def needs_labels(self) -> bool:
        return True

    @override
    def loss(self, predictions: Predictions) -> Tensor:
        logits, labels = predictions.logits, predictions.labels
        assert labels is not None
        if logits.shape[-1] != 1 or labels.dim() != 1:
            raise ConfigError(
                "SquaredError: expected one number per row, got predictions "
                f"{tuple(logits.shape)} and labels {tuple(labels.shape)}. Use CrossEntropy for "
                "classes; pairs of texts need a column of scores."
            )
        labelled = labels != UNLABELLED
        errors = (logits[:, 0] - labels.to(logits)).square()
        total = torch.where(labelled, errors, 0.0).sum()
        return mean_over_rows(total, labelled.sum(), predictions.shared)


@dataclass(frozen=True)
class Entropy(AbstractTerm):
    """Mean entropy of the predictions, without labels (AdaMerging, arXiv 2310.02575).

        mean_i H(p_i) / log C - marginal * H(mean_i p_i) / log C,   C classes

    Division by log C keeps tasks with many classes from dominating. Minimising the entropy alone
    can collapse to one class for all inputs; `marginal` rewards varied predictions within a batch.
    In training, means are over the rows of all processes. A batch without rows gives zero.

    `H(mean p)` is not a mean over rows. The loss of an evaluation split is the mean of its batch
    losses, weighted by rows, so with `marginal` it depends on the evaluation batch size and on the
    number of processes. Scores do not.
    """

    weight: float = 1.0
    """Weight in the objective."""
    marginal: float = 0.0
    """Weight of the entropy of the mean prediction of a batch."""

    @property
    @override
    def adds_over_rows(self) -> bool:
        return self.marginal == 0

    @override
    def loss(self, predictions: Predictions) -> Tensor:
        require_distributions(self, predictions)
        log_p = functional.log_softmax(predictions.logits, dim=-1)
        classes = predictions.logits.shape[-1]
        scale = 1 / math.log(classes) if classes > 1 else 1.0
        loss = mean_over_rows(_entropy(log_p).sum(), len(log_p), predictions.shared)
        if self.marginal:
            log_mean = log_mean_over_rows(log_p.clamp_min(LEAST), predictions.shared)
            if log_mean is not None:
                loss = loss - self.marginal * _entropy(log_mean)
        return loss * scale


def require_distributions(term: AbstractTerm, predictions: Predictions) -> None:
    """Reject rows that are one number each, whose softmax is 1 whatever it is."""
    labels = predictions.labels
    if labels is not None and labels.is_floating_point() and predictions.logits.shape[-1] == 1:
        raise ConfigError(
            f"{type(term).__name__}: expected a distribution per row, got one number (a similarity "
            "or another quantity), whose gradient would be 0. Use SquaredError."
        )


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.clamp_min(LEAST)).sum(dim=-1)
