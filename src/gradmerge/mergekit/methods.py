"""mergekit's merge methods as one table: parameters, models, and the factors that gradmerge runs.

Facts of mergekit 0.1.5 (github.com/arcee-ai/mergekit), checked against its own declarations in
`tests/parity/test_mergekit_methods.py`. The reader and `FromMergekit` know no method by name:
another method is another row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gradmerge.common.errors import require
from gradmerge.operators import (
    AbstractOperator,
    ArceeFusion,
    DisjointMean,
    Karcher,
    Linear,
    ModelStock,
    MultiSlerp,
    NearSwap,
    Slerp,
)
from gradmerge.preprocess import (
    AbstractPreprocess,
    Breadcrumbs,
    MagnitudeDrop,
    RandomDrop,
    SelectTop,
    ShareOfSquares,
    Trim,
)

REQUIRED = object()
"""The default of a parameter that has none."""

Value = bool | int | float
Row = Mapping[str, Any]
"""The parameters of one tensor: a value, or a list with one per source."""
Formula = Callable[[Row, int], list[float]]
"""Numbers of the sources in one tensor, from its row and the number of sources; ValueError where
the row has no such numbers."""
Option = Callable[[str], Any]
"""Looks up a parameter as a factor takes it: one value, or a setting by tensor and source."""

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}
_TRUTH = {
    **dict.fromkeys(("true", "yes", "on", "t", "y", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n", "0", "0.0"), False),
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method."""

    name: str
    default: Any = REQUIRED
    """Its default, of the type of its values; without one they are numbers."""
    scope: Literal["tensor", "model", "global"] = "tensor"
    """How far gradmerge lets it vary: by tensor, by tensor and source model, or not at all."""
    absent: float = 0.0
    """Its value for a model that has no part in a slice."""

    def convert(self, value: Any) -> Value:
        """Return a value as this parameter takes it; numbers may be text (1e-3 is, in YAML 1.1).

        Raises:
            ValueError: the value is of another type.
        """
        kind = float if self.default is REQUIRED else type(self.default)
        try:
            if kind is bool:
                return _TRUTH[str(value).lower()]
            number = float(value)
            if math.isfinite(number) and number == kind(number):
                return kind(number)
        except (TypeError, ValueError, KeyError):
            pass
        raise ValueError(f"expected {_EXPECTED[kind]}, got {value!r}")


_of_model = functools.partial(Parameter, scope="model")
_global = functools.partial(Parameter, scope="global")


@dataclass(frozen=True)
class Method:
    """One merge method."""

    name: str
    parameters: tuple[Parameter, ...]
    coefficients: Formula
    """Coefficients of the sources."""
    weights: Formula | None = None
    """Weights in the sum of models that the method is or starts from, where these are other
    numbers than the coefficients."""
    base: Literal["required", "optional", "input"] = "required"
    """The part of `base_model`: the origin where there is one; input: an input like the others."""
    base_takes_rest: bool = False
    """The base is a source as well; its coefficient completes the others to 1."""
    num_models: tuple[int, int | None] = (1, None)
    """Fewest and most models besides the base."""
    slices_may_differ: bool = False
    """Models with coefficient 0 do not matter, so slices may leave models out."""
    preprocess: Callable[[Option], list[AbstractPreprocess]] = lambda option: []
    operator: Callable[[Option], AbstractOperator] | None = None
    """None: the sum of mergekit, `Linear` of the form that rounds as it does."""

    def parameter(self, name: str) -> Parameter | None:
        """Return the parameter of this name."""
        return next((p for p in self.parameters if p.name == name), None)


# ---- formulas -----------------------------------------------------------------------------------


def _normalised(flag: str) -> Formula:
    """Weights divided by their sum where the parameter `flag` is set."""

    def formula(row: Row, _: int) -> list[float]:
        total = sum(row["weight"]) if row[flag] else 1.0
        if total == 0:
            raise ValueError("cannot normalise weights that sum to zero")
        return [1.0 / total * weight for weight in row["weight"]]

    return formula


def _scaled(row: Row, _: int) -> list[float]:
    total = sum(row["weight"]) if row["normalize"] else 1.0
    # task vectors whose weights cancel out are not normalised
    scale = row["lambda"] / (total if abs(total) >= 1e-8 else 1.0)
    return [scale * weight for weight in row["weight"]]


def _nuslerp(row: Row, _: int) -> list[float]:
    first, second = row["weight"]
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    return [1 - t, t]


def _own(name: str) -> Formula:
    """A parameter per model as it is, or a single value for a single source."""
    return lambda row, _: list(row[name]) if isinstance(row[name], list) else [row[name]]


def _even(_: Row, num_sources: int) -> list[float]:
    return [1 / num_sources] * num_sources


def _none(_: Row, num_sources: int) -> list[float]:
    raise ValueError("states no weights")


# ---- the table ----------------------------------------------------------------------------------


def _on_task_vectors(
    name: str,
    step: Callable[..., AbstractPreprocess] | None = None,
    *extra: Parameter,
    elects: bool = False,
    normalize: bool = False,
    rescale: bool = False,
) -> Method:
    """A method that prunes task vectors by one step and sums them, in TIES after an election."""
    own = (_of_model("density", 1.0, absent=1.0), *extra)
    scale = functools.partial(Parameter, scope="global" if elects else "tensor")

    def preprocess(option: Option) -> list[AbstractPreprocess]:
        if step is None or option("density") == 1:
            return []
        fields = {parameter.name: option(parameter.name) for parameter in own}
        return [step(**fields, rescale="l1" if option("rescale") else "none")]

    def elect(option: Option) -> AbstractOperator:
        return DisjointMean(option("normalize"), elect="sum", scale=option("lambda"))

    shared = (scale("normalize", normalize), _global("rescale", rescale), scale("lambda", 1.0))
    return Method(
        name,
        (Parameter("int8_mask", False), *shared, _of_model("weight"), *own),
        _own("weight") if elects else _scaled,
        (lambda row, _: [row["lambda"] * w for w in row["weight"]]) if elects else None,
        slices_may_differ=True,
        preprocess=preprocess,
        operator=elect if elects else None,
    )


def _nuslerp_operator(option: Option) -> AbstractOperator:
    per: Any = "column" if option("nuslerp_row_wise") else "row"
    return Slerp("tensor" if option("nuslerp_flatten") else per, threshold=0.9999999)


def _multislerp(option: Option) -> AbstractOperator:
    require(option("eps") == 1e-8, "eps", "1e-08, which is fixed", option("eps"))
    return MultiSlerp(option("normalize_weights"))


def _sce_steps(option: Option) -> list[AbstractPreprocess]:
    share = option("select_topk")
    return [*([] if share == 1 else [SelectTop(share)]), ShareOfSquares()]


_gamma, _epsilon = _of_model("gamma", 0.01), _of_model("epsilon", 0.15)
_ROWS = (
    Method(
        "linear",
        (_of_model("weight"), Parameter("normalize", True)),
        _normalised("normalize"),
        base="input",
        slices_may_differ=True,
    ),
    Method(
        "passthrough",
        (_of_model("scale", 1.0),),
        _own("scale"),
        base="input",
        slices_may_differ=True,
        num_models=(1, 1),
    ),
    _on_task_vectors("task_arithmetic"),
    _on_task_vectors("ties", Trim, elects=True, normalize=True),
    _on_task_vectors("dare_linear", RandomDrop, rescale=True),
    _on_task_vectors("dare_ties", RandomDrop, elects=True, rescale=True),
    _on_task_vectors("breadcrumbs", Breadcrumbs, _gamma),
    _on_task_vectors("breadcrumbs_ties", Breadcrumbs, _gamma, elects=True),
    _on_task_vectors("della_linear", MagnitudeDrop, _epsilon, rescale=True),
    _on_task_vectors("della", MagnitudeDrop, _epsilon, elects=True, normalize=True, rescale=True),
    Method(
        "slerp",
        (Parameter("t"),),
        _own("t"),
        base_takes_rest=True,
        num_models=(1, 1),
        operator=lambda option: Slerp("tensor"),
    ),
    Method(
        "nuslerp",
        (
            _of_model("weight"),
            _global("nuslerp_row_wise", False),
            _global("nuslerp_flatten", True),
        ),
        _nuslerp,
        base="optional",
        num_models=(2, 2),
        operator=_nuslerp_operator,
    ),
    Method(
        "multislerp",
        (_of_model("weight"), _global("normalize_weights", True), _global("eps", 1e-8)),
        _own("weight"),
        _normalised("normalize_weights"),
        base="optional",
        operator=_multislerp,
    ),
    Method(
        "karcher",
        (_global("max_iter", 10), _global("tol", 1e-5)),
        _even,
        base="input",
        operator=lambda option: Karcher(option("max_iter"), option("tol")),
    ),
    Method(
        "model_stock",
        (_global("filter_wise", False),),
        _even,
        num_models=(2, None),
        operator=lambda option: ModelStock("row" if option("filter_wise") else "tensor"),
    ),
    Method(
        "nearswap",
        (Parameter("t"),),
        _own("t"),
        _none,
        num_models=(1, 1),
        operator=lambda option: NearSwap(),
    ),
    Method(
        "arcee_fusion",
        (),
        _even,
        _none,
        num_models=(1, 1),
        operator=lambda option: ArceeFusion(),
    ),
    Method(
        "sce",
        (Parameter("int8_mask", False), Parameter("select_topk", 1.0)),
        lambda _, num_sources: [1.0] * num_sources,
        _none,
        preprocess=_sce_steps,
        operator=lambda option: Linear(),
    ),
)
METHODS = {method.name: method for method in _ROWS}
REFUSED = ("ram", "ramplus_tl")
"""Methods of mergekit that gradmerge does not have."""
