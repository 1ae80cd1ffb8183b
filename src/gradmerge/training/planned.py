"""Memory and work of a fit, before any weight is read: its own step, run on fake tensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from gradmerge.common.errors import ConfigError
from gradmerge.engine.headers import HeaderPlan
from gradmerge.engine.merged import Memory, MergedModel
from gradmerge.engine.opening import Opening
from gradmerge.engine.outputs import Batch
from gradmerge.engine.parts import in_parts
from gradmerge.engine.placement import PLACES, Place, chosen, words_of
from gradmerge.engine.predict import expert_rows, predict
from gradmerge.engine.teacher import Teacher
from gradmerge.engine.traced import Part, Peak, Trace, TracedBlocks, tracing
from gradmerge.objectives import Objective, Predictions
from gradmerge.training.data import MergeDataModule
from gradmerge.training.declared import declared_batches
from gradmerge.training.regularisation import Regularisation

RELEASED = 1 << 20
"""Size from which a streamed fit returns freed blocks to the system (`release_freed_memory`)."""
Optimise = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Setting:
    """The options of a fit that trade memory for time."""

    memory: Memory = "resident"
    activation_checkpointing: bool = False
    placement: str | tuple[tuple[str, str], ...] = "mapped"
    """A word for all sources, or words by source; `auto` is planned as `mapped`."""

    @property
    def options(self) -> str:
        """The options of the command line that choose it."""
        placement = self.given if isinstance(self.given, str) else f"'{json.dumps(self.given)}'"
        given = {
            "memory": self.memory,
            "activation_checkpointing": str(self.activation_checkpointing).lower(),
            "placement": placement,
        }
        return " ".join(f"--model.{name} {value}" for name, value in given.items())

    @property
    def given(self) -> str | dict[str, str]:
        """The placement as `MergeModule` takes it."""
        return self.placement if isinstance(self.placement, str) else dict(self.placement)

    def places(self, plan: HeaderPlan, device: torch.device) -> dict[str, Place]:
        """Return the place of each owner's tensors."""
        words = words_of(self.given, plan.known_owners, device)
        return chosen({o: words[o] for o in plan.owners}, plan.sizes()[0], -1, -1)


@dataclass(frozen=True)
class Fit:
    """The step of a fit, apart from its `Setting`."""

    data: MergeDataModule
    objective: Objective
    dtype: torch.dtype
    optimise: Optimise
    device: torch.device
    processes: int = 1
    """Number of processes that divide the sources."""
    tasks_at_once: int = 1
    """Number of tasks whose passes share a merge in streamed memory."""


@dataclass(frozen=True)
class Estimate:
    """Memory and work of a fit with a setting; sizes in bytes."""

    setting: Setting
    device: int
    """Peak of the tensors on the device."""
    host: int
    """Peak of the tensors in the host's memory, as the C library keeps it; of the CPU as device,
    the same tensors."""
    parts: Mapping[Part, int]
    """Parts of `device` at the peak: merged tensors, coefficients with gradient and optimiser
    state, copies of sources, and the rest (activations, gradients of merged tensors,
    temporaries)."""
    disk: int
    """Temporary files."""
    flops: int
    """Floating-point operations of a step in products, convolutions and attention."""
    moved: int
    """Bytes that all other operations of the network read and write in a step."""
    merged: int
    """Entries that a step merges."""
    contracted: int
    """Entries whose gradients a step contracts."""
    read: int
    """Bytes of the sources that a step reads."""
    pinned: int
    """Those of them that are read from page-locked memory."""
    mapped: int
    """Those that are read from files."""


def settings(device: torch.device) -> list[Setting]:
    """Return all settings that differ on a device: the CPU reads mapped files as they are."""
    places = ("mapped",) if device.type == "cpu" else PLACES
    return [
        Setting(memory, checkpointing, place)
        for place in places
        for memory in ("resident", "streamed")
        for checkpointing in (False, True)
    ]


def headers(opening: Opening) -> HeaderPlan:
    """Return the plan of a recipe without weights."""
    plan = opening.plan(keep_network=True, kind=HeaderPlan)
    assert isinstance(plan, HeaderPlan)
    return plan


def estimate(opening: Opening, fit: Fit, setting: Setting) -> Estimate:
    """Run two training steps and an evaluation of a fit on fake tensors, and count.

    Args:
        opening: the recipe's checkpoints; only their headers are read.
        fit: the fit.
        setting: its memory options.

    Raises:
        ConfigError: the network supports no activation checkpointing, or its forward depends on
            the numbers of its inputs in a way that cannot be traced.
    """
    plan = headers(opening)
    trace = plan.trace
    try:
        step = _run(plan, fit, setting)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{type(plan.skeleton).__name__}: expected a forward that runs on tensors without "
            f"numbers, got {type(error).__name__}: {str(error).partition(chr(10))[0]:.200}\n"
            "Its memory cannot be planned; fit it with small batches first."
        ) from error
    own = trace.peaks.get(fit.device.type, Peak())
    streams = setting.memory == "streamed"
    return Estimate(
        setting,
        own.size,
        trace.resident(RELEASED if streams else None),
        own.parts,
        plan.disk,
        step["flops"],
        step["moved"],
        step["merged"],
        step["contracted"],
        step["read"],
        step["pinned"],
        step["mapped"],
    )


def _run(plan: HeaderPlan, fit: Fit, setting: Setting) -> Counter[str]:
    """Run two training steps and an evaluation; return the work of the second step."""
    trace, plan.processes = plan.trace, fit.processes
    merged = _merged(plan, fit, setting)
    trace.hold(merged.parameters(), "coefficients")
    merged._blocks = TracedBlocks(trace, merged._blocks)  # type: ignore[assignment]
    steps = _Steps(merged, fit, plan.fake, trace)
    with tracing(plan.fake, trace):
        plan.place(setting.places(plan, fit.device), fit.device)
        steps.train()
        before = trace.totals()
        steps.train()
        step = trace.totals() - before
        steps.evaluate()
    return step


def _merged(plan: HeaderPlan, fit: Fit, setting: Setting) -> MergedModel:
    tasks = {name: task.source or name for name, task in fit.data.tasks.items()}
    first = next(iter(plan.sources))
    tasks = {name: s if s in plan.serving else first for name, s in tasks.items()}
    at_once = fit.tasks_at_once if setting.memory == "streamed" else 1
    merged = MergedModel(
        plan, memory=setting.memory, dtype=fit.dtype, tasks=tasks, tasks_at_once=at_once
    )
    if fit.device.type != "cpu":
        merged.device = fit.device
        merged._place_network()
        with plan.fake:  # which `Module.to` cannot move
            for values in (merged.raw, merged.private.values):
                for key, value in values.items():
                    values[key] = nn.Parameter(value.to(fit.device))
    if setting.activation_checkpointing:
        merged.enable_activation_checkpointing()
    return merged.train()


class _Steps:
    """The steps of a fit, as `MergeModule` and the trainer take them."""

    def __init__(self, merged: MergedModel, fit: Fit, fake: Any, trace: Trace) -> None:
        self._merged, self._fit = merged, fit
        self._teacher = Teacher(merged, fit.objective)
        self._trace = trace
        with tracing(fake, trace), trace.counting("coefficients"):
            self._penalty = Regularisation(fit.objective, merged)
            self._optimiser = fit.optimise(list(merged.parameters()))

    def _batches(self, stage: Any) -> Mapping[str, Batch]:
        declared = declared_batches(self._fit.data, self._merged.skeleton, stage)
        return move_data_to_device(declared, self._fit.device)

    def _loss(self, task: str, batch: Batch, tasks: Sequence[str]) -> Tensor:
        objective = self._fit.objective
        found = predict(self._merged, objective, task, batch, False, self._teacher)
        return objective.share(task, tasks) * objective.loss(found)

    def train(self) -> None:
        """Take a training step."""
        merged, objective = self._merged, self._fit.objective
        optimiser = self._optimiser
        batches = self._batches("adaptation")
        runs = [partial(self._loss, task, batch, tuple(batches)) for task, batch in batches.items()]

        def closure() -> float:
            with self._trace.counting("rest"):
                loss, _ = merged.accumulate(runs)
            if objective.regularisers:
                loss = loss + self._penalty.penalty()
            optimiser.zero_grad()
            loss.backward()
            return loss.item()

        with self._trace.counting("coefficients"):
            optimiser.step(closure)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Score a batch of each task."""
        merged, objective = self._merged, self._fit.objective
        merged.eval()
        for task, batch in self._batches("selection").items():
            parts = in_parts(merged, task, batch) if objective.adds_over_rows else None
            if parts is None:
                found = predict(merged, objective, task, batch, False, self._teacher)
                objective.loss(found)
                _measure(found.logits)
                _measure(expert_rows(merged, task, batch))  # beside the predictions of the merge
                continue
            for logits, labels, _ in parts:
                objective.loss(Predictions(logits, labels))
                _measure(logits)
            with merged.as_source(merged.tasks[task], own=True):
                for logits, *_ in in_parts(merged, task, batch) or ():
                    _measure(logits)


def _measure(logits: Tensor) -> None:
    """Allocate what scores of rows do: probabilities and the most probable class."""
    logits.log_softmax(dim=-1).argmax(dim=-1)
