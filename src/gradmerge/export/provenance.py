"""Records of how a merge was made, for exported folders and checkpoints."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gradmerge.common.files import read_json
from gradmerge.common.local_paths import without_places, yaml_without_places
from gradmerge.common.secrets import mask_given, masked
from gradmerge.common.spec import to_plain
from gradmerge.common.version import __version__
from gradmerge.engine.plan import Plan
from gradmerge.engine.state import FitState
from gradmerge.sources.files import write_json
from gradmerge.sources.tokenizers.report import token_report

_PACKAGES = ("lightning", "transformers", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of gradmerge and of the packages that results depend on."""
    packages = {name: version(name) for name in _PACKAGES}
    torch_version = str(torch.__version__)  # a subclass of str, which `weights_only` rejects
    python = platform.python_version()
    return {"gradmerge": __version__, "torch": torch_version, **packages, "python": python}


def stamp() -> dict[str, Any]:
    """Return the time and the versions of an output."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"created": now, "versions": versions()}


def mean_coefficients(state: FitState) -> dict[str, float]:
    """Return each source's mean coefficient: over the entries of a tensor, then over tensors."""
    num = len(state.plan.sources)
    with torch.no_grad():
        rows = [
            state.coefficient(name).double().reshape(num, -1).mean(dim=1) for name in state.learned
        ]
    return dict(zip(state.plan.sources, torch.stack(rows).mean(dim=0).tolist(), strict=True))


def provenance_of(
    state: FitState,
    dtype: str | None,
    tasks: Mapping[str, str],
    results: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None,
    paths: bool = False,
) -> dict[str, Any]:
    """Return the content of provenance.json: what was merged, and how (see `export_state`)."""
    plan = state.plan
    checkpoints = {**({} if plan.base is None else {"base": plan.base}), **plan.sources}
    recipe = to_plain(plan.recipe) if paths else without_places(to_plain(plan.recipe))
    labels = {name: checkpoint.label for name, checkpoint in plan.serving.items()}
    found = {
        **stamp(),
        "sources": {
            name: {
                "from": checkpoint.label,
                "sha256": plan.fingerprints[name],
                **({"files": files} if (files := plan.side_hashes.get(name)) else {}),
            }
            for name, checkpoint in checkpoints.items()
        },
        "heads": {n: label for n, label in labels.items() if n not in plan.sources} or None,
        "recipe": recipe,
        "recipe_sha256": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        "fixed": dict(state.fixed),
        "tasks": dict(tasks),
        "dtype": dtype or "as stored",
        **read_as(plan),
        "results": dict(results or {}),
        "finalisation": None if state.corrections is None else state.corrections.report,
        "trained": trained_parts(state),
        "run": state.run or None,
    }
    return published({**{k: v for k, v in found.items() if v is not None}, **(extra or {})}, paths)


def trained_parts(state: FitState) -> dict[str, Any] | None:
    """Return what a fit has trained per task beside the coefficients; None if nothing."""
    parts = state.private
    return parts.record() if parts is not None and parts.active and parts.settled else None


def published(record: Mapping[str, Any], paths: bool = False) -> dict[str, Any]:
    """Return a record of an export without secrets and, unless `paths`, without local paths."""
    found = masked(record)
    run = found.get("run") or {}
    if run.get("yaml"):
        text = mask_given(run["yaml"])  # one of an earlier version may have secrets
        found["run"] = {**run, "yaml": text if paths else yaml_without_places(text)}
    return found if paths else without_places(found)


def strip_settings(folder: Path) -> None:
    """Put names in place of the local paths that copied configs hold, as those of older tools."""
    for path in folder.rglob("*config*.json"):
        settings = read_json(path)
        stripped = without_places(settings, within=False)
        if stripped != settings:
            write_json(path, stripped, spelled=True)


def read_as(plan: Plan) -> dict[str, Any]:
    """Return the entries of provenance.json on tokenizers, alignment and statistics of a merge."""
    tokens = {} if plan.tokens is None else token_report(plan.tokens)
    long = ("added", "differs", "dropped", "other_settings")  # in tokens.json
    return {
        **({"tokenizer": {k: v for k, v in tokens.items() if k not in long}} if tokens else {}),
        **({"alignment": plan.order.report} if plan.order is not None else {}),
        **({"statistics": plan.collected.summary()} if plan.collected is not None else {}),
    }
