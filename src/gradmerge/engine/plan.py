"""An opened recipe: how each tensor is merged from the sources, and the contraction of gradients.

A `Plan` holds neither weights nor anything that a fit changes: coefficients and all that a fit
finds out are in a `gradmerge.engine.state.FitState`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from gradmerge.alignment import Aligned
from gradmerge.coefficients import AbstractInit, InitContext, Layout, initial_raw, linked
from gradmerge.common.errors import ConfigError, Problem
from gradmerge.common.memory import require_temporary_space
from gradmerge.common.patterns import matches
from gradmerge.common.typing import Raw
from gradmerge.engine import contraction
from gradmerge.engine.frozen import CPU, FrozenTensors
from gradmerge.engine.inventory import find_trained, find_unchanged, names_of, take_inventory
from gradmerge.engine.placement import Placement
from gradmerge.engine.recipe import Recipe
from gradmerge.engine.rows import Rows
from gradmerge.engine.statistics import open_statistics
from gradmerge.finalisers import Finalisation, FinalSite
from gradmerge.operators import AbstractOperator, Linear, Spread, low_rank
from gradmerge.preprocess import ProcessedDirections
from gradmerge.sources import Checkpoint
from gradmerge.sources.collected import SourceStatistics
from gradmerge.sources.geometry import direction_statistics
from gradmerge.sources.sharing import share_of
from gradmerge.sources.skeleton import Network

SMALLEST_SHARED = 1 << 12
"""Smaller tensors are merged by every process: exchanging them would take longer."""


class Plan(FrozenTensors):
    """An opened recipe: `theta_p(z)` and its contraction, tensor by tensor.

    It does not change, so copies of a model share it. A coefficient `own` of a tensor is either z
    of that tensor or, for a fixed tensor, a number.
    """

    is_shared = False
    """True if the sources are divided among processes (`ShardedPlan`)."""
    checked_later = False
    """True if it is left to the start of a fit to look for NaN in the sources."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Mapping[str, Checkpoint],
        base: Checkpoint | None,
        network: Network | None,
        problems: Sequence[Problem],
        heads: Mapping[str, Checkpoint] | None = None,
        order: Aligned | None = None,
        statistics: str | None = None,
    ) -> None:
        self.recipe = recipe
        super().__init__(sources, base, heads, order)
        self.skeleton = None if network is None else network.module
        self.binding = None if network is None else network.binding
        self.warnings = [problem for problem in problems if not problem.fatal]
        first = next(iter(self.sources.values()))
        names = names_of(self.reference, first, recipe.private)
        found = take_inventory(names, self.reference, network, recipe.private)
        self.private, self.buffers, self.tensors = found.private, found.buffers, found.tensors
        parts = find_trained(found, recipe.trained, recipe.adapters, first, network)
        self.trained, self.ranks = parts
        """Names of the private tensors that a fit trains per task, and the rank of the adapter that
        it trains per task on each merged matrix that has one."""
        if not self.tensors:
            raise ConfigError(
                "private: expected at least one tensor to merge, got none: all are private or "
                "buffers; narrow the patterns."
            )
        self.unchanged = self._find_unchanged()
        """Tensors that are the base's in all sources, so that none has a direction."""
        self.fixed: Mapping[str, float] = self._fixed()
        """Coefficients of frozen tensors, by name."""
        learned = [tensor for name, tensor in self.tensors.items() if name not in self.fixed]
        if not learned and len(self.unchanged) == len(self.tensors):
            raise ConfigError(
                f"sources: expected weights that differ from the base {self.reference.label}, got "
                "the very same tensors from every source, so there is nothing to merge."
            )
        if not learned:
            raise ConfigError(
                "frozen: expected at least one tensor with free coefficients, got none: the "
                "patterns match all tensors; narrow them."
            )
        self.num_rows = recipe.coefficients.num_rows(len(self.sources))
        self._placement = Placement(self._item)
        self._facts: dict[str, dict[str, Tensor]] = {}
        self._keeps_facts = False  # a static merge reads each tensor once
        if recipe.coefficients.needs_norms:
            learned = [replace(tensor, norms=self._norms(tensor.name)) for tensor in learned]
        self.layout: Layout = recipe.coefficients.layout(learned)
        self.collected = self._open_statistics(statistics or recipe.statistics)
        """The sources' statistics on data, if alignment or preprocess needs them."""
        self._processed = ProcessedDirections(recipe.preprocess, self.directions)
        self.finalisation = Finalisation(recipe.finalisers, self._final_site)
        """The recipe's finalisers."""

    def _open_statistics(self, folder: str | None) -> SourceStatistics | None:
        def found() -> tuple[dict[str, str], dict[str, dict[str, str]]]:
            return {n: self.fingerprints[n] for n in self.sources}, self.side_hashes

        return open_statistics(self.recipe, folder, found)

    def _find_unchanged(self) -> frozenset[str]:
        return find_unchanged(self.recipe, self.base, self.sources, self.tensors)

    def _fixed(self) -> dict[str, float]:
        fixed = {}
        for name in self.tensors:
            for pattern, value in self.recipe.frozen.items():
                if matches([pattern], name):
                    fixed[name] = self._number(value)
                    break
            else:
                if name in self.unchanged:
                    fixed[name] = 0.0
                elif self.binding is not None and name not in self.binding.owners:
                    fixed[name] = self.unused_coefficient
        return fixed

    @property
    def unchanged_note(self) -> str:
        """Number and share of the tensors that no source changes, in words; empty if none."""
        if not self.unchanged:
            return ""
        sizes = {name: math.prod(tensor.shape) for name, tensor in self.tensors.items()}
        return f"{share_of(self.unchanged, sizes)} are the same in all sources and the base"

    def _number(self, value: float | str) -> float:
        if value == "origin":
            return 0.0
        return 1 / len(self.sources) if value == "mean" else float(value)

    @property
    def has_own(self) -> bool:
        """True if tasks have tensors of their own, private ones or adapted matrices."""
        return bool(self.private or self.ranks)

    @property
    def unused_coefficient(self) -> float:
        """The coefficient of tensors without a gradient, by `Recipe.unused`."""
        rule = self.recipe.unused
        if rule == "auto":
            rule = "origin" if self.recipe.resolved_origin == "base" else "mean"
        return self._number(rule)

    @property
    def learned(self) -> list[str]:
        """Names of the tensors whose coefficients are learned."""
        return [name for name in self.tensors if name not in self.fixed]

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources, in order."""
        return tuple(self.sources)

    def init_context(self) -> InitContext:
        """Return the information that an init may use."""
        labels = {name: checkpoint.label for name, checkpoint in self.sources.items()}
        return InitContext(
            self.source_names,
            {name: self.tensors[name] for name in self.learned},
            cache(self.direction_norms),
            self.recipe.resolved_origin,
            {**({} if self.base is None else {"base": self.base.label}), **labels},
            tuple(self.tensors),
        )

    def initial_raw(self, init: AbstractInit | None = None) -> dict[str, Tensor]:
        """Return the raw coefficients of an init (default: the recipe's), by key, in float32."""
        init, context = init or self.recipe.init, self.init_context()
        pull_back = self.recipe.coefficients.pull_back
        return initial_raw(self.layout, init, context, self.num_rows, pull_back)

    def direction_norms(self) -> Tensor:
        """Return `|B_k|^2` over all merged tensors, `[sources]`, in float64."""
        self.require_finite()
        if self.recipe.preprocess:
            squares = (self._processed.read(name).double().square() for name in self.tensors)
            return torch.stack([square.flatten(1).sum(dim=1) for square in squares]).sum(dim=0)
        origin = self.recipe.resolved_origin
        statistics = direction_statistics(
            list(self.sources.values()),
            self.base if origin == "base" else None,
            list(self.tensors),
            origin == "mean",
            signs=False,
        )
        return statistics.gram.diagonal()

    def _norms(self, name: str) -> dict[str, float]:
        """Return `sum |B_k|` over the entries of a tensor before preprocessing, by source."""
        directions = self.direction(name).view(len(self.sources), -1)
        sizes = directions.abs().sum(dim=1, dtype=torch.float64)
        return dict(zip(self.sources, sizes.tolist(), strict=True))

    def with_init(self, init: AbstractInit) -> Plan:
        """Return the same plan with another init in its recipe."""
        other = copy.copy(self)
        other.recipe = replace(self.recipe, init=init)
        return other

    def with_operator(self, operator: AbstractOperator) -> Plan:
        """Return the same plan with another operator of the same kind in its recipe."""
        other = copy.copy(self)
        other.recipe = replace(self.recipe, operator=operator)
        return other

    def without_frozen(self) -> Plan:
        """Return the same plan, in whose preprocess no frozen tensor takes part."""
        other = copy.copy(self)
        other.fixed = dict.fromkeys(self.fixed, 0.0)
        other._processed = ProcessedDirections(self.recipe.preprocess, other.directions)
        other._placement = Placement(other._item)
        return other

    def share(self, name: str, index: int, count: int) -> Rows | None:
        """Return the rows of a tensor that one of `count` processes merges; None for all of them.

        All are those of small tensors, and where rows cannot be merged apart.
        """
        shape = torch.Size(self.tensors[name].shape)
        # two rows at least, so that a run of rows is no vector of its own to any operator
        small = len(shape) < 1 or shape[0] < 2 * count or shape.numel() < SMALLEST_SHARED
        if small or not self.recipe.operator.by_rows:
            return None
        share, slot = Rows.share(shape, index, count), self.layout.slots.get(name)
        if slot is None or not share.runs_along(slot):
            return share
        # coefficients of rows are read, linked and written apart
        return share if self.recipe.coefficients.by_entry and not slot.length else None

    def together(self) -> AbstractContextManager[None]:
        """Return the context of a step, in which processes that share sources merge together."""
        return nullcontext()

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process that merges together with this one."""
        return flag

    def order_of(self, keys: Collection[str], proposal: Sequence[str]) -> Sequence[str]:
        """Return keys in the order in which all processes that share sources contract them."""
        return proposal

    def prepare_learning(self) -> None:
        """Prepare for training: keep sources open and processed directions in mapped files.

        Raises:
            ConfigError: the operator is not differentiable in its coefficients.
        """
        operator = self.recipe.operator
        if not operator.differentiable:
            raise ConfigError(
                "operator: expected one that is differentiable in its coefficients, got "
                f"{type(operator).__name__}, whose coefficients cannot be learned.\n"
                "Merge with fixed coefficients (`gradmerge merge`), or choose another operator."
            )
        if not self.checked_later:
            self.require_finite()
        self._keeps_facts = True
        for checkpoint in (*([self.base] if self.base is not None else []), *self.serving.values()):
            checkpoint.keep()
        if self.recipe.preprocess:
            entries = sum(math.prod(info.shape) for info in self.tensors.values())
            require_temporary_space(4 * entries * len(self.sources), "the preprocessed directions")
        self._processed.keep()

    def _spread(self, name: str, device: torch.device) -> Spread:
        """Return the mapping of the coefficients of `name` to its entries."""
        slot = self.layout.slots[name]
        parts = None
        if slot.kind == "partition":
            facts = self._facts_of(name)
            parts = facts.get("parts")
            if parts is None or parts.device != device:
                parts = slot.parts(math.prod(self.tensors[name].shape), device)
                if device.type != "cpu":  # a step would wait until they are drawn and copied
                    facts["parts"] = parts
        return Spread(slot.kind, slot.axis, parts, slot.experts, slot.length)

    def combine(
        self, name: str, own: Tensor | float, out: Tensor, rows: Rows | None = None
    ) -> Tensor:
        """Write `theta_p(z)`, or some rows of it, into `out`.

        A fixed coefficient of 0 keeps the origin, independent of the operator.

        Args:
            name: the tensor.
            own: the tensor's own z, or the coefficient that it is fixed at.
            out: the result; its dtype is that of the computation.
            rows: the rows to merge. Default: all.

        Returns:
            `out`.
        """
        recipe, operator = self.recipe, self.recipe.operator
        if isinstance(own, Tensor):
            spread = self._spread(name, out.device)
            terms = self._spread_terms(name, spread, out.device, rows)
            if rows is not None:
                own, spread = rows.of_coefficients(own, spread), rows.of_spread(spread)
            return contraction.combine(recipe.coefficients, operator, terms, own, spread, out)
        with torch.no_grad():
            if own == 0 and recipe.resolved_origin == "base":
                return out.copy_(self.read("base", name, rows, out.device))
            terms = self.terms(name, processed=own != 0, rows=rows, device=out.device)
            operator = operator if own else Linear()
            return operator.combine(terms, self.coefficient(own), Spread("scalar"), out)

    @torch.no_grad()
    def factors(self, name: str, own: Tensor | float) -> tuple[Tensor, Tensor] | None:
        """Return `theta_p(z) - A` as a product of two matrices, on the CPU.

        Their rank is the sum of the sources' ranks. None if not all directions are of low rank, or
        if they are not merged linearly as they are.
        """
        spread = Spread("scalar")
        if isinstance(own, Tensor):
            spread = self._spread(name, own.device)
        terms = self._low_rank_terms(name, spread, CPU)
        if terms is None:
            return None
        rows = spread.expanded(self.coefficient(own).view(len(self.sources), -1))
        return low_rank.merged_factors(terms, rows, spread, terms.accumulate_dtype, CPU)

    def z(self, name: str, raw: Raw) -> Tensor:
        """Return z of a tensor, `[rows, *slot]`, as a view of the raw parameters."""
        return self.layout.slots[name].read(raw)

    def coefficient(self, own: Tensor | float) -> Tensor:
        """Return `c = link(z)`, `[sources, *slot]`, differentiable; or a fixed coefficient."""
        if isinstance(own, Tensor):
            return linked(self.recipe.coefficients, own, len(self.sources))
        return torch.full((len(self.sources),), own, dtype=torch.float64)

    def contract(
        self, name: str, grad: Tensor, z: Tensor, slopes: bool = False, rows: Rows | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Contract the gradient of a tensor with its directions, then apply the link's VJP.

        Returns:
            `dL/dz` for `grad = dL/dtheta`, and with `slopes` also `dL/dc`, `[sources, *slot]`. Of
            some rows, both are their parts of the sums.
        """
        coefficients, operator = self.recipe.coefficients, self.recipe.operator
        spread = self._spread(name, grad.device)
        terms = self._spread_terms(name, spread, grad.device, rows)
        if rows is None:
            return contraction.contract(coefficients, operator, terms, z, spread, grad, slopes)
        own, here = rows.of_coefficients(z, spread), rows.of_spread(spread)
        found, slope = contraction.contract(coefficients, operator, terms, own, here, grad, slopes)
        slope = None if slope is None else rows.whole(slope, spread, z.shape[1:])
        return rows.whole(found, spread, z.shape[1:]), slope

    def _final_site(self, name: str) -> FinalSite:
        def sources() -> list[Tensor]:
            return [self.read(source, name) for source in self.sources]

        return FinalSite(name, tuple(self.tensors), partial(self._origin, name), sources)

    @torch.no_grad()
    def buffer(self, name: str) -> Tensor:
        """Return a buffer by `Recipe.buffers`, before any recomputation on data."""
        reference = self.reference.read(name)
        if self.recipe.buffers == "origin" or not reference.dtype.is_floating_point:
            return reference.clone()
        stacked = torch.stack([source.read(name).double() for source in self.sources.values()])
        return stacked.mean(dim=0).to(reference.dtype)
