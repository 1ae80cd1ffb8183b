"""Optimisers used by published merging methods and missing from torch, and a schedule."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import ParamsT

from gradmerge.common.errors import ConfigError, require

__all__ = ["SAM", "CosineDecay", "LogisticNoise", "MoFO"]


class CosineDecay(LRScheduler):
    """Cosine from the optimiser's learning rate to a share of it, over exactly the steps of a fit.

        lr_t = lr (end + (1 - end) (1 + cos(pi t / T)) / 2),   t = 0..T

    The number of steps T is the trainer's (`max_steps`, or epochs times their steps), so it is
    stated once; a fit that is resumed with another length follows the new one.

    Args:
        optimizer: optimiser whose learning rates are set.
        end: share of the learning rate at the last step, in [0, 1].
        steps: T. Default: the steps of the fit, which its trainer sets; without a trainer the rate
            is constant until it is set.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, end: float = 0.06, steps: int | None = None
    ) -> None:
        require(0 <= end <= 1, "CosineDecay.end", "a share in [0, 1]", end)
        require(steps is None or steps >= 1, "CosineDecay.steps", "at least 1", steps)
        self.end = end
        self.steps = steps
        super().__init__(optimizer)

    def follow(self, steps: float) -> None:
        """Take the number of steps of the fit, unless one was given."""
        if self.steps is None and 0 < steps < math.inf:
            self.steps = int(steps)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rates of the current step."""
        if self.steps is None:
            return list(self.base_lrs)
        done = min(self.last_epoch, self.steps) / self.steps
        share = self.end + (1 - self.end) * (1 + math.cos(math.pi * done)) / 2
        return [rate * share for rate in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position; the length belongs to the fit that continues."""
        super().load_state_dict({**state_dict, "steps": self.steps})


class MoFO(torch.optim.Optimizer):
    """Momentum-filtered AdamW (arXiv 2407.20999), the optimiser of DAM (arXiv 2410.08371).

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        z = z - lr weight_decay z
        z = z - lr F (.) (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    where F is 1 on the `ceil(fraction n)` entries of a parameter (of n entries) with the largest
    |m|, and 0 elsewhere. A parameter holds the raw coefficients of one tensor for all sources
    together (DAM filters each source separately), or the table shared by a coarser granularity.

    Args:
        params: raw coefficients.
        lr: learning rate.
        betas: b1 and b2.
        eps: term added to the square root for numerical stability.
        weight_decay: decoupled weight decay, applied to all entries.
        fraction: fraction of the entries that are updated, in (0, 1].

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fraction: float = 0.3,
    ) -> None:
        require(0 < fraction <= 1, "MoFO.fraction", "a number in (0, 1]", fraction)
        require(all(0 <= beta < 1 for beta in betas), "MoFO.betas", "numbers in [0, 1)", betas)
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        for name, value in defaults.items():
            require(value >= 0, f"MoFO.{name}", "at least 0", value)
        super().__init__(params, {**defaults, "betas": tuple(betas), "fraction": fraction})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimisation step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        (b1, b2), rate = group["betas"], group["lr"]
        state["step"] += 1
        steps = float(state["step"])
        m = state["exp_avg"].lerp_(grad, 1 - b1)
        v = state["exp_avg_sq"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
        if group["weight_decay"]:
            parameter.mul_(1 - rate * group["weight_decay"])
        update = (m / (1 - b1**steps)).div_((v / (1 - b2**steps)).sqrt_().add_(group["eps"]))
        moved = max(1, math.ceil(group["fraction"] * m.numel())) if m.numel() else 0
        if moved < m.numel():
            chosen = m.abs().flatten().topk(moved, sorted=False).indices
            kept = torch.zeros_like(update).flatten().index_fill_(0, chosen, 1.0)
            update.mul_(kept.view_as(update))
        parameter.sub_(update, alpha=rate)


class AbstractPerturbed(torch.optim.Optimizer):
    """Base class of optimisers that step by the gradient at another point than the parameters.

    A step evaluates the loss itself, so it needs a closure that clears the gradients, computes the
    loss and calls backward, as Lightning's trainer passes.

    Args:
        params: raw coefficients.
        lr: learning rate of the base optimiser.
        base: base optimiser: a class path, or `{class_path: ..., init_args: {...}}`.

    Raises:
        ConfigError: the base is not an optimiser that steps on one gradient.
    """

    def __init__(self, params: ParamsT, lr: float, base: str | dict[str, Any]) -> None:
        who = type(self).__name__
        kind, options = _read(who, base)
        name = f"{kind.__module__}.{kind.__qualname__}"
        super().__init__(params, {"lr": lr})
        try:
            self.base: torch.optim.Optimizer = kind(self.param_groups, **{"lr": lr, **options})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{who}: cannot create {name} with {options}: {error}") from error
        self.defaults = {**self.base.defaults, "base": name}
        self._share()

    def _share(self) -> None:
        """Expose the base's parameter groups and state to schedulers and checkpoints."""
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    @classmethod
    def require(cls, accumulated: int, scaled: bool) -> None:
        """Reject trainer settings with which a step does not evaluate its whole loss.

        Args:
            accumulated: number of batches whose gradients are accumulated per step.
            scaled: whether a float16 gradient scaler is active.

        Raises:
            ConfigError: more than one batch is accumulated, or gradients are scaled.
        """
        if accumulated != 1:
            raise ConfigError(
                f"{cls.__name__} evaluates the loss of a step itself, but accumulate_grad_batches "
                f"{accumulated} keeps only the last batch of a step. Set "
                "trainer.accumulate_grad_batches to 1 and raise data.batch_size instead."
            )
        if scaled:
            raise ConfigError(
                f"{cls.__name__} needs a closure, which float16's gradient scaler does not "
                "support. Set trainer.precision to bf16-mixed or 32-true."
            )

    def _closure(self, closure: Callable[[], float] | None) -> Callable[[], float]:
        if closure is None:
            raise ConfigError(
                f"{type(self).__name__}.step: expected a closure that clears the gradients, "
                "computes the loss and calls backward (a step evaluates the loss), got None."
            )
        return torch.enable_grad()(closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base optimiser, which is all there is."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the base optimiser."""
        self.base.load_state_dict(state_dict)
        self._share()


class SAM(AbstractPerturbed):
    """Sharpness-aware minimisation around a base optimiser (SAM, arXiv 2010.01412).

        e = rho g / |g|,  g = dL/dz over all parameters
        z is updated by `base` with the gradient at z + e

    With `adaptive` the perturbation is relative to each number (ASAM, arXiv 2102.11600):
    `e = rho z^2 g / | |z| g |`; it is zero where z is.

    Each step evaluates the loss twice on the same batch. If the trainer clips gradients, both
    gradients are clipped; clipping by norm does not change e. With several processes, gradients and
    therefore steps are identical in all of them. Gradient accumulation and float16's gradient
    scaler are rejected. A training step logs twice per optimiser step; the values logged last, at
    z + e, are the ones recorded.

    Args:
        params: raw coefficients.
        lr: learning rate of the base optimiser.
        rho: norm of the perturbation over all parameters together.
        adaptive: scale the perturbation of each number by its square.
        base: base optimiser: a class path, or `{class_path: ..., init_args: {...}}`.

    Raises:
        ConfigError: rho is negative, or the base is not an optimiser that steps on one gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        rho: float = 0.05,
        base: str | dict[str, Any] = "torch.optim.Adam",
        adaptive: bool = False,
    ) -> None:
        require(rho >= 0, "SAM.rho", "at least 0", rho)
        super().__init__(params, lr, base)
        self.rho, self.adaptive = rho, adaptive
        self.defaults = {**self.defaults, "rho": rho, "adaptive": adaptive}

    def step(self, closure: Callable[[], float] | None = None) -> float:  # type: ignore[override]
        """Perform one optimisation step.

        Returns:
            The loss at the unperturbed parameters.

        Raises:
            ConfigError: no closure was passed.
        """
        evaluate = self._closure(closure)
        loss = evaluate()
        kept = self._climb()
        try:
            evaluate()
        finally:
            _restore(kept)
        self.base.step()
        return loss

    @torch.no_grad()
    def _climb(self) -> list[tuple[Tensor, Tensor]]:
        """Add e to the parameters and return them with their previous values."""
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not moved:
            return []
        scaled = [p.abs() * p.grad if self.adaptive else p.grad for p in moved]
        lengths = [torch.linalg.vector_norm(g.double()).to(moved[0].device) for g in scaled]
        length = float(torch.linalg.vector_norm(torch.stack(lengths)))
        if not length > 0:
            return []
        kept = [(p, p.detach().clone()) for p in moved]
        for parameter, grad in zip(moved, scaled, strict=True):
            climb = parameter.abs() * grad if self.adaptive else grad
            parameter.add_(climb, alpha=self.rho / length)
        return kept


class LogisticNoise(AbstractPerturbed):
    """Noise on the raw coefficients around a base optimiser (Concrete Subspace Learning, arXiv
    2312.06173).

        l = log(u / (1 - u)),  u ~ Uniform(0, 1) for each number, new in each step
        z is updated by `base` with the gradient at z + l

    Around `ConcreteMask(temperature=T)` a step draws its mask from the relaxed Bernoulli
    distribution with logits z and temperature T, and its gradient is that of the reparametrised
    sample. Scores, checkpoints and exports are without noise. All batches of a step have the same
    noise. It depends on `seed` and the number of steps alone, so that it is the same in all
    processes and goes on in a fit that resumes. Gradient accumulation and float16's gradient scaler
    are rejected. The loss that is logged is that at z + l.

    Args:
        params: raw coefficients, in one group.
        lr: learning rate of the base optimiser.
        base: base optimiser: a class path, or `{class_path: ..., init_args: {...}}`.
        seed: seed of the noise.

    Raises:
        ConfigError: the base is not an optimiser that steps on one gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        base: str | dict[str, Any] = "torch.optim.Adam",
        seed: int = 0,
    ) -> None:
        super().__init__(params, lr, base)
        self.seed = seed
        self.defaults = {**self.defaults, "seed": seed}
        self.param_groups[0].setdefault("draws", 0)  # is saved and restored with the group

    @property
    def noisy(self) -> list[Tensor]:
        """The parameters that get noise: those of the first group."""
        return list(self.param_groups[0]["params"])

    def step(self, closure: Callable[[], float] | None = None) -> float:  # type: ignore[override]
        """Perform one optimisation step.

        Returns:
            The loss at the perturbed parameters.

        Raises:
            ConfigError: no closure was passed.
        """
        evaluate = self._closure(closure)
        kept = self._perturb()
        try:
            loss = evaluate()
        finally:
            _restore(kept)
        self.param_groups[0]["draws"] += 1
        self.base.step()
        return loss

    @torch.no_grad()
    def _perturb(self) -> list[tuple[Tensor, Tensor]]:
        """Add l to the parameters and return them with their previous values."""
        kept = [(parameter, parameter.detach().clone()) for parameter in self.noisy]
        key = f"{self.seed}\n{self.param_groups[0]['draws']}".encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(number)  # of the CPU: the same on all devices
        for parameter, value in kept:
            uniform = torch.rand(value.shape, generator=generator, dtype=torch.float32)
            parameter.add_(torch.logit(uniform, eps=1e-7).to(parameter))
        return kept


@torch.no_grad()
def _restore(kept: Iterable[tuple[Tensor, Tensor]]) -> None:
    for parameter, value in kept:
        parameter.copy_(value)


def _read(who: str, base: Any) -> tuple[Any, dict[str, Any]]:
    """Return the class and the options that `base` specifies."""
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
    if wrong or issubclass(kind, AbstractPerturbed):
        raise ConfigError(
            f"{who}.base: expected the class path of an optimiser (e.g. torch.optim.Adam), got "
            f"{base!r}."
        )
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{who}.base: {kind.__name__} evaluates the loss itself, but {who} passes it a single "
            "gradient. Choose an optimiser that needs only that, e.g. torch.optim.Adam."
        )
    return kind, options
