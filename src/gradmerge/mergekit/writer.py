"""Learned coefficients as a mergekit YAML, which mergekit merges to the same weights.

The sum is written as gradmerge computes it: `(1 - sum c) A + sum c_k theta_k` as `linear` with the
base as its first model, and `A + sum c_k B_k`, `Linear` of the form "directions", as
`task_arithmetic`. Every number is written so that it reads as the same float32, and in float32 both
give the same bits (`tests/parity`). Finalisers that rescale a direction become a factor on its
coefficients, with the same result to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from gradmerge.common.atomic import whole_file
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.common.output import require_output_file
from gradmerge.common.version import __version__
from gradmerge.engine.plan import Plan
from gradmerge.engine.recipe import Recipe, innermost
from gradmerge.engine.state import FitState
from gradmerge.finalisers import AbstractRescale
from gradmerge.mergekit.document import ModelReference
from gradmerge.operators import Linear
from gradmerge.sources import AbstractSource, HuggingFace, as_source
from gradmerge.sources.lora import Lora
from gradmerge.sources.ties import moved_in, tied_view

# By the form of `Linear`: the method that is this sum, and the parameters under which it is.
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "weights": ("linear", {"normalize": False}),
    "directions": ("task_arithmetic", {"normalize": False, "lambda": 1.0}),
}


def write_mergekit(
    state: FitState,
    output: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    buffers: Mapping[str, Tensor] | None = None,
    inputs: Iterable[Path] = (),
) -> Path:
    """Write coefficients as a mergekit YAML.

    Args:
        state: the opened recipe with its coefficients.
        output: the file; it must not exist unless `overwrite`.
        dtype: dtype in which mergekit stores the result; default: as the reference stores its
            tensors.
        overwrite: replace an existing file.
        buffers: values of buffers in the merged network, by name.
        inputs: files and folders that are read, which the output must be apart from.

    Returns:
        The file.

    Raises:
        ConfigError: the file exists, or mergekit cannot express the merge (all reasons are given).
    """
    target = Path(output).expanduser()
    require_file(target, overwrite, inputs)
    text = mergekit_yaml(state, dtype, buffers)
    with whole_file(target) as work:
        work.write_text(text, encoding="utf-8")
    return target


def require_file(target: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Check before any work that the file can be written.

    Raises:
        ConfigError: the file exists without `overwrite`, is a folder, an input or not ours, or has
            another suffix.
        OutputError: it cannot be written.
    """
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{target}: expected a name ending in .yaml or .yml for a mergekit file.")
    require_output_file(target, overwrite, inputs)


def require_sum(recipe: Recipe) -> None:
    """Reject a recipe whose merges are no weighted sums of the sources, before any work.

    Raises:
        ConfigError: mergekit cannot express its preprocess, operator, finalisers or tokenizer.
    """
    _refuse(_of_recipe(recipe))


def mergekit_yaml(
    state: FitState, dtype: str | None = None, buffers: Mapping[str, Tensor] | None = None
) -> str:
    """Return the text of the file; arguments as in `write_mergekit`."""
    plan = state.plan
    reasons = _reasons(plan, buffers or {})
    inputs = _inputs(plan, reasons)
    stored = dtype or _stored_dtype(plan, reasons)
    _refuse(reasons)
    operator = plan.recipe.operator
    assert isinstance(operator, Linear)  # others are refused
    method, parameters = _METHODS[operator.form]
    base = inputs.pop("base", None)
    if base is not None and method == "linear" and base not in inputs.values():
        inputs = {"base": base, **inputs}  # the base is a term of the sum
    rows = _rows(state)
    everything = [plan.reference, *plan.sources.values()]
    wide = any(c.infos[name].dtype == torch.float64 for c in everything for name in plan.tensors)
    content = {
        "merge_method": method,
        # without a base, mergekit takes config and tokenizer by chance
        "base_model": deepcopy(next(iter(inputs.values())) if base is None else base),
        "dtype": "float64" if wide else "float32",
        "out_dtype": stored,
        "parameters": parameters,
        "models": [
            {"model": model, "parameters": {"weight": _weight(k, rows)}}
            for k, model in inputs.items()
        ],
    }
    # innermost collections are written in one line: a filter with its value
    lines = yaml.safe_dump(content, sort_keys=False, width=10_000, default_flow_style=None)
    return (
        f"# Coefficients of gradmerge {__version__}: a weight per tensor, by its whole name.\n"
        f"# Run:     mergekit-yaml THIS_FILE OUTPUT_FOLDER\n{lines}"
    )


# ---- reasons against it -------------------------------------------------------------------------


def _refuse(reasons: Sequence[str]) -> None:
    if reasons:
        raise ConfigError(
            "\n  ".join(["mergekit cannot express this merge:", *reasons])
            + "\nChange this, or export the merged model as a folder (without `mergekit`)."
        )


def _of_recipe(recipe: Recipe) -> list[str]:
    """Return why mergekit cannot express any merge of a recipe, one reason per field."""
    steps = ", ".join(type(step).__name__ for step in recipe.preprocess)
    corrects = [type(f).__name__ for f in recipe.finalisers if not isinstance(f, AbstractRescale)]
    checks: dict[str, Any] = {
        f"preprocess: the coefficients belong to directions after {steps}, and mergekit reads the "
        "plain ones": steps,
        f"operator: coefficients of {type(recipe.operator).__name__} are not weights of a sum": (
            not isinstance(recipe.operator, Linear)
        ),
        f"finalisers: {', '.join(corrects)} changes a tensor by channels, and mergekit has one "
        "weight per tensor and model": corrects,
        "tokenizer: mergekit aligns vocabularies by its own rules": recipe.tokenizer is not None,
    }
    return [reason for reason, applies in checks.items() if applies]


def _reasons(plan: Plan, buffers: Mapping[str, Tensor]) -> list[str]:
    """Return why mergekit cannot express the merge."""
    fine = [name for name, slot in plan.layout.slots.items() if slot.kind != "scalar"]
    granularity = type(innermost(plan.recipe.coefficients)).__name__
    changed = [
        name
        for name in _float_buffers(plan)
        if name in buffers and not torch.equal(buffers[name].cpu(), plan.buffer(name))
    ]
    moved = moved_in({**({} if plan.base is None else {"base": plan.base}), **plan.sources})
    checks: dict[str, Any] = {
        f"ties: {shorten(moved, 2)} is stored as the tensor that it is tied to, and mergekit does "
        "not find it": moved,
        f"coefficients: {granularity} has several per tensor ({shorten(fine, 2)}), mergekit has "
        "one weight per tensor and model: learn Model, Group or Tensor": fine,
        "alignment: the sources' units are in another order than on disk": plan.order is not None,
        f"private: each task has its own {shorten([*plan.private, *plan.ranks], 2)}, and mergekit "
        "writes one model": plan.has_own,
        f"buffers: {shorten(sorted(changed), 2)} were recomputed on data, which mergekit does not "
        "have": changed,
    }
    return [*_of_recipe(plan.recipe), *(reason for reason, applies in checks.items() if applies)]


def _stored_dtype(plan: Plan, reasons: list[str]) -> str:
    names = [*plan.tensors, *_float_buffers(plan)]
    kinds = sorted({str(plan.reference.infos[n].dtype).removeprefix("torch.") for n in names})
    if len(kinds) > 1:
        got = ", ".join(kinds)
        reasons.append(f"dtype: mergekit stores all tensors in one, got {got}; give one: --dtype")
    return kinds[0]


def _float_buffers(plan: Plan) -> list[str]:
    infos = plan.reference.infos
    return [name for name in plan.buffers if infos[name].dtype.is_floating_point]


# ---- names of models ----------------------------------------------------------------------------


def _inputs(plan: Plan, reasons: list[str]) -> dict[str, Any]:
    """Return mergekit's names of the sources, and of the base as `base`."""
    recipe = plan.recipe
    base = None if recipe.base is None else as_source(recipe.base)
    specs = {name: as_source(source, base) for name, source in recipe.sources.items()}
    if base is not None:
        specs["base"] = base
    found: dict[str, Any] = {}
    for name, spec in specs.items():
        reference = _reference(spec)
        if reference is None:
            reasons.append(
                f"sources.{name}: mergekit takes folders, hub ids and LoRA adapters on them, got "
                f"{type(spec).__name__}; save it as a folder"
            )
            continue
        same = [other for other in found if found[other] == reference]
        if same and (name != "base" or recipe.resolved_origin == "base"):
            reasons.append(
                f"sources: {same[0]} and {name} are the same model, which mergekit takes once"
            )
        found[name] = reference
    return found


def _reference(spec: AbstractSource) -> Any:
    """Return a model as mergekit names it, or None."""
    base = spec.base if isinstance(spec, Lora) else spec
    if not isinstance(base, HuggingFace):
        return None
    owners: list[HuggingFace | Lora] = [base, spec] if isinstance(spec, Lora) else [base]
    parts = [ModelReference(_whole(owner.path), owner.revision) for owner in owners]
    if not any(set(part.path) & set("+@") for part in parts):
        return "+".join(map(str, parts))
    # in text these characters would divide path, revision and adapter
    plain = [{"path": p.path, **({"revision": p.revision} if p.revision else {})} for p in parts]
    return dict(zip(("model", "lora"), plain, strict=False))


def _whole(path: str) -> str:
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.exists() else path


# ---- weights ------------------------------------------------------------------------------------


@torch.no_grad()
def _rows(state: FitState) -> dict[str, dict[str, float]]:
    """Return the weight of each source, and of the base, in each tensor and buffer."""
    plan = state.plan
    names, origin = list(plan.sources), plan.recipe.resolved_origin
    rows = {}
    for name in plan.tensors:
        own = state.coefficient(name).double().cpu()
        if plan.finalisation.active and name not in state.fixed:
            merged = torch.empty(plan.tensors[name].shape)
            plan.combine(name, plan.z(name, state.raw).cpu(), merged)
            own = own * plan.finalisation.factor(name, merged)
        rest = 1 - own.sum()
        if origin == "mean":  # mean + sum c (theta - mean), as a sum of the theta
            own = own + rest / len(own)
        rows[name] = dict(zip(names, own.tolist(), strict=True))
        if origin == "base":
            rows[name]["base"] = rest.item()
    from_base = plan.recipe.buffers == "origin" and origin == "base"
    for name in _float_buffers(plan):
        share = 0.0 if from_base else 1 / len(names)
        rows[name] = {**dict.fromkeys(names, share), "base": float(from_base)}
    tied = tied_view(plan.reference)
    for other, name in tied.copies.items() if tied is not None else ():
        # where a file holds both names of a tied tensor, mergekit asks for each
        if name in rows:
            rows[other] = rows[name]
    return rows


def _weight(source: str, rows: Mapping[str, Mapping[str, float]]) -> Any:
    """Return one number where all tensors have the same, otherwise filters by whole name.

    The first filter counts that is a part of the name. With the longest first, no name is taken for
    one that contains it.
    """
    column = {name: row.get(source, 0.0) for name, row in rows.items()}
    values = set(column.values())
    if len(values) == 1:
        return values.pop()
    ordered = sorted(column, key=lambda name: (-len(name), name))
    return [*({"filter": name, "value": column[name]} for name in ordered), {"value": 0.0}]
