"""Parameters of a network as they are made of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from gradmerge.engine.autograd import Assemble
from gradmerge.engine.state import FitState
from gradmerge.sources.skeleton import Binding
from gradmerge.sources.windows import Window


class Parameters:
    """The parameters of a network, made of stored tensors.

    A parameter has a key: the name of the stored tensor that it is; or, if it is fused from several
    or is a part of one, its own first name in the network.

    Args:
        binding: places of the stored tensors in the network.
        skeleton: the network.
    """

    def __init__(self, binding: Binding, skeleton: nn.Module) -> None:
        self._binding, self._skeleton = binding, skeleton

    @cached_property
    def places(self) -> dict[str, tuple[str, ...]]:
        """All (tied) names of each parameter in the network, by key."""
        made = {place: self._binding.aliases[place] for place in (*self._binding.fused, *self.cuts)}
        return {**self._binding.parameters, **made}

    @cached_property
    def cuts(self) -> dict[str, tuple[str, Window]]:
        """The stored tensor that a parameter is a part of, by key, and its window on that."""
        splits = self._binding.split.values()
        return {place: (s.name, window) for s in splits for place, window in s.parts.items()}

    def parts(self, key: str) -> Mapping[str, Window] | None:
        """Return the window of each stored tensor on a fused parameter; None if it is not fused."""
        fused = self._binding.fused.get(key)
        return None if fused is None else fused.parts

    def names(self, key: str) -> tuple[str, ...]:
        """Return the names of the stored tensors that a parameter is made of."""
        parts = self.parts(key)
        return (key,) if parts is None else tuple(parts)

    def learned(self, key: str, state: FitState) -> list[str]:
        """Return the learned tensors that a parameter is made of."""
        shared, fixed = state.plan.tensors, state.fixed
        return [name for name in self.names(key) if name in shared and name not in fixed]

    def contract(
        self, state: FitState, grads: dict[str, Tensor], key: str, grad: Tensor
    ) -> list[str]:
        """Add the contraction of a parameter's gradient to gradients of raw parameters.

        Args:
            state: the coefficients.
            grads: gradients by key of the raw parameter; a missing one is zero.
            key: key of the parameter.
            grad: its gradient.

        Returns:
            Names of the tensors that it reached.
        """
        parts, names = self.parts(key), self.learned(key, state)
        whole = grad if parts is None else grad.contiguous()
        for name in names:
            state.contract_into(grads, name, whole if parts is None else parts[name].of(whole))
        return names

    def assemble(
        self, key: str, read: Callable[[str], Tensor], empty: Callable[[Sequence[int]], Tensor]
    ) -> Tensor:
        """Return a parameter of given tensors, differentiable.

        Args:
            key: key of the parameter.
            read: returns the tensor of a name.
            empty: returns a tensor of a shape, to be written to.
        """
        parts = self.parts(key)
        if parts is None:
            return read(key)
        with torch.inference_mode(False):
            whole = empty(self.shapes[key])
        found: Tensor = Assemble.apply(whole, list(parts.values()), *map(read, parts))
        return found

    @cached_property
    def built(self) -> tuple[str, ...]:
        """Keys of what is built: all parameters, with split tensors in place of their parts."""
        return tuple(key for key in (*self.places, *self._binding.split) if key not in self.cuts)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of fused parameters."""
        get = self._skeleton.get_parameter
        return {place: tuple(get(place).shape) for place in self._binding.fused}

    @cached_property
    def first_places(self) -> dict[str, str]:
        """A name in the network of each key that is built, and of each stored tensor."""
        owners = {name: places[0] for name, places in self._binding.owners.items()}
        return {**owners, **{key: places[0] for key, places in self.places.items()}}
