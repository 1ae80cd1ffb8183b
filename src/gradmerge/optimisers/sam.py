"""Sharpness-aware minimisation around any optimiser."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradmerge.errors import ConfigError


class SAM(torch.optim.Optimizer):
    """A base optimiser's step with the gradient from uphill (SAM, arXiv 2010.01412).

        e = rho g / |g|,  g = dL/dz over all parameters
        z is moved by `base` with the gradient at z + e

    Each step evaluates the loss twice on the same batch: it wants a closure that clears gradients,
    computes the loss and calls backward, as trainers give. Where a trainer clips gradients, both
    are clipped; clipping by norm leaves e as it is. In several processes gradients are the same,
    and so are the steps. Accumulating batches and float16's gradient scaler are refused. What a
    training step logs is logged twice, so that the loss at z + e is what remains.

    Args:
        params: the raw coefficients.
        lr: learning rate of the base optimiser.
        rho: length of the perturbation, over all parameters together.
        base: the base optimiser: a class path, or `{class_path: ..., init_args: {...}}`.

    Raises:
        ConfigError: rho is negative, or the base is no optimiser.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        rho: float = 0.05,
        base: str | dict[str, Any] = "torch.optim.Adam",
    ) -> None:
        if not rho >= 0:
            raise ConfigError(f"SAM: rho must not be negative, came {rho}.")
        kind, options = _read(base)
        name = f"{kind.__module__}.{kind.__qualname__}"
        super().__init__(params, {"lr": lr})
        try:
            self.base: torch.optim.Optimizer = kind(self.param_groups, **{"lr": lr, **options})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"SAM: {name} cannot be made of {options}: {error}") from error
        self.rho = rho
        self.defaults = {**self.base.defaults, "rho": rho, "base": name}
        self._share()

    def _share(self) -> None:
        """Schedules and checkpoints see the base's groups and state."""
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    @staticmethod
    def require(accumulated: int, scaled: bool) -> None:
        """Refuse a trainer that two gradients a step do not work with.

        Args:
            accumulated: batches whose gradients are added up for a step.
            scaled: whether gradients are scaled for float16.

        Raises:
            ConfigError: there are several, or they are.
        """
        if accumulated != 1:
            raise ConfigError(
                f"SAM needs the loss of a step twice, and accumulate_grad_batches {accumulated} "
                "keeps only its last batch. Set it to 1 and data.batch_size as high."
            )
        if scaled:
            raise ConfigError(
                "SAM steps through a closure, which float16's gradient scaler has none of. Set "
                "trainer.precision to bf16-mixed or 32-true."
            )

    def step(self, closure: Callable[[], float] | None = None) -> float:  # type: ignore[override]
        """One step.

        Returns:
            The loss at the parameters themselves.

        Raises:
            ConfigError: there is no closure to evaluate the loss a second time.
        """
        if closure is None:
            raise ConfigError(
                "SAM.step: expected a closure that clears gradients, computes the loss and calls "
                "backward, for a step takes two gradients; came none."
            )
        with torch.enable_grad():
            loss = closure()
        kept = self._climb()
        try:
            with torch.enable_grad():
                closure()
        finally:
            with torch.no_grad():
                for parameter, value in kept:
                    parameter.copy_(value)
        self.base.step()
        return loss

    @torch.no_grad()
    def _climb(self) -> list[tuple[Tensor, Tensor]]:
        """Add e, and give the parameters with their values before."""
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not moved:
            return []
        lengths = [torch.linalg.vector_norm(p.grad.double()).to(moved[0].device) for p in moved]
        length = float(torch.linalg.vector_norm(torch.stack(lengths)))
        if not length > 0:
            return []
        kept = [(p, p.detach().clone()) for p in moved]
        for parameter in moved:
            parameter.add_(parameter.grad, alpha=self.rho / length)
        return kept

    def state_dict(self) -> dict[str, Any]:
        """That of the base optimiser: a step leaves nothing else behind."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the base optimiser."""
        self.base.load_state_dict(state_dict)
        self._share()


def _read(base: Any) -> tuple[Any, dict[str, Any]]:
    """Class and options of a specification."""
    spec = vars(base) if hasattr(base, "class_path") else base
    options: Any = {}
    if isinstance(spec, Mapping):
        options = spec.get("init_args") or {}
        options = dict(options if isinstance(options, Mapping) else vars(options))
        spec = spec.get("class_path")
    module, _, name = str(spec).rpartition(".")
    kind: Any
    try:
        kind = getattr(importlib.import_module(module or "torch.optim"), name, None)
    except ImportError:
        kind = None
    wrong = not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer))
    if wrong or kind is SAM:
        raise ConfigError(
            f"SAM: base: expected the class path of an optimiser, e.g. torch.optim.Adam, came "
            f"{base!r}."
        )
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"SAM: base: {kind.__name__} evaluates the loss itself, several times a step, and SAM "
            "gives it one gradient. Take one that steps by a gradient, e.g. torch.optim.Adam."
        )
    return kind, options
