"""Terms of an objective that look at predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from gradmerge.errors import ConfigError
from gradmerge.objectives.base import UNLABELLED, AbstractTerm, Predictions
from gradmerge.objectives.regularisers import log_mean_over_rows, mean_over_rows

# log p is -inf only beyond float32's range; 0 * inf would be NaN where the limit is 0.
_LEAST = -1e4


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
                f"CrossEntropy: label_smoothing must lie in [0, 1), got {self.label_smoothing}."
            )

    @property
    def needs_labels(self) -> bool:
        """Yes."""
        return True

    @override
    def loss(self, predictions: Predictions) -> Tensor:
        logits, labels = predictions.logits, predictions.labels
        assert labels is not None
        total = functional.cross_entropy(
            logits,
            labels,
            ignore_index=UNLABELLED,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return mean_over_rows(total, (labels != UNLABELLED).sum(), predictions.shared)


@dataclass(frozen=True)
class Entropy(AbstractTerm):
    """`mean_i H(p_i) / log C`, the mean entropy of the predictions (AdaMerging, arXiv 2310.02575).

    Divided by log C, tasks with many classes do not outweigh those with few. Sharpening alone can
    collapse to one class for everything; `marginal` rewards varied predictions over the batch:
    `- marginal * H(mean_i p_i) / log C`. In training the means are over the rows of all processes.
    A batch without rows gives zero.

    `H(mean p)` is not a mean over rows. The loss of an evaluation split is the mean of its batches'
    losses, weighted by their rows, so with `marginal` it depends on how the split is cut: on the
    evaluation batch size and on the number of processes. Scores do not.
    """

    weight: float = 1.0
    marginal: float = 0.0
    """Weight of the entropy of the batch's mean prediction."""

    @override
    def loss(self, predictions: Predictions) -> Tensor:
        log_p = functional.log_softmax(predictions.logits, dim=-1)
        classes = predictions.logits.shape[-1]
        scale = 1 / math.log(classes) if classes > 1 else 1.0
        loss = mean_over_rows(_entropy(log_p).sum(), len(log_p), predictions.shared)
        if self.marginal:
            log_mean = log_mean_over_rows(log_p.clamp_min(_LEAST), predictions.shared)
            if log_mean is not None:
                loss = loss - self.marginal * _entropy(log_mean)
        return loss * scale


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.clamp_min(_LEAST)).sum(dim=-1)


@dataclass(frozen=True)
class _Distillation(AbstractTerm):
    """What distilling has in common, whoever the teacher is."""

    weight: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Check the temperature."""
        if self.temperature <= 0:
            raise ConfigError(
                f"{type(self).__name__}: temperature must be positive, got {self.temperature}."
            )

    def _divergence(self, teacher: Tensor, predictions: Predictions) -> Tensor:
        """`T^2 KL(teacher || merged)`, a mean over rows; of the teacher log-probabilities at T."""
        t = self.temperature
        student = functional.log_softmax(predictions.logits / t, dim=-1)
        divergence = functional.kl_div(student, teacher, reduction="sum", log_target=True)
        return t * t * mean_over_rows(divergence, len(student), predictions.shared)


@dataclass(frozen=True)
class KLToSource(_Distillation):
    """`T^2 KL( softmax(teacher / T) || softmax(merged / T) )`, distilling the task's own source.

    The teacher is the source of the task, run on the same batch by the same network with its own
    weights: no second model is held (DAM, arXiv 2410.08371). A batch without rows gives zero.
    """

    @property
    def needs_teacher(self) -> bool:
        """Yes."""
        return True

    @override
    def loss(self, predictions: Predictions) -> Tensor:
        assert predictions.teacher is not None
        teacher = functional.log_softmax(predictions.teacher / self.temperature, dim=-1)
        return self._divergence(teacher, predictions)


@dataclass(frozen=True)
class KLToEnsemble(_Distillation):
    """`T^2 KL( mean_k softmax(source_k / T) || softmax(merged / T) )`, distilling the ensemble of
    all sources (Hinton et al., arXiv 1503.02531).

    For sources that all know the task, such as networks trained on the same data from different
    seeds: there the ensemble is better than any of them. Where each knows a part, its teacher is
    the task's own source (`KLToSource`). All sources run on the same batch by the same network, one
    after another: no second model is held, but the logits of each; a step costs a forward pass a
    source more. A batch without rows gives zero.

    The gradient is that of the mean of `T^2 KL(source_k || merged)` over sources.
    """

    @property
    def needs_ensemble(self) -> bool:
        """Yes."""
        return True

    @override
    def loss(self, predictions: Predictions) -> Tensor:
        assert predictions.ensemble is not None
        first, *others = predictions.ensemble
        total = functional.log_softmax(first / self.temperature, dim=-1)
        for logits in others:  # one at a time: of a language model each is large
            own = functional.log_softmax(logits / self.temperature, dim=-1)
            total = torch.logaddexp(total, own)
        return self._divergence(total - math.log(1 + len(others)), predictions)
