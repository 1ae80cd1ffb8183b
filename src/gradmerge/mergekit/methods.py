"""mergekit's merge methods: which parameters each has, and which inputs it wants.

Facts of mergekit 0.1.5 (github.com/arcee-ai/mergekit), by which a file is checked and resolved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

REQUIRED = object()
"""The default of a parameter that has none."""

Value = bool | int | float


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method."""

    name: str
    kind: type[bool] | type[int] | type[float]
    scope: Literal["merge", "input", "non-base"] = "merge"
    """One value for the merge, one an input, or one an input other than the base."""
    default: Any = REQUIRED

    def convert(self, value: Any) -> Value:
        """A value as this parameter takes it; numbers may be written as strings (`1e-3` is one in
        YAML 1.1).

        Raises:
            ValueError: it is no such value.
        """
        if self.kind is bool:
            return _as_bool(value)
        number = float(value)
        if not math.isfinite(number):
            raise ValueError("not finite")
        if self.kind is float:
            return number
        if number != int(number):
            raise ValueError("not whole")
        return int(number)


@dataclass(frozen=True)
class Method:
    """One merge method."""

    name: str
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "ignored"]
    """Whether `base_model` has a part of its own; ignored: it is an input like the others."""
    min_inputs: int = 1
    max_inputs: int | None = None
    """Inputs, the base among them."""
    num_non_base: int | None = None
    """Inputs other than the base, where there have to be so many."""

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of this name."""
        return next((p for p in self.parameters if p.name == name), None)

    @property
    def family(self) -> Family | None:
        """What it does to task vectors, where it is one of those methods."""
        return FAMILIES.get(self.name)


@dataclass(frozen=True)
class Family:
    """What a method does to task vectors before and while it sums them."""

    prune: Literal["none", "magnitude", "random", "outliers", "della"] = "none"
    elects: bool = False
    """Whether an entry's sign is elected and what disagrees left out (TIES)."""


FAMILIES = {
    "task_arithmetic": Family(),
    "ties": Family("magnitude", elects=True),
    "dare_linear": Family("random"),
    "dare_ties": Family("random", elects=True),
    "breadcrumbs": Family("outliers"),
    "breadcrumbs_ties": Family("outliers", elects=True),
    "della_linear": Family("della"),
    "della": Family("della", elects=True),
}

REFUSED = {
    "ram": "gradmerge has no such method",
    "ramplus_tl": "gradmerge has no such method",
}


def _as_bool(value: Any) -> bool:
    known = {"true": True, "yes": True, "on": True, "t": True, "y": True, "1": True}
    known |= {"false": False, "no": False, "off": False, "f": False, "n": False, "0": False}
    text = str(int(value)) if value in (0, 1) else str(value).lower()
    if text not in known:
        raise ValueError("no truth value")
    return known[text]


def _task_vectors(name: str, normalize: bool, rescale: bool) -> Method:
    parameters = [
        Parameter("int8_mask", bool, default=False),
        Parameter("normalize", bool, default=normalize),
        Parameter("rescale", bool, default=rescale),
        Parameter("lambda", float, default=1.0),
        Parameter("weight", float, "non-base"),
        Parameter("density", float, "non-base", 1.0),
    ]
    if FAMILIES[name].prune == "outliers":
        parameters.append(Parameter("gamma", float, "non-base", 0.01))
    if FAMILIES[name].prune == "della":
        parameters.append(Parameter("epsilon", float, "non-base", 0.15))
    return Method(name, tuple(parameters), "required")


METHODS = {
    method.name: method
    for method in (
        Method(
            "linear",
            (Parameter("weight", float, "input"), Parameter("normalize", bool, default=True)),
            "ignored",
        ),
        Method(
            "passthrough",
            (Parameter("scale", float, "input", 1.0),),
            "ignored",
            max_inputs=1,
        ),
        _task_vectors("task_arithmetic", normalize=False, rescale=False),
        _task_vectors("ties", normalize=True, rescale=False),
        _task_vectors("dare_linear", normalize=False, rescale=True),
        _task_vectors("dare_ties", normalize=False, rescale=True),
        _task_vectors("breadcrumbs", normalize=False, rescale=False),
        _task_vectors("breadcrumbs_ties", normalize=False, rescale=False),
        _task_vectors("della_linear", normalize=False, rescale=True),
        _task_vectors("della", normalize=True, rescale=True),
        Method("slerp", (Parameter("t", float),), "required", 2, 2),
        Method(
            "nuslerp",
            (
                Parameter("weight", float, "non-base"),
                Parameter("nuslerp_row_wise", bool, default=False),
                Parameter("nuslerp_flatten", bool, default=True),
            ),
            "optional",
            num_non_base=2,
        ),
        Method(
            "multislerp",
            (
                Parameter("weight", float, "non-base"),
                Parameter("normalize_weights", bool, default=True),
                Parameter("eps", float, default=1e-8),
            ),
            "optional",
        ),
        Method(
            "karcher",
            (Parameter("max_iter", int, default=10), Parameter("tol", float, default=1e-5)),
            "ignored",
        ),
        Method("model_stock", (Parameter("filter_wise", bool, default=False),), "required", 3),
        Method("nearswap", (Parameter("t", float),), "required", 2, 2),
        Method("arcee_fusion", (), "required", 2, 2),
        Method(
            "sce",
            (
                Parameter("int8_mask", bool, default=False),
                Parameter("select_topk", float, default=1.0),
            ),
            "required",
        ),
    )
}
