"""Buffers of the merged network, above all BatchNorm statistics.

Buffers are not parameters: they are not learned, and the sources' statistics are of other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradmerge.common.errors import ConfigError
from gradmerge.engine.plan import Plan
from gradmerge.sources import Checkpoint


class NetworkBuffers:
    """The buffers of a plan's network by their names in the files, set by the recipe's rule."""

    def __init__(self, plan: Plan, skeleton: nn.Module) -> None:
        self._plan = plan
        self._skeleton = skeleton
        places = plan.binding.buffers if plan.binding else {}
        self._places = {name: places[name] for name in plan.buffers if name in places}
        self._private = {name: places[name] for name in plan.private if name in places}
        self._exact = dict(skeleton.named_buffers(remove_duplicate=False))  # before any cast
        self._heads: dict[str, dict[str, Tensor]] = {}
        self._held = False
        self.set({name: plan.buffer(name) for name in self._places})
        names = {module: name for name, module in skeleton.named_modules()}
        for norm in self.batch_norms:
            norm.register_forward_pre_hook(partial(_require_rows, names[norm]), with_kwargs=True)

    def values(self) -> dict[str, Tensor]:
        """Return the current shared buffers (not copies), before any cast to the compute dtype."""
        return {name: self._exact[place] for name, place in self._places.items()}

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Write shared buffers in place."""
        for name, value in values.items():
            self._write(self._places[name], value)

    def _write(self, place: str, value: Tensor) -> None:
        exact, live = self._exact[place], self._skeleton.get_buffer(place)
        exact.copy_(value)
        if live is not exact:
            live.copy_(exact)

    def _install(self, values: Mapping[str, Tensor]) -> None:
        """Put tensors into the network by place; those before may be part of a graph."""
        for place, value in values.items():
            owner, _, name = place.rpartition(".")
            self._skeleton.get_submodule(owner)._buffers[name] = value

    def _read(self, places: Mapping[str, str], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return copies of stored buffers by place, as the network has them."""
        live = self._skeleton.get_buffer
        return {place: read(n).to(live(place), copy=True) for n, place in places.items()}

    def place(self, dtypes: Mapping[str, torch.dtype], device: torch.device) -> None:
        """Cast the network's buffers, by place, and move them; exact ones are kept for export."""
        self._exact = {place: exact.to(device) for place, exact in self._exact.items()}
        self._install({place: exact.to(dtypes[place]) for place, exact in self._exact.items()})
        self._heads.clear()

    def serve(self, source: str) -> None:
        """Use a source's private buffers (those of its head) from now on."""
        if not self._private or self._held:
            return
        if source not in self._heads:
            with torch.inference_mode(False):
                self._heads[source] = self._read(self._private, partial(self._plan.read, source))
        self._install(self._heads[source])

    @property
    def batch_norms(self) -> list[nn.modules.batchnorm._BatchNorm]:
        """The BatchNorm layers that keep running statistics, other than tasks' own."""
        own = {place.rpartition(".")[0] for place in self._private.values()}
        return [
            module
            for path, module in self._skeleton.named_modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats and path not in own
        ]

    def train(self, mode: bool) -> None:
        """Use batch statistics while training, if the rule is to recompute them afterwards."""
        if mode and self._plan.recipe.buffers == "recompute":
            for norm in self.batch_norms:
                norm.train()
                norm.momentum = 0.0  # running statistics stay those of the last recomputation

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Keep the network in evaluation mode within the context."""
        modes = {module: module.training for module in self._skeleton.modules()}
        try:
            self._skeleton.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    @contextmanager
    def of(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Use a checkpoint's buffers, in evaluation mode, within the context."""
        own = {n: p for n, p in self._private.items() if n in checkpoint.infos}
        places = {**self._places, **own}
        kept = {place: self._skeleton.get_buffer(place) for place in places.values()}
        held = self._held
        with self.evaluating():
            try:
                self._install(self._read(places, checkpoint.read))
                self._held = True
                yield
            finally:
                self._held = held
                self._install(kept)

    @torch.no_grad()
    def recompute(
        self, runs: Sequence[Callable[[], object]], only: Sequence[nn.Module] | None = None
    ) -> None:
        """Recompute BatchNorm statistics from all rows of the given forward passes together.

        A row is what a layer normalises: an example, or one position of it. With `n_b` rows, mean
        `m_b` and variance `v_b` (of divisor `n_b`) in batch b, and `N = sum_b n_b`,

            mean = sum_b n_b m_b / N
            var  = (sum_b n_b v_b + sum_b n_b (m_b - mean)^2) / (N - 1)

        the unbiased variance of the N rows, within and between batches. During a pass the layers
        normalise by the statistics of their batch, as in training. A layer that no pass reaches
        keeps its statistics.

        Args:
            runs: the passes.
            only: layers whose statistics are recomputed; default: all.
        """
        norms = [norm for norm in self.batch_norms if only is None or norm in only]
        moments = [ChannelMoments() for _ in norms]
        with self.evaluating(), ExitStack() as hooks:
            for norm, found in zip(norms, moments, strict=True):
                norm.train()
                hooks.enter_context(norm.register_forward_pre_hook(found.before, with_kwargs=True))
            for run in runs:
                run()
        for norm, found in zip(norms, moments, strict=True):
            self.write(norm, found)

    def write(self, norm: nn.Module, moments: ChannelMoments) -> None:
        """Make moments a BatchNorm's running statistics, if there are any rows."""
        if not moments.rows:
            return
        path = next(path for path, module in self._skeleton.named_modules() if module is norm)
        for name, value in moments.statistics().items():
            self._write(f"{path}.{name}" if path else name, value)


def _require_rows(
    name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Reject a batch of one row where a BatchNorm takes the statistics of its batch."""
    batch: Tensor = args[0] if args else kwargs["input"]
    if not module.training or batch.dim() < 2 or batch.numel() != batch.shape[1]:
        return
    if isinstance(module, nn.SyncBatchNorm) and _processes(module) > 1:
        return  # the statistics are those of all processes' rows
    raise ConfigError(
        f"{name}: BatchNorm takes the statistics of its batch while coefficients are learned and "
        "where statistics are recomputed; expected two rows or more, got one (a batch of shape "
        f"{tuple(batch.shape)}). Set data.batch_size and data.eval_batch_size (`batch_size` of "
        "LayerWise) to 2 or more and give each task two adaptation examples, or keep the sources' "
        "statistics: model.recipe.buffers: mean."
    )


def _processes(norm: nn.SyncBatchNorm) -> int:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size(norm.process_group)


class ChannelMoments:
    """Number, mean and sum of squared deviations of rows, per channel."""

    def __init__(self) -> None:
        self.batches = self.rows = 0
        # On the CPU, for not every device has float64.
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Add a layer's input; a forward pre-hook."""
        self.add(args[0] if args else kwargs["input"])

    def add(self, batch: Tensor) -> None:
        """Add values `[examples, channels, ...]`."""
        rows = batch.numel() // max(1, batch.shape[1])
        if rows == 0:
            return
        dims = [dim for dim in range(batch.dim()) if dim != 1]
        wide = batch.float() if batch.element_size() < 4 else batch
        variance, mean = torch.var_mean(wide, dims, correction=0)
        variance, mean = variance.cpu().double(), mean.cpu().double()
        before, self.rows, self.batches = self.rows, self.rows + rows, self.batches + 1
        apart = mean - self.mean
        self.squares = self.squares + rows * variance + apart.square() * (before * rows / self.rows)
        self.mean = self.mean + apart * (rows / self.rows)

    @property
    def deviation(self) -> Tensor:
        """The standard deviation of all rows, of divisor `rows`."""
        return (self.squares / max(1, self.rows)).sqrt()

    def statistics(self) -> dict[str, Tensor]:
        """Return the rows' statistics by the names of a BatchNorm's buffers."""
        return {
            "running_mean": self.mean,
            "running_var": self.squares / max(1, self.rows - 1),
            "num_batches_tracked": torch.tensor(self.batches),
        }
