"""Sources divided among processes: each merges some rows, and all exchange merged rows.

Of a tensor with n rows, one of N processes reads, merges and contracts n / N rows of every source.
Merged rows are gathered by all (all-gather); gradients are added up and divided by rows
(reduce-scatter). What moves between processes is the merged model and its gradient, whatever the
number of sources.

A process's `dL/dz` is its part of the sum over the N processes' losses. The mean over all
processes, which DDP takes, is exactly the gradient of their mean loss,

    1/N sum_r < sum_d G_d, B >_r = < 1/N sum_d G_d, B >.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from typing_extensions import override

from gradmerge.common.errors import ConfigError, GradmergeError
from gradmerge.engine.plan import Plan
from gradmerge.engine.rows import Rows

# names of torch 2.13 and later, then those before
_GATHER = "all_gather_single", "all_gather_into_tensor"
_SCATTER = "reduce_scatter_single", "reduce_scatter_tensor"


def gather(whole: Tensor, part: Tensor, group: Any) -> None:
    """Write the parts of all processes, in their order, into a tensor."""
    next(filter(None, (getattr(distributed, n, None) for n in _GATHER)))(whole, part, group=group)


def scatter(part: Tensor, whole: Tensor, group: Any) -> None:
    """Add up a tensor over processes, and write this process's part of the sum."""
    next(filter(None, (getattr(distributed, n, None) for n in _SCATTER)))(part, whole, group=group)


class ShardedPlan(Plan):
    """A plan whose sources are divided among the processes of a group.

    Gradients are always contracted together, by all processes in the same order. Merges are made
    together inside `together`; elsewhere a process merges by itself, from all rows of its files.
    """

    is_shared = True
    group: Any
    device: torch.device
    _whole: Plan
    _joint: bool
    _order: list[str]

    @classmethod
    def of(cls, plan: Plan, device: torch.device, group: Any = None) -> ShardedPlan:
        """Return a plan that shares its sources with the processes of a group (default: all).

        Args:
            plan: the opened recipe.
            device: of the group's tensors.
            group: the processes.
        """
        other = cls.__new__(cls)
        own = {"group": group, "device": device, "_joint": False, "_order": [], "_facts": {}}
        other.__dict__ = {**plan.__dict__, **own, "_whole": plan}
        return other

    def check(self) -> None:
        """Let one process read and hash all weights, and all know what it found.

        Raises:
            NonFiniteError: a source holds NaN or infinity.
            SourceError: the files have changed since they were opened.
        """
        found: Any = None
        if self._place[0] == 0:
            try:
                found = self.fingerprints, self.infinite_buffers
            except GradmergeError as error:
                found = error
        found = self._told(found)
        if isinstance(found, GradmergeError):
            raise found
        for plan in (self, self._whole):  # the steps of a preprocess read by the other
            plan.__dict__["fingerprints"], plan.__dict__["infinite_buffers"] = found

    def keep_directions(self) -> None:
        """Compute the directions of a preprocess now, each process some, in files that all map.

        Raises:
            ConfigError: the processes do not share a folder for temporary files.
        """
        if not self.recipe.preprocess:
            return
        index, _ = self._place
        own = Path(tempfile.mkdtemp(prefix="gradmerge-")) if index == 0 else None
        folder: Path = self._told(own)
        try:
            if self.any_of_all(not folder.is_dir()):
                raise ConfigError(
                    f"source_shards: expected processes that share TMPDIR ({folder.parent}), where "
                    "preprocessed directions go, got others. Set it to a folder on a shared disk, "
                    "or divide sources within a machine (source_shards: devices per machine)."
                )
            shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
            self._processed.keep_divided(self._place, shapes, folder, self._wait)
        finally:
            if own is not None:
                shutil.rmtree(own, ignore_errors=True)

    def _told(self, found: Any) -> Any:
        """Return what the first process of the group passes."""
        first = 0 if self.group is None else distributed.get_global_rank(self.group, 0)
        box = [found]
        distributed.broadcast_object_list(box, src=first, group=self.group, device=self.device)
        return box[0]

    def _wait(self) -> None:
        distributed.barrier(group=self.group)

    def apart(self) -> Plan:
        """Return the plan by which this process reads all sources."""
        other = Plan.__new__(Plan)
        other.__dict__ = {**self.__dict__, "_facts": {}}
        return other

    @property
    def _place(self) -> tuple[int, int]:
        return distributed.get_rank(self.group), distributed.get_world_size(self.group)

    @contextmanager
    @override
    def together(self) -> Iterator[None]:
        before, self._joint = self._joint, True
        try:
            yield
        finally:
            self._joint = before

    @override
    def any(self, flag: bool) -> bool:
        return self.any_of_all(flag) if self._joint else flag

    def any_of_all(self, flag: bool) -> bool:
        """Return whether a flag is set in any process of the group."""
        return bool(self._total(torch.tensor(float(flag), device=self.device)).item())

    @override
    def order_of(self, keys: Collection[str], proposal: Sequence[str]) -> Sequence[str]:
        if set(self._order) != set(keys):
            every = dict.fromkeys([*proposal, *sorted(keys)])
            self._order = self._told([key for key in every if key in keys])
        return self._order

    @override
    def rows(self, name: str) -> Rows | None:
        own = self.share(name, *self._place)
        return own and replace(own, total=self._total)

    @override
    def combine(
        self, name: str, own: Tensor | float, out: Tensor, rows: Rows | None = None
    ) -> Tensor:
        # a fixed tensor is merged once, which one process may have done before another
        rows = self.rows(name) if self._joint and isinstance(own, Tensor) else None
        if rows is None:
            return super().combine(name, own, out)
        _, count = self._place
        step = -(-out.shape[0] // count)
        part = out.new_empty((step, *out.shape[1:]))
        super().combine(name, own, part[: rows.stop - rows.start], rows)
        even = step * count == out.shape[0] and out.is_contiguous()
        gathered = out if even else out.new_empty((step * count, *out.shape[1:]))
        gather(gathered, part, self.group)
        for other in () if even else range(count):
            share = Rows.share(out.shape, other, count)
            share.of(out).copy_(gathered[other * step :][: share.stop - share.start])
        return out

    @override
    def contract(
        self, name: str, grad: Tensor, z: Tensor, slopes: bool = False, rows: Rows | None = None
    ) -> tuple[Tensor, Tensor | None]:
        rows = self.rows(name)
        if rows is None:
            return super().contract(name, grad, z, slopes)
        _, count = self._place
        step = -(-grad.shape[0] // count)
        if step * count != grad.shape[0]:
            padded = grad.new_zeros((count, step, *grad.shape[1:]))
            for other in range(count):
                share = Rows.share(grad.shape, other, count)
                padded[other, : share.stop - share.start] = share.of(grad)
            grad = padded.flatten(0, 1)
        own = grad.new_empty((step, *grad.shape[1:]))
        scatter(own, grad.contiguous(), self.group)
        return super().contract(name, own[: rows.stop - rows.start], z, slopes, rows)

    def _total(self, value: Tensor) -> Tensor:
        found = value.clone()
        distributed.all_reduce(found, group=self.group)
        return found
