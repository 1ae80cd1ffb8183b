"""A learned factor on the logits in training (learned soup, arXiv 2203.05482)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gradmerge.engine.autograd import Deferred
from gradmerge.errors import ConfigError
from gradmerge.objectives.base import AbstractTerm


class LogitScale(nn.Module):
    """`exp(a)` with one trainable number a, a factor on the merged network's logits.

    An aid to training alone: the calibration of the logits is learned apart from the merge.
    Evaluation and export do without it, and the class with the largest logit is the same.

    The losses of a step run their backward before the step's own (`MergedModel.accumulate`). They
    take the scale from a copy, whose gradient `deferred` brings back into the step's loss.

    Args:
        start: the factor at the start.
        terms: the objective's; each must have a target, for entropy falls with the scale alone.

    Raises:
        ConfigError: the start is not positive, or a term has neither labels nor a teacher.
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
                f"logit_scale: {', '.join(free)} falls with the scale of the logits alone, "
                "whatever the merge. Leave it out, or take a term with labels or a teacher."
            )
        self.log_scale = nn.Parameter(torch.tensor(math.log(start)))
        self._copy = self.log_scale.detach().clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogitScale:
        """Follow `.to(...)`: the number stays in float32 or wider, as coefficients do."""
        probe = fn(torch.zeros_like(self.log_scale))
        wide = torch.promote_types(probe.dtype, torch.float32)
        super()._apply(lambda tensor: tensor.to(probe.device, wide), recurse)
        return self

    @property
    def value(self) -> float:
        """The factor."""
        return math.exp(float(self.log_scale.detach()))

    def begin(self) -> None:
        """Start a step: its losses take the scale as it is now."""
        self._copy = self.log_scale.detach().clone().requires_grad_()

    def scaled(self, logits: Tensor) -> Tensor:
        """`exp(a)` times the logits."""
        return logits * self._copy.exp()

    def deferred(self, inner_scale: float) -> Tensor:
        """Zero, whose backward adds the step's gradient to `log_scale`.

        Args:
            inner_scale: the factor on the losses inside, which is taken out again.
        """
        grad = self._copy.grad
        known = torch.zeros_like(self._copy) if grad is None else grad / inner_scale
        zero: Tensor = Deferred.apply(torch.zeros_like(known), [known], self.log_scale)
        return zero
