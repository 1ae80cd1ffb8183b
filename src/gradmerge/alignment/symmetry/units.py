"""Symbols for the units along tensors' axes, and their unification.

A dimension is a concatenation of row-major products of `Unit`s. A unit stands for n things in an
unknown order that a map may change. Operators on tensors only ever take freedom away:
two units turn out to be one (`unify`), a unit turns out to be a product or a concatenation of
smaller ones (a view, a slice), or its order matters (`pin`). So every outcome is a subgroup of the
permutations that were possible before, and giving up (pinning) is always safe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Product = tuple["Unit", ...]
Expression = tuple[Product, ...]


@dataclass(eq=False)
class Unit:
    """A node of a union-find forest, which may also be found to consist of smaller ones."""

    size: int
    pinned: str | None = None
    """Why its order is fixed; None while it is free."""
    parent: Unit | None = None
    parts: Expression | None = None

    def find(self) -> Unit:
        """The node that stands for it now."""
        node = self
        while node.parent is not None:
            node = node.parent
        while self.parent is not None and self.parent is not node:
            self.parent, self = node, self.parent
        return node

    def pin(self, reason: str) -> None:
        """Fix its order; the first reason is kept."""
        node = self.find()
        if node.parts is not None:
            for product in node.parts:
                for unit in product:
                    unit.pin(reason)
        elif node.pinned is None:
            node.pinned = reason

    def merge(self, other: Unit) -> None:
        """Both are the same units from now on; neither has parts."""
        one, two = self.find(), other.find()
        if one is two:
            return
        two.parent = one
        one.pinned = one.pinned or two.pinned

    def refine(self, parts: Expression) -> None:
        """It consists of these, whose sizes fit."""
        node = self.find()
        node.parts = parts
        if node.pinned is not None:
            node.pin(node.pinned)


@dataclass(eq=False)
class Dim:
    """One dimension of a traced tensor."""

    expression: Expression
    owners: frozenset[tuple[str, int]] = field(default_factory=frozenset)
    """Parameter and axis that it is, where the tensor is (a view of) a parameter."""

    @property
    def size(self) -> int:
        """Entries."""
        return sum(_size(product) for product in self.expression)

    def resolve(self) -> Expression:
        """Return its present structure, without units of one entry."""
        self.expression = _resolve(self.expression)
        return self.expression

    def units(self) -> list[Unit]:
        """All units that stand in it."""
        return [unit for product in self.resolve() for unit in product]

    def pin(self, reason: str) -> None:
        """Fix the order of everything along it."""
        for unit in self.units():
            unit.pin(reason)

    @property
    def is_fixed(self) -> bool:
        """True if nothing along it can move."""
        return all(unit.pinned is not None for unit in self.units())

    @property
    def reason(self) -> str:
        """Why it is fixed."""
        return next((unit.pinned for unit in self.units() if unit.pinned), "one entry")


def fresh(size: int) -> Dim:
    """A dimension of unknown units."""
    return Dim(((Unit(size),),) if size != 1 else ((),))


def fixed(size: int, reason: str) -> Dim:
    """A dimension whose order is fixed."""
    return Dim(((Unit(size, reason),),) if size != 1 else ((),))


def _size(product: Product) -> int:
    return math.prod(unit.size for unit in product)


def _resolve(expression: Expression) -> Expression:
    done: list[Product] = []
    for product in expression:
        nodes = [unit.find() for unit in product if unit.size != 1]
        if all(node.parts is None for node in nodes):
            done.append(tuple(nodes))
            continue
        if len(nodes) == 1 and nodes[0].parts is not None:
            done.extend(_resolve(nodes[0].parts))
            continue
        flat: list[Unit] = []
        for node in nodes:
            parts = None if node.parts is None else _resolve(node.parts)
            if parts is None:
                flat.append(node)
            elif len(parts) == 1:
                flat.extend(parts[0])
            else:  # stretches below another factor: no axis of the specification can say that
                for part in parts:
                    for unit in part:
                        unit.pin("it is cut into stretches within another factor")
                node.parts, node.pinned = None, "it is cut into stretches within another factor"
                flat.append(node)
        done.append(tuple(flat))
    return tuple(done)


def unify(first: Dim, second: Dim, reason: str) -> None:
    """Make both run over the same units, in the same order.

    Args:
        first: a dimension.
        second: one of the same size.
        reason: recorded for units that get pinned because their structures do not fit.
    """
    while True:
        one, two = first.resolve(), second.resolve()
        if first.is_fixed or second.is_fixed:
            first.pin(second.reason if second.is_fixed else reason)
            second.pin(first.reason if first.is_fixed else reason)
            return
        step = _unify_once(one, two)
        if step == "done":
            return
        if step == "failed":
            first.pin(reason)
            second.pin(reason)
            return


def _unify_once(one: Expression, two: Expression) -> str:
    """Unify up to the first unit that has to be refined: `again`, `done` or `failed`."""
    i = j = 0
    while i < len(one) and j < len(two):
        sizes = _size(one[i]), _size(two[j])
        if sizes[0] != sizes[1]:
            longer, cut = (one[i], sizes[1]) if sizes[0] > sizes[1] else (two[j], sizes[0])
            return "again" if cut_product(longer, cut) else "failed"
        step = _unify_products(one[i], two[j])
        if step != "done":
            return step
        i, j = i + 1, j + 1
    return "done"


def _unify_products(one: Product, two: Product) -> str:
    if len(one) == len(two) and all(a.size == b.size for a, b in zip(one, two, strict=True)):
        for a, b in zip(one, two, strict=True):
            a.merge(b)
        return "done"
    for a, b in zip(one, two, strict=False):
        if a.size == b.size:
            continue
        larger, smaller = (a, b) if a.size > b.size else (b, a)
        return "again" if split_unit(larger, smaller.size) else "failed"
    return "failed"


def split_unit(unit: Unit, outer: int) -> bool:
    """Split a unit into a row-major product of `outer` and the rest; False where that fails."""
    if outer < 1 or unit.size % outer:
        return False
    unit.refine(((Unit(outer), Unit(unit.size // outer)),))
    return True


def cut_product(product: Product, at: int) -> bool:
    """Cut a stretch in two; False where it is a product of several units."""
    if len(product) != 1:
        return False
    (unit,) = product
    unit.refine(((Unit(at),), (Unit(unit.size - at),)))
    return True


def sliced(dim: Dim, start: int, stop: int, reason: str) -> Dim:
    """Cut a dimension from `start` to `stop`, and pin it where that is not possible."""
    for at in (start, stop):
        while not _cut_at(dim, at):
            pass
        if dim.is_fixed:
            return fixed(stop - start, dim.reason)
    kept: list[Product] = []
    place = 0
    for product in dim.resolve():
        if start <= place and place + _size(product) <= stop:
            kept.append(product)
        place += _size(product)
    found = Dim(tuple(kept), dim.owners)
    if found.size != stop - start:  # a product that no cut could reach
        dim.pin(reason)
        return fixed(stop - start, reason)
    return found


def _cut_at(dim: Dim, at: int) -> bool:
    """Try once to get a boundary at `at`; True when nothing is left to try."""
    place = 0
    for product in dim.resolve():
        size = _size(product)
        if place < at < place + size:
            return not cut_product(product, at - place)
        place += size
    return True


def joined(dims: Sequence[Dim]) -> Dim:
    """A concatenation."""
    products = [product for dim in dims for product in dim.resolve()]
    return Dim(tuple(products), frozenset())


def regroup(dims: Sequence[Dim], sizes: Sequence[int], reason: str) -> list[Dim]:
    """Return the dimensions of a view: equal numbers of entries, in row-major order.

    Args:
        dims: of the input.
        sizes: of the output.
        reason: recorded for units that get pinned because the view cuts across them.
    """
    found: list[Dim] = []
    if any(size == 0 for size in sizes):
        pin_all(dims, reason)
        return [fixed(size, reason) for size in sizes]
    i = j = 0
    while i < len(dims) or j < len(sizes):
        if j < len(sizes) and sizes[j] == 1:
            found.append(Dim(((),)))
            j += 1
            continue
        if i < len(dims) and dims[i].size == 1:
            i += 1
            continue
        first_in, first_out = i, j
        have, want = dims[i].size, sizes[j]
        i, j = i + 1, j + 1
        while have != want:
            if have < want:
                have, i = have * dims[i].size, i + 1
            else:
                want, j = want * sizes[j], j + 1
        found += _regroup_chunk(dims[first_in:i], sizes[first_out:j], reason)
    return found


def _regroup_chunk(dims: Sequence[Dim], sizes: Sequence[int], reason: str) -> list[Dim]:
    if len(dims) == len(sizes) == 1:
        return [dims[0]]
    owners = frozenset().union(*(dim.owners for dim in dims))
    expressions = [dim.resolve() for dim in dims]
    if len(sizes) == 1 and all(len(e) == 1 for e in expressions[1:]):
        # stretches of the slowest dimension stay stretches: each takes the others' factors
        rest = tuple(unit for e in expressions[1:] for unit in e[0])
        return [Dim(tuple((*product, *rest) for product in expressions[0]), owners)]
    if all(len(e) == 1 for e in expressions):
        found = _split(tuple(unit for e in expressions for unit in e[0]), list(sizes))
        if found is not None:
            return [Dim((product,), owners) for product in found]
    for dim in dims:
        dim.pin(reason)
    return [Dim(fixed(size, reason).expression, owners) for size in sizes]


def _split(product: Product, sizes: list[int]) -> list[Product] | None:
    """Split a product into consecutive ones of these sizes, refining units where need be."""
    units = list(product)
    found: list[Product] = []
    for size in sizes:
        taken: list[Unit] = []
        left = size
        while left > 1:
            if not units:
                return None
            unit = units.pop(0).find()
            if unit.parts is not None:  # it stood twice in the product and was refined just now
                units[:0] = [part for p in unit.parts for part in p]
            elif left % unit.size == 0:
                taken.append(unit)
                left //= unit.size
            elif split_unit(unit, left):
                units.insert(0, unit)
            else:
                return None
        found.append(tuple(taken))
    return found


def pin_all(dims: Iterable[Dim], reason: str) -> None:
    """Fix the order along all of these."""
    for dim in dims:
        dim.pin(reason)
