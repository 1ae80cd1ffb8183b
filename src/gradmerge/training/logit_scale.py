"""Learned factor on the logits during training (learned soup, arXiv 2203.05482)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gradmerge.common.errors import ConfigError
from gradmerge.engine.autograd import Deferred
from gradmerge.objectives.base import AbstractTerm


class LogitScale(nn.Module):
    """Factor `exp(a)` on the logits of the merged network, with one trainable scalar a.

    It separates calibration from the merge during training. Evaluation and export do not use it;
    the predicted class is the same with and without it.

    The losses of a step run their backward passes before that of the step itself
    (`MergedModel.accumulate`). They read a copy of the scale, whose gradient `deferred` adds to the
    loss of the step.

    Args:
        start: initial value of the factor.
        terms: terms of the objective. Each needs labels or a teacher, since entropy could be
            minimised by the scale alone.

    Raises:
        ConfigError: `start` is not positive, or a term has neither labels nor a teacher.
    """

    def __init__(self, start: float, terms: Iterable[AbstractTerm]) -> None:
        super().__init__()
        if not (start > 0 and math.isfinite(start)):
            raise ConfigError(f"logit_scale: expected a positive number, got {start}.")
        free = [
            type(t).__name__
            for t in terms
            if not (t.needs_labels or t.needs_teacher or t.needs_ensemble)
        ]
        if free:
            raise ConfigError(
                f"logit_scale: {', '.join(free)} can be minimised by the scale alone, whatever the "
                "merge. Remove logit_scale, or use a term with labels or a teacher."
            )
        self.log_scale = nn.Parameter(torch.tensor(math.log(start)))
        self._copy = self.log_scale.detach().clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogitScale:
        """Apply `.to(...)`, but keep the scalar in float32 or wider, as coefficients are."""
        probe = fn(torch.zeros_like(self.log_scale))
        wide = torch.promote_types(probe.dtype, torch.float32)
        super()._apply(lambda tensor: tensor.to(probe.device, wide), recurse)
        return self

    @property
    def value(self) -> float:
        """Current value of the factor."""
        return math.exp(float(self.log_scale.detach()))

    def begin(self) -> None:
        """Start a step, whose losses use the current scale."""
        self._copy = self.log_scale.detach().clone().requires_grad_()

    def scaled(self, logits: Tensor) -> Tensor:
        """Return the logits times `exp(a)`."""
        return logits * self._copy.exp()

    def deferred(self, inner_scale: float) -> Tensor:
        """Return a zero whose backward adds the gradient of the step to `log_scale`.

        Args:
            inner_scale: factor on the inner losses (of a gradient scaler), taken out again.
        """
        grad = self._copy.grad
        known = torch.zeros_like(self._copy) if grad is None else grad / inner_scale
        zero: Tensor = Deferred.apply(torch.zeros_like(known), [known], self.log_scale)
        return zero
