"""Terms of an objective that look at predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gradmerge.errors import ConfigError
from gradmerge.objectives.base import UNLABELLED, AbstractTerm, Predictions


@dataclass(frozen=True)
class CrossEntropy(AbstractTerm):
    """`sum over labelled rows of -log p(label) / max(1, labelled rows)`, for classification and for
    the next token of a language model.

    Rows labelled -100 do not count. A batch without any labelled row gives zero, with zero
    gradient.
    """

    weight: float = 1.0
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes."""

    def __post_init__(self) -> None:
        """Check the smoothing."""
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"CrossEntropy: label_smoothing must lie in [0, 1), came {self.label_smoothing}."
            )

    @property
    def needs_labels(self) -> bool:
        """Yes."""
        return True

    def loss(self, predictions: Predictions) -> Tensor:
        """See `AbstractTerm.loss`."""
        logits, labels = predictions.logits, predictions.labels
        assert labels is not None
        total = functional.cross_entropy(
            logits,
            labels,
            ignore_index=UNLABELLED,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return total / (labels != UNLABELLED).sum().clamp_min(1)


@dataclass(frozen=True)
class Entropy(AbstractTerm):
    """`H(p) / log C`, the mean entropy of the predictions (AdaMerging, arXiv 2310.02575).

    Divided by log C, tasks with many classes do not outweigh those with few. Sharpening alone can
    collapse to one class for everything; `marginal` rewards varied predictions over the batch:
    `- marginal * H(mean p) / log C`. A batch without rows gives zero.
    """

    weight: float = 1.0
    marginal: float = 0.0
    """Weight of the entropy of the batch's mean prediction."""

    def loss(self, predictions: Predictions) -> Tensor:
        """See `AbstractTerm.loss`."""
        if len(predictions.logits) == 0:
            return predictions.logits.sum()
        log_p = functional.log_softmax(predictions.logits, dim=-1)
        classes = predictions.logits.shape[-1]
        scale = 1 / math.log(classes) if classes > 1 else 1.0
        loss = _entropy(log_p).mean()
        if self.marginal:
            log_mean = torch.logsumexp(log_p, dim=0) - math.log(len(log_p))
            loss = loss - self.marginal * _entropy(log_mean)
        return loss * scale


def _entropy(log_p: Tensor) -> Tensor:
    # log p is -inf only beyond float32's range; 0 * inf would be NaN where the limit is 0.
    return -(log_p.exp() * log_p.clamp_min(-1e4)).sum(dim=-1)


@dataclass(frozen=True)
class KLToSource(AbstractTerm):
    """`T^2 KL( softmax(teacher / T) || softmax(merged / T) )`, distilling the task's own source.

    The teacher is the source of the task, run on the same batch by the same network with its own
    weights: no second model is held (DAM, arXiv 2410.08371). A batch without rows gives zero.
    """

    weight: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Check the temperature."""
        if self.temperature <= 0:
            raise ConfigError(f"KLToSource: temperature must be positive, came {self.temperature}.")

    @property
    def needs_teacher(self) -> bool:
        """Yes."""
        return True

    def loss(self, predictions: Predictions) -> Tensor:
        """See `AbstractTerm.loss`."""
        assert predictions.teacher is not None
        t = self.temperature
        student = functional.log_softmax(predictions.logits / t, dim=-1)
        teacher = functional.log_softmax(predictions.teacher / t, dim=-1)
        divergence = functional.kl_div(student, teacher, reduction="sum", log_target=True)
        return t * t * divergence / max(1, len(student))
