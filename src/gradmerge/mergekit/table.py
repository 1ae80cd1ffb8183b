"""The values of a mergekit file for each tensor: filters, gradients, precedence and defaults.

Rules of mergekit 0.1.5, pinned in `tests/mergekit/test_document.py` and against mergekit itself
in `tests/parity/test_mergekit_yaml.py`:

- A parameter is looked for with the model, then with its slice, then with the module, then in the
  file; the first that gives a value counts, else the method's default.
- Of a list of filters the first counts whose text is a part of the tensor's name; none, and `*`,
  match every tensor. Where none matches, the search goes on.
- A list of numbers is interpolated linearly at `t = i / (L - 1)` for layer `i` of the `L` of a
  slice (`t = 1` where L = 1). Tensors outside of layers take its first number: those before the
  layers in the first slice, those behind them in the last. Of other lists the value at
  `int(t (n - 1))` counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradmerge.errors import shorten
from gradmerge.mergekit.content import Document, ModelReference, Problems, Settings, Slice
from gradmerge.mergekit.methods import REQUIRED, Parameter, Value

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
# Tensors outside of layers that come before them (`embed_out` is GPT-NeoX's head).
_BEFORE = re.compile(r"embed(?!_out)|(^|\.)(wte|wpe|shared)\.|position|inv_freq")


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in a file."""

    part: Slice
    t: float
    """How far into its slice, from 0 to 1."""


@dataclass(frozen=True)
class Table:
    """Every parameter's value for every tensor."""

    document: Document
    tensors: tuple[str, ...]
    shared: dict[str, dict[str, Any]]
    """Of parameters of the merge: parameter -> tensor -> value."""
    own: dict[str, dict[str, dict[ModelReference, Any]]]
    """Of parameters of inputs: parameter -> tensor -> model -> value; models that have no part in a
    tensor are missing."""
    warnings: list[str] = field(default_factory=list)

    @property
    def sources(self) -> tuple[ModelReference, ...]:
        """The models that get a coefficient: all, or all but the base that directions start
        from.
        """
        document = self.document
        if document.method.base == "ignored" or document.method.name == "slerp":
            return document.models
        return tuple(model for model in document.models if model != document.base)

    def of(self, parameter: str, tensor: str, default: float = 0.0) -> list[Any]:
        """A parameter's value for each source; `default` for those without a part."""
        values = self.own[parameter][tensor]
        return [values.get(model, default) for model in self.sources]

    def agreed(self, parameter: str, problems: Problems) -> Any:
        """The value of a parameter that has to be the same for all tensors; notes one that is
        not.
        """
        values = list(dict.fromkeys(self.shared[parameter].values()))
        if len(values) > 1:
            problems.add(
                parameter,
                f"expected one value for all tensors, got {', '.join(map(str, values[:3]))}: "
                f"gradmerge runs {self.document.method.name} with one",
            )
        return values[0]

    def coefficients(self, problems: Problems) -> dict[str, list[float]]:
        """The coefficients of the sources, tensor by tensor, as far as the file states them.

        `theta = sum_k c_k theta_k` for linear, passthrough and what runs on a sphere, and
        `A + sum_k c_k B_k` for what sums task vectors (after pruning and, in TIES, election: there
        they are the weights, without lambda).
        """
        return {name: self._coefficients(name, problems) for name in self.tensors}

    def weights(self, problems: Problems) -> dict[str, dict[ModelReference, float]]:
        """The weights of all models, the base too, of the sum that a method is or comes near to.

        `theta = sum_m w_m theta_m`, with `1 - sum c` for the base of task vectors. Of methods that
        prune or elect these are the weights that they put on task vectors, times lambda.
        """
        document = self.document
        if document.method.name in ("nearswap", "arcee_fusion", "sce"):
            problems.add("merge_method", f"{document.method.name} states no weights")
            return {}
        found = {}
        for name, row in self.coefficients(problems).items():
            if document.method.family is not None and document.method.family.elects:
                row = [self.shared["lambda"][name] * value for value in row]
            if document.method.name == "multislerp" and self.shared["normalize_weights"][name]:
                row = [value / sum(row) for value in row]
            found[name] = dict(zip(self.sources, row, strict=True))
            if document.base is not None and document.base not in found[name]:
                found[name][document.base] = 1 - sum(row)
        return found

    def _coefficients(self, name: str, problems: Problems) -> list[float]:
        method = self.document.method
        family = method.family
        if method.name == "passthrough":
            return self.of("scale", name)
        if method.name in ("slerp", "nearswap"):
            t = self.shared["t"][name]
            if method.name == "nearswap":
                return [t]
            base_first = self.sources[0] == self.document.base
            return [1 - t, t] if base_first else [t, 1 - t]
        if "weight" not in self.own:
            return [1.0 / len(self.sources)] * len(self.sources)
        weights: list[float] = self.of("weight", name)
        total = sum(weights)
        if method.name == "nuslerp":
            t = 0.5 if abs(total) < 1e-6 else weights[1] / total
            return [1 - t, t]
        if method.name == "multislerp" or (family is not None and family.elects):
            return weights
        scale = 1.0 if family is None else self.shared["lambda"][name]
        if self.shared["normalize"][name]:
            if family is None and total == 0:
                problems.add("weight", f"weights of {name} sum to zero, which cannot be normalised")
                return weights
            # task vectors whose weights cancel out are not normalised
            scale /= total if family is None or abs(total) >= 1e-8 else 1.0
        return [scale * weight for weight in weights]


def tabulate(document: Document, tensors: Sequence[str], problems: Problems) -> Table:
    """Resolve every parameter for every tensor.

    Args:
        document: the file.
        tensors: the names of all tensors of a model.
        problems: takes what is missing or does not fit the model.
    """
    places = place(document, tensors, problems)
    method = document.method
    table = Table(document, tuple(places), {}, {})
    lost: dict[tuple[str, str], list[str]] = {}
    for parameter in method.parameters:
        if parameter.scope == "merge":
            column = table.shared.setdefault(parameter.name, {})
            for name, spot in places.items():
                scopes = [spot.part.parameters, document.module_parameters, document.parameters]
                column[name] = _resolve(parameter, scopes, name, spot.t)
                if column[name] is REQUIRED:
                    lost.setdefault((parameter.name, "the merge"), []).append(name)
            continue
        rows = table.own.setdefault(parameter.name, {})
        for name, spot in places.items():
            rows[name] = {}
            for entry in spot.part.inputs:
                is_base = entry.model == document.base and method.base != "ignored"
                if parameter.scope == "non-base" and is_base:
                    continue
                rest = [spot.part.parameters, document.module_parameters, document.parameters]
                value = _resolve(parameter, [entry.parameters, *rest], name, spot.t)
                rows[name][entry.model] = value
                if value is REQUIRED:
                    lost.setdefault((parameter.name, str(entry.model)), []).append(name)
    for (key, owner), names in lost.items():
        which = "" if len(names) == len(places) else f" for {shorten(names, 3)}"
        problems.add(key, f"{method.name} needs it, and {owner} has none{which}")
    table.warnings.extend(_idle_filters(document, tensors))
    return table


def place(document: Document, tensors: Sequence[str], problems: Problems) -> dict[str, Place]:
    """The slice of each tensor, and how far into it the tensor stands."""
    found = {name: _layer(name) for name in tensors}
    depth: dict[str, int] = {}
    for stack, number in filter(None, found.values()):
        depth[stack] = max(depth.get(stack, 0), number + 1)
    first, last = document.slices[0], document.slices[-1]
    if first.layers is not None:
        if len(depth) > 1:
            problems.add(
                "slices",
                f"expected one stack of layers, got {', '.join(sorted(depth))}; write models",
            )
        elif last.layers and depth and last.layers[1] != max(depth.values()):
            problems.add(
                "slices",
                f"expected all {max(depth.values())} layers, got {last.layers[1]}: another depth "
                "makes another network, which gradmerge does not do",
            )
    places = {}
    for name, spot in found.items():
        if spot is None:
            places[name] = Place(first if _BEFORE.search(name) else last, 0.0)
            continue
        stack, number = spot
        part = next((p for p in document.slices if p.layers and number < p.layers[1]), last)
        start, stop = part.layers or (0, depth[stack])
        places[name] = Place(part, (number - start) / (stop - start - 1) if stop - start > 1 else 1)
    return places


def _layer(name: str) -> tuple[str, int] | None:
    match = _LAYER.search(name)
    return (name[: match.start(1)], int(match[1])) if match else None


def _resolve(parameter: Parameter, scopes: Sequence[Settings], tensor: str, t: float) -> Any:
    for scope in scopes:
        if parameter.name in scope:
            value = evaluate(scope[parameter.name], tensor, t, parameter.convert)
            if value is not None:
                return value
    return parameter.default


def evaluate(
    setting: Any, tensor: str, t: float, convert: Callable[[Any], Value] = float
) -> Value | None:
    """The value of a setting for a tensor; None where no filter matches.

    Args:
        setting: a value, a list of values (a gradient), or filters with either.
        tensor: the tensor's name.
        t: how far into the slice it stands.
        convert: makes a number or truth value of what is written.
    """
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return convert(setting)
    if not setting:
        return None
    if isinstance(setting[0], dict):
        for item in setting:
            pattern = item.get("filter")
            if pattern in (None, "*") or pattern in tensor:
                return evaluate(item["value"], tensor, t, convert)
        return None
    values = [convert(value) for value in setting]
    if any(isinstance(value, bool) for value in values):
        return values[int(t * (len(values) - 1))]
    spot = t * (len(values) - 1)
    low = int(spot)
    high = min(low + 1, len(values) - 1)
    return convert((1 - (spot - low)) * values[low] + (spot - low) * values[high])


def _idle_filters(document: Document, tensors: Sequence[str]) -> list[str]:
    """Filters that match nothing: often a name of another architecture."""
    scopes = [document.parameters, document.module_parameters]
    for part in document.slices:
        scopes += [part.parameters, *(entry.parameters for entry in part.inputs)]
    idle: dict[str, None] = {}
    for scope in scopes:
        for setting in scope.values():
            for item in [setting] if isinstance(setting, dict) else _listed(setting):
                pattern = item.get("filter") if isinstance(item, dict) else None
                if pattern not in (None, "*") and not any(pattern in name for name in tensors):
                    idle[pattern] = None
    return [f"the filter {pattern!r} matches no tensor" for pattern in idle]


def _listed(setting: Any) -> list[Any]:
    return setting if isinstance(setting, list) else []
