"""Plain data in a checkpoint besides coefficients: the sources and state they belong to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradmerge.common.errors import ConfigError
from gradmerge.common.version import __version__
from gradmerge.engine.merged import MergedModel
from gradmerge.finalisers import Corrections


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
    merged: MergedModel, saved: Mapping[str, Any] | None
) -> tuple[bool, dict[str, Any], dict[str, Any]]:
    """Restore the result of `to_save`, and return its arguments other than the model.

    Raises:
        FingerprintError: the checkpoint was trained on other source weights.
        ConfigError: the checkpoint was not written by gradmerge.
    """
    if saved is None:
        raise ConfigError("the checkpoint holds no gradmerge coefficients.")
    merged.plan.require_fingerprints(saved["fingerprints"])
    for name, coefficient in saved["fixed"].items():
        merged.fix([name], coefficient)
    merged.state.run = saved.get("run", {})
    merged.tasks = dict(saved["tasks"])
    merged.network_buffers.set(saved["buffers"])
    merged.state.corrections = Corrections.restore(saved.get("finalisation", {}))
    return saved["checked_unused"], saved["results"], saved["experts"]
