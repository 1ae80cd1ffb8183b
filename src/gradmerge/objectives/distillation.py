"""Loss terms that compare the merged network with its sources, without labels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from typing_extensions import override

from gradmerge.common.errors import ConfigError, require
from gradmerge.common.patterns import require_pattern
from gradmerge.objectives.base import (
    AbstractTerm,
    Leading,
    Predictions,
    Wanted,
    outermost,
)
from gradmerge.objectives.regularisers import mean_over_rows
from gradmerge.objectives.terms import LEAST, require_distributions


@dataclass(frozen=True)
class _Distillation(AbstractTerm):
    """Base class of distillation of distributions."""

    weight: float = 1.0
    """Weight in the objective."""
    temperature: float = 2.0
    """Temperature T that divides the logits."""

    def __post_init__(self) -> None:
        """Validate the temperature."""
        option = f"{type(self).__name__}.temperature"
        require(self.temperature > 0, option, "a positive number", self.temperature)

    def _divergence(self, teacher: Tensor, predictions: Predictions) -> Tensor:
        """Return the mean of `T^2 KL(teacher || merged)`, given the teacher's log-probabilities."""
        require_distributions(self, predictions)
        student = functional.log_softmax(predictions.logits / self.temperature, dim=-1)
        divergence = functional.kl_div(student, teacher, reduction="sum", log_target=True)
        return self._mean(divergence, predictions)

    def _mean(self, total: Tensor, predictions: Predictions) -> Tensor:
        """Return the mean over rows, times T^2, of a divergence that is summed over rows."""
        rows = len(predictions.logits)
        return self.temperature**2 * mean_over_rows(total, rows, predictions.shared)


@dataclass(frozen=True)
class KLToSource(_Distillation):
    """Distillation from the task's own source (DAM, arXiv 2410.08371).

        T^2 KL( softmax(teacher / T) || softmax(merged / T) )

    The teacher is the source of the task. It runs on the same batch, in the same network with its
    own weights, so no second model is held in memory; `MergeModule(teacher_cache=...)` runs it once
    per example. A batch without rows gives zero.

    With `top_k`, all but the teacher's k most probable classes are one class, the rest:

        T^2 ( sum over the top k of p_j log(p_j / q_j) + p_rest log(p_rest / q_rest) ),

    where p is the teacher's and q the merged distribution at temperature T. This is at most the
    full divergence, and equal to it from k = classes - 1 on. A cache then keeps 2 k + 1 numbers per
    row instead of one per class, which large vocabularies need.
    """

    top_k: int | None = None
    """Number of the teacher's most probable classes to match one by one. Default: all."""

    def __post_init__(self) -> None:
        """Validate temperature and number."""
        super().__post_init__()
        require(self.top_k is None or self.top_k >= 1, "KLToSource.top_k", "at least 1", self.top_k)

    @property
    @override
    def needs_teacher(self) -> bool:
        return True

    @property
    @override
    def wanted(self) -> Wanted:
        if self.top_k is None:
            return Wanted(logits=True)
        return Wanted(leading=frozenset({(self.top_k, self.temperature)}))

    @override
    def loss(self, predictions: Predictions) -> Tensor:
        if self.top_k is not None:
            require_distributions(self, predictions)
            leading = predictions.leading_of_teacher(self.top_k, self.temperature)
            total = _Buckets.apply(predictions.logits, leading, self.temperature)
            return self._mean(total, predictions)
        assert predictions.teacher is not None
        teacher = functional.log_softmax(predictions.teacher / self.temperature, dim=-1)
        return self._divergence(teacher, predictions)


class _Buckets(torch.autograd.Function):
    """Sum over rows of the divergence on some classes and all others as one.

    Vocabularies are large, so no log-probability of the others is formed, and the gradient,
    `q_j - p_j` on the classes and `q_i (1 - p_rest / q_rest)` on the others, takes one pass.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Leading, temperature: float) -> Tensor:
        """Return `sum p_j log(p_j / q_j) + p_rest log(p_rest / q_rest)`, a scalar."""
        scaled, classes = logits / temperature, teacher.classes
        q = scaled.softmax(dim=-1)
        largest, place = q.max(dim=-1, keepdim=True)
        log_total = scaled.gather(-1, place) - largest.log()
        own, log_own = q.gather(-1, classes), scaled.gather(-1, classes) - log_total
        q.scatter_(-1, classes, 0.0)
        rest = q.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
        log_p, log_p_rest = teacher.log_p, teacher.log_rest[:, None].clamp_min(LEAST)
        p, p_rest = log_p.exp(), log_p_rest.exp()
        ctx.save_for_backward(q, classes, own - p, 1 - p_rest / rest)
        ctx.temperature = temperature
        on_classes = (p * (log_p - log_own)).sum()
        return on_classes + (p_rest * (log_p_rest - rest.log())).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient in the logits."""
        q, classes, on_classes, on_others = ctx.saved_tensors
        scale = grads[0] / ctx.temperature
        return (q * (on_others * scale)).scatter_(-1, classes, on_classes * scale), None, None


@dataclass(frozen=True)
class KLToEnsemble(_Distillation):
    """Distillation from the ensemble of all sources (Hinton et al., arXiv 1503.02531).

        T^2 KL( mean_k softmax(source_k / T) || softmax(merged / T) )

    Use it for sources that all know the task, such as networks trained on the same data from
    different seeds, whose ensemble is better than each of them. If each source knows only some of
    the tasks, use `KLToSource`. All sources run on the same batch, one after another in the same
    network: no second model is held in memory, only the logits of each; a step costs one more
    forward pass per source. A batch without rows gives zero.

    The gradient equals that of the mean of `T^2 KL(source_k || merged)` over the sources.
    """

    @property
    @override
    def needs_ensemble(self) -> bool:
        return True

    @override
    def loss(self, predictions: Predictions) -> Tensor:
        assert predictions.ensemble is not None
        first, *others = predictions.ensemble
        total = functional.log_softmax(first / self.temperature, dim=-1)
        for logits in others:  # one at a time: logits of a language model are large
            own = functional.log_softmax(logits / self.temperature, dim=-1)
            total = torch.logaddexp(total, own)
        return self._divergence(total - math.log(1 + len(others)), predictions)


@dataclass(frozen=True)
class HardLabels(AbstractTerm):
    """Cross-entropy with the class that the task's own source predicts (SyMerge, arXiv 2412.19098).

        sum over kept rows of -log q(argmax p) / max(1, kept rows)

    Here p is the distribution of the task's source and q the merged one. A row is dropped if the
    two predict different classes and the merged network is the more confident: `max q > max p`.
    A batch without kept rows gives zero, with zero gradient.

    The loss of an evaluation split is the mean of its batch losses weighted by all rows, dropped
    ones included, so it depends slightly on the evaluation batch size. Scores do not.
    """

    weight: float = 1.0
    """Weight in the objective."""
    filtered: bool = True
    """Drop rows on which the merged network disagrees and is the more confident."""

    @property
    @override
    def needs_teacher(self) -> bool:
        return True

    @property
    @override
    def wanted(self) -> Wanted:
        return Wanted(leading=frozenset({(1, 1.0)}))

    @override
    def loss(self, predictions: Predictions) -> Tensor:
        require_distributions(self, predictions)
        leading = predictions.leading_of_teacher(1, 1.0)
        targets, confidence = leading.classes[:, 0], leading.log_p[:, 0]
        log_q = functional.log_softmax(predictions.logits, dim=-1)
        losses = -log_q.gather(-1, targets[:, None])[:, 0]
        largest, own = log_q.detach().max(dim=-1)
        kept = (own == targets) | (largest <= confidence)
        if not self.filtered:
            kept = torch.ones_like(kept)
        total = torch.where(kept, losses, 0.0).sum()
        return mean_over_rows(total, kept.sum(), predictions.shared)


@dataclass(frozen=True)
class HiddenStates(AbstractTerm):
    """Squared distance of hidden states from those of the task's own source (Expert Merging, arXiv
    2509.25712).

        mean over layers, tokens and features of (h_l(merged) - h_l(source))^2

    Both networks run end to end on the same batch; their gradients pass through all layers below.
    Padding does not count. `reduce: sum` adds over layers and features instead, as the paper
    writes it: `sum_l |h_l(merged) - h_l(source)|^2`, the mean over tokens; the published code
    takes the mean, to which its weight of 0.1 belongs. An output without an axis of tokens, such as
    a feature map, is one vector per example. A module that runs several times per forward pass
    counts with its last run.

    The loss of an evaluation split is the mean of its batch losses, weighted by the rows of their
    predictions.
    """

    weight: float = 0.1
    """Weight in the objective."""
    layers: tuple[str, ...] = (r"\b(layers?|h|blocks?)\.\d+$",)
    """Regular expressions of names of modules whose outputs are compared; of modules within one
    another, the outermost match counts. Default: every transformer block."""
    reduce: Literal["mean", "sum"] = field(default="mean", kw_only=True)
    """Reduction over layers and features."""

    def __post_init__(self) -> None:
        """Validate expressions and reduction."""
        for pattern in self.layers:
            require_pattern("HiddenStates.layers", pattern)
        known = self.reduce in ("mean", "sum")
        require(known, "HiddenStates.reduce", "mean or sum", repr(self.reduce))

    @property
    @override
    def needs_teacher(self) -> bool:
        return True

    @property
    @override
    def wanted(self) -> Wanted:
        return Wanted(layers=self.layers)

    @override
    def loss(self, predictions: Predictions) -> Tensor:
        expected = predictions.teacher_hidden
        names = outermost(self.layers, [name for name in predictions.hidden if name in expected])
        losses = [self._distance(predictions, name) for name in names]
        if not losses:
            raise ConfigError(
                f"HiddenStates.layers: expected modules of which both networks return hidden "
                f"states, got none that {', '.join(self.layers)} matches."
            )
        total = torch.stack(losses)
        return total.mean() if self.reduce == "mean" else total.sum()

    def _distance(self, predictions: Predictions, name: str) -> Tensor:
        """Return the squared distance of one layer, a mean over tokens."""
        got, expected = predictions.hidden[name], predictions.teacher_hidden[name]
        wide = torch.promote_types(got.dtype, torch.float32)
        total = (got.to(wide) - expected.to(wide)).square().sum()
        features = got.shape[-1] if self.reduce == "mean" else 1
        return mean_over_rows(total, len(got), predictions.shared) / features
