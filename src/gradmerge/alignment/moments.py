"""Moments of units in pairs of sources, and the likenesses they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradmerge.alignment.base import AbstractAlignment, AlignmentContext, Moments
from gradmerge.alignment.symmetry.spec import LinearMap, Maps, PermutationSpec, UnitGroup
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.sources.collected import Needs, SourceStatistics


@dataclass(frozen=True)
class Pairing:
    """One group's units in a source, and in the targets that it is matched to."""

    context: AlignmentContext
    group: UnitGroup
    source: str
    """The source whose units are moved."""
    targets: Mapping[str, Maps]
    """The others, each with the maps that it is read under."""
    maps: Maps
    """Maps of the source's groups before this one."""

    def moments(self, first: str, second: str) -> Moments:
        """Return the group's moments in two sources."""
        assert self.context.activations is not None
        return self.context.activations.moments(self.group.name, first, second)

    def moments_of_mean(self) -> Moments:
        """Return the moments of the mean of all targets (first) and of the source (second).

        With `x = 1/m sum_k T_k a_k` over m targets and `y = a_s`, all are linear in the moments of
        pairs, so no pass over data is needed for any mean:

            E[x]     = 1/m   sum_k  T_k E[a_k]
            E[x x^T] = 1/m^2 sum_kl T_k E[a_k a_l^T] T_l^T
            E[x y^T] = 1/m   sum_k  T_k E[a_k y^T]
        """
        size, share = self.group.size, 1 / len(self.targets)
        mean = torch.zeros(size, dtype=torch.float64)
        square, cross = torch.zeros(2, size, size, dtype=torch.float64)
        for name in self.targets:
            found = self.moments(name, self.source)
            mean += share * self.mapped(name, found.first_mean)
            cross += share * self.mapped(name, found.cross)
            for other in self.targets:
                pair = self.mapped(name, self.moments(name, other).cross)
                square += share**2 * self.mapped(other, pair.mT).mT
        return replace(found, first_mean=mean, first=square, cross=cross)

    def mapped(self, target: str, values: Tensor) -> Tensor:
        """Return `T values` over the first axis, with the target's map of the group."""
        change = self.targets[target].get(self.group.name)
        if isinstance(change, LinearMap):
            return change.matrix.to(values) @ values
        return values if change is None else values[change]


def covariances(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Centred: of the first, of the second, and across, each `[size, size]`."""
    one, two = moments.first_mean, moments.second_mean
    return (
        moments.first - torch.outer(one, one),
        moments.second - torch.outer(two, two),
        moments.cross - torch.outer(one, two),
    )


def correlation(moments: Moments) -> Tensor:
    """`corr(x_i, y_j)`, `[size, size]`; 0 where either unit does not vary."""
    xx, yy, xy = covariances(moments)
    rows, columns = _inverse_deviations(xx, moments.first), _inverse_deviations(yy, moments.second)
    return rows[:, None] * xy * columns[None, :]


def _inverse_deviations(covariance: Tensor, square: Tensor) -> Tensor:
    """`1 / sqrt(v)`; 0 where v is rounding of `E[x^2] - E[x]^2`."""
    variances = covariance.diagonal()
    varies = variances > 1e-13 * square.diagonal()
    return varies * variances.where(varies, 1.0).rsqrt()


def squared_distances(moments: Moments) -> Tensor:
    """`E (x_i - y_j)^2`, `[size, size]`."""
    squares = moments.first.diagonal()[:, None] + moments.second.diagonal()[None, :]
    return (squares - 2 * moments.cross).clamp(min=0)


ACTIVATIONS = Needs("activations")


def pairs_of(alignment: AbstractAlignment, sources: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of sources that an alignment compares.

    Each source with its reference or, where that is the mean or is not known, with every other.
    """
    reference = getattr(alignment, "reference", "mean") or sources[0]
    if reference in sources:
        return [(reference, name) for name in sources if name != reference]
    return [(one, two) for i, one in enumerate(sources) for two in sources[i + 1 :]]


def plain_places(group: UnitGroup) -> list[dict[str, Any]]:
    """A group's places as plain data for JSON."""
    return [{**asdict(place), "sizes": list(place.sizes)} for place in group.places]


class CollectedActivations:
    """Moments by group and pair of sources, out of a folder of statistics."""

    def __init__(self, folder: str, spec: PermutationSpec, fingerprints: Mapping[str, str]) -> None:
        self._statistics = SourceStatistics(folder)
        self._statistics.require([(ACTIVATIONS, None)], fingerprints)
        found = self._statistics.index["collected"][ACTIVATIONS.kind]
        self._groups: dict[str, dict[str, Any]] = found["groups"]
        self._order = list(found["sources"])
        self._pairs = {tuple(pair) for pair in found["pairs"]}
        wanted = {name: plain_places(group) for name, group in spec.groups.items() if group.places}
        got = {name: group["places"] for name, group in self._groups.items()}
        differ = [n for n in sorted({*wanted, *got}) if wanted.get(n) != got.get(n)]
        if differ:
            raise ConfigError(
                f"statistics: {folder} is of other groups of units: {shorten(differ)} were not "
                "collected, or elsewhere in the network.\nCollect again with this recipe."
            )

    def moments(self, group: str, first: str, second: str) -> Moments:
        """Return the moments of a group that has a place, in two sources."""
        place = self._groups[group]
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
        means = read(f"mean-{one}"), read(f"mean-{two}")
        return Moments(place["rows"], *means, read(f"square-{one}"), read(f"square-{two}"), cross)
