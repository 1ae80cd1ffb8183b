"""Outputs of EMR-Merging (arXiv 2405.17461): one model folder per task, or a compact form.

A task runs with `theta_k = A + r_k M_k (.) u`. The compact form stores the vector `u` once, and a
mask and a scale per task. Both give exactly the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.coefficients import Constant, Model
from gradmerge.engine.opening import open_plan
from gradmerge.engine.plan import Plan
from gradmerge.engine.recipe import Recipe
from gradmerge.errors import ConfigError
from gradmerge.export.atomic import new_folder
from gradmerge.export.card import render
from gradmerge.export.folder import export_plan, write_config
from gradmerge.export.provenance import provenance_of
from gradmerge.export.writer import Entry, write_json, write_safetensors
from gradmerge.preprocess import Site, Unify
from gradmerge.preprocess.base import Chain
from gradmerge.preprocess.unify import elect
from gradmerge.sources import AbstractSource, Checkpoint
from gradmerge.sources.emr import FORMAT


class TaskCheckpoint(Checkpoint):
    """A task's model by a recipe: `A + B'_k` for merged tensors, the source's own for others."""

    def __init__(self, plan: Plan, source: str) -> None:
        own = plan.sources[source]
        self._plan, self._own, self._index = plan, own, plan.source_names.index(source)
        infos = {name: plan.reference.infos[name] for name in plan.tensors}
        infos.update({name: own.infos[name] for name in [*plan.private, *plan.buffers]})
        super().__init__(f"{own.label} in a merge", infos, own.folder, own.config)

    @override
    def read(self, name: str) -> Tensor:
        if name not in self._plan.tensors:
            return self._own.read(name)
        terms = self._plan.terms(name).dense()
        direction = terms.sources[self._index]
        if terms.origin is None:
            return direction.contiguous()
        return terms.origin.to(torch.promote_types(terms.origin.dtype, direction.dtype)) + direction


@dataclass(frozen=True)
class _Opened(AbstractSource):
    """A checkpoint that is open already."""

    checkpoint: Checkpoint

    @override
    def open(self) -> Checkpoint:
        return self.checkpoint


def task_checkpoints(plan: Plan) -> dict[str, Checkpoint]:
    """Return the model of each source's own processed direction, with a coefficient of 1.

    Raises:
        ConfigError: the recipe has no preprocess, or has finalisers or frozen tensors.
    """
    if not plan.recipe.preprocess:
        raise ConfigError(
            "outputs tasks: expected a preprocess (Unify, for EMR-Merging), got none; each task's "
            "model would be its source."
        )
    refuse_finalisers(plan.recipe)
    _reject_frozen(plan)
    return {name: TaskCheckpoint(plan, name) for name in plan.sources}


def export_tasks(
    tasks: Mapping[str, Checkpoint],
    output: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write one Hugging Face folder per task, `output/<task>`, each of which loads on its own.

    Args:
        tasks: the model of each task.
        output: folder to write.
        dtype: float32, bfloat16, float16 or float64; default: as in the headers.
        overwrite: replace an existing folder, once the new one is complete.
        extra: further entries of each provenance.json.

    Returns:
        The folder.
    """
    target = Path(output).expanduser()
    with new_folder(target, overwrite) as work:
        for task, checkpoint in tasks.items():
            plan = _alone(task, checkpoint)
            folder = export_plan(plan, plan.initial_raw(), work / task, dtype=dtype, extra=extra)
            (folder / "coefficients.safetensors").unlink()
            (folder / "README.md").write_text(_task_card(task, checkpoint))
    return target


def export_compact(plan: Plan, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write the shared vector, and a mask and a scale per task (format: `gradmerge.sources.emr`).

    Args:
        plan: an opened recipe whose last preprocess is `Unify`.
        output: folder to write.
        overwrite: replace an existing folder, once the new one is complete.

    Returns:
        The folder.

    Raises:
        ConfigError: the recipe has no compact form.
    """
    unify, base = _require_compact(plan)
    target = Path(output).expanduser()
    with new_folder(target, overwrite) as work:
        directions = _directions(plan)
        sites = [Site(name, plan.source_names) for name in plan.tensors]
        found = unify.scales(lambda: ((site, directions(site.name)) for site in sites))
        scales = dict(zip(plan.sources, found, strict=True))
        vectors = [
            Entry(name, info.shape, torch.float32, partial(_vector, directions, name))
            for name, info in plan.tensors.items()
        ]
        write_safetensors(work / "unified.safetensors", vectors)
        for k, task in enumerate(plan.sources):
            folder = work / "tasks" / task
            folder.mkdir(parents=True)
            masks = []
            for name, info in plan.tensors.items():
                size = torch.Size(info.shape).numel()
                packed = partial(_mask, directions, name, k)
                masks.append(Entry(name, (-(-size // 8),), torch.uint8, packed))
            write_safetensors(folder / "masks.safetensors", masks)
            own = _own_entries(plan, task)
            if own:
                write_safetensors(folder / "own.safetensors", own)
            write_config(_alone(task, TaskCheckpoint(plan, task)), folder, None, None)
        path = Path(base.label).expanduser()  # made absolute, to be found from everywhere
        label = str(path.resolve()) if path.exists() else base.label
        described = {"from": label, "sha256": plan.fingerprints["base"]}
        write_json(work / "emr.json", {"format": FORMAT, "base": described, "scales": scales})
        provenance = provenance_of(plan, None, {task: task for task in scales}, None, None)
        write_json(work / "provenance.json", provenance)
        (work / "README.md").write_text(_compact_card(list(scales), target.name))
    return target


def _require_compact(plan: Plan) -> tuple[Unify, Checkpoint]:
    """Reject recipes without a compact form; return the last preprocess and the base."""
    unify = plan.recipe.preprocess[-1] if plan.recipe.preprocess else None
    if not isinstance(unify, Unify):
        got = "none" if unify is None else type(unify).__name__
        raise ConfigError(f"outputs compact: expected Unify as the last preprocess, got {got}.")
    if plan.recipe.resolved_origin != "base" or plan.base is None:
        raise ConfigError(
            "outputs compact: expected origin base, to which each task's vector is added, got "
            f"{plan.recipe.resolved_origin}."
        )
    if plan.alignment is not None:
        raise ConfigError(
            "outputs compact: the shared vector is added to the base as it is stored, but this "
            "recipe aligns its rows to other tokens (tokenizer). Use --outputs tasks."
        )
    refuse_finalisers(plan.recipe)
    _reject_frozen(plan)
    return unify, plan.base


def _alone(task: str, checkpoint: Checkpoint) -> Plan:
    """Return the merge of one checkpoint, which is the checkpoint itself."""
    recipe = Recipe(
        {task: _Opened(checkpoint)}, origin="zero", coefficients=Model(), init=Constant(1.0)
    )
    return open_plan(recipe, with_skeleton=False)


def refuse_finalisers(recipe: Recipe) -> None:
    """Reject finalisers, which would be lost in outputs per task.

    Raises:
        ConfigError: the recipe has finalisers.
    """
    if recipe.finalisers:
        names = ", ".join(type(finaliser).__name__ for finaliser in recipe.finalisers)
        raise ConfigError(
            f"outputs: expected no finalisers, got {names}. They change one merged model, but here "
            "each task has its own; leave `finalisers` out."
        )


def _reject_frozen(plan: Plan) -> None:
    if plan.fixed:
        name, value = next(iter(plan.fixed.items()))
        raise ConfigError(
            f"outputs: {name} is frozen at {value}, but each task has its whole direction; leave "
            "`frozen` out."
        )


def _directions(plan: Plan) -> Callable[[str], Tensor]:
    """Return a function that computes a tensor's directions before the last preprocess."""
    sites = {name: Site(name, plan.source_names) for name in plan.tensors}

    def stored() -> Iterator[tuple[Site, Tensor]]:
        for name, site in sites.items():
            yield site, plan.direction(name)

    before = Chain(plan.recipe.preprocess[:-1], stored)
    return lambda name: before(plan.direction(name), sites[name])


def _vector(directions: Callable[[str], Tensor], name: str) -> Tensor:
    return elect(directions(name))[0]


def _mask(directions: Callable[[str], Tensor], name: str, k: int) -> Tensor:
    return torch.from_numpy(np.packbits(elect(directions(name))[1][k].reshape(-1).numpy()))


def _own_entries(plan: Plan, task: str) -> list[Entry]:
    """Return head and buffers of a task's source, as stored."""
    if plan.private:
        plan.require_private(task)
    source = plan.sources[task]
    infos = [source.infos[name] for name in [*plan.private, *plan.buffers]]
    return [Entry(i.name, i.shape, i.dtype, partial(source.read, i.name)) for i in infos]


def _task_card(task: str, checkpoint: Checkpoint) -> str:
    text = (
        f"The model of the task `{task}` by EMR-Merging (arXiv 2405.17461) or another merge with a "
        "direction per task: the base plus the task's processed direction. `provenance.json` "
        "records what was merged, and how."
    )
    architectures = (checkpoint.config or {}).get("architectures") or [None]
    return render(task, [text], task, architectures[0])


def _compact_card(tasks: list[str], name: str) -> str:
    sections = [
        "One shared vector (`unified.safetensors`), and for each task a mask of one bit per entry "
        "and a scale (`emr.json`):",
        "\n".join(f"- `{task}`" for task in tasks),
        "The weights of a task are the base's plus its scale times its masked vector. `gradmerge "
        "unpack THIS-FOLDER OUTPUT` writes one model folder per task that `transformers` loads; "
        "gradmerge accepts `THIS-FOLDER/tasks/TASK` as a source.",
    ]
    return render("EMR-Merging, compact", sections, name)
