"""Open a recipe: read headers, check that everything fits, align, and place coefficients."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from gradmerge.alignment.align import align_sources
from gradmerge.alignment.moments import open_activations
from gradmerge.coefficients import Column, Row
from gradmerge.engine.plan import Plan
from gradmerge.engine.recipe import Recipe, innermost
from gradmerge.errors import ConfigError, Problem
from gradmerge.sources import Checkpoint, as_source
from gradmerge.sources.compatibility import check, check_private, require
from gradmerge.sources.skeleton import build_skeleton, strip_weights
from gradmerge.sources.tokenizers.view import align


def open_plan(recipe: Recipe, module: nn.Module | None = None, with_skeleton: bool = True) -> Plan:
    """Read all headers, check compatibility and place the coefficients.

    Args:
        recipe: what is merged and how.
        module: the architecture, where no source has a config (its weights are not used).
        with_skeleton: build the network without weights; a merge with fixed coefficients a
            model, group or tensor does not need it.

    Raises:
        CompatibilityError: one report of everything that does not fit.
        SourceError: a source cannot be opened.
    """
    base_spec = None if recipe.base is None else as_source(recipe.base)
    base = None if base_spec is None else base_spec.open()
    sources = {name: as_source(s, base_spec).open() for name, s in recipe.sources.items()}
    heads = {name: as_source(s, base_spec).open() for name, s in recipe.heads.items()}
    everything = {**({"base": base} if base is not None else {}), **sources}
    if len(everything) != len(sources) + (base is not None):
        raise ConfigError("a source is named 'base', which is the base's own name; rename it.")
    problems: list[Problem] = []
    if recipe.tokenizer is not None:
        everything, problems = align(recipe.tokenizer, everything, recipe.trust_remote_code)
        base = everything.get("base")
        sources = {name: everything[name] for name in sources}
    problems += check({**everything, **heads}, recipe.private, recipe.allow)
    problems += check_private({**sources, **heads}, recipe.private, recipe.allow)
    require(problems)
    skeleton = order = None
    aligned = recipe.alignment is not None and not recipe.alignment.is_identity
    needed = with_skeleton or isinstance(innermost(recipe.coefficients), (Column, Row))
    if needed or aligned:
        skeleton = _skeleton(recipe, module, everything)
    if recipe.alignment is not None and aligned:
        activations = open_activations(recipe.statistics, sources)
        sources, order = align_sources(
            recipe.alignment, sources, skeleton, recipe.private, activations
        )
    return Plan(recipe, sources, base, skeleton if needed else None, problems, heads, order)


def _skeleton(
    recipe: Recipe, module: nn.Module | None, everything: Mapping[str, Checkpoint]
) -> nn.Module | None:
    if module is not None:
        return strip_weights(module)
    # A base may have another head (or none); the network is the one that the tasks run.
    specs = (
        [*recipe.sources.values(), recipe.base]
        if recipe.private
        else [recipe.base, *recipe.sources.values()]
    )
    for spec in specs:
        inner = getattr(spec, "module", spec)
        if isinstance(inner, nn.Module):
            return strip_weights(inner)
    opened = list(everything.values())
    if recipe.private and recipe.base is not None:
        opened = [*opened[1:], opened[0]]
    for checkpoint in opened:
        if checkpoint.folder is not None and checkpoint.config is not None:
            return build_skeleton(checkpoint.folder, recipe.trust_remote_code)
    return None
