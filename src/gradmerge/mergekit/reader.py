"""A mergekit YAML as a recipe: the same merge in gradmerge's factors.

Each method becomes an operator, a preprocess and coefficients; what varies by tensor becomes a
mapping by tensor name. Sums are in float32 whatever `dtype` says: mergekit rounds task vectors to a
`dtype` of 16 bits, so there its results differ by such roundings.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradmerge import operators, preprocess
from gradmerge._typing import Origin
from gradmerge.coefficients import Constant, Model
from gradmerge.coefficients import Tensor as TensorGranularity
from gradmerge.engine.recipe import Recipe, named
from gradmerge.mergekit.content import Document, ModelReference, Problems
from gradmerge.mergekit.document import read_document
from gradmerge.mergekit.table import Table, tabulate
from gradmerge.sources import AbstractSource, Checkpoint, as_source
from gradmerge.sources.lora import Lora
from gradmerge.spec import Setting

_FROM_ZERO = ("linear", "passthrough", "slerp", "karcher")
# Methods whose formula counts its inputs, so that each tensor must have all of them.
_COUNTING = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "nearswap", "sce")
_NUSLERP_LINE = 0.9999999
_EPS = 1e-8


@dataclass(frozen=True)
class Reading:
    """What a mergekit file comes to."""

    recipe: Recipe
    dtype: str | None
    """dtype of the result; None: as the reference stores each tensor."""
    summary: str
    """What was understood, for people."""
    warnings: list[str]


def read_mergekit(path: str | Path) -> Reading:
    """Read a mergekit YAML: methods, models, slices of unchanged depth, gradients, filters.

    The headers of all models are read, for a file's filters and gradients speak of their tensors.

    Args:
        path: the file. Paths in it are taken from the working directory, as mergekit takes them.

    Raises:
        ConfigError: a list of everything in it that cannot be read, or is not supported.
        SourceError: a model cannot be opened.
    """
    document = read_document(path)
    problems = Problems()
    specs = {model: source_of(model) for model in _all_models(document)}
    opened = {model: as_source(spec).open() for model, spec in specs.items()}
    reference = opened[document.base or document.models[0]]
    tensors = [name for name, info in reference.infos.items() if info.dtype.is_floating_point]
    table = tabulate(document, tensors, problems)
    _require_inputs(document, problems)
    problems.stop(str(path))
    names = dict(zip(table.sources, named([specs[m] for m in table.sources]), strict=True))
    dtype = _dtype(document, reference, list(opened.values()), tensors, problems)
    factors = _factors(table, problems, exact=_in_float32(dtype, reference, tensors))
    coefficients = factors.pop("coefficients", None) or table.coefficients(problems)
    vocabulary = _vocabulary(document, names, problems)
    problems.stop(str(path))
    value = compact(coefficients)
    recipe = Recipe(
        sources={name: specs[model] for model, name in names.items()},
        base=None if document.base is None else specs[document.base],
        coefficients=TensorGranularity() if isinstance(value, dict) else Model(),
        init=Constant(value),
        **factors,
        **vocabulary,
    )
    summary = _summary(document, recipe, names, coefficients, dtype)
    return Reading(recipe, dtype, summary, table.warnings)


def source_of(model: ModelReference) -> str | AbstractSource:
    """The source that a model reference means."""
    text = model.path if model.revision is None else f"{model.path}@{model.revision}"
    if model.lora is None:
        return text
    return Lora(model.lora, as_source(text), model.lora_revision)


def compact(values: Mapping[str, Sequence[float]]) -> Setting:
    """One setting for numbers by tensor and source: no more is written than differs."""
    short = {
        name: list(row) if len(set(row)) > 1 else float(row[0]) for name, row in values.items()
    }
    first = next(iter(short.values()))
    return first if all(entry == first for entry in short.values()) else dict(short)


def _all_models(document: Document) -> list[ModelReference]:
    base = [document.base] if document.base is not None else []
    return list(dict.fromkeys([*base, *document.models]))


def _require_inputs(document: Document, problems: Problems) -> None:
    """Slices may have different models only where one without a part counts as coefficient 0."""
    everything = set(document.models)
    if document.method.name in _COUNTING:
        for i, part in enumerate(document.slices):
            if set(part.models) != everything:
                problems.add(
                    f"slices[{i}].sources",
                    f"expected the same models in every slice for {document.method.name}, whose "
                    "formula counts them",
                )


def _dtype(
    document: Document,
    reference: Checkpoint,
    opened: Sequence[Checkpoint],
    tensors: Sequence[str],
    problems: Problems,
) -> str | None:
    """What the result is stored in: `out_dtype`, `dtype`, or what the models' dtypes promote to."""
    stated = document.out_dtype or document.dtype
    if stated is not None:
        return stated
    promoted = {
        name: functools.reduce(
            torch.promote_types, [c.infos[name].dtype for c in opened if name in c.infos]
        )
        for name in tensors
    }
    if all(kind == reference.infos[name].dtype for name, kind in promoted.items()):
        return None
    kinds = set(promoted.values())
    if len(kinds) > 1:
        problems.add("dtype", "expected one, for the models store their tensors in several")
    return str(kinds.pop()).removeprefix("torch.")


def _in_float32(dtype: str | None, reference: Checkpoint, tensors: Sequence[str]) -> bool:
    if dtype is not None:
        return dtype == "float32"
    return all(reference.infos[name].dtype == torch.float32 for name in tensors)


# ---- methods ------------------------------------------------------------------------------------


def _factors(table: Table, problems: Problems, exact: bool) -> dict[str, Any]:
    """The recipe's factors; `exact`: sum in mergekit's order, which shows in float32 alone."""
    method = table.document.method
    origin: Origin = "zero" if method.name in _FROM_ZERO else "base"
    if method.base == "optional" and table.document.base is None:
        origin = "zero"
    factors: dict[str, Any] = {"origin": origin}
    if method.family is not None:
        factors["preprocess"] = _prune(table, problems)
        if method.family.elects:
            options = {
                "normalize": table.agreed("normalize", problems),
                "elect": "sum",
                "scale": table.agreed("lambda", problems),
            }
            return {**factors, **_operator("DisjointMean", problems, **options)}
    if method.name == "sce":
        return {**factors, **_select(table, problems)}
    named_operator = _operator_of(table, problems)
    if named_operator is not None:
        name, options = named_operator
        return {**factors, **_operator(name, problems, **options)}
    if origin == "base":
        factors["operator"] = operators.Linear("directions" if exact else "weights")
    return factors


def _operator_of(table: Table, problems: Problems) -> tuple[str, dict[str, Any]] | None:
    """The operator of a method that is not a sum: its name and fields."""
    name = table.document.method.name
    if name == "slerp":
        return "Slerp", {"per": "tensor"}
    if name == "nuslerp":
        per = "column" if table.agreed("nuslerp_row_wise", problems) else "row"
        flat = table.agreed("nuslerp_flatten", problems)
        return "Slerp", {"per": "tensor" if flat else per, "threshold": _NUSLERP_LINE}
    if name == "multislerp":
        if table.agreed("eps", problems) != _EPS:
            problems.add("eps", f"expected {_EPS}, which is fixed")
        return "MultiSlerp", {"normalize": table.agreed("normalize_weights", problems)}
    if name == "karcher":
        options = {key: table.agreed(key, problems) for key in ("max_iter", "tol")}
        return "Karcher", options
    if name == "model_stock":
        row = table.agreed("filter_wise", problems)
        return "ModelStock", {"per": "row" if row else "tensor"}
    if name == "nearswap":
        return "NearSwap", {}
    return ("ArceeFusion", {}) if name == "arcee_fusion" else None


def _prune(table: Table, problems: Problems) -> list[Any]:
    """The preprocess of a method on task vectors; none where every density is 1."""
    family = table.document.method.family
    assert family is not None
    densities = {name: table.of("density", name, 1.0) for name in table.tensors}
    outside = {d for row in densities.values() for d in row if not 0 <= d <= 1}
    if outside:
        problems.add("density", f"expected a share in [0, 1], got {min(outside)}")
        return []
    if family.prune == "none" or all(d == 1 for row in densities.values() for d in row):
        return []
    density = compact(densities)
    rescale = "l1" if table.agreed("rescale", problems) else "none"
    if family.prune == "magnitude":
        return _step("Trim", problems, density=density, rescale=rescale)
    if family.prune == "random":
        return _step("RandomDrop", problems, density=density, rescale=rescale)
    key, step = {
        "outliers": ("gamma", "Breadcrumbs"),
        "della": ("epsilon", "MagnitudeDrop"),
    }[family.prune]
    extra = compact({name: table.of(key, name) for name in table.tensors})
    return _step(step, problems, density=density, rescale=rescale, **{key: extra})


def _select(table: Table, problems: Problems) -> dict[str, Any]:
    """SCE: entries by their variance, then shares by squares and an election, summed."""
    share = compact({name: [value] for name, value in table.shared["select_topk"].items()})
    steps = [] if share == 1 else _step("SelectTop", problems, density=share)
    steps += _step("ShareOfSquares", problems)
    ones = {name: [1.0] * len(table.sources) for name in table.tensors}
    return {"preprocess": steps, "coefficients": ones}


def _operator(name: str, problems: Problems, **options: Any) -> dict[str, Any]:
    kind = getattr(operators, name, None)
    if kind is None:
        problems.add("merge_method", f"needs the operator {name}, which this gradmerge lacks")
        return {}
    return {"operator": kind(**options)}


def _step(name: str, problems: Problems, **options: Any) -> list[Any]:
    kind = getattr(preprocess, name, None)
    if kind is None:
        problems.add("merge_method", f"needs the preprocess {name}, which this gradmerge lacks")
        return []
    return [kind(**options)]


# ---- tokens, and what to tell --------------------------------------------------------------------


def _vocabulary(
    document: Document, names: Mapping[ModelReference, str], problems: Problems
) -> dict[str, Any]:
    """The recipe's `tokenizer`, where the file names one."""
    if document.tokenizer is None:
        return {}
    if "tokenizer" not in {field.name for field in dataclasses.fields(Recipe)}:
        problems.add("tokenizer", "this gradmerge cannot merge vocabularies; give models of one")
        return {}
    hint = typing.get_type_hints(Recipe)["tokenizer"]
    kind = next(k for k in typing.get_args(hint) if dataclasses.is_dataclass(k))
    source = document.tokenizer
    if isinstance(source, ModelReference):
        if source == document.base:
            source = "base"
        elif source in names:
            source = names[source]
        else:
            problems.add("tokenizer", f"expected one of the models, got {source}")
    options: dict[str, Any] = {"source": str(source)}
    options["pad_to_multiple_of"] = document.pad_to_multiple_of
    if document.chat_template is not None:
        options["chat_template"] = document.chat_template
    made: Any = kind
    return {"tokenizer": made(**options)}


def _summary(
    document: Document,
    recipe: Recipe,
    names: Mapping[ModelReference, str],
    coefficients: Mapping[str, Sequence[float]],
    dtype: str | None,
) -> str:
    """Method, factors, and how the coefficients of each source lie."""
    steps = [type(step).__name__ for step in (*recipe.preprocess, recipe.operator)]
    base = "" if document.base is None else f", base {document.base}"
    lines = [
        f"mergekit {document.method.name}: {', '.join(steps)}, origin {recipe.resolved_origin}"
        f"{base}, stored as {dtype or 'the reference stores it'}"
    ]
    for k, (model, name) in enumerate(names.items()):
        own = [row[k] for row in coefficients.values()]
        spread = f"{own[0]:.6g}"
        if min(own) != max(own):
            mean = sum(own) / len(own)
            spread = f"{min(own):.6g} to {max(own):.6g}, mean {mean:.6g} of {len(own)} tensors"
        lines.append(f"  {name} ({model}): coefficient {spread}")
    return "\n".join(lines)
