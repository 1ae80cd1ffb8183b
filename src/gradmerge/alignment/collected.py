"""Moments that `gradmerge collect` wrote, as alignments read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gradmerge.alignment.base import AbstractAlignment, Moments
from gradmerge.alignment.spec import Group, PermutationSpec
from gradmerge.errors import ConfigError, shorten
from gradmerge.sources import Checkpoint
from gradmerge.sources.fingerprints import fingerprints_of
from gradmerge.statistics import Needs, SourceStatistics

ACTIVATIONS = Needs("activations")


def open_activations(
    folder: str | None, sources: Mapping[str, Checkpoint]
) -> Callable[[PermutationSpec], CollectedActivations] | None:
    """What opens the sources' moments, once the groups are known; None where no folder is named.

    Args:
        folder: what `gradmerge collect` wrote.
        sources: as they are, before any alignment; they are read once for their fingerprints.
    """
    if folder is None:
        return None

    def opened(spec: PermutationSpec) -> CollectedActivations:
        return CollectedActivations(SourceStatistics(folder), spec, fingerprints_of(sources))

    return opened


def pairs_of(alignment: AbstractAlignment, sources: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of sources that an alignment compares: each with its reference, or, where that is
    their mean or is not known, every one with every other.
    """
    reference = getattr(alignment, "reference", "mean") or sources[0]
    if reference in sources:
        return [(reference, name) for name in sources if name != reference]
    return [(one, two) for i, one in enumerate(sources) for two in sources[i + 1 :]]


def plain_places(group: Group) -> list[dict[str, Any]]:
    """Where a group was seen, as JSON has it."""
    return [{**asdict(place), "sizes": list(place.sizes)} for place in group.places]


class CollectedActivations:
    """Moments by group and pair of sources, out of an opened folder.

    Args:
        statistics: the folder.
        spec: the groups that are to be aligned.
        fingerprints: content hash of every source as it is, before any alignment.

    Raises:
        ConfigError: the folder holds no activations, or of other groups of units.
        FingerprintError: it is of other weights.
    """

    def __init__(
        self,
        statistics: SourceStatistics,
        spec: PermutationSpec,
        fingerprints: Mapping[str, str],
    ) -> None:
        statistics.require([(ACTIVATIONS, None)], fingerprints)
        self._statistics = statistics
        found = statistics.index["collected"][ACTIVATIONS.kind]
        self._groups: dict[str, dict[str, Any]] = found["groups"]
        self._order = list(found["sources"])
        self._pairs = {tuple(pair) for pair in found["pairs"]}
        wanted = {name: plain_places(group) for name, group in spec.groups.items() if group.places}
        came = {name: group["places"] for name, group in self._groups.items()}
        if wanted != came:
            names = sorted({*wanted, *came})
            differ = [name for name in names if wanted.get(name) != came.get(name)]
            raise ConfigError(
                f"statistics: {statistics.folder} is of other groups of units: {shorten(differ)} "
                "were collected elsewhere in the network, or not at all. Collect again with this "
                "recipe."
            )

    def moments(self, group: str, first: str, second: str) -> Moments | None:
        """See `Activations.moments`.

        Raises:
            ConfigError: the two sources were not compared.
        """
        place = self._groups.get(group)
        if place is None:
            return None
        one, two = self._order.index(first), self._order.index(second)

        def read(key: str) -> Any:
            return self._statistics.tensor(place["file"], f"{key}:{group}")

        if one == two:
            cross = read(f"square-{one}")
        elif (first, second) in self._pairs:
            cross = read(f"cross-{one}-{two}")
        elif (second, first) in self._pairs:
            cross = read(f"cross-{two}-{one}").mT
        else:
            raise ConfigError(
                f"statistics: {self._statistics.folder} does not compare {first} with {second}: it "
                "was collected for another reference. Collect again with this recipe."
            )
        return Moments(
            place["rows"],
            read(f"mean-{one}"),
            read(f"mean-{two}"),
            read(f"square-{one}"),
            read(f"square-{two}"),
            cross,
        )
