"""The concept of an alignment: maps of every source's units onto a common order.

    align(context) -> Aligned(maps): source -> group -> map

A method that aligns one network to others derives from `Matching` and writes `match` alone; several
sources, a reference, and the running mean come from here.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradmerge.alignment.symmetry.spec import LinearMap, Maps, PermutationSpec, same_maps
from gradmerge.common.errors import ConfigError, nearest, require
from gradmerge.common.patterns import require_pattern
from gradmerge.sources import Checkpoint
from gradmerge.sources.base import tensor_bytes

Needs = Literal["activations"]


@dataclass(frozen=True)
class Moments:
    """First and second moments of one group's units in two sources, on the same inputs.

    Units in each source's own order; rows of all the group's places, whose covariances are about
    each place's own mean. float64.
    """

    rows: float
    """Number of rows that were averaged."""
    first_mean: Tensor
    """`E[a]`, `[size]`."""
    second_mean: Tensor
    """`E[b]`, `[size]`."""
    first: Tensor
    """`E[a a^T]`, `[size, size]`, not centred."""
    second: Tensor
    """`E[b b^T]`, `[size, size]`."""
    cross: Tensor
    """`E[a b^T]`, `[size of the first, size of the second]`."""


class Activations(Protocol):
    """Moments of the sources' units."""

    def moments(self, group: str, first: str, second: str) -> Moments:
        """Return the moments of a group that has a place, in two sources."""


@dataclass(frozen=True)
class AlignmentContext:
    """The sources and their symmetry, as a method sees them."""

    spec: PermutationSpec
    """Groups, and their uses by tensor."""
    sources: Mapping[str, Checkpoint]
    """Opened, in order."""
    compared: tuple[str, ...]
    """Names of the parameters that methods over weights compare: those that all sources share, not
    private, no buffers."""
    skeleton: nn.Module | None = None
    """The network without weights."""
    activations: Activations | None = None
    """For methods that need them."""

    def read(self, source: str, name: str, maps: Maps | None = None) -> Tensor:
        """A compared tensor of a source, under maps of its units."""
        tensor = self.sources[source].read(name)
        return self.spec.apply(maps, name, tensor) if maps else tensor


@dataclass(frozen=True)
class Matched:
    """The result of one match."""

    maps: Maps
    """For the matched source, by group."""
    objective: list[float]
    """After every sweep, the final one last; each method documents its own."""


@dataclass(frozen=True)
class Aligned:
    """The result of an alignment."""

    maps: dict[str, Maps]
    """By source, by group; the reference and groups that stay may be left out."""
    objective: dict[str, list[float]] = field(default_factory=dict)
    """By source: after every sweep."""
    report: dict[str, Any] = field(default_factory=dict)
    """Further entries of the provenance, as plain data."""

    def fingerprint(self) -> str:
        """Return the SHA-256 over all maps."""
        digest = hashlib.sha256()
        for source, maps in self.maps.items():
            for group, change in sorted(maps.items(), key=itemgetter(0)):
                digest.update(f"{source}|{group}|".encode())
                for part in change if isinstance(change, LinearMap) else (change,):
                    digest.update(tensor_bytes(part))
        return digest.hexdigest()


class AbstractAlignment(ABC):
    """A method that brings the sources' units into one order."""

    @property
    def needs(self) -> Needs | None:
        """The statistics on data that it reads; None for a method over weights alone."""
        return None

    @property
    def is_identity(self) -> bool:
        """True if it changes nothing, whatever the sources."""
        return False

    @property
    def mixes_units(self) -> bool:
        """True if its maps may mix units, so that a mapped source computes another function."""
        return False

    @abstractmethod
    def align(self, context: AlignmentContext) -> Aligned:
        """Return maps for every source.

        Raises:
            ConfigError: the reference is not a source, or the statistics it needs are missing.
        """


@dataclass(frozen=True)
class Identity(AbstractAlignment):
    """No alignment: units stay where they are."""

    @property
    @override
    def is_identity(self) -> bool:
        return True

    @override
    def align(self, context: AlignmentContext) -> Aligned:
        return Aligned({name: {} for name in context.sources})


@dataclass(frozen=True)
class Matching(AbstractAlignment):
    """A method that matches each source to a reference, or to the mean of all the others."""

    spec: str | dict[str, Any] | None = None
    """A hand-written specification (see `PermutationSpec` in the documentation): a YAML file, or
    the mapping itself. Default: traced from the network."""
    reference: str | None = None
    """The source whose order of units all others take (default: the first), or `mean`: each is
    matched to the mean of the others in turn, until nothing changes."""
    seed: int = 0
    """Seed of the order in which groups (and sources, with `mean`) are visited."""
    max_iter: int = 100
    """Maximum number of sweeps over all groups and, with `mean`, of rounds over all sources."""
    example: dict[str, Any] | None = None
    """Inputs to trace the network with, by the name of the argument of its forward: shapes, e.g.
    {pixel_values: [1, 3, 32, 32]}, or tensors from Python. Names that end in `ids` are whole
    numbers. A small input is enough (a handful of tokens); a large one takes the memory of the
    network on it, in float64. Default: derived from the config or the first layer."""
    unreached: list[str] = field(default_factory=list)
    """Regular expressions of parameters (by their names in the network) that the example does not
    reach and that its output does not need: they stay as they are. Any other parameter that is not
    reached is an error."""

    def __post_init__(self) -> None:
        """Check the options."""
        kind, given = type(self).__name__, self.example
        require(self.max_iter >= 1, f"{kind}.max_iter", "a positive number", self.max_iter)
        require(
            given is None or isinstance(given, Mapping),
            f"{kind}.example",
            "shapes (or tensors) by the name of the argument, e.g. {x: [1, 3, 32, 32]}",
            repr(str(given)[:60]),
        )
        for pattern in self.unreached:
            require_pattern(f"{kind}.unreached", pattern)

    @abstractmethod
    def match(
        self, context: AlignmentContext, source: str, targets: Mapping[str, Maps], start: Maps
    ) -> Matched:
        """Return maps that bring one source to the mean of others.

        Args:
            context: the sources and their symmetry.
            source: the one whose units are moved.
            targets: the others, each with the maps that it is read under (none: as it is).
            start: maps of `source` to begin with; empty for none.
        """

    @override
    def align(self, context: AlignmentContext) -> Aligned:
        names = list(context.sources)
        reference = self.reference or names[0]
        if reference == "mean":
            return self._to_running_mean(context)
        if reference not in names:
            raise ConfigError(
                f"{type(self).__name__}.reference: expected a source or 'mean', got "
                f"{reference!r}.{nearest(reference, names)}"
            )
        found = {
            name: self.match(context, name, {reference: {}}, {})
            for name in names
            if name != reference
        }
        return Aligned(
            {reference: {}, **{name: matched.maps for name, matched in found.items()}},
            {name: matched.objective for name, matched in found.items()},
            {"reference": reference},
        )

    def _to_running_mean(self, context: AlignmentContext) -> Aligned:
        """Match each source to the mean of the others, in random order, until nothing changes.

        MergeMany of arXiv 2209.04836 (algorithm 2).
        """
        names = list(context.sources)
        maps: dict[str, Maps] = {name: {} for name in names}
        objective: dict[str, list[float]] = {name: [] for name in names}
        generator = torch.Generator().manual_seed(self.seed)
        rounds, changed = 0, len(names) > 1
        while changed and rounds < self.max_iter:
            rounds, changed = rounds + 1, False
            for i in torch.randperm(len(names), generator=generator).tolist():
                name = names[i]
                others = {other: maps[other] for other in names if other != name}
                matched = self.match(context, name, others, maps[name])
                changed |= not same_maps(matched.maps, maps[name])
                maps[name] = matched.maps
                objective[name] += matched.objective
        return Aligned(maps, objective, {"reference": "mean", "rounds": rounds})


def assign(gain: Tensor) -> tuple[Tensor, float]:
    """The permutation p of largest `sum_i gain[i, p[i]]` (Jonker-Volgenant), and that sum."""
    if not bool(torch.isfinite(gain).all()):
        raise ConfigError(
            "alignment: weights or activations are not finite, so units cannot be matched. Check "
            "the sources for NaN and infinity."
        )
    from scipy.optimize import linear_sum_assignment  # takes as long to import as a small merge

    rows, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    return torch.from_numpy(columns).to(torch.int64), float(gain[rows, columns].sum())
