"""Symbols for the units along tensors' axes, and their unification.

A dimension is a concatenation of row-major products of `Unit`s. A unit stands for n things in an
unknown order that a map may change. Operators on tensors only ever take freedom away:
two units turn out to be one (`unify`), a unit turns out to be a product or a concatenation of
smaller ones (a view, a slice), or its order matters (`pin`). So every outcome is a subgroup of the
permutations that were possible before, and giving up (pinning) is always safe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

Product = tuple["Unit", ...]
Expression = tuple[Product, ...]


@dataclass(eq=False)
class Unit:
    """A symbol; once it has parts, it stands for them."""

    size: int
    pinned: bool = False
    """True if its order is fixed."""
    nested: bool = False
    """True if it varies faster than another unit of a product: no axis of a specification can say
    that such a unit consists of stretches."""
    parts: Expression | None = None
    """Another unit that it is, a product, or a concatenation."""

    def split(self, outer: int) -> None:
        """Make it a row-major product of `outer` and the rest."""
        inner = Unit(self.size // outer, self.pinned, nested=True)
        self.parts = ((Unit(outer, self.pinned, self.nested), inner),)

    def merge(self, other: Unit) -> None:
        """Make two units without parts the same."""
        ((one,),), ((two,),) = _resolved(((self,),)), _resolved(((other,),))
        if one is not two:
            one.pinned |= two.pinned
            one.nested |= two.nested
            two.parts = ((one,),)


@dataclass(eq=False)
class Dim:
    """One dimension of a traced tensor."""

    expression: Expression
    owners: frozenset[tuple[str, int]] = field(default_factory=frozenset)
    """Parameter and axis that it is, where the tensor is (a view of) a parameter."""

    @property
    def size(self) -> int:
        """Entries."""
        return sum(map(_size, self.expression))

    def resolve(self) -> Expression:
        """Return its present structure, without units of one entry."""
        self.expression = _resolved(self.expression)
        return self.expression

    def units(self) -> list[Unit]:
        """All units that stand in it."""
        return [unit for product in self.resolve() for unit in product]

    def bounds(self) -> set[int]:
        """Ends of its stretches."""
        return set(accumulate(map(_size, self.resolve())))

    @property
    def is_fixed(self) -> bool:
        """True if nothing along it can move."""
        return all(unit.pinned for unit in self.units())


def fresh(size: int, pinned: bool = False) -> Dim:
    """A dimension of unknown units."""
    return Dim(((Unit(size, pinned),),) if size != 1 else ((),))


def fixed(size: int) -> Dim:
    """A dimension whose order is fixed."""
    return fresh(size, pinned=True)


def pin(*dims: Dim) -> None:
    """Fix the order of everything along these."""
    for unit in (unit for dim in dims for unit in dim.units()):
        unit.pinned = True


def _size(product: Product) -> int:
    return math.prod(unit.size for unit in product)


def _resolved(expression: Expression) -> Expression:
    found: list[Product] = []
    for product in expression:
        stretches: Expression = ((),)
        for unit in product:
            if unit.parts is not None:
                unit.parts = _resolved(unit.parts)
            parts: Expression = ((unit,),) if unit.parts is None else unit.parts
            if unit.size != 1:  # only the first unit of a product may consist of stretches
                stretches = tuple((*one, *two) for one in stretches for two in parts)
        found += stretches
    return tuple(found)


def unify(first: Dim, second: Dim) -> None:
    """Make two dimensions of one size run over the same units, in the same order."""
    if first.is_fixed or second.is_fixed or not _matched(first, second):
        pin(first, second)


def _matched(first: Dim, second: Dim) -> bool:
    """Refine both to a common structure and merge their units; False where there is none."""
    while apart := first.bounds() ^ second.bounds():
        if not all(_cut(dim, at) for at in apart for dim in (first, second)):
            return False
    for products in zip(first.resolve(), second.resolve(), strict=True):
        (one,), (two,) = (_resolved((product,)) for product in products)
        while (sizes := [unit.size for unit in one]) != (others := [unit.size for unit in two]):
            if _split(one, others) is None or _split(two, sizes) is None:
                return False
            (one,), (two,) = _resolved((one,)), _resolved((two,))
        for a, b in zip(one, two, strict=True):
            a.merge(b)
    return True


def _cut(dim: Dim, at: int) -> bool:
    """Let a stretch end at an entry; False where the units across it cannot be cut."""
    start = 0
    for product in dim.resolve():
        size = _size(product)
        if start < at < start + size:
            unit = product[0]
            outer, within = divmod(at - start, _size(product[1:]))
            if within or unit.nested:
                return False
            unit.parts = tuple((Unit(n, unit.pinned),) for n in (outer, unit.size - outer))
        start += size
    return True


def sliced(dim: Dim, start: int, stop: int) -> Dim:
    """Cut a dimension from `start` to `stop`, and pin it where that is not possible."""
    if dim.is_fixed or not (_cut(dim, start) and _cut(dim, stop)):
        pin(dim)
        return fixed(stop - start)
    kept: list[Product] = []
    place = 0
    for product in dim.resolve():
        place += _size(product)
        if start < place <= stop:
            kept.append(product)
    return Dim(tuple(kept), dim.owners)


def joined(dims: Sequence[Dim]) -> Dim:
    """A concatenation; the order is fixed where that of every part is."""
    whole = Dim(tuple(product for dim in dims if dim.size for product in dim.resolve()))
    return fixed(whole.size) if whole.is_fixed else whole


def regroup(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """Return the dimensions of a view: equal numbers of entries, in row-major order.

    Units that the view cuts across are pinned.
    """
    if 0 in sizes:
        pin(*dims)
        return [fixed(size) for size in sizes]
    before, after = [dim for dim in dims if dim.size != 1], [n for n in sizes if n != 1]
    found: list[Dim] = []
    while before:
        chunk, wanted = [before.pop(0)], [after.pop(0)]
        while (gap := math.prod(dim.size for dim in chunk) - math.prod(wanted)) != 0:
            if gap < 0:
                chunk.append(before.pop(0))
            else:
                wanted.append(after.pop(0))
        found += _regrouped(chunk, wanted)
    rest = iter(found)
    return [fresh(1) if size == 1 else next(rest) for size in sizes]


def _regrouped(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    if len(dims) == len(sizes) == 1:
        return [dims[0]]
    owners = frozenset().union(*(dim.owners for dim in dims))
    first, *others = (dim.resolve() for dim in dims)
    found: list[Expression] | None = None
    if all(len(other) == 1 for other in others):
        faster = tuple(unit for other in others for unit in other[0])
        if len(sizes) == 1:  # stretches of the slowest dimension take the others' factors
            found = [tuple((*product, *faster) for product in first)]
        elif len(first) == 1:
            split = _split((*first[0], *faster), sizes)
            found = None if split is None else [(product,) for product in split]
    if found is None:
        pin(*dims)
        return [Dim(fixed(size).expression, owners) for size in sizes]
    result = [Dim(expression, owners) for expression in found]
    for unit in (unit for dim in result for product in dim.resolve() for unit in product[1:]):
        unit.nested = True
    return result


def _split(product: Product, sizes: Sequence[int]) -> list[Product] | None:
    """Split a product into consecutive ones of these sizes, refining units where need be."""
    found: list[Product] = []
    for size in sizes:
        taken: Product = ()
        while size > 1:
            ((unit, *rest),) = _resolved((product,))  # a unit may stand twice in it
            product = (unit, *rest)
            if size % unit.size == 0:
                taken, product, size = (*taken, unit), tuple(rest), size // unit.size
            elif unit.size % size == 0:
                unit.split(size)
            else:
                return None
        found.append(taken)
    return found
