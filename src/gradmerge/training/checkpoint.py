"""Loading of checkpoints, and what is in them besides coefficients: sources and state."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from gradmerge.common.atomic import whole_file
from gradmerge.common.checkpoints import is_address, load_checkpoint
from gradmerge.common.errors import ConfigError, GradmergeError, OutputError, shorten
from gradmerge.common.files import read_json
from gradmerge.common.hub import without_downloads
from gradmerge.common.schema import a_count, a_name, a_number, require_shape
from gradmerge.common.spec import from_plain
from gradmerge.common.version import __version__
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.plan import Plan
from gradmerge.engine.recipe import Recipe
from gradmerge.export.history import SAVED as SAVED_HISTORY
from gradmerge.finalisers import Corrections
from gradmerge.sources import AbstractSource

_SCORES = ".scores.json"


def guard_loading(trainer: Any) -> None:
    """Make a trainer load checkpoints by `load_checkpoint` only, whatever it is asked to load.

    Raises:
        ConfigError: it would save checkpoints at an address, from where they are not loaded.
    """
    strategy = trainer.strategy
    for callback in trainer.checkpoint_callbacks:
        place = getattr(callback, "dirpath", None)
        if place is not None and is_address(place):
            raise ConfigError(
                f"{type(callback).__name__}.dirpath: expected a local folder, got {place}; "
                "checkpoints are loaded from local files only. Save them here, and copy them."
            )

    def load(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if type(strategy).load_checkpoint is not Strategy.load_checkpoint:
            raise ConfigError(
                f"{checkpoint_path}: {type(strategy).__name__} reads checkpoints in a way that can "
                "run code in them, so that it cannot resume. Use strategy auto or ddp."
            )
        return load_checkpoint(checkpoint_path)

    strategy.load_checkpoint = load


# Types of the module's options in a checkpoint.
_OPTIONS: dict[str, tuple[type, ...]] = {
    "memory": (str,),
    "dtype": (str,),
    "activation_checkpointing": (bool,),
    "tasks_at_once": (int,),
    "learning_rate": (int, float),
    "private_learning_rate": (int, float, type(None)),
    "load_sources": (bool,),
    "placement": (str, dict),
    "source_shards": (int,),
    "score_experts": (bool,),
    "score_start": (bool,),
    "logit_scale": (int, float, type(None)),
}


@contextmanager
def damage_named(path: object) -> Iterator[None]:
    """Turn what unexpected content of a checkpoint raises within the context into one error."""
    try:
        yield
    except (GradmergeError, OSError, ImportError):
        raise
    except Exception as error:
        raise ConfigError(
            f"{path} is damaged or was changed, or does not belong to this recipe: "
            f"{type(error).__name__}: {error}"
        ) from error


def require_options(saved: Mapping[str, Any]) -> None:
    """Reject options of another type than the module's."""
    for name, kinds in _OPTIONS.items():
        if name in saved and not isinstance(saved[name], kinds):
            raise TypeError(f"{name} is {saved[name]!r}")


def recipe_of(
    saved: Any,
    allow_modules: Collection[str],
    trust_remote_code: bool,
    sources: Mapping[str, str | AbstractSource] | None,
) -> Recipe:
    """Return the recipe in a checkpoint with the user's permissions and places of sources."""
    recipe = from_plain(saved, allow_modules)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"its recipe is a {type(recipe).__name__}")
    return replace(recipe, trust_remote_code=trust_remote_code).with_sources(sources or {})


def unknown_sources(
    path: object, sources: Mapping[str, str | AbstractSource] | None
) -> AbstractContextManager[None]:
    """Return the context in which the sources that a checkpoint names are opened."""
    given = (getattr(spec, "path", spec) for spec in (sources or {}).values())
    known = [spec.partition("@")[0] for spec in given if isinstance(spec, str)]
    remedy = "Name it yourself: --sources NAME=ID (in Python: sources={...})."
    return without_downloads(path, remedy, known)


def is_empty(value: Any) -> bool:
    """nothing"""  # noqa: D403, D415
    return value == {}


_CORRECTION = {"scale": Tensor, "axis": a_count, "shift?": Tensor, "groups?": a_count}
_FINALISATION = {"corrections": {str: _CORRECTION}, "report?": dict, "coefficients?": [int]}
_SAVED = {
    "tasks": {a_name: str},
    "fingerprints": {str: str},
    "files?": {str: {str: str}},
    "fixed": {str: float},
    "checked_unused": bool,
    "buffers": {str: Tensor},
    "finalisation?": (_FINALISATION, is_empty),
    "run?": {"yaml?": str},
    "results": {str: {str: {str: a_number}}},
    "experts": {str: {str: {str: a_number}}},
    "regularisation?": {str: Tensor},
    "history?": SAVED_HISTORY,
}


@contextmanager
def holding(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Set the parameters to the given values within the context."""
    changed = {
        name: (parameter, parameter.detach().clone())
        for name, parameter in parameters.items()
        if name in values and not torch.equal(parameter, values[name].to(parameter))
    }
    # through .data: a graph awaiting its backward pass keeps the values from outside the context
    for name, (parameter, _) in changed.items():
        parameter.data.copy_(values[name])
    try:
        yield
    finally:
        for parameter, before in changed.values():
            parameter.data.copy_(before)


def to_save(
    merged: MergedModel,
    checked_unused: bool,
    results: Mapping[str, Any],
    experts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the fingerprints, fixed tensors, buffers, corrections and scores of a merge.

    Args:
        merged: the model whose coefficients are saved.
        checked_unused: true once tensors without a gradient have been fixed.
        results: scores by split.
        experts: scores of the tasks' own sources by split.
    """
    plan, state = merged.plan, merged.state
    return {
        "version": __version__,
        "sources": list(plan.source_names),
        "tasks": dict(merged.tasks),
        "fingerprints": plan.fingerprints,
        "files": plan.side_hashes,
        "fixed": dict(state.fixed),
        "checked_unused": checked_unused,
        "buffers": {
            k: v.detach().cpu().clone() for k, v in merged.network_buffers.values().items()
        },
        "finalisation": state.corrections.to_save() if state.corrections else {},
        "run": copy.deepcopy(state.run),
        "results": copy.deepcopy(dict(results)),
        "experts": copy.deepcopy(dict(experts)),
    }


def restore(
    merged: MergedModel, checkpoint: dict[str, Any]
) -> tuple[bool, dict[str, Any], dict[str, Any]]:
    """Restore the result of `to_save`, and return its arguments other than the model.

    Coefficients that an earlier version gave to tensors that no source changes are taken out of
    the checkpoint.

    Raises:
        FingerprintError: the checkpoint was trained on other source weights.
        ConfigError: the checkpoint was not written by gradmerge.
    """
    saved = checkpoint.get("gradmerge")
    if saved is None:
        raise ConfigError("the checkpoint holds no gradmerge coefficients.")
    require_shape("the checkpoint", saved, _SAVED, "Take another checkpoint.", ConfigError)
    merged.plan.require_fingerprints(saved["fingerprints"], saved.get("files"))
    for name, coefficient in saved["fixed"].items():
        if name not in merged.plan.tensors or not math.isfinite(coefficient):
            raise ValueError(f"it fixes {name} at {coefficient}")
        merged.fix([name], float(coefficient))
    merged.state.run = saved.get("run", {})
    lost = [f"{t} -> {s}" for t, s in saved["tasks"].items() if s not in merged.plan.serving]
    if lost or not saved["tasks"]:
        raise ValueError(
            f"its tasks are {', '.join(lost) or 'none'}, and its sources "
            f"{', '.join(merged.plan.serving)}"
        )
    _take_tasks(merged, saved["tasks"])
    merged.network_buffers.set(saved["buffers"])
    merged.state.corrections = Corrections.restore(saved.get("finalisation", {}))
    _leave_out_unchanged(merged.plan, checkpoint, saved)
    return saved["checked_unused"], saved["results"], saved["experts"]


def _leave_out_unchanged(plan: Plan, checkpoint: dict[str, Any], saved: dict[str, Any]) -> None:
    """Take coefficients of tensors that no source changes out of a checkpoint in place."""
    stale = [
        name
        for name in plan.tensors
        if name in plan.unchanged and name not in saved["fixed"] and plan.fixed[name] == 0
    ]
    if not stale:
        return
    names = {*plan.layout.slots, *stale}
    older = plan.recipe.coefficients.layout([t for n, t in plan.tensors.items() if n in names])

    def kept(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        columns: dict[str, dict[int, int]] = {}
        found = {}
        for name, slot in plan.layout.slots.items():
            if slot.index is None:
                found[slot.key] = values[slot.key]
            else:
                columns.setdefault(slot.key, {})[slot.index] = older.slots[name].index or 0
        for key, of in columns.items():
            found[key] = values[key][:, [of[index] for index in sorted(of)]]
        return found

    state, start = checkpoint["state_dict"], "merged.raw."
    raw = {key.removeprefix(start): state.pop(key) for key in [*state] if key.startswith(start)}
    state.update({f"{start}{key}": value for key, value in kept(raw).items()})
    if saved.get("regularisation"):
        saved["regularisation"] = kept(saved["regularisation"])
    if checkpoint.get("optimizer_states"):
        checkpoint["optimizer_states"] = []  # a fit that resumes has a new one
    warnings.warn(
        f"the checkpoint has coefficients of {len(stale)} tensors that are the same in all sources "
        f"and the base ({shorten(stale, 2)}), and that no coefficient changes. They are left out; "
        "a fit that resumes from it starts with a new state of its optimiser.",
        stacklevel=2,
    )


def _take_tasks(merged: MergedModel, tasks: Mapping[str, str]) -> None:
    """Set the tasks of a checkpoint; what it has trained per task is for no others."""
    if merged.private.active and merged.private.settled and dict(tasks) != merged.tasks:
        raise ConfigError(
            f"the checkpoint's private parts are those of the tasks {shorten(list(tasks))}, got "
            f"{shorten(list(merged.tasks))}. Resume with the tasks and sources of its fit."
        )
    merged.tasks = dict(tasks)
    merged.private.settled = True


def keep_scores(checkpoint: Path, results: Mapping[str, Any]) -> Path | None:
    """Keep scores of a checkpoint beside it (`NAME.scores.json`), for its export.

    A folder that cannot be written is left as it is: the scores have been printed.

    Args:
        checkpoint: the checkpoint.
        results: scores by split (or other measurement), task and metric, added to those before.

    Returns:
        The file, if it could be written.
    """
    target = checkpoint.with_suffix(_SCORES)
    with suppress(OSError, OutputError), whole_file(target) as work:
        kept = {**kept_scores(checkpoint), **results}
        found = {"checkpoint_sha256": _sha256(checkpoint), "scores": kept}
        work.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return target
    return None


def kept_scores(checkpoint: Path) -> dict[str, Any]:
    """Return the scores of a checkpoint that were kept, if it is the same since.

    Raises:
        ConfigError: their file is damaged.
    """
    path = checkpoint.with_suffix(_SCORES)
    if not path.is_file():
        return {}
    found: Any = read_json(path, ConfigError)
    shape = {"checkpoint_sha256": str, "scores": {str: {str: {str: a_number}}}}
    require_shape(path, found, shape, "Remove it, or score the checkpoint again.", ConfigError)
    return dict(found["scores"]) if found["checkpoint_sha256"] == _sha256(checkpoint) else {}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
