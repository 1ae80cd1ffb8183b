"""A merge as data: everything that defines it before its coefficients are trained.

theta_p(z) = A_p + sum_k B_{k,p} (.) link(z_{k, g(p)})
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

from gradmerge._typing import Origin
from gradmerge.alignment import AbstractAlignment
from gradmerge.coefficients import (
    AbstractCoefficients,
    AbstractInit,
    Component,
    Constant,
)
from gradmerge.coefficients import Tensor as TensorGranularity
from gradmerge.errors import ConfigError
from gradmerge.finalisers import AbstractFinaliser
from gradmerge.operators import AbstractOperator, Linear
from gradmerge.preprocess import AbstractPreprocess
from gradmerge.sources import AbstractSource, Vocabulary
from gradmerge.sources.resolve import FILE_SUFFIXES


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a merge before its coefficients are trained."""

    sources: dict[str, str | AbstractSource]
    """Fine-tuned checkpoints by name: a path, a hub id, or a source class."""
    base: str | AbstractSource | None = None
    """The checkpoint that the sources were fine-tuned from."""
    origin: Origin | None = None
    """What directions are measured from: base, zero, or the mean of the sources. Default: base if
    there is one, else zero."""
    alignment: AbstractAlignment | None = None
    """How the units of sources that share no initialisation are brought into one order
    (WeightMatching; on data: ActivationMatching, CCA, OptimalTransport). Default: as they are."""
    preprocess: list[AbstractPreprocess] = field(default_factory=list)
    """What happens to the directions once, in order, before coefficients are put on them (Trim,
    ElectSign, RandomDrop, TSVM, RegMean and others)."""
    statistics: str | None = None
    """Folder of `gradmerge collect` with the sources' statistics on data, for steps (FisherScale,
    RegMean, MaTS) and alignments (ActivationMatching, CCA, OptimalTransport) that need them."""
    coefficients: AbstractCoefficients = field(default_factory=TensorGranularity)
    """Who shares a coefficient (Model, Group, Tensor, Column, Row, Partition, Component, Element),
    possibly wrapped by a link (Clamp, Sigmoid, Tanh, Softmax, Complement, HardMask, WithScale)."""
    init: AbstractInit = field(default_factory=Constant)
    """Where the coefficients start."""
    operator: AbstractOperator = field(default_factory=Linear)
    """How directions are combined (Linear, Components, DisjointMean, Slerp, MultiSlerp, Karcher,
    ModelStock, NearSwap, ArceeFusion)."""
    finalisers: list[AbstractFinaliser] = field(default_factory=list)
    """What happens to merged weights in the end, in order, in evaluation and export (REPAIR,
    SpectralRescale, DepthRescale); not while coefficients learn."""
    frozen: dict[str, float | str] = field(default_factory=dict)
    """Tensors by regular expression that keep a stated coefficient: a number for every source,
    `origin` (0) or `mean` (1/K). The first match wins."""
    private: list[str] = field(default_factory=list)
    """Regular expressions of tensors that are not merged and stay with their task (heads)."""
    unused: Literal["auto", "origin", "mean"] = "auto"
    """Coefficient of tensors that never get a gradient: origin (0), mean (1/K), or auto: origin
    where that is the base, else mean."""
    heads: dict[str, str | AbstractSource] = field(default_factory=dict)
    """Checkpoints by name that are not merged but serve tasks: with their private tensors, and as
    the teacher of a task that names them (`source` of the task)."""
    buffers: Literal["recompute", "mean", "origin"] = "recompute"
    """BatchNorm statistics: recomputed on adaptation data, the sources' mean, or the origin's."""
    allow: list[str] = field(default_factory=list)
    """Kinds of compatibility problems taken as warnings, e.g. tokenizer or config.rope_theta."""
    tokenizer: Vocabulary | None = None
    """Whose tokens the merge has, where tokenizers differ. Default: all must be the same."""
    trust_remote_code: bool = False
    """Allow modelling code that ships with a model to run."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        """Itself, as `Shared` is (the parser takes a dataclass field by field only without other
        bases).
        """
        return self

    def __post_init__(self) -> None:
        """Check what can be checked without opening a file."""
        if not isinstance(self.sources, Mapping):
            object.__setattr__(self, "sources", named(self.sources))
        if not self.sources:
            raise ConfigError("a merge needs at least one source, got none.")
        if self.origin == "base" and self.base is None:
            raise ConfigError("origin is base, but no base is given; set `base` or another origin.")
        for pattern in [*self.frozen, *self.private]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error
        for pattern, value in self.frozen.items():
            if isinstance(value, str) and value not in ("origin", "mean"):
                raise ConfigError(
                    f"frozen[{pattern!r}]: expected a number, 'origin' or 'mean', got {value!r}."
                )
        if sum(finaliser.needs_data for finaliser in self.finalisers) > 1:
            raise ConfigError(
                "finalisers: expected REPAIR once, got twice; the second would find every channel "
                "as it should be. Leave one out."
            )
        if self.tokenizer is not None:
            self.tokenizer.require(list(self.sources), self.base is not None)
        if self.alignment is not None and not self.alignment.is_identity:
            self._require_alignment(self.alignment)
        both = [name for name in self.heads if name in self.sources or name == "base"]
        if both:
            raise ConfigError(f"heads: {', '.join(both)} is a source already; leave it out.")
        self._require_number()

    def _require_number(self) -> None:
        """Whether coefficients and operator take this number of sources."""
        self.coefficients.num_rows(len(self.sources))
        self.operator.require(len(self.sources), self.resolved_origin)
        if isinstance(innermost(self.coefficients), Component) and not (self.operator.by_component):
            raise ConfigError(
                "coefficients: Component puts coefficients on singular components, which operator "
                f"{type(self.operator).__name__} does not know. Set operator: Components."
            )

    def _require_alignment(self, alignment: AbstractAlignment) -> None:
        kind = type(alignment).__name__
        if self.resolved_origin == "base":
            raise ConfigError(
                f"alignment: {kind} moves the units of the sources, not those of the base, so "
                "differences to the base would compare other units. Sources of one base need no "
                "alignment: leave it out; or, for networks of their own, give no base, or origin "
                "zero or mean."
            )
        if self.heads and self.private:
            raise ConfigError(
                f"alignment: {kind} moves the units of the sources, not those of the checkpoints "
                f"in heads ({', '.join(self.heads)}), whose private tensors would read other units "
                "than the merge has. Merge their sources too, or leave the alignment out."
            )
        if self.base is not None and self.buffers == "origin":
            raise ConfigError(
                f"alignment: {kind} with buffers origin would put the base's statistics, in its "
                "own order of units, beside aligned weights; take buffers recompute or mean."
            )

    @property
    def resolved_origin(self) -> Origin:
        """The origin after the default is applied."""
        return self.origin or ("base" if self.base is not None else "zero")


def innermost(coefficients: AbstractCoefficients) -> Any:
    """Return the granularity inside the links that wrap it."""
    inner: Any = coefficients
    while hasattr(inner, "inner"):
        inner = inner.inner
    return inner


def named(sources: Any) -> dict[str, Any]:
    """Names for sources given as a list: the last part of their path, or source0, source1...

    The first of several with one name keeps it, the others get a number that no name has yet.
    """
    sources = list(sources)
    whole = [_whole_name(source) or f"source{i}" for i, source in enumerate(sources)]
    named: dict[str, Any] = {}
    for i, (source, name) in enumerate(zip(sources, whole, strict=True)):
        if name in named or name == "base":
            dash = "-" if name[-1].isdigit() else ""  # llama-3.2-1, not llama-3.21
            free = (f"{name}{dash}{number}" for number in count(i))
            name = next(n for n in free if n not in named and n not in whole)
        named[name] = source
    return named


def _whole_name(source: Any) -> str | None:
    path = source if isinstance(source, (str, Path)) else getattr(source, "path", None)
    if not path:
        return None
    name = Path(str(path)).name
    if name in ("", ".."):
        name = Path(str(path)).resolve().name
    stem, dot, suffix = name.rpartition(".")
    return stem if stem and f"{dot}{suffix}" in FILE_SUFFIXES else name
