"""Learned coefficients as a mergekit YAML, which mergekit merges to the same weights.

The sum that gradmerge computes is written as it is, as mergekit's `linear` without normalisation:
`(1 - sum c) A + sum c_k theta_k` has the base as its first model. Under
`Linear(form="directions")` it is mergekit's `task_arithmetic`. Every number is written so that it
reads as the same float32, and in float32 both give the same bits (`tests/parity`). Finalisers that
rescale a direction are a factor on its coefficients, and give the same to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from gradmerge._typing import Raw
from gradmerge._version import __version__
from gradmerge.engine.plan import Plan
from gradmerge.engine.recipe import Recipe
from gradmerge.errors import ConfigError, shorten
from gradmerge.finalisers import AbstractRescale
from gradmerge.operators import Linear
from gradmerge.sources import AbstractSource, HuggingFace, as_source
from gradmerge.sources.lora import Lora

_FOLDER = "export the merged model as a folder instead (without `mergekit`)"


def write_mergekit(
    plan: Plan,
    raw: Raw,
    output: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    buffers: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write coefficients as a mergekit YAML.

    Args:
        plan: the opened recipe.
        raw: raw coefficients by key.
        output: the file; it must not exist unless `overwrite`.
        dtype: what mergekit stores the result in; default: as the reference stores its tensors.
        overwrite: replace an existing file.
        buffers: values that buffers have in the merged network, by name.

    Returns:
        The file.

    Raises:
        ConfigError: the file exists, or mergekit cannot express the merge (all reasons are given).
    """
    target = Path(output).expanduser()
    require_file(target, overwrite)
    text = mergekit_yaml(plan, raw, dtype, buffers)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        work.write_text(text, encoding="utf-8")
        work.replace(target)
    finally:
        work.unlink(missing_ok=True)  # a full disk leaves a part of it
    return target


def require_file(target: Path, overwrite: bool) -> None:
    """Stop before any work if there can be no such file.

    Raises:
        ConfigError: it exists and is not to be replaced, or is a folder, or is named otherwise.
    """
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{target}: expected a name ending in .yaml or .yml for a mergekit file.")
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; give a file.")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists; give another file, or --overwrite true.")


def require_plain(recipe: Recipe) -> None:
    """Stop before data are read if the directions are not the sources' own.

    Raises:
        ConfigError: the recipe has a preprocess.
    """
    if recipe.preprocess:
        raise ConfigError(f"mergekit cannot express this merge:\n  {_processed(recipe)}")


def mergekit_yaml(
    plan: Plan, raw: Raw, dtype: str | None = None, buffers: Mapping[str, Tensor] | None = None
) -> str:
    """The text of the file; see `write_mergekit`."""
    reasons = _reasons(plan, buffers or {})
    inputs = _inputs(plan, reasons)
    stored = _stored_dtype(plan, dtype, reasons)
    if reasons:
        raise ConfigError(
            "mergekit cannot express this merge:\n" + "\n".join(f"  {reason}" for reason in reasons)
        )
    rows = _rows(plan, raw)
    base = inputs.pop("base", None)
    as_directions = plan.recipe.operator == Linear("directions")
    if base is not None and not as_directions and base not in inputs.values():
        inputs = {"base": base, **inputs}  # the base is a term of the sum
    models = [
        {
            "model": model,
            "parameters": {"weight": _weight({n: row.get(k, 0.0) for n, row in rows.items()})},
        }
        for k, model in inputs.items()
    ]
    everything = [plan.reference, *plan.sources.values()]
    wide = any(c.infos[name].dtype == torch.float64 for c in everything for name in plan.tensors)
    settings = {"normalize": False, **({"lambda": 1.0} if as_directions else {})}
    content = {
        "merge_method": "task_arithmetic" if as_directions else "linear",
        "base_model": next(iter(inputs.values())) if base is None else base,
        "dtype": "float64" if wide else "float32",
        "out_dtype": stored,
        "parameters": settings,
        "models": models,
    }
    head = (
        f"# Coefficients of gradmerge {__version__}: a weight for each tensor, by its whole name.\n"
        "# Run:     mergekit-yaml THIS_FILE OUTPUT_FOLDER\n"
    )
    return head + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=10_000)


def _reasons(plan: Plan, buffers: Mapping[str, Tensor]) -> list[str]:
    """Why mergekit cannot express it, as far as the recipe tells."""
    reasons = []
    fine = [name for name, slot in plan.layout.slots.items() if slot.kind != "scalar"]
    if fine:
        kind = _granularity(plan.recipe.coefficients)
        reasons.append(
            f"coefficients: {kind} has several for a tensor ({shorten(fine, 2)}), mergekit has one "
            f"weight a tensor and model. Learn Model, Group or Tensor, or {_FOLDER}"
        )
    if plan.recipe.preprocess:
        reasons.append(_processed(plan.recipe))
    if not isinstance(plan.recipe.operator, Linear):
        name = type(plan.recipe.operator).__name__
        reasons.append(f"operator: coefficients of {name} are no weights of a sum; {_FOLDER}")
    corrects = [f for f in plan.recipe.finalisers if not isinstance(f, AbstractRescale)]
    if corrects:
        names = ", ".join(type(finaliser).__name__ for finaliser in corrects)
        reasons.append(
            f"finalisers: {names} changes a tensor by channels, and mergekit has one weight a "
            f"tensor and model; {_FOLDER}"
        )
    if plan.order is not None:
        reasons.append(
            f"alignment: the sources' units are in another order than on disk; {_FOLDER}"
        )
    if getattr(plan.recipe, "tokenizer", None) is not None:
        reasons.append(f"tokenizer: mergekit aligns vocabularies by rules of its own; {_FOLDER}")
    if plan.private:
        reasons.append(
            f"private: each task keeps {shorten(plan.private, 2)}, and mergekit writes one model; "
            f"{_FOLDER}, which holds one for each task"
        )
    changed = [
        name
        for name in _float_buffers(plan)
        if name in buffers and not torch.equal(buffers[name].cpu(), plan.buffer(name))
    ]
    if changed:
        reasons.append(
            f"buffers: {shorten(sorted(changed), 2)} were recomputed on data, which mergekit "
            f"has none of; {_FOLDER}"
        )
    return reasons


def _processed(recipe: Recipe) -> str:
    steps = ", ".join(type(step).__name__ for step in recipe.preprocess)
    return (
        f"preprocess: the coefficients belong to directions after {steps}, and mergekit takes "
        f"them off the files anew; {_FOLDER}"
    )


def _granularity(coefficients: Any) -> str:
    while hasattr(coefficients, "inner"):
        coefficients = coefficients.inner
    return type(coefficients).__name__


def _inputs(plan: Plan, reasons: list[str]) -> dict[str, Any]:
    """How mergekit names the sources, and the base as `base`."""
    recipe = plan.recipe
    base = None if recipe.base is None else as_source(recipe.base)
    specs = {name: as_source(source, base) for name, source in recipe.sources.items()}
    if base is not None:
        specs["base"] = base
    found: dict[str, Any] = {}
    for name, spec in specs.items():
        found[name] = _reference(spec)
        if found[name] is None:
            reasons.append(
                f"sources.{name}: mergekit takes folders, hub ids and LoRA adapters on them, got "
                f"{type(spec).__name__}; save it as a folder"
            )
    seen: dict[str, str] = {}
    for name, reference in found.items():
        other = seen.setdefault(str(reference), name)
        same_base = name == "base" and recipe.resolved_origin != "base"
        if reference is not None and other != name and not same_base:
            reasons.append(
                f"sources: {other} and {name} are the same model, which mergekit takes once; merge "
                "it once"
            )
    return found


def _reference(spec: AbstractSource) -> Any:
    """A model as mergekit names it, or None."""
    if isinstance(spec, HuggingFace):
        return _path(spec.path, spec.revision)
    if isinstance(spec, Lora) and isinstance(spec.base, HuggingFace):
        base, adapter = _reference(spec.base), _path(spec.path, spec.revision)
        if isinstance(base, str) and isinstance(adapter, str):
            return f"{base}+{adapter}"
        plain = [{"path": x} if isinstance(x, str) else x["model"] for x in (base, adapter)]
        return {"model": plain[0], "lora": plain[1]}
    return None


def _path(path: str, revision: str | None) -> Any:
    folder = Path(path).expanduser()
    if folder.exists():
        path = str(folder.resolve())
    if not set(path) & set("+@"):
        return path if revision is None else f"{path}@{revision}"
    # in a string they would divide path, revision and adapter
    return {"model": {"path": path, **({} if revision is None else {"revision": revision})}}


def _stored_dtype(plan: Plan, dtype: str | None, reasons: list[str]) -> str:
    if dtype is not None:
        return dtype
    names = [*plan.tensors, *_float_buffers(plan)]
    kinds = sorted({str(plan.reference.infos[name].dtype) for name in names})
    if len(kinds) > 1:
        got = ", ".join(kind.removeprefix("torch.") for kind in kinds)
        reasons.append(f"dtype: mergekit stores all tensors in one, got {got}; give one: --dtype")
    return kinds[0].removeprefix("torch.")


def _float_buffers(plan: Plan) -> list[str]:
    infos = plan.reference.infos
    return [name for name in plan.buffers if infos[name].dtype.is_floating_point]


def _rows(plan: Plan, raw: Raw) -> dict[str, dict[str, float]]:
    """The weight of each source in each tensor and buffer."""
    names = list(plan.sources)
    origin = plan.recipe.resolved_origin
    rows = {}
    with torch.no_grad():
        for name in plan.tensors:
            own = plan.coefficient(name, raw).detach().double().cpu()
            if plan.finalisation.active and name not in plan.fixed:
                own = own * plan.finalisation.factor(name, _merged(plan, raw, name))
            rest = 1 - own.sum()
            if origin == "mean":  # mean + sum c (theta - mean), as a sum of the theta
                own = own + rest / len(own)
            rows[name] = dict(zip(names, own.tolist(), strict=True))
            if origin == "base":
                rows[name]["base"] = rest.item()
    for name in _float_buffers(plan):
        share = 0.0 if plan.recipe.buffers == "origin" and origin == "base" else 1 / len(names)
        rows[name] = dict.fromkeys(names, share)
        if origin == "base":
            rows[name]["base"] = 1.0 if share == 0 else 0.0
    if plan.binding is not None:
        # where a file holds both names of a tied tensor, mergekit asks for each
        for other, name in plan.binding.ties.items():
            if name in rows and other in plan.reference.infos:
                rows[other] = rows[name]
    return rows


def _merged(plan: Plan, raw: Raw, name: str) -> Tensor:
    """A merged tensor before its finalisers, float32."""
    out = torch.empty(plan.tensors[name].shape)
    return plan.combine(name, plan.raw(name, raw).detach().cpu(), out)


class _Line(dict[str, Any]):
    """A mapping that is written in one line."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes filters a line each."""


def _in_one_line(dumper: yaml.SafeDumper, data: _Line) -> Any:
    return dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)


def _no_alias(dumper: yaml.SafeDumper, data: Any) -> bool:
    return True


_Dumper.add_representer(_Line, _in_one_line)
_Dumper.ignore_aliases = _no_alias


def _weight(column: Mapping[str, float]) -> Any:
    """One number where all tensors have the same, else filters by whole name.

    A filter is a test for a part of the name, and the first that matches counts; longest first, no
    name is taken for one that contains it.
    """
    values = list(dict.fromkeys(column.values()))
    if len(values) == 1:
        return values[0]
    ordered = sorted(column, key=lambda name: (-len(name), name))
    filters = [_Line(filter=name, value=column[name]) for name in ordered]
    return [*filters, _Line(value=0.0)]
