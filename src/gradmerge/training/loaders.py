"""Data loaders: the stream of training steps, shares of evaluation splits, and samples.

Training batches are a function of (seed, epoch, step): every process computes the same global batch
and takes its share, so the number of processes does not change the data, and a resumed run
continues at the next batch. Each example of an evaluation split is read by exactly one process. A
sample of a split, for statistics, is the same in every process.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info

from gradmerge.training.budget import LabelBudget, mixed


class TaskStream(IterableDataset[dict[str, dict[str, Tensor]]]):
    """Stream of the training steps `start` to `stop`, counted over all epochs.

    Each step is `{task: batch}`, with the share of this process.
    """

    def __init__(
        self,
        examples: Mapping[str, Dataset[Any]],
        collate: Any,
        batch_size: int,
        seed: int,
        labelled_share: float = 0.0,
    ) -> None:
        self.examples = examples
        self.collate = collate
        self.batch_size = batch_size
        self.seed = seed
        self.labelled_share = labelled_share
        self.start = self.stop = 0
        self.rank, self.world = 0, 1
        self._orders: dict[str, tuple[tuple[int, int], list[int]]] = {}

    def num_steps(self) -> int:
        """Return the number of steps in an epoch: until the largest task has been seen once."""
        size = self.batch_size * self.world
        return max(math.ceil(len(e) / size) for e in self.examples.values())  # type: ignore[arg-type]

    def indices(self, task: str, step: int) -> list[int]:
        """Return the indices of a task's examples for one step of this process."""
        epoch, within = divmod(step, self.num_steps())
        length = len(self.examples[task])  # type: ignore[arg-type]
        size = self.batch_size * self.world
        wanted = range(within * size, (within + 1) * size)[self.rank :: self.world]

        def drawn(key: str, at: int, length: int) -> int:
            return self._order(key, epoch, at // length, length)[at % length]

        examples = self.examples[task]
        if isinstance(examples, LabelBudget):
            return [mixed(examples, self.labelled_share, task, at, drawn) for at in wanted]
        return [drawn(task, at, length) for at in wanted]

    def _order(self, task: str, epoch: int, lap: int, length: int) -> list[int]:
        """Return the seeded order of the examples, a new one for every lap over the task."""
        kept = self._orders.get(task)
        if kept is None or kept[0] != (epoch, lap):
            name = int.from_bytes(
                hashlib.sha1(task.encode(), usedforsecurity=False).digest()[:4], "big"
            )
            generator = torch.Generator().manual_seed(
                (self.seed * 1_000_003 + epoch * 9_176 + lap * 131 + name) % 2**63
            )
            kept = (epoch, lap), torch.randperm(length, generator=generator).tolist()
            self._orders[task] = kept
        return kept[1]

    def __iter__(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        worker = get_worker_info()
        share, first = (worker.num_workers, worker.id) if worker else (1, 0)
        for step in range(self.start + first, self.stop, share):
            yield {
                task: self.collate([examples[i] for i in self.indices(task, step)])
                for task, examples in self.examples.items()
            }


class StreamLoader:
    """Loader of training steps that can be resumed in the middle of an epoch.

    It counts the steps that it has yielded, since a trainer never exhausts the iterator of an
    epoch, and each new iterator continues at that count. The content of a step depends only on its
    number. A resumed loader offers a whole epoch of steps: only the trainer knows how many remain
    (`limit_train_batches`).
    """

    def __init__(self, stream: TaskStream, num_workers: int) -> None:
        self.stream = stream
        self.num_workers = num_workers
        self.step = 0

    def __len__(self) -> int:
        return self.stream.num_steps()

    def __iter__(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        self.stream.start, self.stream.stop = self.step, self.step + len(self)
        for batch in DataLoader(self.stream, batch_size=None, num_workers=self.num_workers):
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps yielded so far."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Resume after the saved step."""
        self.step = state["step"]


class ShareLoader:
    """Loader of one process's share of an evaluation split: every `world`th example from `rank` on.

    No example is repeated to equalise the shares, which would count it twice. Every process yields
    the same number of batches, so that none waits for another; the last may be empty. It does not
    subclass `DataLoader`, because the trainer would then insert a sampler that repeats examples.
    """

    def __init__(self, whole: DataLoader[Any], rank: int, world: int) -> None:
        total = len(whole.dataset)  # type: ignore[arg-type]
        size = whole.batch_size or 1
        self.steps = max(1, math.ceil(math.ceil(total / world) / size))
        self.batches = DataLoader(
            Subset(whole.dataset, range(rank, total, world)),
            batch_size=size,
            collate_fn=whole.collate_fn,
            num_workers=whole.num_workers,
        )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.batches
        for _ in range(len(self.batches), self.steps):
            yield {}


def sample_batches(loader: DataLoader[Any], batches: int) -> DataLoader[Any]:
    """Sample at most `batches` batches of a loader's examples, to estimate statistics of a split.

    From L examples, `n = min(L, batches * batch_size)` are taken, the i-th drawn from
    `[i L / n, (i + 1) L / n)`; in a split sorted by class, every class keeps its share. The sample
    is shuffled, so batches are mixed, and cut by `even_batches`. The seed is fixed: every call and
    every process takes the same sample.
    """
    length = len(loader.dataset)  # type: ignore[arg-type]
    size = loader.batch_size or 1
    count = min(length, batches * size)
    generator = torch.Generator().manual_seed(0)
    edges = [i * length // max(1, count) for i in range(count + 1)]
    drawn = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    taken = [a + int(u * (b - a)) for a, b, u in zip(edges, edges[1:], drawn, strict=False)]
    order = torch.randperm(count, generator=generator).tolist()
    return DataLoader(
        loader.dataset,
        batch_sampler=even_batches([taken[i] for i in order], size),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
    )


def even_batches(order: Sequence[int], size: int) -> list[list[int]]:
    """Cut all indices into batches of about `size` whose lengths differ by at most one.

    No batch has a single example, for which BatchNorm has no statistics, unless `size` is 1 or
    there is only one example. With `size` 2 and an odd number of examples, one batch has three.
    """
    parts = -(-len(order) // size)
    if size > 1:
        parts = min(parts, max(1, len(order) // 2))
    if not parts:
        return []
    least, more = divmod(len(order), parts)
    edges = [i * least + min(i, more) for i in range(parts + 1)]
    return [list(order[a:b]) for a, b in itertools.pairwise(edges)]


class Shared:
    """A value that is the same for all examples and stands in a batch as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value


def collate(examples: Sequence[Mapping[str, Any]], pad: int = 0) -> dict[str, Any]:
    """Stack examples into a batch.

    Sequences of different length are padded on the right: tokens with `pad`, `labels` with -100,
    the rest with 0. A list of sequences is as many rows of the batch, and `Shared` values are not
    stacked. Scalars become tensors, and `bytes_per_token` is averaged over the tokens with labels.
    """
    batch: dict[str, Any] = {}
    for key in examples[0]:
        values = [example[key] for example in examples]
        first = values[0]
        if isinstance(first, Shared):
            batch[key] = first.value
            continue
        if isinstance(first, list) and all(isinstance(each, Tensor) for each in first):
            values = [each for several in values for each in several]
        if key == "bytes_per_token":
            counts = [_labelled(example.get("labels")) for example in examples]
            counts = counts if sum(counts) else [1] * len(counts)
            total = sum(n * value for n, value in zip(counts, values, strict=True))
            batch[key] = float(total / sum(counts))
        elif not isinstance(values[0], Tensor):
            batch[key] = torch.tensor(values)
        elif len({value.shape for value in values}) == 1:
            batch[key] = torch.stack(values)
        else:
            fill = -100 if key == "labels" else pad if key.endswith("input_ids") else 0
            batch[key] = torch.nn.utils.rnn.pad_sequence(values, True, fill)
    return batch


def _labelled(labels: Any) -> int:
    """Return the number of labelled tokens of an example, 1 if its labels are not tokens."""
    return int((labels != -100).sum()) if isinstance(labels, Tensor) and labels.dim() else 1
