"""Moments of the sources' units on the same batches, which alignments on data read.

Every batch of every task's adaptation data runs through every source, each with its own weights,
heads and buffers, in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from gradmerge.alignment.moments import plain_places
from gradmerge.alignment.symmetry.spec import Place, UnitGroup
from gradmerge.calibration.fisher import Passes
from gradmerge.calibration.observers import Observer, mask_of, without_padding
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.engine.outputs import Batch, rows_of

MEMORY = 4 << 30
"""Bytes of moments that one reading of the data may sum up; more groups take more readings."""
_ROWS = 1 << 14
"""Rows that are converted to float64 at a time."""

Pair = tuple[str, str]
Rows = dict[str, list[Tensor]]
"""The units of each group, `[rows, size]` per call of a place."""


class UnitPasses(Passes):
    """Moments of as many groups as fit into memory per reading of the data, for pairs of sources.

    Sums are in float64. Memory holds the sums of the current groups (`MEMORY` bytes, or those of a
    single larger group), and their outputs for one batch in two sources.
    """

    def units(
        self, groups: Sequence[UnitGroup], pairs: Sequence[Pair], memory: int = MEMORY
    ) -> dict[str, dict[str, Any]]:
        """Write the moments of all groups that have a place, for pairs of sources, and return the
        index of groups.
        """
        seen = [group for group in groups if group.places]
        index: dict[str, dict[str, Any]] = {}
        self._moving = moving_factors(groups)
        parts = _parts(seen, len(self.found) + len(pairs), memory)
        for part in parts:
            sums = self._read(part, pairs)
            file = self.save(
                {
                    f"{key}:{name}": moment
                    for name, total in sums.items()
                    for key, moment in total.tensors().items()
                }
            )
            for group in part:
                index[group.name] = {
                    "file": file,
                    "rows": sums[group.name].rows,
                    "size": group.size,
                    "places": plain_places(group),
                }
        examples = next(iter(self.found.values())).examples
        self.report(
            f"activations of {len(seen)} of {len(groups)} groups of units from {examples} examples "
            f"through {len(self.found)} sources, in {len(parts)} readings of the data"
        )
        return index

    @torch.no_grad()
    def _read(self, groups: Sequence[UnitGroup], pairs: Sequence[Pair]) -> dict[str, _Sums]:
        sums = {group.name: _Sums(group.size) for group in groups}
        names = list(self.found)
        for task, batch in self.batches(names[0]):
            self._add(sums, pairs, task, partial(self._outputs, task, batch, groups))
        for group, total in sums.items():
            if not total.rows:
                raise ConfigError(
                    "the sources gave no activations: the tasks have no adaptation data, or "
                    "nothing but padding."
                )
            for at, source in enumerate(names):
                if not total.finite(at):
                    raise ConfigError(
                        f"source {source} gave numbers that are not finite in the units of "
                        f"{group}, so they cannot be matched; check its weights and the data."
                    )
        for found in self.found.values():
            found.examples = self.found[names[0]].examples
        return sums

    def _add(
        self,
        sums: Mapping[str, _Sums],
        pairs: Sequence[Pair],
        task: str,
        run: Callable[[str], Rows],
    ) -> None:
        """Add one batch, of which the outputs of two sources are kept at a time."""
        numbers = {name: at for at, name in enumerate(self.found)}
        fresh = set(numbers)
        kept: dict[str, Rows] = {}

        def outputs(source: str, other: str) -> Rows:
            for name in kept.keys() - {source, other}:
                del kept[name]
            if source not in kept:
                kept[source] = run(source)
            if source in fresh:
                fresh.remove(source)
                for name, total in sums.items():
                    total.add((numbers[source],) * 2, kept[source][name], kept[source][name])
            return kept[source]

        for first, second in pairs:
            one, two = outputs(first, second), outputs(second, first)
            for name, total in sums.items():
                _require_same(name, task, (first, one[name]), (second, two[name]))
                total.add((numbers[first], numbers[second]), one[name], two[name])
            del one, two
        for alone in tuple(fresh):
            outputs(alone, alone)

    def _outputs(self, task: str, batch: Batch, groups: Sequence[UnitGroup], source: str) -> Rows:
        units = _Units(self.merged.skeleton, groups, self._moving)
        units.mask = mask_of(self.merged.skeleton, batch)
        with self.merged.as_source(source), units.watching():
            rows_of(self.merged, task, batch)
        for group in groups:
            if len(units.rows[group.name]) < len(group.places):
                modules = shorten(sorted({place.module for place in group.places}))
                raise ConfigError(
                    f"task {task}: not every module that shows the units of {group.name} ran in "
                    f"source {source}: {modules}. On these data the network takes another path "
                    "than on the example it was traced with; use WeightMatching, or a "
                    "hand-written `spec`."
                )
        return units.rows


def _require_same(
    group: str, task: str, first: tuple[str, list[Tensor]], second: tuple[str, list[Tensor]]
) -> None:
    shapes = [[tuple(rows.shape) for rows in found] for _, found in (first, second)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"task {task}: the units of {group} gave other rows in {second[0]} than in "
            f"{first[0]} ({shapes[1][:3]}, {shapes[0][:3]}) on the same batch, so they cannot "
            "be compared. The network's course depends on its weights; use WeightMatching."
        )


class _Units(Observer):
    """The units of each group in one pass."""

    def __init__(
        self,
        network: nn.Module,
        groups: Sequence[UnitGroup],
        moving: Mapping[Place, tuple[int, ...]],
    ) -> None:
        self.watched = [
            ((group.name, place, count()), network.get_submodule(place.module))
            for group in groups
            for place in group.places
        ]
        self._moving = moving
        self.rows: Rows = {group.name: [] for group in groups}

    @override
    def after(
        self, key: Any, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        group, place, calls = key
        if next(calls) == place.call:
            self.rows[group].append(place_rows(place, output, self.mask, self._moving[place]))


def place_rows(
    place: Place, output: Any, mask: Tensor | None, moving: Sequence[int] = ()
) -> Tensor:
    """Return a place's units in its module's (first) output, `[rows, size]`, without padding.

    Over `moving` factors of the stretch, whose units may be permuted, too (channels within heads),
    positions are not rows: a unit is represented by its root mean square over them, which does not
    depend on their order.
    """
    values: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    rows = without_padding(values.detach(), mask, place.axis)
    if not moving:
        return replace(place, axis=-1).units(rows)
    cut = rows.narrow(1, place.start, torch.Size(place.sizes).numel()).unflatten(1, place.sizes)
    root = cut.double().square().mean(dim=[1 + i for i in moving], keepdim=True).sqrt()
    return root.movedim(1 + place.position, -1).flatten(0, -2)


def moving_factors(groups: Sequence[UnitGroup]) -> dict[Place, tuple[int, ...]]:
    """Return the factors of each place's stretch that run over units of another group."""
    places = [place for group in groups for place in group.places]
    positions: dict[Place, set[int]] = {}
    for place in places:
        positions.setdefault(replace(place, position=0), set()).add(place.position)
    return {
        place: tuple(sorted(positions[replace(place, position=0)] - {place.position}))
        for place in places
    }


class _Sums:
    """Sums over the rows of one group in float64, by pair of sources.

    Behind its units a row has a one at the number of its place, `[size + places]`, so that one
    product holds the sums of `a b^T`, of units by place, and of rows.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._products: dict[tuple[int, int], Tensor] = {}

    @property
    def rows(self) -> int:
        """Rows of all places."""
        return int(self._products[0, 0].diagonal()[self._size :].sum()) if self._products else 0

    def finite(self, source: int) -> bool:
        """Return whether all units of a source are finite."""
        return bool(self._products[source, source].isfinite().all())

    def add(self, pair: tuple[int, int], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Add products of two sources' rows by place, `_ROWS` at a time."""
        places = len(first)
        for place, (one, two) in enumerate(zip(first, second, strict=True)):
            for parts in zip(one.split(_ROWS), two.split(_ROWS), strict=True):
                a, b = (functional.pad(part.double(), (0, places)) for part in parts)
                a[:, self._size + place] = b[:, self._size + place] = 1
                known = self._products.get(pair)
                self._products[pair] = a.mT @ b if known is None else known.addmm_(a.mT, b)

    def tensors(self) -> dict[str, Tensor]:
        """Return moments by key: `mean-k`, `square-k`, `cross-k-l`.

        With n_p of N rows in place p, and means m_p there, means are those of all rows, and

            E[a b^T] = 1/N sum_rows a b^T - sum_p n_p/N m_p^a m_p^b^T + m^a m^b^T

        so that covariances are those within places: a difference between places that all units
        share (a norm's outputs against a stream's) does not make units similar.
        """
        size, found = self._size, {}
        counts = self._products[0, 0].diagonal()[size:, None]
        total = counts.sum()
        sums = {k: p[size:, :size] for (k, other), p in self._products.items() if k == other}
        for (k, other), product in self._products.items():
            one, two = sums[k], sums[other]
            value = product[:size, :size] - (one / counts.clamp(min=1)).mT @ two
            value = value / total + torch.outer(one.sum(dim=0), two.sum(dim=0)) / total**2
            found[f"square-{k}" if k == other else f"cross-{k}-{other}"] = value
            if k == other:
                found[f"mean-{k}"] = one.sum(dim=0) / total
        return found


def _parts(groups: Sequence[UnitGroup], matrices: int, memory: int) -> list[list[UnitGroup]]:
    """Split groups, in order, into parts whose sums fit into memory; at least one group each."""
    parts: list[list[UnitGroup]] = []
    filled = 0
    for group in groups:
        size = 8 * matrices * group.size**2
        if not parts or filled + size > memory:
            parts.append([])
            filled = 0
        parts[-1].append(group)
        filled += size
    return parts
