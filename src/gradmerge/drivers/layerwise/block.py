"""Learning one block: its merged output matches each expert's own, in the mean of squares.

    L(c) = sum_k mean | f(x1; theta(c)) - f(x2_k; theta_k) |^2

over the entries of the hidden state, padding left out (ProDistill, arXiv 2502.12706).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from typing_extensions import override

from gradmerge.drivers.layerwise.chain import Chain, Read
from gradmerge.drivers.layerwise.files import slot_id
from gradmerge.engine.autograd import Deferred, backward_of
from gradmerge.errors import ConfigError
from gradmerge.optimisers import SAM

BLOCK_LOSS = "layer/loss"
"""Name of the loss that a schedule watches, whatever the block: that of the last step of a pass."""


class MergedWeights:
    """Merged tensors of the network by name, as far as their coefficients are known.

    Args:
        chain: the network.
        raw: `z` by slot; of tensors in blocks only once they are learned.
    """

    def __init__(self, chain: Chain, raw: Mapping[str, Tensor]) -> None:
        self.chain, self.raw = chain, dict(raw)
        self.state = chain.model.state

    def read(self, source: str, name: str, finished: bool = False) -> Tensor:
        """Return a merged tensor, or a private one of the source that serves the batch.

        Raises:
            ConfigError: its block is not learned yet.
        """
        plan = self.chain.plan
        if name not in plan.tensors:
            return plan.read(source, name)
        own: Tensor | float | None = self.state.fixed.get(name)
        if own is None:
            own = self.raw.get(slot_id(plan.layout.slots[name]))
            if own is None:
                raise ConfigError(
                    f"LayerWise: {name} is used outside of its block, so it cannot be learned with "
                    "that block alone. Name other `blocks`, or learn end to end: leave `driver` "
                    "out."
                )
        return self.build(name, own, finished)

    def kept(self, finished: bool = False) -> tuple[Read, dict[str, Tensor]]:
        """Return a `read` that merges each tensor once, and the tensors that it keeps."""
        found: dict[str, Tensor] = {}

        def read(source: str, name: str) -> Tensor:
            if name not in self.chain.plan.tensors:
                return self.read(source, name)
            if name not in found:
                found[name] = self.read(source, name, finished)
            return found[name]

        return read, found

    def build(self, name: str, own: Tensor | float, finished: bool = False) -> Tensor:
        """Return `theta` of a tensor, after the recipe's finalisers where asked for."""
        plan, model = self.chain.plan, self.chain.model
        with torch.no_grad():
            out = torch.empty(plan.tensors[name].shape, dtype=model.dtype, device=model.device)
            return (self.state.finish if finished else plan.combine)(name, own, out)


class MergedBlock:
    """The merged tensors of one block, from raw coefficients by slot.

    Merged tensors live for a step; its weight gradients are contracted, and freed, as its last
    backward produces them.

    Args:
        number: of the block.
        raw: `z` by slot.
        weights: merged tensors outside of the block.
    """

    def __init__(self, number: int, raw: Mapping[str, Tensor], weights: MergedWeights) -> None:
        self.number, self.raw, self._weights = number, raw, weights
        self.state = weights.state
        self.names = weights.chain.blocks[number].tensors
        self.unused: list[str] = []
        """Tensors that the first backward did not reach."""
        self._theta: dict[str, Tensor] = {}
        self._checked_unused = False

    @property
    def learned(self) -> list[str]:
        """Names of its tensors whose coefficients are learned."""
        return [name for name in self.names if name not in self.state.fixed]

    def read(self, source: str, name: str) -> Tensor:
        """Return a tensor of the merged network; those of the block are merged once."""
        if name not in self.names:
            return self._weights.read(source, name)
        if name not in self._theta:
            own = self.state.fixed.get(name)
            self._theta[name] = self._weights.build(name, self.z(name) if own is None else own)
        return self._theta[name]

    def z(self, name: str) -> Tensor:
        """Return the raw coefficients of a tensor."""
        return self.raw[slot_id(self.state.plan.layout.slots[name])]

    def forget(self, *names: str) -> None:
        """Release learned tensors, by default all; they are merged anew when they are next read."""
        for name in names or self.learned:
            self._theta.pop(name, None)

    def accumulate(self, losses: Sequence[Callable[[], Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Run the backward of several losses of the block, one after another, as one loss.

        Args:
            losses: callables that run the block and return a scalar.

        Returns:
            The sum of the losses, whose `backward()` adds the known gradients to the raw
            coefficients, and each loss.
        """
        self.forget()
        step = _Step(self)
        values = []
        with self._weights.chain.weights(step.read):
            for i, run in enumerate(losses):
                if i == len(losses) - 1:
                    step.begin_last()
                values.append(backward_of(run, 1.0))
        grads = step.finish()
        self.forget()  # the optimiser's temporaries take their place
        if not self._checked_unused:
            self._checked_unused = True
            self.unused = [name for name in self.learned if name not in step.touched]
            self.state.fix(self.unused, self.state.plan.unused_coefficient)
        total = torch.stack(values).sum()
        ordered = [
            grads.pop(slot) if slot in grads else torch.zeros_like(z)
            for slot, z in self.raw.items()
        ]
        loss: Tensor = Deferred.apply(total, ordered, *self.raw.values())
        return loss, values


class _Step:
    """Leaves for the merged tensors of one step, whose gradients are contracted once complete."""

    def __init__(self, block: MergedBlock) -> None:
        self.touched: set[str] = set()
        """Tensors that a backward has reached."""
        self._block, self._learned = block, set(block.learned)
        self._leaves: dict[str, Tensor] = {}
        self._grads: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._is_last = False

    def read(self, source: str, name: str) -> Tensor:
        """Return a tensor of the merged network; learned ones as leaves."""
        if name not in self._learned:
            return self._block.read(source, name)
        if name not in self._leaves:
            self._leaves[name] = self._block.read(source, name).detach().requires_grad_()
            if self._is_last:
                self._watch(name)
        return self._leaves[name]

    def begin_last(self) -> None:
        """Contract gradients as they arrive: with the last loss each is complete at once, and no
        backward that is still to run needs the weight.
        """
        self._is_last = True
        for name in self._leaves:
            self._watch(name)

    def _watch(self, name: str) -> None:
        hook = partial(self._contract, name)
        self._hooks.append(self._leaves[name].register_post_accumulate_grad_hook(hook))

    def _contract(self, name: str, leaf: Tensor) -> None:
        if self._leaves.get(name) is leaf:
            del self._leaves[name]
            self._block.forget(name)
        grad, leaf.grad = leaf.grad, None
        if grad is None:
            return
        self.touched.add(name)
        state = self._block.state
        slot = slot_id(state.plan.layout.slots[name])
        found = state.contract(name, grad, self._block.z(name))
        self._grads[slot] = self._grads[slot].add_(found) if slot in self._grads else found

    def finish(self) -> dict[str, Tensor]:
        """Contract what is left and return `dL/dz` by slot; a missing one is zero."""
        for name, leaf in list(self._leaves.items()):
            self._contract(name, leaf)
        # else hooks, leaves and the gradients form a circle that outlives the step
        for hook in self._hooks:
            hook.remove()
        return self._grads


def mean_square(got: Tensor, expected: Tensor, mask: Tensor | None) -> Tensor:
    """Return `mean |got - expected|^2` over entries, in float32 or wider.

    Args:
        got: hidden states, `[batch, tokens, ...]` or of any other form.
        expected: of the same shape.
        mask: `[batch, tokens]`, 0 on padding, which is left out.
    """
    if mask is not None and got.dim() >= 3 and got.shape[:2] == mask.shape:
        got, expected = got[mask != 0], expected[mask != 0]
    wide = torch.promote_types(got.dtype, torch.float32)
    return (got.to(wide) - expected.to(wide)).square().mean()


class BlockModule(lightning.LightningModule):
    """Learns the coefficients of one block with `trainer.fit`; a batch names a batch per task.

    Args:
        block: its merged tensors; their raw coefficients become this module's parameters.
        loss: of a task's batch, by its number; runs the block.
        learning_rate: of Adam, where no other optimiser is configured.
        first_step: steps of all blocks before, so that all blocks are logged on one axis.
    """

    def __init__(
        self,
        block: MergedBlock,
        loss: Callable[[str, int], Tensor],
        learning_rate: float,
        first_step: int,
    ) -> None:
        super().__init__()
        self.raw = nn.ParameterDict({slot: nn.Parameter(z) for slot, z in block.raw.items()})
        self.block = block
        self.learning_rate = learning_rate
        self.losses: list[float] = []
        """First and last loss."""
        self._loss, self._first_step = loss, first_step
        block.raw = dict(self.raw.items())

    @override
    def on_train_epoch_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, SAM):
                optimizer.require(self.trainer.accumulate_grad_batches, False)

    @override
    def training_step(self, batch: Mapping[str, int], batch_idx: int) -> Tensor:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            # the trainer does so only after the losses, when the new gradients are there, too
            self.zero_grad(set_to_none=True)
        runs = [partial(self._loss, task, number) for task, number in batch.items()]
        loss, values = self.block.accumulate(runs)
        self.losses = [*self.losses[:1], float(loss.detach())]
        prefix = f"layer/{self.block.number}"
        options: dict[str, Any] = {"batch_size": 1}
        self.log(f"{prefix}/loss", loss.detach(), prog_bar=True, **options)
        # one name for all blocks, for schedules that watch a loss; loggers have the block's own
        self.log(BLOCK_LOSS, loss.detach(), logger=False, **options)
        if len(values) > 1:
            for task, value in zip(batch, values, strict=True):
                self.log(f"{prefix}/{task}/loss", value, **options)
        self.log("step", float(self._first_step + self.global_step), **options)
        return loss

    def release(self) -> dict[str, Tensor]:
        """Return the coefficients and keep nothing: a trainer and its module are in a circle, which
        is collected at some later time.
        """
        found = {}
        for slot, parameter in self.raw.items():
            found[slot] = parameter.detach()
            parameter.grad = None
            parameter.data = parameter.new_empty(0)
        return found

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
