"""The layer-wise driver: one block at a time, each matched to the experts' own (ProDistill)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from gradmerge.common.errors import ConfigError
from gradmerge.common.patterns import require_pattern
from gradmerge.common.ranges import require_ranges
from gradmerge.drivers.base import AbstractDriver, Job
from gradmerge.drivers.layerwise.block import BLOCK_LOSS
from gradmerge.drivers.layerwise.job import Layers, require_permuted, steps_of
from gradmerge.objectives import Objective

_OF_A_FIT = ("max_steps", "max_epochs", "max_time", "limit_train_batches", "precision")
_CALLBACKS_OF_A_FIT = ("EarlyStopping", "ModelCheckpoint")


@dataclass(frozen=True, kw_only=True)
class LayerWise(AbstractDriver):
    """Match the output of each merged block to each expert's own (ProDistill, 2502.12706).

    For l = 1..L in turn, over the coefficients of block l alone,

        min sum_k mean_{x in D_k} | f^l(x1; theta^l(c)) - f^l(x2_k; theta_k^l) |^2

    with x1 the output of the merged blocks before l on task k's adaptation data and x2_k that of
    expert k's own blocks; the mean is over entries of the hidden state, padding left out. Then both
    pass the new block. No labels are used.

    A last step learns what follows the blocks (last norm, pooler, head) by the same loss on what
    the network gives out: its logits, or all its tensors if it has none. The paper leaves that out.
    Other tensors (embeddings, and heads that are tied to them) keep the coefficients that the
    recipe starts from.

    The terms of a configured objective are not used, as a message says; regularisers, task weights
    and a logit scale are rejected, and so are alignments that mix units (CCA, OptimalTransport): a
    mapped source is not the expert.

    Start and end of the merge are scored on the selection split, as those of a fit are, with one
    merged block in memory at a time (`trainer.limit_val_batches: 0` leaves that out, and
    `model.score_start: false` the start).

    Each block has its own optimiser and schedule. A schedule that watches a loss watches
    `layer/loss` after each pass. Trainer settings of a whole fit (its length, precision, early
    stopping, checkpoints) are not used, as a message says.

    Memory: merged tensors, gradients, coefficients and optimiser state of one block, one expert's
    block, and activations up to `activation_memory`.
    """

    blocks: list[str] | None = None
    """Regular expressions that match whole names of the modules that are the blocks, e.g.
    `layer[1-4]`. Default: the members of the network's one nn.ModuleList."""
    epochs: int = 100
    """Passes over the adaptation data per block."""
    steps: int | None = None
    """Steps per block, instead of passes."""
    batch_size: int | None = None
    """Examples per task and step; default: that of the data. Batches are put together once, and
    differ in size by at most one."""
    activation_memory: float = 4.0
    """GiB of activations in memory; the rest is mapped from files in the job's folder."""

    def __post_init__(self) -> None:
        """Check the options."""
        require_ranges(type(self), vars(self))
        for pattern in self.blocks or ():
            require_pattern("LayerWise.blocks", pattern)

    @override
    def learn(self, job: Job) -> Path:
        if job.options.get("activation_checkpointing"):
            raise ConfigError(
                "LayerWise: activation_checkpointing recomputes blocks within a pass of the whole "
                "network; here one block runs at a time. Leave it out."
            )
        _require_finalisers_without_data(job)
        require_permuted(job.recipe.alignment)
        _require_own_loss(job)
        _require_own_monitor(job.config.get("lr_scheduler"))
        _say_unused(job)
        job.require_free(self)
        # everything that would be rejected is found before the job is on record
        resumed_at = None if self.restart else steps_of(job.folder)
        layers = Layers(job, self.blocks, self.batch_size, self.activation_memory, resumed_at)
        job.begin(self)
        done = job.exported
        if done is not None:
            job.say(f"finished before: {done}")
            return done
        return layers.run(self.epochs, self.steps)


def _require_finalisers_without_data(job: Job) -> None:
    on_data = [type(f).__name__ for f in job.recipe.finalisers if f.needs_data]
    if on_data:
        raise ConfigError(
            f"LayerWise: {', '.join(on_data)} takes passes of the whole merged network, which is "
            "never held here. Take SpectralRescale or DepthRescale, or learn end to end: leave "
            "`driver` out."
        )


def _require_own_loss(job: Job) -> None:
    """Reject options that change the loss of a fit, and say that an objective's terms are not used.

    Terms are accepted, because configurations of methods state them for every driver.
    """
    objective = job.objective
    stated = {
        "objective.regularisers": [type(term).__name__ for term in objective.regularisers],
        "objective.task_weights": objective.task_weights,
        "logit_scale": job.options.get("logit_scale"),
    }
    for name, value in stated.items():
        if value or value == 0:
            raise ConfigError(
                f"LayerWise: {name} changes the loss of a fit, got {value}; here the loss is each "
                "block's distance to the experts' blocks, over all tasks alike. Leave it out "
                f"(--model.{name.split('.')[0]} null), or learn end to end: leave `driver` out."
            )
    if objective.terms != Objective().terms:
        terms = ", ".join(type(term).__name__ for term in objective.terms)
        job.say(f"objective {terms}: not used, each block is matched to the experts' own")


def _require_own_monitor(schedule: Any) -> None:
    """Reject a schedule that watches anything but a block's loss."""
    monitor = ((schedule or {}).get("init_args") or {}).get("monitor")
    if monitor not in (None, BLOCK_LOSS):
        raise ConfigError(
            f"LayerWise: lr_scheduler watches {monitor}, and a block has a loss alone, without "
            f"scores. Set --lr_scheduler.monitor {BLOCK_LOSS} (it acts after each pass)."
        )


def _say_unused(job: Job) -> None:
    """Say which trainer settings are not used; suites state them for every driver."""
    trainer = job.config.get("trainer") or {}
    stated = [f"trainer.{name}" for name in _OF_A_FIT if trainer.get(name) not in (None, -1)]
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        kind = str(callback.get("class_path", "")).rpartition(".")[2]
        stated += [kind] if kind in _CALLBACKS_OF_A_FIT else []
    if stated:
        job.say(
            f"{', '.join(stated)}: not used, because they are of a whole fit; a block's length is "
            "the driver's epochs or steps, and its dtype is model.dtype"
        )
