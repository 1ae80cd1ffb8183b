"""A mergekit YAML as a recipe: the same merge in gradmerge's factors.

Values that vary by tensor become mappings by tensor name. Sums are in float32 whatever `dtype`
says: mergekit rounds task vectors to a `dtype` of 16 bits, so there its results differ by such
roundings.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gradmerge.coefficients import Constant, Model
from gradmerge.coefficients import Tensor as TensorGranularity
from gradmerge.common.errors import ConfigError
from gradmerge.common.names import named
from gradmerge.engine.recipe import Recipe
from gradmerge.mergekit.document import Document, ModelReference, Problems, read_document
from gradmerge.mergekit.table import Table, check_filters, compact, tabulate
from gradmerge.operators import AbstractOperator, Linear
from gradmerge.sources import AbstractSource, Checkpoint, Vocabulary, as_source
from gradmerge.sources.lora import Lora


@dataclass(frozen=True)
class Reading:
    """A mergekit file as gradmerge understands it."""

    recipe: Recipe
    opened: dict[str, Checkpoint]
    """The opened checkpoints by the recipe's source names, and `base`, for a merge that need not
    open them again. A base that is a source as well is one object under both names."""
    dtype: str | None
    """dtype of the result; None: as the reference stores each tensor."""
    summary: str
    """The factors and the range of each source's coefficients, as text to print."""


def read_mergekit(path: str | Path) -> Reading:
    """Read a mergekit YAML: methods, models, slices of unchanged depth, gradients, filters.

    The headers of all models are read, because filters and gradients refer to their tensors.

    Args:
        path: the file. Paths in it are relative to the working directory, as in mergekit.

    Raises:
        ConfigError: the file has problems or needs what gradmerge does not support (all are
            listed).
        SourceError: a model cannot be opened.
    """
    document = read_document(path)
    problems = Problems()
    base = document.base
    specs = {m: source_of(m) for m in (*([base] if base else []), *document.models)}
    opened = {model: as_source(spec).open() for model, spec in specs.items()}
    reference = next(iter(opened.values()))
    tensors = [name for name, info in reference.infos.items() if info.dtype.is_floating_point]
    table = tabulate(document, tensors, problems)
    everything = dict.fromkeys(name for checkpoint in opened.values() for name in checkpoint.infos)
    check_filters(document, everything, problems)
    problems.stop(str(path))

    sources = named([specs[model] for model in document.sources])
    models = dict(zip(sources, document.sources, strict=True))
    if base is not None:
        models["base"] = base
    dtype = document.dtype or _promoted(list(opened.values()), tensors, problems)
    stored = {dtype or _name(reference.infos[name].dtype) for name in tensors}
    factors = _factors(table, problems, exact=stored == {"float32"})
    coefficients = table.coefficients(problems)
    tokenizer = _vocabulary(document.vocabulary, models, problems)
    problems.stop(str(path))

    value = compact(coefficients)
    recipe = Recipe(
        sources,
        base=specs[base] if base else None,
        coefficients=TensorGranularity() if isinstance(value, dict) else Model(),
        init=Constant(value),
        tokenizer=tokenizer,
        **factors,
    )
    checkpoints = {name: opened[model] for name, model in models.items()}
    summary = _summary(document, recipe, coefficients, dtype)
    return Reading(recipe, checkpoints, dtype, summary)


def source_of(model: ModelReference) -> str | AbstractSource:
    """Return the source that a model reference means."""
    own = str(replace(model, adapter=None))
    if model.adapter is None:
        return own
    return Lora(model.adapter.path, as_source(own), model.adapter.revision)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _promoted(
    opened: Sequence[Checkpoint], tensors: Sequence[str], problems: Problems
) -> str | None:
    """Return what the models' dtypes promote to; None: each tensor to the reference's own."""
    promoted = {
        name: functools.reduce(
            torch.promote_types, [c.infos[name].dtype for c in opened if name in c.infos]
        )
        for name in tensors
    }
    if all(kind == opened[0].infos[name].dtype for name, kind in promoted.items()):
        return None
    kinds = sorted(set(map(_name, promoted.values())))
    if len(kinds) > 1:
        got = ", ".join(kinds)
        problems.add("dtype", f"the models' dtypes promote to several ({got}); state one")
    return kinds[0]


def _factors(table: Table, problems: Problems, exact: bool) -> dict[str, Any]:
    """Return origin, preprocess and operator; `exact`: sum in mergekit's order, which shows in
    float32 alone.
    """
    method, origin = table.document.method, table.document.origin
    option = functools.partial(table.option, problems=problems)
    operator: AbstractOperator = Linear("directions" if exact and origin == "base" else "weights")
    try:
        if method.operator is not None:
            operator = method.operator(option)
        return {"origin": origin, "preprocess": method.preprocess(option), "operator": operator}
    except ConfigError as error:
        problems.add("parameters", str(error))
        return {}


def _vocabulary(
    found: Vocabulary | None, models: Mapping[str, ModelReference], problems: Problems
) -> Vocabulary | None:
    if found is None or found.source in ("union", "base"):
        return found
    known = {str(model): name for name, model in models.items()}
    problems.expect(found.source in known, "tokenizer", "one of the models", found.source)
    return replace(found, source=known.get(found.source, "union"))


def _summary(
    document: Document,
    recipe: Recipe,
    coefficients: Mapping[str, Sequence[float]],
    dtype: str | None,
) -> str:
    steps = [type(step).__name__ for step in (*recipe.preprocess, recipe.operator)]
    base = "" if document.base is None else f", base {document.base}"
    lines = [
        f"mergekit {document.method.name}: {', '.join(steps)}, origin {recipe.resolved_origin}"
        f"{base}, stored as {dtype or 'the reference stores it'}"
    ]
    for k, (name, model) in enumerate(zip(recipe.sources, document.sources, strict=True)):
        own = [row[k] for row in coefficients.values()]
        spread = f"{own[0]:.6g}"
        if min(own) != max(own):
            mean = sum(own) / len(own)
            spread = f"{min(own):.6g} to {max(own):.6g}, mean {mean:.6g} of {len(own)} tensors"
        lines.append(f"  {name} ({model}): coefficient {spread}")
    return "\n".join(lines)
