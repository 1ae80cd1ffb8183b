"""Autograd functions: a merge whose backward is a contraction, and a loss known in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradmerge.coefficients import Slot
from gradmerge.errors import ConfigError


class Combine(torch.autograd.Function):
    """Forward: combine. Backward: contract. No weights are kept between the two."""

    @staticmethod
    def forward(
        ctx: Any,
        raw: Tensor,
        build: Callable[[Tensor], Tensor],
        contract: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """`theta = build(raw)` of a tensor; `contract(dL/dtheta, raw)` is its `dL/dz`."""
        ctx.raw, ctx.contract = raw, contract
        return build(raw)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """`dL/dz` of its raw coefficients."""
        return ctx.contract(grads[0], ctx.raw), None, None


class Deferred(torch.autograd.Function):
    """A loss whose gradient in the raw coefficients is already known, and handed over: it may be as
    large as the sources, so no copy is made of it. Its backward runs once.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *raws: Tensor) -> Tensor:
        """The loss itself; the list is emptied by backward, and its tensors are written to."""
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The known gradients, scaled by the incoming one.

        Raises:
            RuntimeError: they were handed over before.
        """
        if not ctx.grads:
            raise RuntimeError(
                "backward runs once through a loss of `accumulate`, whose gradient is handed over; "
                "call `accumulate` again."
            )
        known = [grad.mul_(grads[0]) for grad in ctx.grads]
        ctx.grads.clear()  # else they would be copied
        return (None, None, *known)


def add_gradient(grads: dict[str, Tensor], slot: Slot, found: Tensor, raw: Tensor) -> None:
    """Add a tensor's `dL/dz` to those of its raw parameter.

    Args:
        grads: by key of the raw parameters; what is not there is zero.
        slot: the tensor's.
        found: `dL/dz`, which is kept itself where it is all there is: with a coefficient per weight
            it is as large as the sources.
        raw: the parameter.
    """
    if slot.key not in grads and slot.index is None:
        grads[slot.key] = found
        return
    if slot.key not in grads:
        grads[slot.key] = torch.zeros_like(raw)
    slot.read(grads).add_(found)


def backward_of(run: Callable[[], Tensor], scale: float) -> Tensor:
    """Run a loss and its backward at once; returns the loss, detached.

    Raises:
        ConfigError: the loss is no scalar.
    """
    with torch.enable_grad():
        loss = run()
    if loss.dim() != 0:
        raise ConfigError(f"a loss must be a scalar, got shape {tuple(loss.shape)}.")
    with torch.autocast(loss.device.type, enabled=False):
        (loss * scale).backward()
    return loss.detach()


def checksums(parameters: Iterable[Tensor]) -> list[int]:
    """Sums of the parameters' bits, to notice what is written through `.data`.

    Such writes (some optimisers, averaging of weights) leave no trace in a tensor's version.
    """
    with torch.no_grad():
        sums = [_checksum(parameter.detach()) for parameter in parameters]
        return torch.stack(sums).tolist() if sums else []


def _checksum(tensor: Tensor) -> Tensor:
    """`sum_i (2 i + 1) b_i` modulo 2^64 of its words b: odd factors, so that any change of one word
    shows, and different ones, so that two which are swapped do.
    """
    bits = tensor.reshape(-1).view(torch.int32)
    if len(bits) % 2 == 0 and bits.storage_offset() % 2 == 0:
        bits = bits.view(torch.int64)  # sums of int32 are many times slower
    # As a matrix of rows r and columns c, i = c + width r: two plain sums, and no temporary of the
    # tensor's size.
    width = 512
    rows = len(bits) // width
    body, tail = bits[: rows * width].view(rows, width), bits[rows * width :]
    odd = torch.arange(1, 2 * width, 2, device=bits.device)
    total = (tail * (odd[: len(tail)] + 2 * width * rows)).sum()
    if rows:
        total += (body.sum(dim=0) * odd).sum()
        total += (body.sum(dim=1) * torch.arange(rows, device=bits.device)).sum() * (2 * width)
    return total
