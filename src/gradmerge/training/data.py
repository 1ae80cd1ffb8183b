"""Data: one dataset a task, three disjoint splits (adaptation, selection, test), seeded batches."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from gradmerge.errors import ConfigError, nearest, shorten
from gradmerge.training.examples import First, Kind, load_processor, padding_id, prepare, rows_used
from gradmerge.training.loaders import ShareLoader, StreamLoader, TaskStream, collate

Stage = Literal["adaptation", "selection", "test"]
STAGES: tuple[Stage, ...] = ("adaptation", "selection", "test")
_ALIASES = {"adaptation": "train", "selection": "validation", "test": "test"}


@dataclass(frozen=True)
class TaskData:
    """Where a task's examples come from, and how they become batches."""

    path: Any
    """Hub id, builder (csv, json, parquet, imagefolder, or text: an example a line, without blank
    ones), a folder of `save_to_disk`; from Python also a mapping of the three splits to
    datasets."""
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
                f"fractions must be three shares that sum to 1, got {self.fractions}."
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
            given = {
                stage: datasets.load_dataset(
                    data.path,
                    data.name,
                    data_files=data.data_files,
                    split=data.splits.get(stage, _ALIASES[stage]),
                    revision=data.revision,
                )
                for stage in STAGES
            }
            if data.path == "text":
                return {stage: _without_blank_lines(lines) for stage, lines in given.items()}
            return given
        else:
            loaded = datasets.load_dataset(
                data.path, data.name, data_files=data.data_files, revision=data.revision
            )
            if data.path == "text":
                loaded = {name: _without_blank_lines(lines) for name, lines in loaded.items()}
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ConfigError(
            f"task {task}: {data.path} (files {data.data_files}, splits {data.splits}) cannot be "
            f"read: {error}"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return _cut(task, _without_repetitions(task, loaded, data), data.fractions, seed)
    for names in ({s: s for s in STAGES}, _ALIASES):
        if all(name in loaded for name in names.values()):
            return {stage: loaded[names[stage]] for stage in STAGES}
    if len(loaded) == 1:
        whole = _without_repetitions(task, next(iter(loaded.values())), data)
        return _cut(task, whole, data.fractions, seed)
    raise ConfigError(
        f"task {task}: expected the splits adaptation, selection, test (or train, validation, "
        f"test), got {', '.join(loaded)}. Say which to use: "
        "splits: {adaptation: ..., selection: ..., test: ...}."
    )


def _without_blank_lines(lines: Any) -> Any:
    kept = [i for i, text in enumerate(lines["text"]) if text.strip()]
    return lines if len(kept) == len(lines) else lines.select(kept)


def _without_repetitions(task: str, whole: Any, data: TaskData) -> Any:
    """Texts once each: a repeated one would fall into several splits."""
    if data.kind not in ("causal_lm", "text_classification"):
        return whole
    seen: set[str] = set()
    kept = []
    for i in range(len(whole)):
        key = _digest(sorted(whole[i].items()))
        if key not in seen:
            seen.add(key)
            kept.append(i)
    if len(kept) == len(whole):
        return whole
    rank_zero_info(
        f"task {task}: {len(whole) - len(kept)} of {len(whole)} examples repeat another one "
        "exactly and are left out, so that the splits cut from them share none."
    )
    return whole.select(kept)


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
            f"task {task}: the splits must not share examples: {found}. Remove the duplicates; or "
            "give one set of examples, which is cut into three after repeated ones are left out; "
            "or, if they may be shared (lines that any text repeats), turn this check off: "
            "data.check_disjoint: false."
        )


class MergeDataModule(lightning.LightningDataModule):
    """One dataset a task; a training step holds a batch of every task.

    Args:
        tasks: the tasks by name.
        batch_size: examples per task, step and process.
        eval_batch_size: examples per batch of selection and test; default: twice `batch_size`.
        num_workers: processes that prepare batches.
        seed: order of the training examples, and the cut of single splits.
        processor: folder or hub id of the tokenizer or image processor; default: the folder of the
            base or the first source.
        check_disjoint: compare the contents of all splits, as far as they are used, before
            training.
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
            raise ConfigError("data.tasks: expected at least one task, got none.")
        if batch_size < 1:
            raise ConfigError(f"data.batch_size: must be at least 1, got {batch_size}.")
        self.tasks = tasks
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.processor_path = processor
        self.check_disjoint = check_disjoint
        self.processor: Any = None
        self._network: Any = None
        self._loaded: dict[str, tuple[TaskData, dict[Stage, Any]]] = {}
        self._prepared: dict[str, dict[Stage, Any]] = {}
        self._pad = 0

    def setup(self, stage: str | None = None) -> None:
        """Read, check and prepare all splits once."""
        if self._prepared:
            return
        folder = self.processor_path or self._default_processor()
        for task, data in self.tasks.items():
            splits = self.splits(task)
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
            if self.check_disjoint:
                used = {
                    name: First(split, rows_used(self._prepared[task][name]))
                    for name, split in splits.items()
                }
                require_disjoint(task, used, (data.text, data.image, "input_ids", "pixel_values"))
        classifies = any(data.kind == "text_classification" for data in self.tasks.values())
        several = max(self.batch_size, self.eval_batch_size) > 1
        network = getattr(self._merged(), "skeleton", None)
        self._pad = padding_id(self.processor, network, classifies and several)

    def splits(self, task: str) -> dict[Stage, Any]:
        """A task's three splits as datasets, not prepared; they are loaded once.

        Raises:
            ConfigError: see `load_splits`.
        """
        data, kept = self.tasks[task], self._loaded.get(task)
        if kept is None or kept[0] is not data:
            kept = self._loaded[task] = data, load_splits(task, data, self.seed)
        return kept[1]

    def attach(self, merged: Any) -> None:
        """Prepare for a merged model where no trainer says for which."""
        self._network = merged

    def restricted(self, tasks: Sequence[str]) -> MergeDataModule:
        """The same data with some of the tasks alone, for a trainer of its own."""
        own = copy.copy(self)
        own.tasks = {name: task for name, task in self.tasks.items() if name in tasks}
        own._prepared, own.trainer = {}, None
        return own

    def _merged(self) -> Any:
        module = None if self.trainer is None else self.trainer.lightning_module
        return getattr(module, "merged", self._network)

    def _default_processor(self) -> str | None:
        plan = getattr(self._merged(), "plan", None)
        folder = None if plan is None else plan.folder
        return None if folder is None else str(folder)

    def examples(self, stage: Stage) -> dict[str, Any]:
        """The prepared examples of a split, by task."""
        return {task: splits[stage] for task, splits in self._prepared.items()}

    def train_dataloader(self) -> StreamLoader:
        """Steps over the adaptation split."""
        pads = partial(collate, pad=self._pad)
        stream = TaskStream(self.examples("adaptation"), pads, self.batch_size, self.seed)
        if self.trainer is not None:
            stream.rank, stream.world = self.trainer.global_rank, self.trainer.world_size
        return StreamLoader(stream, self.num_workers)

    def val_dataloader(self) -> list[Any]:
        """A loader a task over the selection split."""
        return self._shares("selection")

    def test_dataloader(self) -> list[Any]:
        """A loader a task over the test split."""
        return self._shares("test")

    def _shares(self, stage: Stage) -> list[Any]:
        world = 1 if self.trainer is None else self.trainer.world_size
        if self.trainer is None or world == 1:
            return self.evaluation_loaders(stage)
        options = self.eval_batch_size, self.num_workers, self.trainer.global_rank, world, self._pad
        return [ShareLoader(examples, *options) for examples in self.examples(stage).values()]

    def evaluation_loaders(self, stage: Stage) -> list[Any]:
        """A loader a task over the whole split, in the order of `tasks`."""
        return [
            DataLoader(
                examples,
                batch_size=self.eval_batch_size,
                collate_fn=partial(collate, pad=self._pad),
                num_workers=self.num_workers,
            )
            for examples in self.examples(stage).values()
        ]
