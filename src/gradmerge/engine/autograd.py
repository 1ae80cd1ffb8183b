"""Autograd functions: a merge with a contraction as its backward, and a precomputed loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradmerge.common.errors import ConfigError
from gradmerge.common.typing import Raw
from gradmerge.sources.windows import Window


class Combine(torch.autograd.Function):
    """Combine in forward and contract in backward, keeping no weights in between."""

    @staticmethod
    def forward(
        ctx: Any,
        build: Callable[[Raw], Tensor],
        contract: Callable[[Tensor, Raw], dict[str, Tensor]],
        keys: Sequence[str],
        *raws: Tensor,
    ) -> Tensor:
        """Return `theta = build(raw)`; in backward, `dL/draw = contract(dL/dtheta, raw)`."""
        ctx.raw, ctx.contract = dict(zip(keys, raws, strict=True)), contract
        return build(ctx.raw)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the raw parameters."""
        found = ctx.contract(grads[0], ctx.raw)
        return (None, None, None, *(found.get(key) for key in ctx.raw))


class Assemble(torch.autograd.Function):
    """Put given tensors together to one parameter, by their windows on it."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, windows: Sequence[Window], *parts: Tensor) -> Tensor:
        """Write the parts into a contiguous tensor and return it."""
        ctx.windows, ctx.needs = windows, [part.requires_grad for part in parts]
        for window, part in zip(windows, parts, strict=True):
            window.write(whole, lambda out, part=part: out.copy_(part))  # type: ignore[misc]
        ctx.mark_dirty(whole)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of each part."""
        whole = grads[0].contiguous()
        pairs = zip(ctx.windows, ctx.needs, strict=True)
        return (None, None, *(window.of(whole) if needed else None for window, needed in pairs))


class Patch(torch.autograd.Function):
    """Add tensors to windows of a parameter, or put them in their place."""

    @staticmethod
    def forward(
        ctx: Any, whole: Tensor, patches: Sequence[tuple[Window, bool]], *parts: Tensor
    ) -> Tensor:
        """Return a copy of the parameter with the parts, each added if its flag says so."""
        ctx.patches, ctx.dtypes = patches, [part.dtype for part in parts]
        found = whole.clone(memory_format=torch.contiguous_format)
        for (window, adds), part in zip(patches, parts, strict=True):
            value = window.of(found) + part if adds else part
            window.write(found, lambda out, value=value: out.copy_(value))  # type: ignore[misc]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the parameter, whose replaced parts nobody reads, and of parts."""
        whole = grads[0].contiguous()
        pairs = zip(ctx.patches, ctx.dtypes, strict=True)
        return (whole, None, *(window.of(whole).to(dtype) for (window, _), dtype in pairs))


class Deferred(torch.autograd.Function):
    """A loss whose gradient with respect to the raw coefficients is already known.

    The gradient may be as large as the sources, so backward passes it on without a copy and can
    run only once.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *raws: Tensor) -> Tensor:
        """Return the loss; backward scales the tensors of `grads` in place and empties the list."""
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the known gradients, scaled by the incoming one.

        Raises:
            RuntimeError: backward ran before.
        """
        if not ctx.grads:
            raise RuntimeError(
                "expected one backward pass through a loss of `accumulate`, got a second one, but "
                "its gradients are not kept; call `accumulate` again."
            )
        known = [grad.mul_(grads[0]) for grad in ctx.grads]
        ctx.grads.clear()  # autograd copies gradients that are referenced elsewhere
        return (None, None, *known)


def known_loss(
    values: Sequence[Tensor],
    grads: dict[str, Tensor],
    raws: Mapping[str, Tensor],
    scale: float = 1.0,
) -> Tensor:
    """Return the sum of losses, whose backward adds known gradients to the raw parameters.

    Args:
        values: the losses, whose backward passes have run.
        grads: gradients by key of the raw parameter; missing ones are zero. Emptied.
        raws: raw parameters by key.
        scale: factor that the gradients contain.
    """
    for grad in grads.values() if scale != 1.0 else ():
        grad.div_(scale)
    ordered = [grads.pop(key) if key in grads else torch.zeros_like(z) for key, z in raws.items()]
    loss: Tensor = Deferred.apply(torch.stack(list(values)).sum(), ordered, *raws.values())
    return loss


def backward_of(run: Callable[[], Tensor], scale: float) -> Tensor:
    """Compute a loss, run its backward immediately, and return the detached loss.

    Raises:
        ConfigError: the loss is not a scalar.
    """
    with torch.enable_grad():
        loss = scalar(run())
    with torch.autocast(loss.device.type, enabled=False):
        (loss * scale).backward()
    return loss.detach()


def scalar(loss: Tensor) -> Tensor:
    """Return a loss that is a scalar.

    Raises:
        ConfigError: it is not.
    """
    if loss.dim() != 0:
        raise ConfigError(f"loss: expected a scalar, got shape {tuple(loss.shape)}; reduce it.")
    return loss


def checksums(parameters: Iterable[Tensor]) -> list[int]:
    """Return a checksum of each parameter's bits, to detect writes through `.data`.

    Such writes (by some optimisers, or by weight averaging) do not change a tensor's version.
    """
    with torch.no_grad():
        sums = [_checksum(parameter.detach()) for parameter in parameters]
        return torch.stack(sums).tolist() if sums else []


def _checksum(tensor: Tensor) -> Tensor:
    """Return `sum_i (2 i + 1) b_i` modulo 2^64 over the tensor's words `b_i`.

    The factors are odd, so that a change of any one word is detected, and distinct, so that a swap
    of two words is.
    """
    bits = tensor.reshape(-1).view(torch.int32)
    if len(bits) % 2 == 0 and bits.storage_offset() % 2 == 0:
        bits = bits.view(torch.int64)  # summing int32 is many times slower
    # Viewed as a matrix with i = width * row + column, the sum splits into plain sums over rows and
    # columns, without a temporary of the tensor's size.
    width = 512
    rows = len(bits) // width
    body, tail = bits[: rows * width].view(rows, width), bits[rows * width :]
    odd = torch.arange(1, 2 * width, 2, device=bits.device)
    total = (tail * (odd[: len(tail)] + 2 * width * rows)).sum()
    if rows:
        total += (body.sum(dim=0) * odd).sum()
        total += (body.sum(dim=1) * torch.arange(rows, device=bits.device)).sum() * (2 * width)
    return total
