"""EMR-Merging's outputs (arXiv 2405.17461): one shared vector with a mask and a scale per task, or
one ordinary model folder a task.

A task runs with `theta_k = A + r_k M_k (.) u`. Both forms are written tensor by tensor into a
folder that takes its name only when complete; that a task comes from the recipe or from the compact
form makes no difference to its weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from gradmerge.export.atomic import discard, refuse_existing, start_beside, take_name
from gradmerge.export.folder import export_plan, provenance_of, write_config
from gradmerge.export.writer import Entry, write_safetensors
from gradmerge.preprocess import Site, Unify
from gradmerge.preprocess.base import Chain, Passes
from gradmerge.preprocess.unify import elect
from gradmerge.sources import AbstractSource, Checkpoint, TensorInfo
from gradmerge.sources.emr import FORMAT


class TaskCheckpoint(Checkpoint):
    """A task's model by a recipe: `A + B'_k` for merged tensors, the source's own for others."""

    def __init__(self, plan: Plan, source: str) -> None:
        self._plan, self._source = plan, source
        self._checkpoint = plan.sources[source]
        kept = [*plan.private, *plan.buffers]
        self._infos = {
            **{name: plan.reference.infos[name] for name in plan.tensors},
            **{name: self._checkpoint.infos[name] for name in kept},
        }

    @property
    @override
    def label(self) -> str:
        return f"{self._checkpoint.label} in a merge"

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """See `Checkpoint.infos`; merged tensors carry the reference's dtype."""
        return self._infos

    @property
    @override
    def folder(self) -> Path | None:
        return self._checkpoint.folder

    @property
    @override
    def config(self) -> Mapping[str, Any] | None:
        return self._checkpoint.config

    def read(self, name: str) -> Tensor:
        """See `Checkpoint.read`; merged tensors are formed in float32 or wider and kept there."""
        if name not in self._plan.tensors:
            return self._checkpoint.read(name)
        terms = self._plan.terms(name).dense()
        direction = terms.sources[self._plan.source_names.index(self._source)]
        if terms.origin is None:
            return direction.contiguous()
        wide = torch.promote_types(terms.origin.dtype, direction.dtype)
        return terms.origin.to(wide) + direction


@dataclass(frozen=True)
class _Opened(AbstractSource):
    """A checkpoint that is open already."""

    checkpoint: Checkpoint

    def open(self) -> Checkpoint:
        return self.checkpoint


def task_checkpoints(plan: Plan) -> dict[str, Checkpoint]:
    """The model of each source's own processed direction, with a coefficient of 1.

    Raises:
        ConfigError: the recipe changes no direction, or freezes tensors.
    """
    if not plan.recipe.preprocess:
        raise ConfigError(
            "outputs tasks: expected a preprocess (Unify, for EMR-Merging), got none; each task's "
            "model would be its source."
        )
    refuse_finalisers(plan.recipe)
    _require_none_frozen(plan)
    return {name: TaskCheckpoint(plan, name) for name in plan.sources}


def export_tasks(
    tasks: Mapping[str, Checkpoint],
    output: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write one Hugging Face folder a task, `output/<task>`, each of which loads alone.

    Args:
        tasks: the model of each task.
        output: folder to write.
        dtype: see `export_plan`.
        overwrite: replace an existing folder, once the new one is complete.
        extra: more for each provenance.json.

    Returns:
        The folder.
    """
    target = Path(output).expanduser()
    refuse_existing(target, overwrite)
    work = start_beside(target)
    try:
        for task, checkpoint in tasks.items():
            plan = _alone(task, checkpoint)
            folder = export_plan(
                plan, plan.initial_raw(), work / task, dtype=dtype, extra=dict(extra or {})
            )
            (folder / "coefficients.safetensors").unlink()
            (folder / "README.md").write_text(_task_card(task))
        take_name(work, target, overwrite)
    finally:
        discard(work, target)
    return target


def export_compact(plan: Plan, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write the shared vector, and a mask and a scale per task (`gradmerge.sources.emr` says how).

    Args:
        plan: an opened recipe whose last preprocess is `Unify`.
        output: folder to write.
        overwrite: replace an existing folder, once the new one is complete.

    Returns:
        The folder.

    Raises:
        ConfigError: the recipe is no EMR-Merging, freezes tensors, or aligns vocabularies.
    """
    unify = plan.recipe.preprocess[-1] if plan.recipe.preprocess else None
    if not isinstance(unify, Unify):
        raise ConfigError("outputs compact: expected Unify as the last preprocess, got none.")
    if plan.recipe.resolved_origin != "base" or plan.base is None:
        raise ConfigError(
            "outputs compact: expected origin base, which tasks are put on again, got "
            f"{plan.recipe.resolved_origin}."
        )
    if plan.alignment is not None:
        raise ConfigError(
            "outputs compact: the shared vector is put on the base as it is stored, and this "
            "recipe aligns its rows to other tokens (tokenizer). Use --outputs tasks."
        )
    refuse_finalisers(plan.recipe)
    _require_none_frozen(plan)
    target = Path(output).expanduser()
    refuse_existing(target, overwrite)
    passes = _directions(plan)
    work = start_beside(target)
    try:
        scales = dict(zip(plan.sources, unify.scales(passes), strict=True))
        write_safetensors(work / "unified.safetensors", list(_unified_entries(plan, passes)))
        for k, task in enumerate(plan.sources):
            folder = work / "tasks" / task
            folder.mkdir(parents=True)
            write_safetensors(folder / "masks.safetensors", list(_mask_entries(plan, passes, k)))
            own = list(_own_entries(plan, task))
            if own:
                write_safetensors(folder / "own.safetensors", own)
            write_config(_alone(task, TaskCheckpoint(plan, task)), folder, None, None)
        provenance = provenance_of(plan, None, {task: task for task in scales}, None, None)
        base = {"from": _found_again(plan.base), "sha256": plan.fingerprints["base"]}
        described = {"format": FORMAT, "base": base, "scales": scales}
        (work / "emr.json").write_text(json.dumps(described, indent=2) + "\n")
        (work / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        (work / "README.md").write_text(_compact_card(list(scales)))
        take_name(work, target, overwrite)
    finally:
        discard(work, target)
    return target


def _alone(task: str, checkpoint: Checkpoint) -> Plan:
    """The merge of one checkpoint, which is the checkpoint."""
    recipe = Recipe(
        {task: _Opened(checkpoint)}, origin="zero", coefficients=Model(), init=Constant(1.0)
    )
    return open_plan(recipe, with_skeleton=False)


def _found_again(base: Checkpoint) -> str:
    """The base's label; a folder's path such that it holds from everywhere."""
    path = Path(base.label).expanduser()
    return str(path.resolve()) if path.exists() else base.label


def refuse_finalisers(recipe: Recipe) -> None:
    """Stop a merge whose finalisers would be lost in outputs a task.

    Raises:
        ConfigError: the recipe has finalisers.
    """
    if recipe.finalisers:
        names = ", ".join(type(finaliser).__name__ for finaliser in recipe.finalisers)
        raise ConfigError(
            f"outputs: finalisers are of one merged model, got {names}, and here each task has "
            "its own; leave `finalisers` out."
        )


def _require_none_frozen(plan: Plan) -> None:
    if plan.fixed:
        raise ConfigError(
            f"outputs: {next(iter(plan.fixed))} is frozen at {next(iter(plan.fixed.values()))}, "
            "but each task takes its own direction whole; leave `frozen` out."
        )


def _directions(plan: Plan) -> Passes:
    """All directions as the steps before the last leave them."""
    sites = [Site(name, plan.source_names) for name in plan.tensors]

    def stored() -> Iterator[tuple[Site, Tensor]]:
        for site in sites:
            yield site, plan.direction(site.name)

    before = Chain(plan.recipe.preprocess[:-1], stored)

    def passes() -> Iterator[tuple[Site, Tensor]]:
        for site, directions in stored():
            yield site, before(directions, site)

    return passes


def _elections(plan: Plan, passes: Passes) -> Iterator[tuple[str, Any]]:
    """Each tensor's name and a call that elects; entries are made in this order."""
    elections = ((site.name, elect(directions)) for site, directions in passes())
    for name in plan.tensors:

        def next_one(name: str = name) -> tuple[Tensor, Tensor]:
            found, election = next(elections)
            assert found == name
            return election

        yield name, next_one


def _unified_entries(plan: Plan, passes: Passes) -> Iterator[Entry]:
    for name, election in _elections(plan, passes):

        def make(election: Any = election) -> Tensor:
            return election()[0].contiguous()

        yield Entry(name, plan.tensors[name].shape, torch.float32, make)


def _mask_entries(plan: Plan, passes: Passes, k: int) -> Iterator[Entry]:
    for name, election in _elections(plan, passes):
        size = torch.Size(plan.tensors[name].shape).numel()

        def make(election: Any = election) -> Tensor:
            mask = election()[1][k].reshape(-1)
            return torch.from_numpy(np.packbits(mask.numpy()))

        yield Entry(name, (-(-size // 8),), torch.uint8, make)


def _own_entries(plan: Plan, task: str) -> Iterator[Entry]:
    """Head and buffers of a task's source, as stored."""
    if plan.private:
        plan.require_private(task)
    source = plan.sources[task]
    for name in [*plan.private, *plan.buffers]:
        info = source.infos[name]

        def make(name: str = name) -> Tensor:
            return source.read(name)

        yield Entry(name, info.shape, info.dtype, make)


def _task_card(task: str) -> str:
    return (
        "---\nlibrary_name: transformers\ntags:\n- merge\n- gradmerge\n---\n\n"
        f"# {task}\n\nThe model of the task `{task}` by EMR-Merging (arXiv 2405.17461) or another "
        "merge that keeps a direction a task: the base plus the task's own processed direction. "
        "`transformers` loads it alone; `provenance.json` says what it was made of.\n"
    )


def _compact_card(tasks: list[str]) -> str:
    listed = "\n".join(f"- `{task}`" for task in tasks)
    return (
        "---\ntags:\n- merge\n- gradmerge\n---\n\n# EMR-Merging, compact\n\n"
        "One shared vector (`unified.safetensors`), and for each task a mask of one bit an entry "
        f"and a scale (`emr.json`):\n\n{listed}\n\nThe weights of a task are the base's plus its "
        "scale times its masked vector. `gradmerge unpack THIS-FOLDER OUTPUT` writes one model "
        "folder a task that `transformers` loads; gradmerge takes `THIS-FOLDER/tasks/TASK` as a "
        "source as it is.\n"
    )
