"""The values of a mergekit file for each tensor: filters, gradients, precedence and defaults.

Rules of mergekit 0.1.5, pinned in `tests/mergekit/test_document.py` and against mergekit itself
in `tests/parity/test_mergekit_yaml.py`:

- A parameter is looked up under the model, then the slice, the module and the file. The first that
  gives a value counts; otherwise the method's default.
- Of a list of filters the first counts whose text is a part of the tensor's name; a missing filter
  and `*` match every tensor. If none matches, the lookup goes on.
- A list of numbers is interpolated linearly at `t = i / (L - 1)` for layer `i` of the `L` of a
  slice (`t = 1` where L = 1). Tensors outside of layers take its first number: those before the
  layers in the first slice, those behind them in the last. Of other lists the value at
  `int(t (n - 1))` counts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gradmerge.errors import shorten
from gradmerge.mergekit.content import Document, ModelReference, Problems, Settings, Slice
from gradmerge.mergekit.methods import REQUIRED, Formula, Parameter, Value
from gradmerge.spec import Setting

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
# Tensors outside of layers that come before them (`embed_out` is GPT-NeoX's head).
_BEFORE = re.compile(r"embed(?!_out)|(^|\.)(wte|wpe|shared)\.|position|inv_freq")


@dataclass(frozen=True)
class Table:
    """Every parameter's value for every tensor."""

    document: Document
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Tensor -> parameter -> value; of parameters per model, a list with one per source."""
    warnings: list[str] = field(default_factory=list)

    @property
    def origin(self) -> Literal["base", "zero"]:
        """The recipe's origin."""
        return self.document.method.origin if self.document.base else "zero"

    @property
    def sources(self) -> tuple[ModelReference, ...]:
        """The models with a coefficient: all, or all but the base that directions start from."""
        document = self.document
        left_out = document.base if self.origin == "base" else None
        return tuple(model for model in document.models if model != left_out)

    def option(self, name: str, problems: Problems) -> Any:
        """Return a parameter as a factor takes it: one value, or a setting by tensor and source.

        Args:
            name: the parameter.
            problems: takes a parameter that varies where gradmerge has one value.
        """
        method = self.document.method
        parameter = method.parameter(name)
        values = {tensor: row[name] for tensor, row in self.rows.items()}
        if parameter is None or parameter.scope != "global":
            return compact({t: v if isinstance(v, list) else [v] for t, v in values.items()})
        different = list(dict.fromkeys(values.values()))
        if len(different) > 1:
            got = ", ".join(map(str, different[:3]))
            one = f"gradmerge runs {method.name} with a single value"
            problems.add(name, f"expected one value for all tensors, got {got}: {one}")
        return different[0]

    def coefficients(self, problems: Problems) -> dict[str, list[float]]:
        """Return the coefficients of the sources by tensor.

        `theta = sum_k c_k theta_k` from origin zero, and `A + sum_k c_k B_k` from the base (in TIES
        these are the weights before the election, without lambda).
        """
        return self._by_tensor(self.document.method.coefficients, problems)

    def weights(self, problems: Problems) -> dict[str, dict[ModelReference, float]]:
        """Return the weights of all models, the base included, by tensor.

        `theta = sum_m w_m theta_m`, with `1 - sum c` for the base of task vectors. Of methods that
        prune or elect these are the weights that they put on task vectors, times lambda.
        """
        method, base = self.document.method, self.document.base
        found = {}
        for name, row in self._by_tensor(method.weights or method.coefficients, problems).items():
            found[name] = dict(zip(self.sources, row, strict=True))
            if base is not None:
                found[name].setdefault(base, 1 - sum(row))
        return found

    def _by_tensor(self, formula: Formula, problems: Problems) -> dict[str, list[float]]:
        document, sources = self.document, self.sources
        found: dict[str, list[float]] = {}
        failed = defaultdict(list)
        for name, row in self.rows.items():
            try:
                values = formula(row, len(sources))
            except ValueError as error:
                failed[str(error)].append(name)
                continue
            if document.base in sources and document.method.base != "input":
                values.insert(sources.index(document.base), 1 - sum(values))
            found[name] = values
        for reason, names in failed.items():
            which = "" if len(names) == len(self.rows) else f" ({shorten(names, 3)})"
            problems.add("merge_method", f"{document.method.name} {reason}{which}")
        return found


def compact(values: Mapping[str, Sequence[float]]) -> Setting:
    """Return numbers by tensor and source as the shortest setting that says the same."""
    short = {
        name: list(row) if len(set(row)) > 1 else float(row[0]) for name, row in values.items()
    }
    first = next(iter(short.values()))
    return first if all(entry == first for entry in short.values()) else dict(short)


def tabulate(document: Document, tensors: Sequence[str], problems: Problems) -> Table:
    """Resolve every parameter for every tensor.

    Args:
        document: the file.
        tensors: the names of all tensors of a model.
        problems: takes what is missing or does not fit the model.
    """
    table = Table(document, warnings=_idle_filters(document, tensors))
    sources = table.sources
    missing = defaultdict(list)
    for name, (part, t) in _places(document, tensors, problems).items():
        shared = [part.parameters, document.module_parameters, document.parameters]
        row = table.rows[name] = {}
        for parameter in document.method.parameters:
            values = []
            for model in sources if parameter.scope == "model" else (None,):
                scopes = shared if model is None else [part.inputs.get(model, {}), *shared]
                absent = model is not None and model not in part.inputs
                value = parameter.absent if absent else _resolve(parameter, scopes, name, t)
                values.append(value)
                if value is REQUIRED:
                    missing[parameter.name, str(model or "the merge")].append(name)
            row[parameter.name] = values if parameter.scope == "model" else values[0]
    for (key, owner), names in missing.items():
        which = "" if len(names) == len(table.rows) else f" ({shorten(names, 3)})"
        problems.add(key, f"required by {document.method.name}, missing for {owner}{which}")
    return table


def _places(
    document: Document, tensors: Sequence[str], problems: Problems
) -> dict[str, tuple[Slice, float]]:
    """Return the slice of each tensor, and how far into it the tensor lies, from 0 to 1."""
    layers = {name: _layer(name) for name in tensors}
    depth: dict[str, int] = {}
    for stack, number in filter(None, layers.values()):
        depth[stack] = max(depth.get(stack, 0), number + 1)
    first, last = document.slices[0], document.slices[-1]
    if last.layers is not None and len(depth) > 1:
        got = ", ".join(sorted(depth))
        problems.add("slices", f"expected one stack of layers, got {got}; write models")
    elif last.layers is not None and depth and last.layers[1] != max(depth.values()):
        problems.add(
            "slices",
            f"expected all {max(depth.values())} layers, got {last.layers[1]}: another depth is "
            "another network, which gradmerge does not support",
        )
    places = {}
    for name, spot in layers.items():
        if spot is None:
            places[name] = (first if _BEFORE.search(name) else last, 0.0)
            continue
        stack, number = spot
        part = next((p for p in document.slices if p.layers and number < p.layers[1]), last)
        start, stop = part.layers or (0, depth[stack])
        places[name] = (part, (number - start) / (stop - start - 1) if stop - start > 1 else 1.0)
    return places


def _layer(name: str) -> tuple[str, int] | None:
    """Return the stack and the number of a tensor's layer."""
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
    """Return the value of a setting for a tensor; None where no filter matches.

    Args:
        setting: a value, a list of values (a gradient), or filters with either.
        tensor: the tensor's name.
        t: how far into the slice it lies, from 0 to 1.
        convert: makes a value of its type.
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
    spot = t * (len(values) - 1)
    low = int(spot)
    if any(isinstance(value, int) for value in values):  # truth values and whole numbers
        return values[low]
    high = min(low + 1, len(values) - 1)
    return convert((1 - (spot - low)) * values[low] + (spot - low) * values[high])


def _idle_filters(document: Document, tensors: Sequence[str]) -> list[str]:
    """Warn of filters that match nothing: often names of another architecture."""
    scopes = [document.parameters, document.module_parameters]
    for part in document.slices:
        scopes += [part.parameters, *part.inputs.values()]
    settings = [setting for scope in scopes for setting in scope.values()]
    items = [item for s in settings for item in (s if isinstance(s, list) else [s])]
    patterns = dict.fromkeys(item.get("filter") for item in items if isinstance(item, dict))
    return [
        f"the filter {pattern!r} matches no tensor"
        for pattern in patterns
        if pattern not in (None, "*") and not any(pattern in name for name in tensors)
    ]
