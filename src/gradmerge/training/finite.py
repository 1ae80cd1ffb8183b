"""A fit stops at the first loss, gradient or coefficient that is NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from typing_extensions import override

from gradmerge.common.errors import NonFiniteError, shorten
from gradmerge.common.finite import is_finite

# A float16 gradient scaler halves its scale at each overflow; below this nothing is left to halve.
_SMALLEST_SCALE = 2.0**-24

_REMEDY = (
    "The fit stops, and its checkpoints stay as they were. Lower the learning rate, start nearer "
    "to the sources (recipe.init), or look for empty or extreme examples in the data."
)


class FiniteModule(lightning.LightningModule):
    """A module whose fit never goes on with NaN or infinity, nor keeps them in a checkpoint."""

    def require_finite_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Reject losses of a step before they change anything; all processes stop together.

        Args:
            losses: the loss of each task of this process.

        Raises:
            NonFiniteError: the message names step and tasks.
        """
        values = torch.stack([value.detach().float() for value in losses.values()]).cpu()
        found = dict(zip(losses, values.tolist(), strict=True))
        wrong = [
            f"{n} ({found[n]:g})" for n, ok in zip(losses, values.isfinite(), strict=True) if not ok
        ]
        trainer = self._trainer
        agreed = not wrong
        if trainer is not None and trainer.world_size > 1:
            agreed = trainer.strategy.reduce_boolean_decision(agreed, all=True)
        if not agreed:
            where = shorten(wrong) or "a task of another process"
            self._stop(f"expected finite losses, got {where}")

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled():  # skips such steps, and then scales less
            if scaler.get_scale() < _SMALLEST_SCALE:
                self._stop("expected finite gradients at some scale of the losses, got none")
            return
        wrong = self._non_finite(lambda parameter: parameter.grad)
        if wrong:
            self._stop(f"expected finite gradients, got NaN or infinity for {shorten(wrong)}")

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        wrong = self._non_finite(lambda parameter: parameter)
        if wrong:  # the gradients were finite: the optimiser's own numbers were too large
            self._stop(
                f"expected finite numbers from the optimiser, got others for {shorten(wrong)}"
            )

    def _non_finite(self, read: Callable[[nn.Parameter], Tensor | None]) -> list[str]:
        found: Iterable[tuple[str, Tensor | None]] = (
            (name, read(parameter)) for name, parameter in self.named_parameters()
        )
        return [n for n, t in found if t is not None and not is_finite(t.detach().reshape(-1))]

    def _stop(self, problem: str) -> None:
        raise NonFiniteError(f"step {self.global_step + 1}: {problem}.\n{_REMEDY}")
