"""Moments of the sources' units on the same batches: what alignments on data read.

Every batch of every task's adaptation data runs through every source, each with its own weights,
heads and buffers, in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gradmerge.alignment.moments import plain_places
from gradmerge.alignment.symmetry.spec import Group, Place
from gradmerge.calibration.fisher import Passes, length
from gradmerge.calibration.observers import without_padding
from gradmerge.engine.predict import Batch, rows_of
from gradmerge.errors import ConfigError, shorten

# Bytes of moments that one reading of the data may sum up; more groups take more readings.
MEMORY = 4 << 30
# Rows that are converted to float64 at a time.
_ROWS = 1 << 14

Pair = tuple[str, str]


class UnitPasses(Passes):
    """One reading of the data for as many groups as fit into memory, for all pairs of sources.

    Sums are in float64. Memory holds the sums of the groups at hand (`MEMORY` bytes, or those of a
    single group that is larger), and the outputs of their places for one batch in two sources.
    """

    def units(
        self, groups: Sequence[Group], pairs: Sequence[Pair], memory: int = MEMORY
    ) -> dict[str, dict[str, Any]]:
        """Write the moments of all groups that have a place, and say where each is.

        Args:
            groups: units.
            pairs: the sources whose units are compared.
            memory: bytes of moments that one reading of the data sums up.

        Returns:
            What the index says of each group.

        Raises:
            ConfigError: there are no rows, or two sources' passes see different ones.
        """
        seen = [group for group in groups if group.places]
        index: dict[str, dict[str, Any]] = {}
        self._moving = moving_factors(groups)
        matrices = len(self.found) + len(pairs)
        parts = _parts(seen, matrices, memory)
        for number, part in enumerate(parts):
            sums = self._read(part, pairs)
            file = f"{self.needs.kind}-{number}.safetensors"
            save_file(
                {
                    f"{key}:{group.name}": moment.cpu().contiguous()
                    for group in part
                    for key, moment in sums[group.name].tensors().items()
                },
                self.folder / file,
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
    def _read(self, groups: Sequence[Group], pairs: Sequence[Pair]) -> dict[str, _Sums]:
        sums = {group.name: _Sums() for group in groups}
        examples = 0
        names = list(self.found)
        # a common reference first, so that it runs once a batch
        order = sorted(names, key=lambda name: -sum(name in pair for pair in pairs))
        for task, batch in self.batches(names[0]):
            examples += length(batch)
            fresh = set(names)  # whose own moments this batch has not reached yet
            for i, first in enumerate(order):
                others = [name for name in order[i + 1 :] if _wanted(first, name, pairs)]
                if not others and first not in fresh:
                    continue
                one = self._outputs(first, task, batch, groups)
                _add_own(sums, names, first, one, fresh)
                for second in others:
                    two = self._outputs(second, task, batch, groups)
                    _add_own(sums, names, second, two, fresh)
                    for name in sums:
                        self._require_same(name, task, (first, one[name]), (second, two[name]))
                        a, b = (first, second), (one[name], two[name])
                        if a not in pairs:
                            a, b = a[::-1], b[::-1]
                        sums[name].add_products((names.index(a[0]), names.index(a[1])), *b)
                    del two
                del one
        self._require_finite(sums)
        if not all(total.rows for total in sums.values()):
            raise ConfigError(
                "the sources gave no activations: the tasks have no adaptation data, or nothing "
                "but padding."
            )
        for found in self.found.values():
            found.examples = examples
        return sums

    def _require_finite(self, sums: Mapping[str, _Sums]) -> None:
        for group, total in sums.items():
            for at, source in enumerate(self.found):
                means = total.means.get(at, ())
                if not all(bool(mean.isfinite().all()) for mean in means):
                    raise ConfigError(
                        f"source {source} gave numbers that are not finite in the units of "
                        f"{group}, so nothing can be matched by them; look at its weights and at "
                        "the data."
                    )

    def _outputs(
        self, source: str, task: str, batch: Batch, groups: Sequence[Group]
    ) -> dict[str, list[Tensor]]:
        """What the units of each group gave in one source, `[rows, size]` a call of a place."""
        found: dict[str, list[Tensor]] = {group.name: [] for group in groups}
        with self.merged.as_source(source), self._watching(groups, self.mask(batch), found):
            rows_of(self.merged, task, batch)
        for group in groups:
            if len(found[group.name]) < len(group.places):
                modules = shorten(sorted({place.module for place in group.places}))
                raise ConfigError(
                    f"task {task}: not every module that shows the units of {group.name} ran in "
                    f"source {source}: {modules}. The network takes another course on these data "
                    "than on the tracing's example; use WeightMatching, or a hand-written `spec`."
                )
        return found

    @contextmanager
    def _watching(
        self, groups: Sequence[Group], mask: Tensor | None, found: Mapping[str, list[Tensor]]
    ) -> Iterator[None]:
        hooks = []
        for group in groups:
            for place in group.places:
                module = self.merged.skeleton.get_submodule(place.module)
                hook = _Watch(place, self._moving[place], mask, found[group.name])
                hooks.append(module.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _require_same(
        self,
        group: str,
        task: str,
        first: tuple[str, list[Tensor]],
        second: tuple[str, list[Tensor]],
    ) -> None:
        shapes = [[tuple(rows.shape) for rows in found] for _, found in (first, second)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"task {task}: the units of {group} gave other rows in {second[0]} than in "
                f"{first[0]} ({shapes[1][:3]}, {shapes[0][:3]}) on the same batch, so they cannot "
                "be compared. The network's course depends on its weights; use WeightMatching."
            )


class _Watch:
    """Takes the units of one place out of the call that it is of."""

    def __init__(
        self, place: Place, moving: Sequence[int], mask: Tensor | None, found: list[Tensor]
    ) -> None:
        self._place, self._moving, self._mask, self._found = place, moving, mask, found
        self._calls = 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._calls == self._place.call:
            self._found.append(place_rows(self._place, output, self._mask, self._moving))
        self._calls += 1


def place_rows(
    place: Place, output: Any, mask: Tensor | None, moving: Sequence[int] = ()
) -> Tensor:
    """What a place's units gave, `[rows, size]`, without rows of padding.

    Args:
        place: where.
        output: of its module; of several outputs the first.
        mask: `[batch, tokens]`, 0 on padding; see `without_padding` for the outputs it is found in.
        moving: other factors of the stretch whose units may have changed places, too (channels
            within heads). Their positions are no rows: a unit is seen by its root mean square over
            them, which no order of theirs changes.
    """
    values: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    values, axis = without_padding(values.detach(), mask, place.axis)
    place = replace(place, axis=axis)
    if not moving:
        return place.units(values)
    axis = place.axis + values.dim()
    length = torch.Size(place.sizes).numel()
    cut = values.narrow(axis, place.start, length).unflatten(axis, place.sizes)
    root = cut.double().square().mean(dim=[axis + i for i in moving], keepdim=True).sqrt()
    return root.movedim(axis + place.position, -1).flatten(0, -2)


def moving_factors(groups: Sequence[Group]) -> dict[Place, tuple[int, ...]]:
    """The factors beside a place's own that run over units of another group."""
    stretches: dict[tuple[Any, ...], set[int]] = {}
    for group in groups:
        for place in group.places:
            stretches.setdefault(_stretch(place), set()).add(place.position)
    return {
        place: tuple(sorted(stretches[_stretch(place)] - {place.position}))
        for group in groups
        for place in group.places
    }


def _stretch(place: Place) -> tuple[Any, ...]:
    return place.module, place.call, place.axis, place.start, place.sizes


class _Sums:
    """Sums over rows of one group, float64; means by place."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        """Rows of each place."""
        self.means: dict[int, list[Tensor]] = {}
        """Sums of rows by source, of each place."""
        self.products: dict[tuple[int, int], Tensor] = {}
        """`sum_rows a b^T` by pair of sources."""

    @property
    def rows(self) -> int:
        """Rows of all places."""
        return sum(self.counts)

    def add_rows(self, source: int, found: Sequence[Tensor]) -> None:
        """Take in the rows of one source's places; they are counted with source 0."""
        sums = [rows.sum(dim=0, dtype=torch.float64) for rows in found]
        before = self.means.get(source)
        self.means[source] = sums if before is None else _plus(before, sums)
        if source == 0:
            counts = [len(rows) for rows in found]
            self.counts = counts if not self.counts else _plus(self.counts, counts)

    def add_products(
        self, pair: tuple[int, int], first: Sequence[Tensor], second: Sequence[Tensor]
    ) -> None:
        """Take in two sources' rows, a stretch of them at a time."""
        for one, two in zip(first, second, strict=True):
            for a, b in zip(one.split(_ROWS), two.split(_ROWS), strict=True):
                product = a.double().mT @ b.double()
                if pair in self.products:
                    self.products[pair] += product
                else:
                    self.products[pair] = product

    def tensors(self) -> dict[str, Tensor]:
        """Moments by key: `mean-k`, `square-k`, `cross-k-l`.

        With n_p of N rows in place p, and means m_p there, means are those of all rows, and

            E[a b^T] = 1/N sum_rows a b^T - sum_p n_p/N m_p^a m_p^b^T + m^a m^b^T

        so that covariances are those within places: what sets places apart, and is the same for
        every unit (a norm's outputs beside a stream's), does not make units alike.
        """
        total = self.rows
        whole = {k: torch.stack(sums).sum(dim=0) / total for k, sums in self.means.items()}
        found = {f"mean-{k}": mean for k, mean in whole.items()}
        for (k, other), product in self.products.items():
            value = product / total + torch.outer(whole[k], whole[other])
            for count, one, two in zip(self.counts, self.means[k], self.means[other], strict=True):
                value -= torch.outer(one, two) / (count * total)
            found[f"square-{k}" if k == other else f"cross-{k}-{other}"] = value
        return found


def _plus(first: list[Any], second: list[Any]) -> list[Any]:
    return [one + two for one, two in zip(first, second, strict=True)]


def _add_own(
    sums: Mapping[str, _Sums],
    names: Sequence[str],
    source: str,
    found: Mapping[str, Sequence[Tensor]],
    fresh: set[str],
) -> None:
    """Means and squares of a source, once a batch."""
    if source not in fresh:
        return
    fresh.remove(source)
    at = names.index(source)
    for name, total in sums.items():
        total.add_rows(at, found[name])
        total.add_products((at, at), found[name], found[name])


def _wanted(first: str, second: str, pairs: Sequence[Pair]) -> bool:
    return (first, second) in pairs or (second, first) in pairs


def _parts(groups: Sequence[Group], matrices: int, memory: int) -> list[list[Group]]:
    """Groups in order, as many together as the memory holds sums of; at least one."""
    parts: list[list[Group]] = []
    filled = 0
    for group in groups:
        size = 8 * matrices * group.size**2
        if not parts or filled + size > memory:
            parts.append([])
            filled = 0
        parts[-1].append(group)
        filled += size
    return parts
