"""Opening of a recipe: read headers, check compatibility, align, and assign coefficients."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial

from torch import nn

from gradmerge.alignment import Aligned, PermutationSpec
from gradmerge.alignment.align import align_sources, find_spec
from gradmerge.coefficients import Column, Row
from gradmerge.common.errors import ConfigError, Problem
from gradmerge.common.patterns import require_matches
from gradmerge.common.spec import patterns_of
from gradmerge.engine.inventory import names_of, take_inventory
from gradmerge.engine.plan import Plan
from gradmerge.engine.recipe import Recipe, innermost
from gradmerge.sources import Checkpoint, as_source
from gradmerge.sources.agreement import check_agreement
from gradmerge.sources.base import require_finite
from gradmerge.sources.compatibility import check, check_private, require
from gradmerge.sources.composite import complete
from gradmerge.sources.module_weights import check_modules
from gradmerge.sources.renaming import unify_names
from gradmerge.sources.skeleton import Network, strip_weights
from gradmerge.sources.ties import Networks, may_be_tied, settle_ties, untie
from gradmerge.sources.tokenizers.view import align


def open_plan(recipe: Recipe, module: nn.Module | None = None, with_skeleton: bool = True) -> Plan:
    """Open a recipe's checkpoints, align them if it asks for that, and assign coefficients.

    Args:
        recipe: the merge to open.
        module: the architecture, if no source has a config. Its weights are not used.
        with_skeleton: build the network without weights. A merge with fixed coefficients per model,
            group or tensor does not need it.

    Raises:
        CompatibilityError: the checkpoints do not fit together; the message lists every problem.
        SourceError: a source cannot be opened.
    """
    opening = Opening(recipe, module, with_network=with_skeleton)
    opening.align(recipe.statistics)
    return opening.plan(with_skeleton=with_skeleton)


class Opening:
    """The open checkpoints of a recipe, with their network and the alignment of their units.

    A command that runs the sources before it merges them (statistics, alignment on data) makes all
    its plans from one opening, so that nothing is opened, traced or aligned twice.

    Args:
        recipe: the merge to open.
        module: the architecture, if no source has a config. Its weights are not used.
        opened: checkpoints that are open already, by source name or `base`.
        with_network: whether plans will need the network in any case.

    Raises:
        CompatibilityError: the checkpoints do not fit together; the message lists every problem.
        SourceError: a source cannot be opened.
    """

    def __init__(
        self,
        recipe: Recipe,
        module: nn.Module | None = None,
        opened: Mapping[str, Checkpoint] | None = None,
        with_network: bool = True,
    ) -> None:
        self.recipe = recipe
        self._module = module
        self.order: Aligned | None = None
        """The common order of the sources' units, once they are aligned."""
        known = opened or {}
        base_spec = None if recipe.base is None else as_source(recipe.base)
        self.base: Checkpoint | None = None
        if base_spec is not None:
            self.base = known["base"] if "base" in known else base_spec.open()
        self.sources: dict[str, Checkpoint] = {
            name: known[name] if name in known else as_source(s, base_spec).open()
            for name, s in recipe.sources.items()
        }
        self.heads: dict[str, Checkpoint] = {
            name: as_source(s, base_spec).open() for name, s in recipe.heads.items()
        }
        if self.base is not None and "base" in self.sources:
            raise ConfigError(
                "sources: expected names other than 'base', which is reserved for `base`, got it "
                "as the name of a source; rename the source."
            )
        self._apart: tuple[str, ...] | None = None
        specs = {"base": recipe.base, **recipe.sources, **recipe.heads}
        self._networks = Networks(specs, module, recipe.trust_remote_code)
        self._needed = with_network or self._needs_network(recipe)
        self.sources, problems = complete(self.sources, self.base, self._networks.look)
        problems += self._unify_names()
        if self._needed or may_be_tied({**self._everything(), **self.heads}, recipe.private):
            problems += self._settle_ties()
        self._require_patterns()
        self.problems = [*problems, *self._check()]

    @staticmethod
    def _needs_network(recipe: Recipe) -> bool:
        aligned = recipe.alignment is not None and not recipe.alignment.is_identity
        by_axis = isinstance(innermost(recipe.coefficients), (Column, Row))
        return by_axis or aligned or recipe.needs_statistics

    def _unify_names(self) -> list[Problem]:
        """Read all checkpoints under the same names; return what to say of it."""
        everything = {**self._everything(), **self.heads}
        # the sources' own first: a base may have another head, or none
        order = {**self.sources, **self.heads, **everything}
        build = partial(self._networks.first, order)
        found, notes = unify_names(everything, build, self.recipe.private)
        self._take(found)
        return notes

    def _take(self, checkpoints: Mapping[str, Checkpoint]) -> None:
        if self.base is not None:
            self.base = checkpoints["base"]
        self.sources = {name: checkpoints[name] for name in self.sources}
        self.heads = {name: checkpoints[name] for name in self.heads}

    def _settle_ties(self) -> list[Problem]:
        """Give all checkpoints the same tensors of each tied group; return what to say of it."""
        everything = {**self._everything(), **self.heads}
        found = settle_ties(everything, self._networks, self.recipe.private)
        self._take(found.checkpoints)
        self._apart = found.apart
        return list(found.notes)

    def _require_patterns(self) -> None:
        """Reject expressions of the recipe that match no tensor of any checkpoint."""
        opened = [*self._everything().values(), *self.heads.values()]
        names = dict.fromkeys(name for checkpoint in opened for name in checkpoint.infos)
        require_matches(patterns_of(self.recipe), names, "tensor of the sources")

    def _check(self) -> list[Problem]:
        """Match vocabularies and compare all checkpoints; return the warnings."""
        recipe = self.recipe
        everything = self._everything()
        problems: list[Problem] = []
        if recipe.tokenizer is not None:
            everything, problems = align(recipe.tokenizer, everything, recipe.trust_remote_code)
            self.base = everything.get("base", self.base)
            self.sources = {name: everything[name] for name in self.sources}
        problems += check({**everything, **self.heads}, recipe.private, recipe.allow)
        problems += check_private({**self.sources, **self.heads}, recipe.private, recipe.allow)
        problems += check_modules([*everything.values()])
        require(problems)
        if self._module is None:
            serving = {**self.sources, **self.heads}
            require(
                check_agreement(
                    {**everything, **self.heads},
                    list(serving),
                    self._networks.look,
                    recipe.private,
                    sure=self._needed,
                )
            )
        return problems

    def _everything(self) -> dict[str, Checkpoint]:
        return {**({} if self.base is None else {"base": self.base}), **self.sources}

    @cached_property
    def network(self) -> Network | None:
        """The network without weights, or None if no source defines the architecture."""
        if self._apart is None:
            self.problems = [*self._settle_ties(), *self.problems]
        module = self._skeleton()
        if module is None:
            return None
        untie(module, self._apart or ())
        first = next(iter(self.sources.values()))
        infos = {**first.infos, **self.reference.infos}
        shapes = {name: infos[name].shape for name in self._names}
        return Network.bound(module, self._names, self.reference.label, shapes)

    @property
    def reference(self) -> Checkpoint:
        """The base, or the first source."""
        return self.base or next(iter(self.sources.values()))

    @property
    def _names(self) -> list[str]:
        first = next(iter(self.sources.values()))
        return names_of(self.reference, first, self.recipe.private)

    def _skeleton(self) -> nn.Module | None:
        recipe = self.recipe
        if self._module is not None:
            return strip_weights(self._module)
        # A base may have another head, or none; the tasks run the sources' network.
        specs = [recipe.base, *recipe.sources.values()]
        opened = list(self._everything().values())
        if recipe.private and self.base is not None:
            specs, opened = [*specs[1:], specs[0]], [*opened[1:], opened[0]]
        for spec in specs:
            inner = getattr(spec, "module", spec)
            if isinstance(inner, nn.Module):
                return strip_weights(inner)
        for checkpoint in opened:
            if checkpoint.folder is not None and checkpoint.config is not None:
                return self._networks.build(checkpoint.folder)
        return None

    @cached_property
    def spec(self) -> PermutationSpec:
        """The groups of units that the recipe's alignment may permute, traced once."""
        assert self.recipe.alignment is not None
        return find_spec(self.recipe.alignment, self.sources, self.network)

    def align(self, statistics: str | None) -> None:
        """Align the sources' units if the recipe asks for it and they are not aligned yet.

        Args:
            statistics: folder of the sources' statistics on data, for alignments that need them.
        """
        method = self.recipe.alignment
        if method is None or method.is_identity or self.order is not None:
            return
        found = take_inventory(self._names, self.reference, self.network, self.recipe.private)
        require_finite({**self._everything(), **self.heads}, found.buffers)
        self.sources, self.order = align_sources(
            method, self.sources, self.spec, self.network, self.recipe.private, statistics
        )

    def plan(
        self,
        recipe: Recipe | None = None,
        with_skeleton: bool = True,
        keep_network: bool = False,
        statistics: str | None = None,
        kind: type[Plan] = Plan,
    ) -> Plan:
        """Make the plan of a recipe on the sources as they are now.

        Args:
            recipe: another recipe for the same sources. Default: the one that was opened.
            with_skeleton: give the plan the network.
            keep_network: give the plan a copy of the network, because more plans will follow.
            statistics: folder of the sources' statistics. Default: the recipe's.
            kind: class of the plan.
        """
        recipe = recipe or self.recipe
        needed = with_skeleton or isinstance(innermost(recipe.coefficients), (Column, Row))
        network = self.network if needed else None
        if keep_network:
            network = network and replace(network, module=copy.deepcopy(network.module))
        return kind(
            recipe,
            self.sources,
            self.base,
            network,
            self.problems,
            self.heads,
            self.order,
            statistics,
        )
