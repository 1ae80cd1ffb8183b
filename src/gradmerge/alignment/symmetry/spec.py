"""The units of a network that may change places: their groups, and the tensors that use them.

A group of n units (channels, neurons, heads) is written by some tensors and read by others. With a
map `z' = T z` of each group's units, the network computes the same function when every tensor is
mapped along its axes:

    out      W' = T W            rows of weights, biases, embeddings' columns
    in       W' = W T^-1         columns of weights that read z
    along    b' = T b            one number per unit that is added: shifts, running means
    gain     g' = R g            one number per unit that is multiplied with: R is T . T (entry by
                                 entry) with rows that sum to 1
    square   v' = (T . T) v      one number per unit that is a variance

For a permutation `z'[i] = z[perm[i]]` all five are `new = old[perm]` along the axis. R g is the
diagonal nearest to T diag(g) after T, `argmin_d |diag(d) T - T diag(g)|` row by row. Other maps are
pairs `(T, T^-1)`; they do not pass through element-wise functions, so they keep the function only
approximately (as CCA and optimal transport do).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Role = Literal["out", "in", "along", "gain", "square"]


def vector_role(name: str) -> Role:
    """Return the role of a tensor of one axis by its name."""
    if name.endswith("running_var"):
        return "square"
    return "gain" if name.rpartition(".")[2] == "weight" else "along"


class LinearMap(NamedTuple):
    """`z' = matrix @ z`; tensors that read the units take `inverse`. Both `[size, size]`."""

    matrix: Tensor
    inverse: Tensor


Map = Tensor | LinearMap
"""A permutation (int64 `[size]`, `new = old[perm]`), or a linear map."""
Maps = Mapping[str, Map]
"""By group; groups that are not named stay as they are."""


@dataclass(frozen=True)
class Factor:
    """One factor of an axis that is a row-major product."""

    size: int
    """Number of units."""
    group: str | None = None
    """Whose units they are; None where their order is fixed."""


@dataclass(frozen=True)
class Segment:
    """A stretch of an axis: a row-major product of factors, the first varying slowest."""

    factors: tuple[Factor, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of each factor."""
        return tuple(factor.size for factor in self.factors)

    @property
    def size(self) -> int:
        """Entries of the stretch."""
        return torch.Size(self.sizes).numel()


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor: stretches, one after the other (a fused qkv has three)."""

    segments: tuple[Segment, ...]
    role: Role = "out"
    """How the tensor transforms with the units; without meaning where all factors are fixed."""

    @property
    def size(self) -> int:
        """Entries of the axis."""
        return sum(segment.size for segment in self.segments)

    @property
    def groups(self) -> frozenset[str]:
        """All groups along the axis."""
        return frozenset(f.group for s in self.segments for f in s.factors if f.group is not None)


@dataclass(frozen=True)
class Place:
    """A view of a group's units in the output of a module (the first of several).

    The output's axis is cut to `[start, start + prod(sizes))` and reshaped to `sizes`; the units
    run along `sizes[position]`.
    """

    module: str
    """Path of the module in the network."""
    axis: int
    """Axis of its output, counted from the end (-1: features of a linear layer; -3: channels of a
    2-D convolution)."""
    start: int
    """First entry of the stretch."""
    sizes: tuple[int, ...]
    """Factors of the stretch."""
    position: int
    """The factor that runs over the units."""
    call: int = 0
    """Number of the module's call in one forward pass (a ReLU may serve several layers)."""

    def units(self, output: Tensor) -> Tensor:
        """Return the units' activations `[rows, size]`: a row for each place of all other axes."""
        axis = self.axis + output.ndim
        length = torch.Size(self.sizes).numel()
        cut = output.narrow(axis, self.start, length).unflatten(axis, self.sizes)
        size = self.sizes[self.position]
        return cut.movedim(axis + self.position, -1).reshape(-1, size)


@dataclass(frozen=True)
class UnitGroup:
    """Units that may change places."""

    name: str
    size: int
    places: tuple[Place, ...] = ()
    """Views of the units, in the order of the forward pass; empty if there are none."""
    multiplied: bool = False
    """True if they are multiplied one by one with other units (a gate): no map may mix them."""


@dataclass(frozen=True)
class Use:
    """One place where a tensor uses a group."""

    tensor: str
    axis: int
    segment: int
    position: int
    """The factor within the segment."""
    role: Role


@dataclass(frozen=True)
class PermutationSpec:
    """The groups of a network and the axes of its tensors.

    Tensors that it does not name have no group on any axis.
    """

    groups: Mapping[str, UnitGroup]
    """By name."""
    tensors: Mapping[str, tuple[Axis, ...]]
    """Axes by the tensor's name in the files; buffers too."""
    checked: float | None = field(default=None, compare=False)
    """Relative change of the network's output under a random element of all groups, in float64;
    None where that was not checked (no network, or one of more than 10^9 parameters)."""

    @cached_property
    def uses(self) -> Mapping[str, tuple[Use, ...]]:
        """Every use of each group."""
        found: dict[str, list[Use]] = {name: [] for name in self.groups}
        for name, axes in self.tensors.items():
            for i, axis in enumerate(axes):
                for j, segment in enumerate(axis.segments):
                    for k, factor in enumerate(segment.factors):
                        if factor.group is not None:
                            found[factor.group].append(Use(name, i, j, k, axis.role))
        return {name: tuple(uses) for name, uses in found.items()}

    def touched(self, name: str) -> frozenset[str]:
        """Groups that a tensor uses."""
        axes = self.tensors.get(name, ())
        return frozenset(group for axis in axes for group in axis.groups)

    def apply(self, maps: Maps, name: str, tensor: Tensor, skip: Use | None = None) -> Tensor:
        """Return the tensor of the network with mapped units, in its own dtype.

        Permutations move entries; linear maps are applied in float32 or better. A tensor that no
        map changes is returned itself.

        Args:
            maps: by group.
            name: the tensor's name in the files.
            tensor: of the shape that the specification states.
            skip: leave out this one use of a group.
        """
        for axis, kind in enumerate(self.tensors.get(name, ())):
            own = (skip.segment, skip.position) if skip and skip.axis == axis else None
            if any(isinstance(maps.get(group), LinearMap) for group in kind.groups):
                wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                tensor = _mapped(wide, axis, kind, maps, own).to(tensor.dtype)
            elif kind.groups & maps.keys():
                stays = torch.arange(kind.size)
                index = _mapped(stays, 0, kind, maps, own)
                if not torch.equal(index, stays):
                    tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor

    def expose(self, use: Use, tensor: Tensor) -> Tensor:
        """Return a tensor as a matrix `[size, rest]` whose rows are the units of one use."""
        axes = self.tensors[use.tensor]
        segments = axes[use.axis].segments
        start = sum(segment.size for segment in segments[: use.segment])
        segment = segments[use.segment]
        cut = tensor.narrow(use.axis, start, segment.size).unflatten(use.axis, segment.sizes)
        size = segment.sizes[use.position]
        return cut.movedim(use.axis + use.position, 0).reshape(size, -1)

    def identity(self) -> dict[str, Map]:
        """The permutation of every group that moves nothing."""
        return {name: torch.arange(group.size) for name, group in self.groups.items()}

    def random(self, seed: int) -> dict[str, Map]:
        """A seeded random permutation of every group, never the one that moves nothing."""
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, Map] = {}
        for name, group in self.groups.items():
            order = torch.randperm(group.size, generator=generator)
            found[name] = order if share_moved(order) else order.roll(1)
        return found


def _mapped(
    tensor: Tensor, axis: int, kind: Axis, maps: Maps, skip: tuple[int, int] | None
) -> Tensor:
    """Apply all maps along one axis, except for a factor (segment and position)."""
    parts = list(tensor.split([segment.size for segment in kind.segments], dim=axis))
    for j, segment in enumerate(kind.segments):
        for k, factor in enumerate(segment.factors):
            change = None if factor.group is None else maps.get(factor.group)
            if change is not None and (j, k) != skip:
                cut = parts[j].unflatten(axis, segment.sizes).movedim(axis + k, 0)
                cut = _act(change, cut, kind.role).movedim(0, axis + k)
                parts[j] = cut.flatten(axis, axis + len(segment.sizes) - 1)
    return torch.cat(parts, dim=axis)


def _act(change: Map, tensor: Tensor, role: Role) -> Tensor:
    """Apply a map along the first axis."""
    if isinstance(change, Tensor):
        return tensor.index_select(0, change.to(tensor.device))
    matrix = (change.inverse.T if role == "in" else change.matrix).to(tensor)
    if role in ("square", "gain"):
        matrix = matrix.square()
    if role == "gain":
        matrix = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.tensordot(matrix, tensor, dims=1)


def as_linear(change: Map, dtype: torch.dtype = torch.float64) -> LinearMap:
    """A map as a pair of matrices; a permutation gives `T[i, perm[i]] = 1` and its transpose."""
    if isinstance(change, LinearMap):
        return LinearMap(change.matrix.to(dtype), change.inverse.to(dtype))
    matrix = torch.eye(len(change), dtype=dtype, device=change.device)[change]
    return LinearMap(matrix, matrix.T)


def same_maps(first: Maps, second: Maps, tolerance: float = 1e-9) -> bool:
    """True if two sets of maps are the same; a group that is not named is not moved."""
    for name, known in {**first, **second}.items():
        stays = torch.arange(len(known.matrix if isinstance(known, LinearMap) else known))
        one, two = first.get(name, stays), second.get(name, stays)
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            same = torch.equal(one, two)
        else:
            gap = (as_linear(one).matrix - as_linear(two).matrix).abs().max()
            same = float(gap) <= tolerance
        if not same:
            return False
    return True


def share_moved(change: Map) -> float:
    """Share of units that a map moves: those that do not keep their own place (or row)."""
    if isinstance(change, LinearMap):
        eye = torch.eye(len(change.matrix), dtype=change.matrix.dtype, device=change.matrix.device)
        return float((change.matrix - eye).abs().amax(dim=1).gt(1e-6).double().mean())
    stays = change == torch.arange(len(change), device=change.device)
    return float((~stays).double().mean())
