"""Memory of the machine and of a fit, asked for before any weight is read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from gradmerge.common.errors import ConfigError, GradmergeError

MARGIN = 0.15
"""Largest relative error of a predicted peak that is reckoned with (`benchmarks/plan.py`)."""
VARIABLE = "GRADMERGE_PLAN"
_SHARE = 16
"""Models below this part of the memory are fitted without asking."""
LESS = "reduce data.batch_size or max_length, or use a coarser granularity"


@dataclass(frozen=True)
class Machine:
    """Memory of the machine in bytes: what is free, and all of it; 0 where unknown."""

    host: tuple[int, int]
    device: tuple[int, int] | None
    """None if the CPU computes."""
    process: int
    """What this process takes with its libraries, before a merge is opened."""

    def need(self, found: Any) -> tuple[int, int]:
        """Return the bytes that an estimate takes of the host, and of the device."""
        return self.process + found.host, 0 if self.device is None else found.device


def fits(machine: Machine, host: int, device: int, free: bool = True) -> str:
    """Return whether bytes of the host and of the device fit: yes, no, or tight.

    Args:
        machine: the machine.
        host: bytes of the host's memory, predicted to `MARGIN`.
        device: those of the device's.
        free: compare with what is free, else with all memory.
    """
    rooms = [(host, machine.host[0 if free else 1])]
    rooms += [] if machine.device is None else [(device, machine.device[0 if free else 1])]
    known = [(need, room) for need, room in rooms if room]
    if any(need * (1 - MARGIN) > room for need, room in known):
        return "no"
    return "tight" if any(need * (1 + MARGIN) > room for need, room in known) else "yes"


def fit_of(cli: Any) -> tuple[Any, Any]:
    """Return the `Fit` of a parsed configuration, and its `Setting`."""
    from gradmerge.cli.early import made
    from gradmerge.export.folder import DTYPES
    from gradmerge.objectives import AbstractTerm, Objective
    from gradmerge.training.planned import Fit, Setting

    model = dict(cli.model.keywords)
    objective = model.get("objective") or Objective()
    if isinstance(objective, AbstractTerm):
        objective = Objective([objective])
    configured = cli._get(cli.config, "optimizer")
    configured = configured or {"class_path": "torch.optim.Adam"}
    setting = Setting(
        model.get("memory", "resident"),
        bool(model.get("activation_checkpointing")),
        _placement(model, device_of(cli)),
    )
    dtype, optimise = DTYPES[model.get("dtype", "float32")], partial(made, configured)
    processes = model.get("source_shards", 1) or processes_of(cli)
    at_once = model.get("tasks_at_once", 1)
    fit = Fit(cli.datamodule, objective, dtype, optimise, device_of(cli), processes, at_once)
    return fit, setting


def _placement(model: Mapping[str, Any], device: Any) -> str | tuple[tuple[str, str], ...]:
    """Return the configured placement of a `Setting`."""
    given = "device" if model.get("load_sources") else model.get("placement", "auto")
    if not isinstance(given, str):
        return tuple(sorted(given.items()))
    return "mapped" if given == "auto" and device.type == "cpu" else given


def processes_of(cli: Any) -> int:
    """Return the number of processes that the trainer will start."""
    import torch

    devices = cli._get(cli.config, "trainer.devices")
    nodes = int(cli._get(cli.config, "trainer.num_nodes") or 1)
    if isinstance(devices, (list, tuple)):
        return nodes * len(devices)
    every = torch.cuda.device_count() if device_of(cli).type == "cuda" else 1
    return nodes * (int(devices) if str(devices).isdigit() else every)


def device_of(cli: Any) -> Any:
    """Return the device that the trainer will choose."""
    import torch

    asked = str(cli._get(cli.config, "trainer.accelerator") or "auto")
    uses = asked in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if uses else torch.device("cpu")


def _has_room(opening: Any, fit: Any, setting: Any, now: Machine) -> bool:
    """Return whether all memory of a machine may hold a fit with a setting."""
    from gradmerge.training.planned import estimate

    try:
        found = estimate(opening, fit, setting)
    except ConfigError:
        return False
    return fits(now, *now.need(found), free=False) != "no"


def machine_of(device: Any) -> Machine:
    """Return the memory of this machine as it is now."""
    import torch

    from gradmerge.common.memory import anonymous_memory, host_memory

    on_device = torch.cuda.mem_get_info(device) if device.type == "cuda" else None
    return Machine(host_memory(), on_device, anonymous_memory())


def is_small(size: int, whole: int | None = None) -> bool:
    """Return whether merged weights of a size in bytes need no plan, as nearly all do.

    Args:
        size: the size.
        whole: all memory of the device. Default: of this machine's.
    """
    if whole is None:
        import torch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        now = machine_of(device)
        whole = (now.device or now.host)[1]
    return not whole or size * _SHARE < whole


def require_memory(cli: Any, opening: Any) -> None:
    """Reject a fit that certainly takes more memory than there is, before weights are read.

    Placements that the device does not have are rejected, too.

    Small models are not asked about, nor a network that cannot be traced. The environment variable
    `GRADMERGE_PLAN=off` leaves the check out.

    Raises:
        ConfigError: it takes more, beyond the error of the estimate; the message names the
            settings that fit.
    """
    from gradmerge.engine.placement import words_of
    from gradmerge.training.planned import estimate, settings

    fit, chosen = fit_of(cli)
    words_of(chosen.given, ["base", *opening.sources], fit.device)
    size = fit.dtype.itemsize * sum(math.prod(i.shape) for i in opening.reference.infos.values())
    now = machine_of(fit.device)
    whole = (now.device or now.host)[1]
    if os.environ.get(VARIABLE) == "off" or is_small(size, whole):
        return
    try:
        found = estimate(opening, fit, chosen)
    except GradmergeError:
        return  # the fit itself says what is wrong, if anything is
    need = now.need(found)
    if fits(now, *need, free=False) != "no":
        return
    others = (setting for setting in settings(fit.device) if setting != chosen)
    fitting = next((setting for setting in others if _has_room(opening, fit, setting, now)), None)
    todo = f"This fits: {fitting.options}." if fitting else f"No setting fits: {LESS}."
    raise ConfigError(
        f"model.memory: expected a fit of at most {whole / 1e9:.1f} GB, all memory there is, got "
        f"one of about {max(need) / 1e9:.1f} GB, which the system would end.\n{todo} `gradmerge "
        f"plan` shows all settings; {VARIABLE}=off leaves this check out."
    )
