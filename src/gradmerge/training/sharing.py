"""Sources divided among the processes of a fit."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from torch.distributed.device_mesh import init_device_mesh

from gradmerge.common.errors import ConfigError
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.sharded import ShardedPlan

_DIVIDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


def require_strategy(trainer: lightning.Trainer) -> None:
    """Reject strategies that divide a model's parameters, of which a merge has almost none.

    Raises:
        ConfigError: the strategy is FSDP, model parallel or DeepSpeed.
    """
    name = type(trainer.strategy).__name__
    if isinstance(trainer.strategy, _DIVIDING):
        raise ConfigError(
            f"trainer.strategy: expected auto or ddp, got {name}, which divides parameters; the "
            "only ones here are coefficients.\nUse ddp, and divide the sources among processes "
            "with model.source_shards."
        )


def share_sources(trainer: lightning.Trainer, merged: MergedModel, shards: int) -> None:
    """Divide the sources among groups of processes, until the end of the fit.

    Processes of consecutive ranks form a group: with `shards` of the number of devices per machine,
    sources are divided within each machine, and gradients alone are exchanged between machines.

    Args:
        trainer: the trainer, whose processes have started.
        merged: the model that it fits.
        shards: number of processes in a group; 0 for all.

    Raises:
        ConfigError: the number of processes is no multiple of it, or the strategy is not DDP.
    """
    count = shards or trainer.world_size
    if count == 1:
        merged.plan.require_finite()  # now, if it was left for later
        return
    if trainer.world_size % count:
        raise ConfigError(
            f"source_shards: expected a divisor of the number of processes ({trainer.world_size}), "
            f"got {shards}. Set trainer.devices and num_nodes accordingly, or 0 for all processes."
        )
    if not isinstance(trainer.strategy, DDPStrategy):
        raise ConfigError(
            f"source_shards: expected trainer.strategy ddp, got {type(trainer.strategy).__name__}. "
            "The sources are divided by gradmerge, not by the strategy."
        )
    device: Any = trainer.strategy.root_device
    shape = (trainer.world_size // count, count)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicas", "shards"))
    plan = merged.state.plan = ShardedPlan.of(merged.plan, device, mesh.get_group("shards"))
    plan.check()
    plan.keep_directions()


def end_sharing(merged: MergedModel) -> None:
    """Let each process read all sources again."""
    if isinstance(merged.plan, ShardedPlan):
        merged.state.plan = merged.plan.apart()


def merge_together(merged: MergedModel) -> None:
    """Merge all parameters of resident memory now, where processes share sources."""
    if merged.plan.is_shared and merged.memory == "resident":
        with merged.plan.together(), merged.prepared(next(iter(merged.tasks))):
            pass
