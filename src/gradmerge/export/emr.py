"""Outputs of EMR-Merging (arXiv 2405.17461): one model folder per task, or a compact form.

A task runs with `theta_k = A + r_k M_k (.) u`. The compact form stores the vector `u` once, and a
mask and a scale per task. Both give exactly the same weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from gradmerge.common.errors import ConfigError, NonFiniteError, shorten
from gradmerge.common.finite import non_finite_numbers
from gradmerge.common.patterns import matches
from gradmerge.engine.inventory import take_inventory
from gradmerge.engine.plan import Plan
from gradmerge.engine.recipe import Recipe
from gradmerge.engine.state import FitState
from gradmerge.export.atomic import inputs_of, new_folder
from gradmerge.export.card import render
from gradmerge.export.folder import require_options, write_config
from gradmerge.export.opened import folder_like, require_opens
from gradmerge.export.provenance import provenance_of, published, stamp, strip_settings
from gradmerge.export.weights import private_entries, write_weights
from gradmerge.export.writer import Entry, entries_of, write_safetensors
from gradmerge.operators import Linear, Spread
from gradmerge.preprocess import Unify
from gradmerge.preprocess.processed import ProcessedDirections
from gradmerge.preprocess.unify import elect
from gradmerge.sources import Checkpoint
from gradmerge.sources.base import require_finite
from gradmerge.sources.emr import FORMAT
from gradmerge.sources.files import write_json
from gradmerge.sources.ties import moved_in

_NEAR = 3
"""Levels that a relative path may climb, and still say nothing of the machine."""


class TaskCheckpoint(Checkpoint):
    """A task's model by a recipe: `A + B'_k` for merged tensors, the source's own for others.

    Tensors that are frozen at v are `A + v sum_j B_j` in every task, without preprocess. The
    fingerprint is that of the source.
    """

    def __init__(self, plan: Plan, source: str) -> None:
        own = plan.sources[source]
        self._own, self._index = own, plan.source_names.index(source)
        self._plan, self._frozen = plan.without_frozen(), _frozen(plan)
        plan.require_private(source)
        infos = {name: plan.reference.infos[name] for name in plan.tensors}
        infos.update({name: own.infos[name] for name in [*plan.private, *plan.buffers]})
        super().__init__(own.label, infos, own.folder, own.config)

    @property
    @override
    def parts(self) -> Sequence[Checkpoint]:
        return self._own.parts

    @override
    def read(self, name: str) -> Tensor:
        if name not in self._plan.tensors:
            return self._own.read(name)
        if name in self._frozen:
            return _frozen_at(self._plan, name, self._frozen[name])
        terms = self._plan.terms(name).dense()
        direction = terms.sources[self._index]
        if terms.origin is None:
            return direction.contiguous()
        return terms.origin.to(torch.promote_types(terms.origin.dtype, direction.dtype)) + direction

    @override
    def fingerprint(self) -> str:
        return self._own.fingerprint()


def _frozen(plan: Plan) -> dict[str, float]:
    """Return the coefficients of tensors that the recipe freezes or that no source changes."""
    patterns = plan.recipe.frozen
    kept = (n for n in plan.fixed if n in plan.unchanged or matches(patterns, n))
    return {name: plan.fixed[name] for name in kept}


def _frozen_at(plan: Plan, name: str, value: float) -> Tensor:
    """Return `A + v sum_j B_j` in float32 or wider; `A` as it is stored if it is the base's."""
    if not value and plan.recipe.resolved_origin == "base":
        return plan.read("base", name)
    terms = plan.terms(name, processed=False)
    out = torch.empty(plan.tensors[name].shape, dtype=terms.accumulate_dtype)
    return Linear().combine(terms, plan.coefficient(value), Spread("scalar"), out)


def require_outputs(recipe: Recipe, outputs: Literal["tasks", "compact"]) -> None:
    """Reject recipes that do not have a folder per task or a compact form, before any work."""
    compact, origin = outputs == "compact", recipe.resolved_origin
    last = recipe.preprocess[-1] if recipe.preprocess else None
    finalisers = ", ".join(type(finaliser).__name__ for finaliser in recipe.finalisers)
    moved = [pattern for pattern, value in recipe.frozen.items() if value not in ("origin", 0)]
    for is_wrong, problem in (
        (finalisers, f"expected no finalisers, got {finalisers}; each task has a model of its own"),
        (
            not compact and last is None,
            "expected a preprocess (Unify, for EMR-Merging), got none; tasks would be sources",
        ),
        (
            compact and not isinstance(last, Unify),
            f"expected Unify as the last preprocess, got {type(last).__name__ if last else 'none'}",
        ),
        (
            compact and origin != "base",
            f"expected origin base, to which each task's vector is added, got {origin}",
        ),
        (
            compact and moved,
            f"expected tensors that are frozen at the origin, which the base has, got "
            f"{shorten(moved)}, frozen elsewhere. Use --outputs tasks",
        ),
        (
            compact and recipe.tokenizer is not None,
            "expected no tokenizer, which aligns the base's rows to other tokens; the vector is "
            "added to the base as it is stored. Use --outputs tasks",
        ),
    ):
        if is_wrong:
            raise ConfigError(f"outputs {outputs}: {problem}.")


def task_checkpoints(plan: Plan) -> dict[str, Checkpoint]:
    """Return the model of each source's own processed direction, with a coefficient of 1."""
    require_outputs(plan.recipe, "tasks")
    return {name: TaskCheckpoint(plan, name) for name in plan.sources}


def export_tasks(
    tasks: Mapping[str, Checkpoint],
    output: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
    inputs: Iterable[Path] = (),
    trust_remote_code: bool = False,
    provenance_paths: bool = False,
) -> Path:
    """Write one Hugging Face folder per task, `output/<task>`, each of which loads on its own.

    `extra` are further entries of each provenance.json, and `inputs` all files and folders that are
    read; `trust_remote_code` lets modelling code run when the folders are opened once; other
    options as in `export_state`.
    """
    kind = require_options(dtype, None, tasks)
    target = Path(output).expanduser()
    first = next(iter(tasks.values()))
    masks = require_finite(tasks, take_inventory(list(first.infos), first, None, ()).buffers)
    with new_folder(target, overwrite, inputs) as work:
        for task, checkpoint in tasks.items():
            folder = work / task
            folder.mkdir()
            found = take_inventory(list(checkpoint.infos), checkpoint, None, ())
            weights = entries_of(checkpoint, found.tensors, kind)
            write_weights(
                folder, [*weights, *entries_of(checkpoint, found.buffers, infinite=masks)]
            )
            write_config(folder, checkpoint.folder, checkpoint.config, kind)
            like = folder_like(checkpoint)
            check = require_opens(folder, target / task, like, trust_remote_code)
            source = {"from": checkpoint.label, "sha256": checkpoint.fingerprint()}
            provenance = {
                **stamp(),
                "sources": {task: source},
                "tasks": {task: task},
                "dtype": dtype or "as stored",
                "check": check,
                **(extra or {}),
            }
            strip_settings(folder)
            write_json(folder / "provenance.json", published(provenance, provenance_paths))
            (folder / "README.md").write_text(_task_card(task, checkpoint))
    return target


def export_compact(
    plan: Plan,
    output: str | Path,
    *,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    provenance_paths: bool = False,
) -> Path:
    """Write the shared vector, and a mask and a scale per task (format: `gradmerge.sources.emr`).

    The recipe's last preprocess must be `Unify`.
    """
    require_outputs(plan.recipe, "compact")
    unify, base = plan.recipe.preprocess[-1], plan.base
    moved = [] if base is None else moved_in({"base": base})
    if moved:
        raise ConfigError(
            f"outputs compact: expected the base to store all merged tensors, but {moved[0]} is "
            "stored as the tensor that it is tied to. Use --outputs tasks."
        )
    assert isinstance(unify, Unify)
    assert base is not None
    before = ProcessedDirections(plan.recipe.preprocess[:-1], plan.directions)

    def vector(name: str) -> Tensor:
        return elect(before.read(name))[0]

    def mask(name: str, k: int) -> Tensor:
        return torch.from_numpy(np.packbits(elect(before.read(name))[1][k].numpy()))

    kept = _frozen(plan)
    shapes = {name: tensor.shape for name, tensor in plan.tensors.items() if name not in kept}
    vectors = [Entry(n, shape, torch.float32, partial(vector, n)) for n, shape in shapes.items()]
    target = Path(output).expanduser()
    with new_folder(target, overwrite, [*inputs, *inputs_of(plan)]) as work:
        sites = plan.directions
        found = unify.scales(lambda: ((site, before.read(site.name)) for site, _ in sites()))
        scales = dict(zip(plan.sources, found, strict=True))
        if wrong := list(non_finite_numbers(scales)):
            listed = ", ".join(f"{task}: {value:g}" for task, value in wrong)
            raise NonFiniteError(f"scales of EMR-Merging: expected finite numbers, got {listed}.")
        write_safetensors(work / "unified.st", vectors)
        for k, (task, source) in enumerate(plan.sources.items()):
            folder = work / "tasks" / task
            folder.mkdir(parents=True)
            masks = [
                Entry(n, (-(-math.prod(shape) // 8),), torch.uint8, partial(mask, n, k))
                for n, shape in shapes.items()
            ]
            write_safetensors(folder / "masks.st", masks)
            own = [
                *private_entries(plan, task),
                *entries_of(source, plan.buffers, infinite=plan.infinite_buffers),
            ]
            if own:
                write_safetensors(folder / "own.st", own)
            write_config(folder, source.folder, source.config)
        label = _place_of(base.label, target, provenance_paths)
        described = {"from": label, "sha256": plan.fingerprints["base"]}
        content = {"format": FORMAT, "base": described, "scales": scales, "unchanged": [*kept]}
        write_json(work / "emr.json", content)
        serving = {task: task for task in scales}
        state = FitState(plan, {})
        provenance = provenance_of(state, None, serving, None, None, provenance_paths)
        write_json(work / "provenance.json", provenance)
        strip_settings(work)
        (work / "README.md").write_text(_compact_card(list(scales), target.name))
    return target


def _place_of(label: str, target: Path, paths: bool) -> str:
    """Return where a compact folder finds its base: relative to it, if that tells nothing more."""
    path = Path(label).expanduser()
    if not path.exists():
        return label
    place = path.resolve()
    if paths:
        return str(place)
    with suppress(ValueError):  # on another drive
        way = Path(os.path.relpath(place, target.resolve()))
        shared = Path(os.path.commonpath([place, target.resolve()]))
        if way.parts.count("..") <= _NEAR and shared not in Path.home().parents:
            return way.as_posix()
    return place.name


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
        "One shared vector (`unified.st`), and for each task a mask of one bit per entry "
        "and a scale (`emr.json`):",
        "\n".join(f"- `{task}`" for task in tasks),
        "The weights of a task are the base's plus its scale times its masked vector. `gradmerge "
        "unpack THIS-FOLDER OUTPUT` writes one model folder per task that `transformers` loads; "
        "gradmerge accepts `THIS-FOLDER/tasks/TASK` as a source.",
    ]
    return render("EMR-Merging, compact", sections, name)
