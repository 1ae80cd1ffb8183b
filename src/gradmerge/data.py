"""Data: one dataset a task, three disjoint splits (adaptation, selection, test), seeded batches.

Training batches are a stream indexed by (seed, epoch, step): every process computes the same global
batch and takes its share, so two processes see what one would, and a resumed run goes on at the
very next batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from gradmerge.errors import ConfigError, nearest, shorten
from gradmerge.preparation import Kind, load_processor, prepare

Stage = Literal["adaptation", "selection", "test"]
STAGES: tuple[Stage, ...] = ("adaptation", "selection", "test")
_ALIASES = {"adaptation": "train", "selection": "validation", "test": "test"}


@dataclass(frozen=True)
class TaskData:
    """Where a task's examples come from, and how they become batches."""

    path: Any
    """Hub id, builder (csv, json, parquet, text, imagefolder), a folder of `save_to_disk`; from
    Python also a mapping of the three splits to datasets."""
    kind: Kind = "causal_lm"
    """causal_lm, text_classification, image_classification, or tensors (examples are already
    mappings of tensors, as the model takes them)."""
    name: str | None = None
    """Configuration of a hub dataset."""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Local files; a mapping by split where each split has its own."""
    splits: dict[str, str] | None = None
    """adaptation, selection and test as split expressions, e.g. `train[:256]`. Default: the splits
    of those names, or train, validation and test; a single split is cut by `fractions`."""
    fractions: tuple[float, float, float] = (0.5, 0.2, 0.3)
    """Shares of a single split, after a seeded shuffle."""
    text: str = "text"
    """Column of the text."""
    image: str = "image"
    """Column of the image."""
    label: str = "label"
    """Column of the label; a task without it is unlabelled."""
    max_length: int = 512
    """Tokens a text; for causal_lm, tokens a window over the concatenated documents."""
    limit: dict[str, int] | None = None
    """At most this many examples (causal_lm: windows) a split."""
    source: str | None = None
    """The source whose head and teacher the task uses; default: the source of the task's name."""
    revision: str | None = None
    """Revision of a hub dataset."""

    def __post_init__(self) -> None:
        """Check names and shares."""
        for given in (self.splits, self.limit):
            for key in given or {}:
                if key not in STAGES:
                    raise ConfigError(
                        f"{key!r} is no split; expected adaptation, selection, test."
                        f"{nearest(key, STAGES)}"
                    )
        if len(self.fractions) != 3 or not math.isclose(sum(self.fractions), 1, abs_tol=1e-6):
            raise ConfigError(
                f"fractions must be three shares that sum to 1, came {self.fractions}."
            )


def load_splits(task: str, data: TaskData, seed: int) -> dict[Stage, Any]:
    """The three splits as datasets.

    Raises:
        ConfigError: the data cannot be read, or its splits are not those asked for.
    """
    if isinstance(data.path, Mapping):
        lost = [stage for stage in STAGES if stage not in data.path]
        if lost:
            raise ConfigError(f"task {task}: expected the splits {STAGES}, missing {lost}.")
        return {stage: data.path[stage] for stage in STAGES}
    import datasets

    try:
        if (Path(str(data.path)) / "dataset_dict.json").is_file() or (
            Path(str(data.path)) / "state.json"
        ).is_file():
            loaded = datasets.load_from_disk(str(data.path))
        elif data.splits is not None:
            return {
                stage: datasets.load_dataset(
                    data.path,
                    data.name,
                    data_files=data.data_files,
                    split=data.splits.get(stage, _ALIASES[stage]),
                    revision=data.revision,
                )
                for stage in STAGES
            }
        else:
            loaded = datasets.load_dataset(
                data.path, data.name, data_files=data.data_files, revision=data.revision
            )
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ConfigError(
            f"task {task}: {data.path} (files {data.data_files}, splits {data.splits}) cannot be "
            f"read: {error}"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return _cut(task, loaded, data.fractions, seed)
    for names in ({s: s for s in STAGES}, _ALIASES):
        if all(name in loaded for name in names.values()):
            return {stage: loaded[names[stage]] for stage in STAGES}
    if len(loaded) == 1:
        return _cut(task, next(iter(loaded.values())), data.fractions, seed)
    raise ConfigError(
        f"task {task}: expected the splits adaptation, selection, test (or train, validation, "
        f"test), came {', '.join(loaded)}. Say which to use: "
        "splits: {adaptation: ..., selection: ..., test: ...}."
    )


def _cut(task: str, whole: Any, fractions: Sequence[float], seed: int) -> dict[Stage, Any]:
    shuffled = whole.shuffle(seed=seed)
    first = round(len(shuffled) * fractions[0])
    second = first + round(len(shuffled) * fractions[1])
    if min(first, second - first, len(shuffled) - second) < 1:
        raise ConfigError(f"task {task}: {len(shuffled)} examples are too few for three splits.")
    ranges = (range(first), range(first, second), range(second, len(shuffled)))
    return {stage: shuffled.select(part) for stage, part in zip(STAGES, ranges, strict=True)}


def _digest(value: Any) -> str:
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif hasattr(value, "tobytes"):
        raw = value.tobytes()
    else:
        raw = str(value).encode()
    return hashlib.sha1(raw, usedforsecurity=False).hexdigest()


def require_disjoint(task: str, splits: Mapping[Stage, Any], columns: Sequence[str]) -> None:
    """Refuse splits that share an example: scores on them would not be honest.

    Raises:
        ConfigError: how many examples are shared, between which splits, and the first of them.
    """
    seen: dict[str, tuple[Stage, int]] = {}
    shared: dict[tuple[Stage, Stage], list[str]] = {}
    for stage, dataset in splits.items():
        for i in range(len(dataset)):
            example = dataset[i]
            if not isinstance(example, Mapping):
                return
            inputs = [name for name in columns if name in example][:1]
            inputs = inputs or [name for name in example if name not in ("label", "labels")]
            key = "".join(_digest(example[name]) for name in inputs)
            first = seen.setdefault(key, (stage, i))
            if first[0] != stage:
                shared.setdefault((first[0], stage), []).append(f"{first[1]} = {i}")
    if shared:
        found = "; ".join(
            f"{len(pairs)} of {a} are in {b} too (rows {shorten(pairs, 3)})"
            for (a, b), pairs in shared.items()
        )
        raise ConfigError(
            f"task {task}: the splits must not share examples: {found}. Remove the duplicates, or "
            "cut the splits from one deduplicated set."
        )


class _TaskStream(IterableDataset[dict[str, dict[str, Tensor]]]):
    """Steps `start` to `stop`, counted over all epochs; each yields `{task: batch}` for this
    process.
    """

    def __init__(
        self, examples: Mapping[str, Dataset[Any]], collate: Any, batch_size: int, seed: int
    ) -> None:
        self.examples = examples
        self.collate = collate
        self.batch_size = batch_size
        self.seed = seed
        self.start = self.stop = 0
        self.rank, self.world = 0, 1
        self._orders: dict[str, tuple[tuple[int, int], list[int]]] = {}

    def num_steps(self) -> int:
        """Steps until the largest task was seen once."""
        size = self.batch_size * self.world
        return max(math.ceil(len(e) / size) for e in self.examples.values())  # type: ignore[arg-type]

    def indices(self, task: str, step: int) -> list[int]:
        """Examples of a task for one step of this process, out of the seeded global order."""
        epoch, within = divmod(step, self.num_steps())
        length = len(self.examples[task])  # type: ignore[arg-type]
        size = self.batch_size * self.world
        wanted = range(within * size, (within + 1) * size)[self.rank :: self.world]
        return [self._order(task, epoch, at // length, length)[at % length] for at in wanted]

    def _order(self, task: str, epoch: int, lap: int, length: int) -> list[int]:
        """A permutation of the examples, a new one each time the task has been seen once."""
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
    """A loader of training steps that can be resumed in the middle of an epoch.

    It counts the steps it gave: a trainer stops asking after an epoch's last step and so never sees
    an iterator end.
    """

    def __init__(self, stream: _TaskStream, num_workers: int) -> None:
        self.stream = stream
        self.num_workers = num_workers
        self.step = 0
        self._resumed = False

    def __len__(self) -> int:
        return self.stream.num_steps()

    def __iter__(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        done = self.step % len(self) if self._resumed else 0
        self._resumed = False
        self.stream.start, self.stream.stop = self.step, self.step + len(self) - done
        for batch in DataLoader(self.stream, batch_size=None, num_workers=self.num_workers):
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where it stood."""
        self.step, self._resumed = state["step"], True


class MergeDataModule(lightning.LightningDataModule):
    """One dataset a task; a training step holds a batch of every task.

    Args:
        tasks: the tasks by name.
        batch_size: examples a task, step and process.
        eval_batch_size: examples a batch of selection and test; default: twice `batch_size`.
        num_workers: processes that prepare batches.
        seed: order of the training examples, and the cut of single splits.
        processor: folder or hub id of the tokenizer or image processor; default: the folder of the
            base or the first source.
        check_disjoint: compare the contents of all splits before training.
    """

    def __init__(
        self,
        tasks: dict[str, TaskData],
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        processor: str | None = None,
        check_disjoint: bool = True,
    ) -> None:
        super().__init__()
        if not tasks:
            raise ConfigError("data.tasks: expected at least one task, came none.")
        if batch_size < 1:
            raise ConfigError(f"data.batch_size: must be at least 1, came {batch_size}.")
        self.tasks = tasks
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.processor_path = processor
        self.check_disjoint = check_disjoint
        self.processor: Any = None
        self._prepared: dict[str, dict[Stage, Any]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, check and prepare all splits once."""
        if self._prepared:
            return
        folder = self.processor_path or self._default_processor()
        for task, data in self.tasks.items():
            splits = load_splits(task, data, self.seed)
            if self.check_disjoint:
                require_disjoint(task, splits, (data.text, data.image, "input_ids", "pixel_values"))
            if self.processor is None and data.kind != "tensors":
                self.processor = load_processor(folder, data.kind)
            self._prepared[task] = {
                name: prepare(
                    split,
                    data.kind,
                    self.processor,
                    columns={"text": data.text, "image": data.image, "label": data.label},
                    max_length=data.max_length,
                    limit=(data.limit or {}).get(name),
                    where=f"task {task}, {name}",
                )
                for name, split in splits.items()
            }

    def _default_processor(self) -> str | None:
        module = None if self.trainer is None else self.trainer.lightning_module
        plan = getattr(getattr(module, "merged", None), "plan", None)
        folder = None if plan is None else plan.folder
        return None if folder is None else str(folder)

    def examples(self, stage: Stage) -> dict[str, Any]:
        """The prepared examples of a split, by task."""
        return {task: splits[stage] for task, splits in self._prepared.items()}

    def train_dataloader(self) -> StreamLoader:
        """Steps over the adaptation split."""
        stream = _TaskStream(self.examples("adaptation"), collate, self.batch_size, self.seed)
        if self.trainer is not None:
            stream.rank, stream.world = self.trainer.global_rank, self.trainer.world_size
        return StreamLoader(stream, self.num_workers)

    def val_dataloader(self) -> list[Any]:
        """A loader a task over the selection split."""
        return self.evaluation_loaders("selection")

    def test_dataloader(self) -> list[Any]:
        """A loader a task over the test split."""
        return self.evaluation_loaders("test")

    def evaluation_loaders(self, stage: Stage) -> list[Any]:
        """A loader a task, in the order of `tasks`."""
        return [
            DataLoader(
                examples,
                batch_size=self.eval_batch_size,
                collate_fn=collate,
                num_workers=self.num_workers,
            )
            for examples in self.examples(stage).values()
        ]


def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack tensors, padding token sequences on the right; scalars become tensors."""
    batch: dict[str, Any] = {}
    for key in examples[0]:
        values = [example[key] for example in examples]
        if key == "bytes_per_token":
            batch[key] = float(sum(values) / len(values))
        elif not isinstance(values[0], Tensor):
            batch[key] = torch.tensor(values)
        elif len({value.shape for value in values}) == 1:
            batch[key] = torch.stack(values)
        else:
            fill = {"labels": -100}.get(key, 0)
            batch[key] = torch.nn.utils.rnn.pad_sequence(values, True, fill)
    return batch
