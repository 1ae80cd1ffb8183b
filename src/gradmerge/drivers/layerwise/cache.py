"""Activations of the merged prefix and of each expert's own, on the tasks' adaptation data."""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gradmerge.drivers.layerwise.blocks import slot_id
from gradmerge.drivers.layerwise.chain import Call, Chain
from gradmerge.errors import ConfigError
from gradmerge.training.data import MergeDataModule
from gradmerge.training.loaders import even_batches


class Activations:
    """Tensors by name, each replaced in place as the blocks go by.

    What goes over the bound is kept in files of a folder and mapped from there, so that it counts
    as the system's cache. The folder is scratch: `close` removes it, with what a killed run left
    there, and nothing of it is needed to go on.

    Args:
        folder: for the files; made when it is needed.
        limit: bytes to hold in memory.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._held: dict[str, Tensor] = {}
        self._mapped: dict[str, Tensor] = {}
        self._files = 0

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self._held.values())

    @property
    def spilled(self) -> int:
        """Bytes in files."""
        return sum(tensor.nbytes for tensor in self._mapped.values())

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of a tensor under a name, in the place of what was there."""
        tensor = tensor.detach()
        kept = self._mapped.get(name, self._held.get(name))
        if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
            kept.copy_(tensor)
            return
        self._held.pop(name, None)
        self._mapped.pop(name, None)
        if self.held + tensor.nbytes <= self._limit or not tensor.numel():
            self._held[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        else:
            self._mapped[name] = self._map(tensor).copy_(tensor)

    def get(self, name: str) -> Tensor:
        """The tensor of a name; not to be written to."""
        return self._mapped[name] if name in self._mapped else self._held[name]

    def _map(self, tensor: Tensor) -> Tensor:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._files}.bin"
        self._files += 1
        size = math.prod(tensor.shape)
        flat = torch.from_file(str(path), shared=True, size=size, dtype=tensor.dtype)
        return flat.view(tensor.shape)

    def close(self) -> None:
        """Let go of all, in memory and on disk."""
        self._held.clear()
        self._mapped.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


Side = Literal["expert", "merged"]
_NOT_INPUTS = frozenset({"labels", "bytes_per_token"})


@dataclass(frozen=True)
class Batch:
    """How the blocks are called with one batch; its tensors are among the activations."""

    task: str
    number: int
    calls: Mapping[Side, list[Call]]
    constants: Mapping[Side, list[str]]
    """Names of its tensors beside the hidden states."""
    masked: bool

    def name(self, what: str) -> str:
        """Of a tensor of this batch."""
        return _name(self.task, self.number, what)


class Prefixes:
    """Two sets of activations that go through the network block by block.

    Args:
        chain: the network.
        data: the tasks, set up.
        tasks: task -> its expert.
        batch_size: examples per task and step.
        activations: where they are kept.
        outside: raw coefficients of tensors outside of blocks, by slot.
    """

    def __init__(
        self,
        chain: Chain,
        data: MergeDataModule,
        tasks: Mapping[str, str],
        batch_size: int,
        activations: Activations,
        outside: Mapping[str, Tensor],
    ) -> None:
        self.chain, self.tasks, self.activations = chain, tasks, activations
        self.batches: list[Batch] = []
        self.outside = outside
        self._data, self._size = data, batch_size
        self._owners = {n: block.name for block in chain.blocks for n in block.tensors}
        self._kept: dict[str, Tensor] | None = None
        self._source = next(iter(tasks.values()))

    # ---- the data -------------------------------------------------------------------------------

    def inputs(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Task, number of the batch, and the network's inputs; the same batches each time.

        They are put together once: examples may lie in the order of classes. They differ in size by
        one at most, see `even_batches`.
        """
        for task, whole in zip(
            self.tasks, self._data.evaluation_loaders("adaptation"), strict=True
        ):
            seed = self._data.seed * 1_000_003 + zlib.crc32(task.encode())
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(whole.dataset), generator=generator).tolist()
            loader = DataLoader(
                whole.dataset,
                batch_sampler=even_batches(order, self._size),
                collate_fn=whole.collate_fn,
                num_workers=whole.num_workers,
            )
            for number, batch in enumerate(loader):
                yield task, number, self.moved(batch)

    def moved(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the network takes, on the device."""
        place = self.chain.place
        return {
            key: place(value) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key not in _NOT_INPUTS
        }

    # ---- weights outside of the block that is learned ------------------------------------------

    def merged_weights(self, task: str) -> AbstractContextManager[None]:
        """Within the context tensors outside of blocks are merged as the recipe starts."""
        self._source = self.tasks[task]
        return self.chain.weights(self.elsewhere)

    def elsewhere(self, name: str) -> Tensor:
        """A tensor outside of blocks as the merged network has it; private ones are the expert's
        of the batch that runs.
        """
        plan = self.chain.plan
        if name not in plan.tensors:
            return plan.read(self._source, name)
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        if name in self._owners and name not in plan.fixed:
            raise ConfigError(
                f"LayerWise: {name} of the block {self._owners[name]} is used outside of that "
                "block, so it cannot be learned with it alone. Learn end to end, or name other "
                "`blocks`."
            )
        theta = self.theta(name, self.outside)
        if self._kept is not None:
            self._kept[name] = theta
        return theta

    def theta(self, name: str, raw: Mapping[str, Tensor], finished: bool = False) -> Tensor:
        """A merged tensor of raw coefficients by slot, or what finalisers make of it."""
        plan, chain = self.chain.plan, self.chain
        own = None if name in plan.fixed else raw[slot_id(plan.layout.slots[name])]
        with torch.inference_mode(False), torch.no_grad():
            out = torch.empty(plan.tensors[name].shape, dtype=chain.dtype, device=chain.device)
            return (plan.finish if finished else plan.combine)(name, own, out)

    # ---- activations ----------------------------------------------------------------------------

    @torch.no_grad()
    def enter(self) -> None:
        """Activations before the first block, and how the blocks are called with each batch."""
        self._kept = {}
        self.recompute(self._before_blocks)
        self.batches = [self._entered(*found) for found in self.inputs()]
        self._kept = None

    def _before_blocks(self) -> None:
        for task, _, inputs in self.inputs():
            with self.merged_weights(task):
                self.chain.start(inputs)

    def _entered(self, task: str, number: int, inputs: Mapping[str, Any]) -> Batch:
        mask = inputs.get("attention_mask")
        masked = isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all())
        if masked:
            self.activations.put(_name(task, number, "mask"), mask)  # type: ignore[arg-type]
        with self.chain.as_source(self.tasks[task]):
            expert = self.chain.start(inputs)
        with self.merged_weights(task):
            merged = self.chain.start(inputs)
        # masks and positions are most often the same for both
        shared = len(expert.constants) == len(merged.constants) and all(
            torch.equal(a, b) for a, b in zip(expert.constants, merged.constants, strict=True)
        )
        calls: dict[Side, list[Call]] = {"expert": expert.calls, "merged": merged.calls}
        constants: dict[Side, list[str]] = {}
        sides: tuple[tuple[Side, Any], ...] = (("expert", expert), ("merged", merged))
        for side, start in sides:
            self.activations.put(_name(task, number, side), start.hidden)
            owner = "expert" if shared else side
            names = [_name(task, number, f"{owner}-{i}") for i in range(len(start.constants))]
            constants[side] = names
            for name, tensor in zip(names, start.constants, strict=True):
                if side == owner:
                    self.activations.put(name, tensor)
        return Batch(task, number, calls, constants, masked)

    def hidden(self, number: int, batch: Batch, side: Side) -> Tensor:
        """What a block gives of a batch, with the weights that are set."""
        self._source = self.tasks[batch.task]
        get, device = self.activations.get, self.chain.device
        constants = [get(name).to(device) for name in batch.constants[side]]
        # a copy, for a block may write over what it is given
        hidden = get(batch.name(side)).to(device, copy=True)
        return self.chain.run(number, batch.calls[side][number], hidden, constants)

    def target(self, batch: Batch) -> Tensor:
        """What the expert's own block gave of a batch, once `pass_expert` has been called."""
        return self.activations.get(batch.name("expert")).to(self.chain.device)

    def mask(self, batch: Batch) -> Tensor | None:
        """`[batch, tokens]`, 0 on padding; None where there is none."""
        if not batch.masked:
            return None
        return self.activations.get(batch.name("mask")).to(self.chain.device)

    def pass_experts(self, number: int) -> None:
        """Every expert's activations go through its own block."""
        for source in dict.fromkeys(self.tasks.values()):
            with self.chain.as_source(source, number):
                for batch in self.batches:
                    if self.tasks[batch.task] == source:
                        out = self.hidden(number, batch, "expert")
                        self.activations.put(batch.name("expert"), out)

    # ---- BatchNorm ------------------------------------------------------------------------------

    def recompute(self, passes: Callable[[], object]) -> None:
        """BatchNorm statistics of what these passes reach, where the recipe says so."""
        statistics = self.chain.statistics
        if self.chain.plan.recipe.buffers == "recompute" and statistics.batch_norms:
            with torch.no_grad():
                statistics.recompute([passes])

    def batch_statistics(self, training: bool) -> None:
        """Batches have their own statistics while a block is learned, as in any fit."""
        if training:
            self.chain.statistics.train(True)
        else:
            self.chain.skeleton.eval()

    def block_buffers(self, number: int) -> dict[str, Tensor]:
        """The buffers of one block, by their names in the files."""
        binding, prefix = self.chain.plan.binding, f"{self.chain.blocks[number].name}."
        assert binding is not None
        values = self.chain.statistics.values()
        return {name: v for name, v in values.items() if binding.buffers[name].startswith(prefix)}


def _name(task: str, number: int, what: str) -> str:
    return f"{task}/{number}/{what}"
