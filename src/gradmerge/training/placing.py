"""Places of sources while a merge is learned or scored (`MergeModule.placement`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from gradmerge.common.errors import ConfigError
from gradmerge.common.memory import host_memory
from gradmerge.engine.opening import Opening
from gradmerge.engine.placement import Place, chosen, described, words_of
from gradmerge.engine.plan import Plan
from gradmerge.training.data import MergeDataModule
from gradmerge.training.planned import Fit, Optimise, Setting, estimate

_log = logging.getLogger(__name__)
# Share of the device's memory that sources get if the memory of a step is not known.
_UNKNOWN = 0.5
# Relative error of a planned step that is reckoned with.
_MARGIN = 0.15
# Sources below this share of the device's free memory are placed there without a plan.
_SMALL = 1 / 8
# Share of the host's free memory that may be page-locked: it cannot be paged out.
_LOCKED = 0.5


def placement_of(options: Mapping[str, Any]) -> str | dict[str, str]:
    """Return the placement among the options of a `MergeModule`, with a warning of the old one.

    Raises:
        ConfigError: both were given.
    """
    given: str | dict[str, str] = options.get("placement", "auto")
    if not options.get("load_sources"):
        return given
    if given not in ("auto", "device"):
        raise ConfigError(
            f"load_sources: expected one of load_sources and placement, got placement {given}, "
            "too. Leave load_sources out."
        )
    rank_zero_warn("load_sources is deprecated: use placement: device.")
    return "device"


def place_sources(module: Any) -> None:
    """Place the sources of a module as its `placement` says, unless they are placed already.

    Args:
        module: a `MergeModule` with a trainer.

    Raises:
        ConfigError: the device has no such place.
    """
    trainer = module.trainer
    processes = trainer.world_size // trainer.num_nodes
    place(module.merged.plan, module.placement, module.device, partial(_need, module), processes)


def place(
    plan: Plan,
    placement: str | Mapping[str, str],
    device: torch.device,
    need: Callable[[], int | None] = lambda: None,
    processes: int = 1,
) -> None:
    """Place the sources of a plan, and say so.

    Args:
        plan: the opened recipe.
        placement: as `MergeModule` takes it.
        device: the device that merges.
        need: returns the bytes of the device that a step takes beside the sources, if known.
        processes: number of processes that share the host's memory.

    Raises:
        ConfigError: the device has no such place.
    """
    asked = (str(placement), str(device), plan.is_shared)
    if plan.placed == asked:
        return
    words = words_of(placement, plan.known_owners, device)
    words = {owner: words[owner] for owner in plan.owners}
    sizes, dtypes = plan.sizes()
    free = host = -1  # no room, whatever the size
    if device.type == "cuda" and "auto" in words.values():
        plan.unload()
        free, host = _rooms(device, sum(sizes.values()), need)
    found: dict[str, Place] = chosen(words, sizes, free, host // processes)
    failure = ""
    try:
        plan.place(found, device, asked)
    except (ConfigError, torch.OutOfMemoryError) as error:
        if "auto" not in words.values():
            raise
        failure = str(error)
    if failure:  # here, where the error no longer holds what was copied
        rank_zero_warn(f"sources that were to be copied are read from files: {failure}")
        found = {o: found[o] if word != "auto" else "mapped" for o, word in words.items()}
        plan.place(found, device, asked)
    if device.type != "cpu" or placement != "auto":
        rank_zero_info(f"sources: {described(found, sizes, dtypes)}.")


def _rooms(device: torch.device, size: int, need: Callable[[], int | None]) -> tuple[int, int]:
    """Return the bytes of the device that sources may take, and those of the host."""
    free = torch.cuda.mem_get_info(device)[0]
    # what torch keeps for reuse is free, too
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    host = int(_LOCKED * host_memory()[0])
    if size <= _SMALL * free:
        return free, host
    step = need()
    return int(_UNKNOWN * free if step is None else free - (1 + _MARGIN) * step), host


def _like(optimiser: torch.optim.Optimizer) -> Optimise:
    """Return a function that makes an optimiser of the same kind and options."""
    return partial(type(optimiser), **optimiser.defaults)


def _need(module: Any) -> int | None:
    """Return the device's peak in a step that reads its sources from files, as it is planned."""
    trainer, merged = module.trainer, module.merged
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, MergeDataModule):
        return None
    optimise = next(map(_like, trainer.optimizers), torch.optim.Adam)
    shards = module.source_shards or trainer.world_size
    at_once = merged.tasks_at_once
    fit = Fit(data, module.objective, merged.dtype, optimise, module.device, shards, at_once)
    checkpoints = bool(module.hparams.get("activation_checkpointing"))
    try:
        with torch.random.fork_rng(devices=[]):
            opening = Opening(module.recipe)
            return estimate(opening, fit, Setting(merged.memory, checkpoints, "mapped")).device
    except Exception as error:  # of a network or an optimiser that cannot run without numbers
        _log.info("the memory of a step cannot be planned: %s", error)
        return None
