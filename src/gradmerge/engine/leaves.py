"""Merged parameters as the leaves of a step's backward passes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradmerge.engine.autograd import backward_of

Agree = Callable[[Sequence[str]], Sequence[str]]
"""Return the keys of all learned parameters, in an order that all processes follow."""
Contract = Callable[[dict[str, Tensor], str, Tensor], Collection[str]]
"""Add the contraction of a parameter's gradient to gradients by key; return what it reached."""


class Leaves(dict[str, Tensor]):
    """Merged parameters of one step by key, made when they are first read.

    Learned ones are leaves: the gradient of each is contracted once it is complete, and freed
    together with the leaf.

    Args:
        learned: keys of the learned parameters.
        build: returns the merged parameter of a key.
        contract: contracts a gradient; it is given the gradients so far, the key and the gradient.
        agree: if processes contract together, returns the order in which they do, given a proposal.
            Gradients wait for their turn, and a learned parameter without one has zeros.
    """

    def __init__(
        self,
        learned: Collection[str],
        build: Callable[[str], Tensor],
        contract: Contract,
        agree: Agree | None = None,
    ) -> None:
        super().__init__()
        self.grads: dict[str, Tensor] = {}
        """`dL/dz` by key of the raw parameter; a missing one is zero."""
        self.touched: set[str] = set()
        """Tensors that a backward pass has reached."""
        self._learned, self._build, self._into = learned, build, contract
        self._is_last = False
        self._agree, self._waiting = agree, dict[str, Tensor]()
        self._order: list[str] | None = None
        self._hooks: list[Any] = []

    def __missing__(self, name: str) -> Tensor:
        """Return a tensor that is not a leaf yet."""
        theta = self._build(name)
        if name not in self._learned:
            return theta
        self[name] = theta.detach().requires_grad_()
        if self._is_last:
            self._watch(name)
        return self[name]

    def accumulate(
        self, losses: Sequence[Callable[[], Tensor]], scale: float = 1.0
    ) -> list[Tensor]:
        """Run the backward passes of several losses in turn, and return the losses.

        Args:
            losses: callables that read these tensors and return a scalar.
            scale: factor on the losses, and so on `grads`.
        """
        values = []
        try:
            for i, run in enumerate(losses):
                if i == len(losses) - 1:
                    # gradients are now complete as they arrive, and no later pass reads a leaf
                    self._is_last = True
                    for name in self:
                        self._watch(name)
                values.append(backward_of(run, scale))
            for name, leaf in list(self.items()):
                self._contract(name, leaf)
            for name in self._turns(()) if self._agree is not None else ():
                grad = self._waiting.pop(name, None)
                if grad is not None:
                    self._reach(name, grad)
                else:  # another process may have one
                    self._into(self.grads, name, torch.zeros_like(self._build(name)))
        finally:
            for hook in self._hooks:
                # leaf, hook and leaves form a cycle that keeps `grads` until garbage collection
                hook.remove()
        return values

    def _watch(self, name: str) -> None:
        hook = partial(self._contract, name)
        self._hooks.append(self[name].register_post_accumulate_grad_hook(hook))

    def _contract(self, name: str, leaf: Tensor) -> None:
        if self.get(name) is leaf:
            del self[name]  # made anew if activations are recomputed from it
        grad, leaf.grad = leaf.grad, None
        if grad is None:
            return
        if self._agree is None:
            self._reach(name, grad)
            return
        order = self._turns([name, *reversed(self)])
        self._waiting[name] = grad
        while order and order[0] in self._waiting:
            first = order.pop(0)
            self._reach(first, self._waiting.pop(first))

    def _turns(self, arriving: Sequence[str]) -> list[str]:
        """Return the keys that have not been contracted yet, in order."""
        if self._order is None:
            assert self._agree is not None
            self._order = list(self._agree(arriving))
        return self._order

    def _reach(self, name: str, grad: Tensor) -> None:
        self.touched.update(self._into(self.grads, name, grad))
