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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradmerge.common.errors import shorten
from gradmerge.common.patterns import nearest_part
from gradmerge.common.spec import Setting
from gradmerge.mergekit.document import Case, Document, ModelReference, Problems, Settings, Slice
from gradmerge.mergekit.methods import REQUIRED, Formula, Parameter, Value

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
# Tensors outside of layers that come before them (`embed_out` is GPT-NeoX's head).
_BEFORE = re.compile(r"embed(?!_out)|(^|\.)(wte|wpe|shared)\.|position|inv_freq")


@dataclass(frozen=True)
class Table:
    """Every parameter's value for every tensor."""

    document: Document
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Tensor -> parameter -> value; of parameters per model, a list with one per source."""

    def option(self, name: str, problems: Problems) -> Any:
        """Return a parameter as a factor takes it: one value, or a setting by tensor and source."""
        method = self.document.method
        parameter = method.parameter(name)
        values = {tensor: row[name] for tensor, row in self.rows.items()}
        if parameter is None or parameter.scope != "global":
            return compact({t: v if isinstance(v, list) else [v] for t, v in values.items()})
        different = list(dict.fromkeys(values.values()))
        got = ", ".join(map(str, different[:3]))
        why = f"{got}: gradmerge runs {method.name} with a single value"
        problems.expect(len(different) == 1, name, "one value for all tensors", why)
        return different[0]

    def coefficients(self, problems: Problems) -> dict[str, list[float]]:
        """Return the coefficients of the sources, in order, by tensor.

        `theta = sum_k c_k theta_k` from origin zero, and `A + sum_k c_k B_k` from the base (in TIES
        these are the weights before the election, without lambda).
        """
        found = self._by_model(self.document.method.coefficients, problems)
        return {name: [row[m] for m in self.document.sources] for name, row in found.items()}

    def weights(self, problems: Problems) -> dict[str, dict[ModelReference, float]]:
        """Return the weights of all models, the base included, by tensor.

        `theta = sum_m w_m theta_m`, with `1 - sum c` for the base of task vectors. Of methods that
        prune or elect these are the weights that they put on task vectors, times lambda.
        """
        method = self.document.method
        return self._by_model(method.weights or method.coefficients, problems)

    def _by_model(
        self, formula: Formula, problems: Problems
    ) -> dict[str, dict[ModelReference, float]]:
        method, base = self.document.method, self.document.base
        models = [m for m in self.document.models if m != base or method.base == "input"]
        num_sources = len(self.document.sources)
        found: dict[str, dict[ModelReference, float]] = {}
        failed = defaultdict(list)
        for name, row in self.rows.items():
            try:
                values = formula(row, num_sources)
            except ValueError as error:
                failed[str(error)].append(name)
                continue
            found[name] = dict(zip(models, values, strict=True))
            if base is not None:
                found[name].setdefault(base, 1 - sum(values))
        for reason, names in failed.items():
            problems.add("merge_method", f"{method.name} {reason}{self._which(names)}")
        return found

    def _which(self, tensors: Sequence[str]) -> str:
        return "" if len(tensors) == len(self.rows) else f" ({shorten(tensors, 3)})"


def compact(values: Mapping[str, Sequence[float]]) -> Setting:
    """Return numbers by tensor and source as the shortest setting that says the same."""
    short = {
        name: list(row) if len(set(row)) > 1 else float(row[0]) for name, row in values.items()
    }
    first = next(iter(short.values()))
    return first if all(entry == first for entry in short.values()) else dict(short)


def tabulate(document: Document, tensors: Sequence[str], problems: Problems) -> Table:
    """Resolve every parameter for every tensor of a model; note what is missing or does not fit."""
    table = Table(document)
    sources = document.sources
    missing = defaultdict(list)
    for name, (part, t) in _places(document, tensors, problems).items():
        row = table.rows[name] = {}
        for parameter in document.method.parameters:
            of_model = parameter.scope == "model"
            values = []
            for model in sources if of_model else (None,):
                values.append(_resolve(parameter, part, model, name, t))
                if values[-1] is REQUIRED:
                    missing[parameter.name, str(model or "the merge")].append(name)
            row[parameter.name] = values if of_model else values[0]
    for (key, owner), names in missing.items():
        what = f"required by {document.method.name}, missing for {owner}{table._which(names)}"
        problems.add(key, what)
    return table


def _places(
    document: Document, tensors: Sequence[str], problems: Problems
) -> dict[str, tuple[Slice, float]]:
    """Return the slice of each tensor, and how far into it the tensor lies, from 0 to 1."""
    layers = {name: _LAYER.search(name) for name in tensors}
    depth: dict[str, int] = {}
    for layer in filter(None, layers.values()):
        stack = layer.string[: layer.start(1)]
        depth[stack] = max(depth.get(stack, 0), int(layer[1]) + 1)
    first, last = document.slices[0], document.slices[-1]
    if last.layers is not None and depth:
        stacks = ", ".join(sorted(depth))
        problems.expect(len(depth) == 1, "slices", "one stack of layers", f"{stacks}; write models")
        number = max(depth.values())
        why = "another depth is another network, which gradmerge does not support"
        got = f"{last.layers[1]}: {why}"
        problems.expect(last.layers[1] == number, "slices", f"all {number} layers", got)
    places = {}
    for name, match in layers.items():
        if match is None:
            places[name] = (first if _BEFORE.search(name) else last, 0.0)
            continue
        number = int(match[1])
        part = next((p for p in document.slices if p.layers and number < p.layers[1]), last)
        start, stop = part.layers or (0, depth[name[: match.start(1)]])
        places[name] = (part, (number - start) / (stop - start - 1) if stop - start > 1 else 1.0)
    return places


def _resolve(
    parameter: Parameter, part: Slice, model: ModelReference | None, tensor: str, t: float
) -> Any:
    own: Settings = {}
    if model is not None:
        if model not in part.inputs:
            return parameter.absent
        own = part.inputs[model]
    for scope in (own, *part.shared):
        value = evaluate(scope.get(parameter.name, ()), tensor, t)
        if value is not None:
            return value
    return parameter.default


def evaluate(cases: Sequence[Case], tensor: str, t: float) -> Value | None:
    """Return the value for a tensor that lies at `t` in its slice, or None if no filter matches."""
    values = next((values for pattern, values in cases if pattern in tensor), ())
    if not values:
        return None
    spot = t * (len(values) - 1)
    low = int(spot)
    if isinstance(values[low], int):  # truth values and whole numbers
        return values[low]
    high = min(low + 1, len(values) - 1)
    return (1 - (spot - low)) * values[low] + (spot - low) * values[high]


def check_filters(document: Document, tensors: Collection[str], problems: Problems) -> None:
    """Note filters that match no tensor: often names of another architecture."""
    scopes = [scope for part in document.slices for scope in (*part.shared, *part.inputs.values())]
    for scope in scopes:
        for parameter, cases in scope.items():
            for text, _ in cases:
                if not any(text in name for name in tensors):
                    hint = nearest_part(text, tensors)
                    problems.add(parameter, f"the filter {text!r} matches no tensor.{hint}")
