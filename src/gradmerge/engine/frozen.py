"""The frozen tensors that a merge reads, from their files or from where they are placed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from gradmerge.coefficients import Layout, MergeTensor
from gradmerge.coefficients.base import Slot
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.common.low_rank import LowRank
from gradmerge.common.patterns import matches
from gradmerge.engine.opened import OpenedSources
from gradmerge.engine.placement import Item, Items, Place, Placement
from gradmerge.engine.recipe import Recipe
from gradmerge.engine.rows import Rows
from gradmerge.operators import Linear, Spread, Terms
from gradmerge.preprocess import ProcessedDirections, Site
from gradmerge.sources.collected import SourceStatistics

CPU = torch.device("cpu")


class FrozenTensors(OpenedSources):
    """The frozen tensors of an opened recipe, each in its stored dtype, on the device that merges.

    See `Plan`, which adds the coefficients.
    """

    recipe: Recipe
    private: Sequence[str]
    tensors: Mapping[str, MergeTensor]
    fixed: Mapping[str, float]
    layout: Layout
    collected: SourceStatistics | None
    _placement: Placement
    _processed: ProcessedDirections
    _facts: dict[str, dict[str, Tensor]]
    _keeps_facts: bool

    def read(
        self,
        source: str,
        name: str,
        rows: Rows | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Return a tensor of a source or of `base`, or some rows of it, in its stored dtype.

        Args:
            source: the source, or `base`.
            name: the tensor.
            rows: some rows of it. Default: all.
            device: a device, where it may be placed. Default: the CPU, from its file.
        """
        if device is None:
            return self._item(Item(source, name, rows=rows))
        return self._placement.fetch(self._item_alone(source, name, rows), device)[0]

    def reader(self, source: str, device: torch.device) -> Callable[[str], Tensor]:
        """Return a function that reads a source's tensors on a device, by name."""
        return partial(self.read, source, device=device)

    def _item(self, item: Item) -> Tensor:
        """Read what a merge reads from its file, or compute it."""
        name, rows = item.tensor, item.rows
        if item.kind in ("left", "right"):
            return self._factor(item)
        if item.kind == "direction":
            tensor = self._processed.read(name)[list(self.sources).index(item.owner)]
        else:
            tensor = self._mean(name) if item.kind == "mean" else self._stored(item.owner, name)
        return tensor if rows is None else rows.of(tensor)

    def _factor(self, item: Item) -> Tensor:
        update = self.sources[item.owner].update(item.tensor)
        assert update is not None
        if item.kind == "right":
            return update.right
        return update.left if item.rows is None else item.rows.of(update.left)

    def form(self, item: Item) -> tuple[torch.Size, torch.dtype]:
        """Return shape and stored dtype of an item; nothing but factors of adapters is read."""
        if item.kind in ("left", "right"):
            tensor = self._factor(item)
            return tensor.shape, tensor.dtype
        shape = torch.Size(self.tensors[item.tensor].shape)
        shape = shape if item.rows is None else item.rows.of_shape
        if item.kind != "stored":
            return shape, torch.float32
        owner = self.base if item.owner == "base" and self.base else self.sources[item.owner]
        return shape, owner.infos[item.tensor].dtype

    def _stored(self, source: str, name: str) -> Tensor:
        checkpoint = self.base if source == "base" and self.base else self.serving[source]
        if name not in checkpoint.infos:
            self.require_private(source)
        return checkpoint.read(name)

    def require_private(self, source: str) -> None:
        """Reject a source that lacks the private tensors (head) of a task.

        Raises:
            ConfigError: the source has no such tensors.
        """
        checkpoint = self.serving[source]
        lost = [name for name in self.private if name not in checkpoint.infos]
        if lost:
            raise ConfigError(
                f"source {source} ({checkpoint.label}) has no {shorten(lost)}, so it cannot serve "
                "a task; set the task's `source` to one that has a head."
            )

    def base_as(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the origin on a device, if it is a base that is stored in this dtype."""
        if self.recipe.resolved_origin != "base" or self.form(Item("base", name))[1] != dtype:
            return None
        base = self.read("base", name, device=device)
        return base if base.dtype == dtype else None  # an adapted one is wider than its header

    @property
    def owners(self) -> list[str]:
        """Owners of what a step reads: the origin (`base`), unless it is zero, and the sources."""
        origin = self.recipe.resolved_origin
        has_origin = origin == "base" or (origin == "mean" and bool(self.recipe.preprocess))
        return [*(["base"] if has_origin else []), *self.sources]

    @property
    def known_owners(self) -> list[str]:
        """All names that a placement may have: of the base, even if no step reads it."""
        return list(dict.fromkeys([*([] if self.base is None else ["base"]), *self.owners]))

    def sizes(self) -> tuple[dict[str, int], dict[str, set[str]]]:
        """Return the bytes that a step reads of each owner (this process's share), and dtypes."""
        sizes = dict.fromkeys(self.owners, 0)
        dtypes: dict[str, set[str]] = {owner: set() for owner in sizes}
        for item in (item for name in self.tensors for item in self.items(name)):
            shape, dtype = self.form(item)
            sizes[item.owner] += shape.numel() * dtype.itemsize
            dtypes[item.owner].add(str(dtype).removeprefix("torch."))
        return sizes, dtypes

    @property
    def placed(self) -> object:
        """Request by which the sources were placed; None if they are read from files."""
        return self._placement.asked

    def place(self, words: Mapping[str, Place], device: torch.device, asked: object = "") -> None:
        """Put what a step reads where its owners are placed, until `unload`.

        Args:
            words: place of each owner's tensors.
            device: the device that merges.
            asked: the request by which they are placed (see `placed`).
        """
        items = (item for name in self.tensors for item in self.items(name))
        self._placement.place(words, items, device)
        self._placement.asked = asked
        self._facts.clear()

    def unload(self) -> None:
        """Free the copies of all sources, which are read from their files again."""
        self._placement.unload()

    def rows(self, name: str) -> Rows | None:
        """Return the rows of a tensor that this process merges; None for all of them."""
        return None

    def items(self, name: str) -> Items:
        """Return what a step reads to merge a tensor, or this process's rows of it."""
        value = self.fixed.get(name)
        if value == 0 and self.recipe.resolved_origin == "base":
            return self._item_alone("base", name, None)
        if value is not None:
            return self._items(name, processed=value != 0)
        rows, updates = self.rows(name), self._factors_of(name, self.layout.slots[name])
        return self._items(name, rows) if updates is None else self._items_of(name, updates, rows)

    def _item_alone(self, owner: str, name: str, rows: Rows | None) -> Items:
        key = owner, name, rows
        return self._placement.group(key, lambda: [Item(owner, name, rows=rows)])

    def _items(self, name: str, rows: Rows | None = None, processed: bool = True) -> Items:
        kept = processed and bool(self.recipe.preprocess)
        origin = self.recipe.resolved_origin

        def make() -> Iterator[Item]:
            for source in self.sources:
                yield Item(source, name, "direction" if kept else "stored", rows)
            if origin == "base" or (kept and origin == "mean"):
                yield Item("base", name, "stored" if origin == "base" else "mean", rows)

        return self._placement.group((name, rows, kept), make)

    def _items_of(self, name: str, updates: Sequence[LowRank | None], rows: Rows | None) -> Items:
        """Return the origin, and the factors of directions of low rank."""

        def make() -> Iterator[Item]:
            pairs = zip(self.sources, updates, strict=True)
            owners = [source for source, update in pairs if update is not None]
            yield Item("base", name, rows=rows)
            yield from (Item(owner, name, "left", rows) for owner in owners)
            yield from (Item(owner, name, "right") for owner in owners)

        return self._placement.group((name, rows, "factors"), make)

    def directions(self) -> Iterator[tuple[Site, Callable[[], Tensor]]]:
        """Yield the site of each merged tensor, and a call that computes its directions."""
        for name in self.tensors:
            kept = matches(self.recipe.frozen, name) and not self.fixed[name]
            origin = partial(self._origin, name)
            site = Site(name, tuple(self.sources), self.collected, not kept, origin)
            yield site, partial(self.direction, name)

    def direction(self, name: str) -> Tensor:
        """Return `B_k = theta_k - A` before preprocessing, `[sources, *shape]`, in float32."""
        self.require_finite()
        shape = (len(self.sources), *self.tensors[name].shape)
        directions = torch.empty(shape, dtype=torch.float32)
        for source, direction in zip(self.sources, directions, strict=True):
            direction.copy_(self.read(source, name))
        origin = self._origin(name)
        return directions if origin is None else directions.sub_(origin.to(directions))

    def _origin(self, name: str) -> Tensor | None:
        """Return the origin that directions are measured from; None for zero."""
        if self.recipe.resolved_origin == "base":
            return self.read("base", name)
        return None if self.recipe.resolved_origin == "zero" else self._mean(name)

    def _mean(self, name: str) -> Tensor:
        total = torch.zeros(self.tensors[name].shape, dtype=torch.float32)
        for source in self.sources:
            total.add_(self.read(source, name).to(total))
        return total.div_(len(self.sources))

    def terms(
        self,
        name: str,
        processed: bool = True,
        rows: Rows | None = None,
        device: torch.device = CPU,
    ) -> Terms:
        """Return the frozen tensors that `name` is merged from, in their stored dtypes.

        Args:
            name: the tensor.
            processed: apply the recipe's preprocess.
            rows: the rows to merge. Default: all.
            device: the device that merges.
        """
        facts = self._facts_of(name)
        processed = processed and bool(self.recipe.preprocess)
        if processed and not self._processed.is_kept:
            terms = self._processed_now(name, facts)
            return terms if rows is None else rows.of_terms(terms)
        items = self._items(name, rows, processed)
        found, count = self._placement.fetch(items, device), len(self.sources)
        return Terms(
            found[:count],
            found[count] if len(found) > count else None,
            self.recipe.resolved_origin == "mean" and not processed,
            directions=processed,
            facts=facts,
            total=None if rows is None else rows.total,
        )

    def _processed_now(self, name: str, facts: dict[str, Tensor]) -> Terms:
        """Return terms whose directions are processed now, as masks if steps only select."""
        anchor = self._origin(name)
        sources = [self.read(source, name) for source in self.sources]
        chosen = self._processed.select(name, sources, anchor)
        if chosen is not None:
            return Terms(sources, anchor, masks=chosen.masks, factors=chosen.factors, facts=facts)
        return Terms(list(self._processed.read(name)), anchor, directions=True, facts=facts)

    def _facts_of(self, name: str) -> dict[str, Tensor]:
        """Return what is kept of a tensor between steps; empty and not kept outside a fit."""
        return self._facts.setdefault(name, {}) if self._keeps_facts else {}

    def _spread_terms(
        self, name: str, spread: Spread, device: torch.device = CPU, rows: Rows | None = None
    ) -> Terms:
        """Return the terms of a tensor, with directions of low rank where those are merged."""
        terms = self._low_rank_terms(name, spread, device, rows)
        return terms or self.terms(name, rows=rows, device=device)

    def _factors_of(self, name: str, spread: Spread | Slot) -> list[LowRank | None] | None:
        """Return the directions of a tensor that is merged from their factors; None for others."""
        by_factors = spread.kind in ("scalar", "axis") and not spread.experts
        return self._updates(name) if by_factors else None

    def _updates(self, name: str) -> list[LowRank | None] | None:
        """Return the directions of a tensor from the base, None for a zero one.

        Returns None if one is not of low rank, or if they are not merged linearly as they are.
        """
        recipe = self.recipe
        plain = isinstance(recipe.operator, Linear) and recipe.operator.form == "weights"
        if self.base is None or recipe.resolved_origin != "base" or recipe.preprocess or not plain:
            return None
        stored = self.base.stored_as(name)
        found: list[LowRank | None] = []
        for source in self.sources.values():
            update = source.update(name)
            same = source.stored_as(name) if update is None else update.stored
            if stored is None or same != stored:
                return None
            found.append(update)
        return found

    def _low_rank_terms(
        self, name: str, spread: Spread, device: torch.device, rows: Rows | None = None
    ) -> Terms | None:
        """Return the terms of a tensor whose directions are merged from their factors."""
        updates = self._factors_of(name, spread)
        if updates is None:
            return None
        origin, *factors = self._placement.fetch(self._items_of(name, updates, rows), device)
        count = len(factors) // 2
        pairs = iter(zip(factors[:count], factors[count:], strict=True))
        placed = [u and LowRank(*next(pairs), stored=u.stored) for u in updates]
        return Terms([], origin, updates=placed)
