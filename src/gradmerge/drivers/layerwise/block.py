"""Learning one block: its merged output matches each expert's own, in the mean of squares.

    L(c) = sum_k mean | f(x1; theta(c)) - f(x2_k; theta_k) |^2

over the entries of the hidden state, padding left out (ProDistill, arXiv 2502.12706).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradmerge.drivers.layerwise.chain import BlockChain
from gradmerge.engine.autograd import known_loss
from gradmerge.engine.leaves import Leaves
from gradmerge.optimisers import AbstractPerturbed
from gradmerge.training.finite import FiniteModule

BLOCK_LOSS = "layer/loss"
"""Name of the loss that a schedule watches, whatever the block: that of the last step of a pass."""


def mean_square(got: Tensor, expected: Tensor, mask: Tensor | None) -> Tensor:
    """Return `mean |got - expected|^2` over entries, in float32 or wider.

    Args:
        got: hidden states, `[batch, tokens, ...]` or of any other form.
        expected: of the same shape.
        mask: `[batch, tokens]`, 0 on padding, which is left out.
    """
    if mask is not None and got.dim() >= 3 and got.shape[:2] == mask.shape:
        keep = (mask != 0).to(got.device)
        got, expected = got[keep], expected[keep]
    wide = torch.promote_types(got.dtype, torch.float32)
    return (got.to(wide) - expected.to(wide)).square().mean()


class BlockModule(FiniteModule):
    """Learns the coefficients of one block with `trainer.fit`; a batch names a batch per task.

    Merged tensors live for a step. Their gradients are contracted, and freed, as the last backward
    produces them.

    Args:
        chain: the network, whose state takes the parameters.
        number: of the block; that after the last is of what follows it.
        raw: its raw coefficients by key, which become this module's parameters.
        loss: of a batch, by its number; runs the block.
        learning_rate: of Adam, where no other optimiser is configured.
        first_step: steps of all blocks before, so that all blocks are logged on one axis.
    """

    def __init__(
        self,
        chain: BlockChain,
        number: int,
        raw: Mapping[str, Tensor],
        loss: Callable[[int], Tensor],
        learning_rate: float,
        first_step: int,
    ) -> None:
        super().__init__()
        self.raw = nn.ParameterDict({key: nn.Parameter(z) for key, z in raw.items()})
        self.number, self.learning_rate = number, learning_rate
        self.losses: list[float] = []
        """First and last loss."""
        self.unused: list[str] | None = None
        """Tensors that the first backward did not reach, once it has run."""
        self._chain, self._loss, self._first_step = chain, loss, first_step
        self._others = cache(chain.theta)
        state = chain.model.state
        state.raw = {**state.raw, **self.raw}

    @override
    def on_train_epoch_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, AbstractPerturbed):
                optimizer.require(self.trainer.accumulate_grad_batches, False)

    @override
    def training_step(self, batch: Mapping[str, int], batch_idx: int) -> Tensor:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            # the trainer does so only after the losses, when the new gradients are there, too
            self.zero_grad(set_to_none=True)
        loss, values = self._accumulated(batch)
        block = self._chain.steps[self.number].name
        self.require_finite_losses({f"{task} at {block}": v for task, v in values.items()})
        self.losses = [*self.losses[:1], float(loss.detach())]
        prefix = f"layer/{self.number}"
        options: dict[str, Any] = {"batch_size": 1}
        self.log(f"{prefix}/loss", loss.detach(), prog_bar=True, **options)
        # one name for all blocks, for schedules that watch a loss; loggers have the block's own
        self.log(BLOCK_LOSS, loss.detach(), logger=False, **options)
        for task, value in values.items() if len(values) > 1 else ():
            self.log(f"{prefix}/{task}/loss", value, **options)
        self.log("step", float(self._first_step + self.global_step), **options)
        return loss

    def _accumulated(self, batch: Mapping[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a step, whose gradients are known, and that of each task."""
        chain, state = self._chain, self._chain.model.state
        learned = [name for name in chain.steps[self.number].tensors if name not in state.fixed]

        def build(name: str) -> Tensor:
            return (chain.theta if name in learned else self._others)(name)

        def contract(grads: dict[str, Tensor], name: str, grad: Tensor) -> tuple[str]:
            state.contract_into(grads, name, grad)
            return (name,)

        leaves = Leaves(learned, build, contract)
        with chain.weights(leaves.__getitem__):
            values = leaves.accumulate([partial(self._loss, number) for number in batch.values()])
        if self.unused is None:
            self.unused = [name for name in learned if name not in leaves.touched]
            state.fix(self.unused, chain.plan.unused_coefficient)
        loss = known_loss(values, leaves.grads, dict(self.raw.items()))
        return loss, dict(zip(batch, values, strict=True))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
