"""Learning one block: its merged output matches each expert's own, in the mean of squares.

    L(c) = sum_k mean | f(x1; theta(c)) - f(x2_k; theta_k) |^2

over the entries of the hidden state, padding left out (ProDistill, arXiv 2502.12706).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from gradmerge.drivers.layerwise.blocks import slot_id
from gradmerge.drivers.layerwise.chain import Chain
from gradmerge.engine.autograd import Deferred, backward_of
from gradmerge.errors import ConfigError
from gradmerge.optimisers import SAM

Read = Callable[[str], Tensor]

BLOCK_LOSS = "layer/loss"
"""The name that a schedule watches, whatever the block: the loss of the last step of a pass."""


class MergedBlock:
    """The merged tensors of one block, from raw coefficients by slot.

    Merged tensors live for a step; its weight gradients are contracted, and freed, as its last
    backward produces them.

    Args:
        chain: the network.
        number: of the block.
        raw: `z` by slot.
        elsewhere: gives tensors that are none of the block's merged ones.
    """

    def __init__(
        self, chain: Chain, number: int, raw: Mapping[str, Tensor], elsewhere: Read
    ) -> None:
        self.chain, self.number, self.raw = chain, number, raw
        self.plan = chain.plan
        self.names = chain.blocks[number].tensors
        self.elsewhere = elsewhere
        self.touched: set[str] = set()
        self._theta: dict[str, Tensor] = {}
        self._stale = set(self.names)

    @property
    def learned(self) -> list[str]:
        """Names of its tensors whose coefficients are learned."""
        return [name for name in self.names if name not in self.plan.fixed]

    def z(self, name: str) -> Tensor:
        """Raw coefficients of a tensor."""
        return self.raw[slot_id(self.plan.layout.slots[name])]

    def renew(self, names: Sequence[str]) -> None:
        """These tensors are to be merged again, for their coefficients have changed."""
        self._stale.update(names)

    def theta(self, name: str) -> Tensor:
        """A merged tensor."""
        if name in self._stale:
            out = self._theta.get(name)
            if out is None:
                shape, chain = self.plan.tensors[name].shape, self.chain
                out = torch.empty(shape, dtype=chain.dtype, device=chain.device)
            raw = None if name in self.plan.fixed else self.z(name).detach()
            # a trainer may be in inference mode; a tensor made there could never be trained with
            with torch.inference_mode(False), torch.no_grad():
                self._theta[name] = self.plan.combine(name, raw, out)
            self._stale.discard(name)
        return self._theta[name]

    @contextmanager
    def running(self, leaf: Read | None = None) -> Iterator[None]:
        """Within the context the network takes the block's merged tensors; of those that are
        learned, what `leaf` gives.
        """
        own, learned = set(self.names), set(self.learned)

        def read(name: str) -> Tensor:
            if leaf is not None and name in learned:
                return leaf(name)
            return self.theta(name) if name in own else self.elsewhere(name)

        with self.chain.weights(read):
            yield

    def accumulate(
        self, losses: Sequence[Callable[[], Tensor]], raws: Mapping[str, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Backward of several losses of the block, one after another, as one differentiable loss.

        Args:
            losses: callables that run the block and return a scalar.
            raws: the raw coefficients that the loss is to give gradients to.

        Returns:
            The sum of the losses, whose `backward()` adds the known gradients, and each.
        """
        self.renew(self.learned)
        leaves: dict[str, Tensor] = {}
        grads: dict[str, Tensor] = {}
        hooks: list[Any] = []
        values: list[Tensor] = []

        def read(name: str) -> Tensor:
            if name not in leaves:
                leaves[name] = self.theta(name).detach().requires_grad_()
                if len(values) == len(losses) - 1:
                    watch(name)
            return leaves[name]

        def watch(name: str) -> None:
            hook = partial(contract, name)
            hooks.append(leaves[name].register_post_accumulate_grad_hook(hook))

        def contract(name: str, leaf: Tensor) -> None:
            # with the last loss a weight gradient is complete as soon as it arrives, and no
            # backward that is still to run needs the weight
            if leaves.get(name) is leaf:
                del leaves[name]
                self._theta.pop(name, None)
                self._stale.add(name)
            grad, leaf.grad = leaf.grad, None
            if grad is None:
                return
            self.touched.add(name)
            slot = slot_id(self.plan.layout.slots[name])
            found = self.plan.contract(name, grad, self.z(name))
            grads[slot] = grads[slot].add_(found) if slot in grads else found

        with self.running(read):
            for i, run in enumerate(losses):
                if i == len(losses) - 1:
                    for name in leaves:
                        watch(name)
                values.append(backward_of(run, 1.0))
        for name, leaf in list(leaves.items()):
            contract(name, leaf)
        # else hooks, leaves and the gradients form a circle that outlives the step
        for hook in hooks:
            hook.remove()
        for name in self.learned:  # the optimiser's temporaries take their place
            self._theta.pop(name, None)
            self._stale.add(name)
        total = torch.stack(values).sum()
        ordered = [
            grads.pop(slot) if slot in grads else torch.zeros_like(z) for slot, z in raws.items()
        ]
        loss: Tensor = Deferred.apply(total, ordered, *raws.values())
        return loss, values

    def release(self) -> None:
        """Let go of all tensors."""
        self.raw = {}
        self._theta.clear()

    def fix_unused(self) -> list[str]:
        """Set tensors that no backward has reached by the recipe's rule, and say which."""
        unused = [name for name in self.learned if name not in self.touched]
        self.plan.fix(unused, self.plan.unused_coefficient)
        self.renew(unused)
        return unused


def mean_square(got: Tensor, expected: Tensor, mask: Tensor | None) -> Tensor:
    """`mean |got - expected|^2` over entries, in float32 or wider.

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
        first_step: steps of all blocks before, so that what is logged has one axis.
        training: switches batch statistics on and off.
    """

    def __init__(
        self,
        block: MergedBlock,
        loss: Callable[[str, int], Tensor],
        learning_rate: float,
        first_step: int,
        training: Callable[[bool], None],
    ) -> None:
        super().__init__()
        self.raw = nn.ParameterDict({slot: nn.Parameter(z) for slot, z in block.raw.items()})
        self.block = block
        self.learning_rate = learning_rate
        self.losses: list[float] = []
        """First and last loss."""
        self.unused: list[str] = []
        """Tensors without a gradient, set by rule."""
        self._loss, self._first_step, self._batch_statistics = loss, first_step, training
        block.raw = dict(self.raw.items())

    def on_fit_start(self) -> None:
        """Sources' statistics describe other weights: batches have their own, as in any fit."""
        self._batch_statistics(True)

    def on_train_epoch_start(self) -> None:
        """Refuse settings of the trainer that an optimiser cannot do with."""
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, SAM):
                optimizer.require(self.trainer.accumulate_grad_batches, False)

    def on_fit_end(self) -> None:
        """Ready for use."""
        self._batch_statistics(False)

    def training_step(self, batch: Mapping[str, int], batch_idx: int) -> Tensor:
        """One merge, one backward a task, one contraction."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            # the trainer does so only after the losses, when the new gradients are there, too
            self.zero_grad(set_to_none=True)
        runs = [partial(self._loss, task, number) for task, number in batch.items()]
        loss, values = self.block.accumulate(runs, dict(self.raw.items()))
        if not self.losses:
            self.unused = self.block.fix_unused()
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
        """The coefficients as they are; nothing is kept here.

        A trainer and its module are in a circle, which Python collects when it will.
        """
        found = {}
        for slot, parameter in self.raw.items():
            found[slot] = parameter.detach()
            parameter.grad = None
            parameter.data = parameter.new_empty(0)
        return found

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam; the command line's `optimizer` and `lr_scheduler` take its place."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def require_finite(number: int, name: str, losses: Sequence[float]) -> None:
    """Stop at a block whose loss is no number: all that follow would be learned from it.

    Raises:
        ConfigError: it is not.
    """
    if not all(torch.isfinite(torch.tensor(losses))):
        raise ConfigError(
            f"LayerWise: the loss of block {number} ({name}) went from {losses[0]:g} to "
            f"{losses[-1]:g}. Lower the learning rate (optimizer), or start nearer to the sources "
            "(recipe.init)."
        )
