"""A merge as data: everything that defines it before its coefficients are learned.

theta_p(z) = A_p + sum_k B_{k,p} (.) link(z_{k, g(p)})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gradmerge.alignment import AbstractAlignment
from gradmerge.coefficients import (
    AbstractCoefficients,
    AbstractInit,
    Component,
    Constant,
)
from gradmerge.coefficients import Tensor as TensorGranularity
from gradmerge.common.errors import ConfigError, nearest
from gradmerge.common.finite import require_finite_options
from gradmerge.common.names import named, require_names
from gradmerge.common.output import paths_in
from gradmerge.common.patterns import require_pattern
from gradmerge.common.spec import PATTERNS, to_plain
from gradmerge.common.typing import Origin
from gradmerge.finalisers import AbstractFinaliser
from gradmerge.operators import AbstractOperator, Linear
from gradmerge.preprocess import AbstractPreprocess
from gradmerge.sources import AbstractSource, Vocabulary
from gradmerge.sources.resolve import as_source

_PATTERNS = ("frozen", "private", "trained", "adapters")
"""Fields whose values or keys are regular expressions of tensors."""


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a merge before its coefficients are learned."""

    sources: dict[str, str | AbstractSource]
    """Fine-tuned checkpoints by name: paths, hub ids or source classes."""
    base: str | AbstractSource | None = None
    """Checkpoint that the sources were fine-tuned from."""
    origin: Origin | None = None
    """Origin of the directions `source - origin`: `base`, `zero`, or `mean` of the sources.
    Default: `base` if one is given, else `zero`."""
    alignment: AbstractAlignment | None = None
    """Permutation or mixing of units that aligns sources without a common initialisation:
    WeightMatching; on data: ActivationMatching, CCA, OptimalTransport. Default: none."""
    preprocess: list[AbstractPreprocess] = field(default_factory=list)
    """Steps applied to the directions once, in order, before they get coefficients (Trim,
    ElectSign, RandomDrop, TSVM, RegMean and others)."""
    statistics: str | None = None
    """Folder that `gradmerge collect` wrote, with the sources' statistics on data, for preprocess
    steps (FisherScale, RegMean, MaTS) and alignments on data."""
    coefficients: AbstractCoefficients = field(default_factory=TensorGranularity)
    """Granularity of the coefficients (Model, Group, Tensor, Column, Row, Partition, Component,
    Element), optionally inside a link (Clamp, Sigmoid, Tanh, Softmax, Complement, Shared, HardMask,
    ConcreteMask, WithScale)."""
    init: AbstractInit = field(default_factory=Constant)
    """Initial coefficients; the final ones of a merge without training."""
    operator: AbstractOperator = field(default_factory=Linear)
    """Operator that combines the directions (Linear, Components, DisjointMean, Slerp, MultiSlerp,
    Karcher, ModelStock, NearSwap, ArceeFusion)."""
    finalisers: list[AbstractFinaliser] = field(default_factory=list)
    """Corrections of the merged weights, in order, in evaluation and export but not while learning
    (REPAIR, SpectralRescale, DepthRescale)."""
    frozen: dict[str, float | str] = field(default_factory=dict, metadata=PATTERNS)
    """Fixed coefficients of tensors by regular expression: a number, `origin` (0) or `mean` (1/K).
    The first match wins."""
    private: list[str] = field(default_factory=list, metadata=PATTERNS)
    """Regular expressions of tensors that are not merged but kept per task, such as heads."""
    trained: list[str] = field(default_factory=list, metadata=PATTERNS)
    """Regular expressions of private tensors that a fit trains per task beside the coefficients,
    from the values of the task's source on."""
    adapters: dict[str, int] = field(default_factory=dict, metadata=PATTERNS)
    """Rank of the adapter (LoRA, arXiv 2106.09685) that a fit trains per task on each merged matrix
    that a regular expression matches: theta_task = theta + B A. The first match wins."""
    unused: Literal["auto", "origin", "mean"] = "auto"
    """Coefficient of tensors that never get a gradient: `origin` (0), `mean` (1/K), or `auto`:
    `origin` if that is the base, else `mean`."""
    heads: dict[str, str | AbstractSource] = field(default_factory=dict)
    """Checkpoints by name that are not merged but serve tasks whose `source` names them, with their
    private tensors and as teachers."""
    buffers: Literal["recompute", "mean", "origin"] = "recompute"
    """BatchNorm statistics: recomputed on adaptation data, the sources' mean, or the origin's."""
    allow: list[str] = field(default_factory=list)
    """Kinds of compatibility problems to only warn of, e.g. tokenizer or config.rope_theta."""
    tokenizer: Vocabulary | None = None
    """Vocabulary of the merge if tokenizers differ. Default: all tokenizers must be the same."""
    trust_remote_code: bool = False
    """Run modelling code that ships with a model."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        """Return itself, as `Shared` does.

        Inheriting from `Shared` would hide the fields from the parser.
        """
        return self

    def __post_init__(self) -> None:
        """Check everything that needs no open file."""
        require_finite_options(self)
        if not isinstance(self.sources, Mapping):
            object.__setattr__(self, "sources", named(self.sources))
        if not self.sources:
            raise ConfigError("sources: expected at least one, got none.")
        if self.origin == "base" and self.base is None:
            raise ConfigError("origin: base needs a base, got none; set `base` or another origin.")
        require_names("sources", self.sources)
        require_names("heads", self.heads)
        for option in _PATTERNS:
            for pattern in getattr(self, option):
                require_pattern(option, pattern)
        self._require_ranks()
        for pattern, value in self.frozen.items():
            if isinstance(value, str) and value not in ("origin", "mean"):
                raise ConfigError(
                    f"frozen[{pattern!r}]: expected a number, 'origin' or 'mean', got {value!r}."
                )
        if sum(finaliser.needs_data for finaliser in self.finalisers) > 1:
            raise ConfigError(
                "finalisers: expected REPAIR once, got twice, but only the first has an effect; "
                "remove the other."
            )
        if self.tokenizer is not None:
            self.tokenizer.require(list(self.sources), self.base is not None)
        if self.alignment is not None and not self.alignment.is_identity:
            self._require_alignment(self.alignment)
        both = [name for name in self.heads if name in self.sources or name == "base"]
        if both:
            raise ConfigError(
                "heads: expected names other than those of the sources and base, got "
                f"{', '.join(both)}; rename or remove it."
            )
        self._require_number()

    @property
    def inputs(self) -> list[Path]:
        """Files and folders that the recipe names."""
        named = to_plain(self)["init_args"]
        # expressions and kinds of problems are no paths, though one may look like it
        given = [v for k, v in named.items() if k not in (*_PATTERNS, "allow")]
        return paths_in(given, patterns=True)

    def _require_number(self) -> None:
        """Reject a number of sources that coefficients or operator do not support."""
        self.coefficients.num_rows(len(self.sources))
        self.operator.require(len(self.sources), self.resolved_origin)
        for step in self.preprocess:
            step.require(self.resolved_origin)
        if isinstance(innermost(self.coefficients), Component) and not (self.operator.by_component):
            raise ConfigError(
                "operator: expected Components, because coefficients are Component (per singular "
                f"component), got {type(self.operator).__name__}; set operator: Components."
            )

    def _require_ranks(self) -> None:
        """Reject adapters without a rank, or beside a correction of one network for all tasks."""
        wrong = {p: r for p, r in self.adapters.items() if not isinstance(r, int) or r < 1}
        if wrong:
            raise ConfigError(f"adapters: expected a rank of at least 1 per pattern, got {wrong}.")
        on_data = [type(f).__name__ for f in self.finalisers if f.needs_data]
        if self.adapters and on_data:
            raise ConfigError(
                f"finalisers: {', '.join(on_data)} corrects one merged network by its activations, "
                "but with `adapters` every task has another.\nLeave it out, or the adapters."
            )

    def _require_alignment(self, alignment: AbstractAlignment) -> None:
        kind = type(alignment).__name__
        if self.resolved_origin == "base":
            raise ConfigError(
                f"alignment: {kind} needs origin zero or mean, got base. It reorders the units of "
                "the sources but not of the base, so differences would compare other units.\n"
                "Remove the alignment if the sources share the base; otherwise change the origin."
            )
        if self.heads and self.private:
            raise ConfigError(
                f"alignment: {kind} reorders the units of the sources, but not those of the heads "
                f"({', '.join(self.heads)}), whose private tensors would no longer fit.\n"
                "Merge the heads as sources, or remove the alignment."
            )
        if self.base is not None and self.buffers == "origin":
            raise ConfigError(
                f"buffers: {kind} needs recompute or mean, got origin, but the base's statistics "
                "are not in the order of the aligned units."
            )

    def with_sources(self, given: Mapping[str, str | AbstractSource]) -> Recipe:
        """Return this recipe with some of its checkpoints at other places.

        Args:
            given: new places by name of the source or head, or `base`. The other settings of an
                adapter are kept.

        Raises:
            ConfigError: the recipe has no such checkpoint.
        """
        known = [*self.sources, *self.heads, *([] if self.base is None else ["base"])]
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"sources: unknown name {name!r} (choose from {', '.join(known)})."
                    f"{nearest(name, known)}"
                )

        def moved(name: str, spec: Any) -> Any:
            new: Any = given.get(name, spec)
            if not (isinstance(spec, AbstractSource) and hasattr(spec, "base")):
                return new
            # an adapter, or a task of a compact merge
            changes: dict[str, Any] = {}
            if isinstance(new, str):
                new, changes = spec, {"path": new}
            if "base" in given and getattr(new, "base", None) is not None:
                changes["base"] = as_source(given["base"])
            return replace(new, **changes)

        sources = {name: moved(name, spec) for name, spec in self.sources.items()}
        heads = {name: moved(name, spec) for name, spec in self.heads.items()}
        return replace(self, sources=sources, heads=heads, base=given.get("base", self.base))

    @property
    def resolved_origin(self) -> Origin:
        """The origin with the default applied."""
        return self.origin or ("base" if self.base is not None else "zero")

    @property
    def aligns_on_data(self) -> bool:
        """True if the alignment needs statistics of the sources on data."""
        return self.alignment is not None and self.alignment.needs is not None

    @property
    def needs_statistics(self) -> bool:
        """True if the alignment or a step needs statistics of the sources on data."""
        return self.aligns_on_data or any(step.needs is not None for step in self.preprocess)


def innermost(coefficients: AbstractCoefficients) -> Any:
    """Return the granularity inside the links that wrap it."""
    inner: Any = coefficients
    while hasattr(inner, "inner"):
        inner = inner.inner
    return inner
