"""Weights of the modules around a network (sentence-transformers), merged as the network is."""

from __future__ import annotations

from pathlib import Path

import torch

from gradmerge.coefficients import Constant, Model
from gradmerge.common.spec import patterns_of
from gradmerge.engine.opening import open_plan
from gradmerge.engine.plan import Plan
from gradmerge.engine.recipe import Recipe
from gradmerge.engine.state import FitState
from gradmerge.export.provenance import mean_coefficients
from gradmerge.export.weights import merged_entries, write_weights
from gradmerge.operators import Linear
from gradmerge.sources import Checkpoint, SafetensorsFile, TorchFile
from gradmerge.sources.module_weights import differing_weights


def write_modules(
    state: FitState, work: Path, dtype: torch.dtype | None = None
) -> dict[str, dict[str, str]]:
    """Merge the weights of modules that differ between the sources, in place of the copied ones.

    Such a module takes no part in the network's forward pass, so nothing is learned for it: each
    source gets its mean coefficient over the network's tensors, with the recipe's origin, operator
    and preprocess. Steps that need data, or name tensors of the network, are left out.

    Args:
        state: the opened recipe with its coefficients.
        work: the folder, with copies of the modules.
        dtype: dtype of the weights. Default: as stored.

    Returns:
        Fingerprint of each source's weights, by file.
    """
    plan = state.plan
    found = {}
    for name in differing_weights(_opened(plan).values()):
        part = FitState.start(open_plan(_recipe(state, name), with_skeleton=False))
        target = work / name
        target.unlink()
        write_weights(target.parent, list(merged_entries(part, {}, dtype)))
        found[name] = dict(part.plan.fingerprints)
    return found


def _opened(plan: Plan) -> dict[str, Checkpoint]:
    return {**({} if plan.base is None else {"base": plan.base}), **plan.sources}


def _recipe(state: FitState, name: str) -> Recipe:
    """Return the recipe of one weight file of a module."""
    plan, recipe = state.plan, state.plan.recipe
    kind = SafetensorsFile if name.endswith(".safetensors") else TorchFile
    places = {n: kind(f"{opened.folder}/{name}") for n, opened in _opened(plan).items()}
    base = places.pop("base", None)
    steps = [s for s in recipe.preprocess if s.needs is None and not patterns_of(s)]
    return Recipe(
        dict(places),
        base=base,
        origin=recipe.resolved_origin,
        preprocess=steps,
        coefficients=Model(),
        init=Constant(list(mean_coefficients(state).values())),
        operator=Linear() if recipe.operator.by_component else recipe.operator,
    )
