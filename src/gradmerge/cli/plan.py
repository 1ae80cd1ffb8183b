"""`gradmerge plan`: memory and time of a fit before any weight is read, by memory setting."""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from gradmerge.cli import room
from gradmerge.cli.arguments import PlainParser
from gradmerge.common.errors import ConfigError

_ABOUT = """
Predict memory and time of a fit for every memory setting, from headers and configs alone: the
fit's own step runs on tensors without numbers, at the largest batch that the data declare
(`batch_size` examples of `max_length` tokens). Nothing is read of the weights and nothing written.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options that `fit` does not have."""
    made = PlainParser(
        prog="gradmerge plan",
        usage="gradmerge plan --config merge.yaml [options of fit] [--format json]",
        description=textwrap.dedent(_ABOUT),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other options are those of `gradmerge fit`.",
    )
    made.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    return made


def plan_command(options: Sequence[str], of_process: bool = False) -> None:
    """Print the plan of a fit.

    Args:
        options: the options of the command.
        of_process: they are those of the process, where LightningCLI then reads them.
    """
    given, rest = parser().parse_known_args(list(options))

    from gradmerge.cli.learning import learn
    from gradmerge.cli.method import with_method

    rest, _ = with_method("fit", rest)
    if of_process:
        sys.argv[1:] = rest
    found = planned(learn(None if of_process else rest, run=False, opens=False))
    print(json.dumps(_plain(found), indent=2) if given.format == "json" else rendered(found))


@dataclass(frozen=True)
class Planned:
    """The estimates of a fit on a machine."""

    machine: room.Machine
    estimates: Sequence[Any]
    failures: Mapping[Any, str]
    """Why a setting cannot be chosen."""
    speed: Any
    chosen: Any
    """The setting that the configuration asks for."""
    facts: Mapping[str, Any]

    def fits(self, found: Any) -> str:
        """Return whether a setting fits into the free memory: yes, no, or tight."""
        return room.fits(self.machine, *self.machine.need(found))

    @property
    def recommended(self) -> Any:
        """The fastest estimate that fits, or is at least not sure to fail; None if none does."""
        for verdict in ("yes", "tight"):
            fitting = [found for found in self.estimates if self.fits(found) == verdict]
            if fitting:
                return min(fitting, key=self.speed.seconds)
        return None


def memory_for(config: Mapping[str, Any]) -> str:
    """Return the memory mode of a fit: resident, unless that may not fit into the free memory.

    Args:
        config: its configuration as plain data.
    """
    from gradmerge.cli.learning import learn
    from gradmerge.engine.opening import Opening
    from gradmerge.training.planned import Setting, estimate

    text = yaml.safe_dump(dict(config))
    cli = learn(["--config", text], run=False, opens=False)
    fit, _ = room.fit_of(cli)
    now = room.machine_of(fit.device)
    try:
        found = estimate(Opening(cli.model.keywords["recipe"]), fit, Setting())
    except ConfigError:
        return "streamed"  # what cannot be planned takes no risk
    return "resident" if room.fits(now, *now.need(found)) == "yes" else "streamed"


def planned(cli: Any) -> Planned:
    """Return the plan of a parsed fit.

    Raises:
        ConfigError: a driver makes several fits, or the network cannot be traced.
    """
    from gradmerge.engine.opening import Opening
    from gradmerge.training.calibrate import calibrate
    from gradmerge.training.planned import estimate, headers, settings

    if cli._get(cli.config, "driver"):
        raise ConfigError(
            "driver: expected a single fit to plan, got a driver, which makes several smaller ones."
            "\nPlan one of its steps: a recipe of its sources, without `driver`."
        )
    fit, chosen = room.fit_of(cli)
    now = room.machine_of(fit.device)
    opening = Opening(cli.model.keywords["recipe"])
    estimates, failures, every = [], {}, settings(fit.device)
    if chosen.placement != "auto" and chosen not in every:
        every.append(chosen)
    for setting in every:
        try:
            estimates.append(estimate(opening, fit, setting))
        except ConfigError as error:
            failures[setting] = str(error)
    if not estimates:
        raise ConfigError(next(iter(failures.values())))
    plan = headers(opening)
    speed = calibrate(plan, fit.dtype, fit.device)
    found = Planned(now, estimates, failures, speed, chosen, _facts(plan, fit))
    if chosen.placement != "auto":
        return found
    # the first place with room for all sources, as a fit chooses it
    same = [e for e in estimates if replace(e.setting, placement="auto") == chosen]
    auto = next((e for e in same if found.fits(e) == "yes"), None)
    return found if auto is None else replace(found, chosen=auto.setting)


def _facts(plan: Any, fit: Any) -> dict[str, Any]:
    opened = {**({} if plan.base is None else {"base": plan.base}), **plan.serving}
    parts = {id(part): part for checkpoint in opened.values() for part in checkpoint.parts}
    raw = plan.initial_raw()
    return {
        "network": type(plan.skeleton).__name__,
        "parameters": sum(math.prod(tensor.shape) for tensor in plan.tensors.values()),
        "tensors": len(plan.tensors),
        "sources": len(plan.sources),
        "stored": sum(i.num_bytes for part in parts.values() for i in part.infos.values()),
        "coefficients": sum(value.numel() for value in raw.values()),
        "disk": plan.disk,
        "tasks": {name: task.kind for name, task in fit.data.tasks.items()},
        "batch_size": fit.data.batch_size,
        "dtype": str(fit.dtype).removeprefix("torch."),
        "device": fit.device.type,
    }


# ---- output -------------------------------------------------------------------------------------


def rendered(found: Planned) -> str:
    """Return a plan as text."""
    from gradmerge.training.summary import aligned

    facts, machine = found.facts, found.machine
    device = machine.device
    rows = [
        ["memory", "checkpointing", "sources", *_PARTS.values(), "peak", "fits", "read", "s/step"]
    ]
    for each in found.estimates:
        setting, need = each.setting, machine.need(each)
        rows.append(
            [
                f"{setting.memory}{' *' if setting == found.chosen else ''}",
                "on" if setting.activation_checkpointing else "off",
                setting.placement if isinstance(setting.placement, str) else "mixed",
                *(_gb(each.parts.get(part, 0)) for part in _PARTS),
                _gb(need[0] if device is None else need[1]),
                found.fits(each),
                _gb(each.read),
                f"{found.speed.seconds(each):.2g}",
            ]
        )
    best = found.recommended
    lines = [
        f"network     {facts['network']}, {facts['parameters'] / 1e6:,.1f}M parameters in "
        f"{facts['tensors']} tensors; {facts['sources']} sources, {_gb(facts['stored'])} GB stored",
        f"learned     {facts['coefficients']:,} coefficients",
        f"step        {facts['batch_size']} examples of {', '.join(facts['tasks'])} each, in "
        f"{facts['dtype']} on {facts['device']}",
        f"machine     {_room(machine.host)} GB of memory free"
        + ("" if device is None else f"; {_room(device)} GB of the device's")
        + f"; this process takes {_gb(machine.process)} GB",
    ]
    if facts["disk"]:
        lines.append(f"disk        {_gb(facts['disk'])} GB in TMPDIR, processed directions")
    notes = [f"{s.options}: {text}".split("\n")[0] for s, text in found.failures.items()]
    verdict = (
        f"recommended  none fits: {room.LESS}"
        if best is None
        else f"recommended  {best.setting.options}"
    )
    tail = (
        "Sizes in GB at the peak (host memory with this process), correct to about "
        f"{room.MARGIN:.0%}; read: of the sources per step; *: as configured."
    )
    return "\n".join([*lines, "", aligned(rows), "", tail, *notes, verdict])


_PARTS = {
    "merged": "merged",
    "coefficients": "coefficients",
    "sources": "copies",
    "rest": "activations",
}


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


def _room(memory: tuple[int, int]) -> str:
    return f"{_gb(memory[0])} of {_gb(memory[1])}" if memory[1] else "unknown"


def _plain(found: Planned) -> dict[str, Any]:
    """Return a plan as plain data, sizes in bytes."""
    best = found.recommended
    return {
        **found.facts,
        "machine": asdict(found.machine),
        "speed": {k: v for k, v in asdict(found.speed).items() if v != float("inf")},
        "margin": room.MARGIN,
        "configured": asdict(found.chosen),
        "settings": [
            {
                **asdict(each),
                "host_total": found.machine.need(each)[0],
                "fits": found.fits(each),
                "seconds": found.speed.seconds(each),
                "options": each.setting.options,
            }
            for each in found.estimates
        ],
        "not_possible": {s.options: text for s, text in found.failures.items()},
        "recommended": None if best is None else best.setting.options,
    }
