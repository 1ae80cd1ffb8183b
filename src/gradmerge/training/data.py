"""Task data: one dataset per task, three disjoint splits, seeded batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import lightning
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from gradmerge.common.errors import ConfigError, nearest, require
from gradmerge.common.names import require_names
from gradmerge.training.budget import LabelBudget, within_budget
from gradmerge.training.examples import (
    Processor,
    Stage,
    TaskData,
    first_rows,
    load_processor,
    padding_id,
)
from gradmerge.training.fitting import (
    classes_of,
    require_examples,
    require_kind,
    require_room,
)
from gradmerge.training.generation import Question
from gradmerge.training.kinds import KINDS
from gradmerge.training.kinds.base import Tally, questions, split_of
from gradmerge.training.labels import Labels, read_tensors
from gradmerge.training.limits import require_batches
from gradmerge.training.loaders import ShareLoader, StreamLoader, TaskStream, collate
from gradmerge.training.splits import load_splits, require_disjoint


class MergeDataModule(lightning.LightningDataModule):
    """Load one dataset per task; every training step holds a batch of every task.

    Training reads the adaptation splits, validation the selection splits, testing the test splits.
    The order of training examples depends on the seed alone: several processes split each global
    batch between them, and a resumed run continues at the next batch. An epoch ends when the
    largest task has been seen once; smaller tasks repeat, reshuffled.

    Args:
        tasks: the tasks by name.
        batch_size: training examples per task, step and process.
        eval_batch_size: examples per batch of selection and test. Default: twice `batch_size`.
        num_workers: number of worker processes that prepare batches.
        seed: seed of the order of training examples and of the cut of single splits.
        processor: folder or hub id of the tokenizer or image processor. Default: the folder of the
            base or the first source.
        check_disjoint: reject splits of a task that share examples. Only the examples in use are
            compared.
        labels_per_task: number of adaptation examples (packed: windows) per task, or by task name,
            that keep their labels, in equal numbers per class. The others stay, without labels, for
            terms that need none. Default: all.
        labelled_share: with `labels_per_task`, least share of labelled examples in a step; they
            repeat more often than the others. 0: as many as in the split.
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
        labels_per_task: int | dict[str, int] | None = None,
        labelled_share: float = 0.25,
    ) -> None:
        super().__init__()
        if not tasks:
            raise ConfigError("data.tasks: expected at least one task, got none.")
        budget = labels_per_task, labelled_share
        require_batches(batch_size, eval_batch_size, num_workers, seed, *budget)
        require_names("data.tasks", tasks)
        for name in labels_per_task if isinstance(labels_per_task, Mapping) else ():
            if name not in tasks:
                raise ConfigError(
                    f"data.labels_per_task: unknown task {name!r} (choose from "
                    f"{', '.join(tasks)}).{nearest(name, tasks)}"
                )
        self.labels_per_task = labels_per_task
        self.labelled_share = labelled_share
        self.tasks = tasks
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.processor_path = processor
        self.check_disjoint = check_disjoint
        self.processor: Any = None
        self._processors: dict[Processor, Any] = {}
        self._network: Any = None
        self._loaded: dict[str, tuple[TaskData, dict[Stage, Any]]] = {}
        self._prepared: dict[str, dict[Stage, Any]] = {}
        self._labels: dict[str, dict[Stage, Labels | None]] = {}
        self._questions: dict[str, dict[Stage, list[Question]]] = {}
        self.tallies: dict[str, dict[Stage, Tally]] = {}
        """Numbers of examples and tokens of the prepared splits, by task."""
        self._classes: dict[str, int] = {}
        self._pad = 0

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **options: Any) -> NoReturn:
        """Refuse: a checkpoint of a fit holds no data.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{cls.__name__}.load_from_checkpoint: a checkpoint of a fit holds no data. Make the "
            "data module from its tasks, as for the fit."
        )

    def setup(self, stage: str | None = None) -> None:
        """Load, prepare and check all splits once."""
        if self._prepared:
            return
        merged = self._merged()
        network = getattr(merged, "skeleton", None)
        for task, data in self.tasks.items():
            require_kind(network, data.kind, f"task {task}")
        prepared = {task: self._prepare(task, merged) for task in self.tasks}
        kinds = {data.kind for data in self.tasks.values()}
        classifies = "text_classification" in kinds
        several = max(self.batch_size, self.eval_batch_size) > 1
        self._pad = padding_id(self.processor, network, classifies and several)
        self._prepared = prepared  # all of it is checked
        if stage == "fit":
            self._require_interval()

    def _require_interval(self) -> None:
        """Reject a number of steps between validations that no epoch has."""
        trainer = self.trainer
        if trainer is None or not trainer.enable_validation:
            return
        interval, limit = trainer.val_check_interval, trainer.limit_train_batches
        steps = len(self.train_dataloader())
        steps = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
        if trainer.check_val_every_n_epoch is not None and isinstance(interval, int):
            require(
                interval <= steps,
                "trainer.val_check_interval",
                f"at most {steps}, the steps of an epoch (to count over all epochs: "
                "check_val_every_n_epoch: null)",
                interval,
            )

    def _prepare(self, task: str, merged: Any) -> dict[Stage, Any]:
        """Load, prepare and check the splits of a task."""
        data, splits = self.tasks[task], self.splits(task)
        kind, network = KINDS[data.kind], getattr(merged, "skeleton", None)
        names = {stage: f"task {task}, {stage}" for stage in splits}
        for stage, rows in splits.items():
            if len(rows) == 0:
                raise ConfigError(f"{names[stage]}: expected at least one example, got none.")
        processor = None if kind.processor is None else self._processor(kind.processor, merged)
        cuts = {
            stage: split_of(rows, kind, data, stage, processor, network, self.seed, names[stage])
            for stage, rows in splits.items()
        }
        prepared = {stage: kind.prepare(cut) for stage, cut in cuts.items()}
        if self.check_disjoint:
            used = {
                stage: first_rows(splits[stage], getattr(rows, "rows_used", len(rows)))
                for stage, rows in prepared.items()
            }
            require_disjoint(task, used, kind.compared(cuts["adaptation"].columns))
        if data.generation is not None:
            self._questions[task] = {
                stage: questions(cuts[stage], kind) for stage in data.generation.splits
            }
            require_room(task, data, self._questions[task], network)
        for stage, rows in prepared.items():
            labels = require_examples(rows, data, processor, network, names[stage])
            # a dataset of one's own may take long to read, and is read anyway if it is compared
            if data.kind == "tensors" and (self.check_disjoint or type(rows) in (list, tuple)):
                labels = read_tensors(rows, names[stage])
            self._labels.setdefault(task, {})[stage] = labels
        known, whole = self._labels[task]["adaptation"], prepared["adaptation"]
        limited = within_budget(self.labels_per_task, task, whole, known, self.seed)
        self._report(task, cuts["adaptation"].columns, prepared, limited)
        prepared["adaptation"] = limited
        if network is not None:
            self.require_classes(task, classes_of(merged, task, data))
        return prepared

    def _processor(self, kind: Processor, merged: Any) -> Any:
        """Return the tokenizer or image processor, loaded once."""
        if kind not in self._processors:
            plan = getattr(merged, "plan", None)
            folder = self.processor_path or getattr(plan, "folder", None)
            trusted = plan is not None and plan.recipe.trust_remote_code
            self._processors[kind] = load_processor(folder, kind, trusted)
            self.processor = self.processor or self._processors[kind]
        return self._processors[kind]

    def _report(
        self, task: str, columns: Mapping[str, str], prepared: Mapping[Stage, Any], limited: Any
    ) -> None:
        """Keep the numbers of tokens, and say which columns were read and what they hold."""
        tallies = {s: rows.tally for s, rows in prepared.items() if hasattr(rows, "tally")}
        if tallies:
            self.tallies[task] = tallies
            read = ", ".join(f"{role} = {name}" for role, name in columns.items())
            held = "; ".join(f"{stage}: {tally}" for stage, tally in tallies.items())
            rank_zero_info(f"task {task} ({self.tasks[task].kind}; {read}): {held}.")
        if isinstance(limited, LabelBudget):
            rank_zero_info(f"task {task}: {limited} for adaptation.")

    def require_classes(self, task: str, classes: int | None) -> None:
        """Reject labels of any split of a task that the network has no class for.

        Raises:
            ConfigError: a label is too large.
        """
        if classes is not None and self._classes.get(task) != classes:
            for labels in self._labels.get(task, {}).values():
                if labels is not None:
                    labels.require_below(classes)
            self._classes[task] = classes

    def lacks_labels(self, task: str, stage: Stage) -> bool:
        """Return True if a split of another kind than tensors has no column of labels."""
        return not getattr(self._prepared.get(task, {}).get(stage), "labelled", True)

    def questions(self, task: str, stage: Stage) -> list[Question]:
        """Return what texts are generated for, to be scored; empty unless the task asks for it."""
        return self._questions.get(task, {}).get(stage, [])

    def splits(self, task: str) -> dict[Stage, Any]:
        """Return the three raw splits of a task, loaded once.

        Raises:
            ConfigError: the data cannot be read, or lack an expected split.
        """
        data, kept = self.tasks[task], self._loaded.get(task)
        if kept is None or kept[0] is not data:
            kept = self._loaded[task] = data, load_splits(task, data, self.seed)
        return kept[1]

    def attach(self, merged: Any) -> None:
        """Set the merged model that the data are prepared for, if no trainer is used."""
        self._network = merged

    def restricted(self, tasks: Sequence[str]) -> MergeDataModule:
        """Return a copy with only the given tasks, for a trainer of its own."""
        own = copy.copy(self)
        own.tasks = {name: task for name, task in self.tasks.items() if name in tasks}
        own._prepared, own._labels, own._classes, own.trainer = {}, {}, {}, None
        own._questions, own.tallies = {}, {}
        return own

    def limited(self, stage: Stage, count: int) -> MergeDataModule:
        """Return a copy with the first `count` prepared examples of each task in a split."""
        own = copy.copy(self)
        own._prepared, own.trainer = {}, None
        for task, splits in self._prepared.items():
            rows = first_rows(splits[stage], count)
            rows.labelled = getattr(splits[stage], "labelled", True)
            own._prepared[task] = {**splits, stage: rows}
        return own

    def _merged(self) -> Any:
        module = None if self.trainer is None else self.trainer.lightning_module
        return getattr(module, "merged", self._network)

    def examples(self, stage: Stage) -> dict[str, Any]:
        """Return the prepared examples of a split by task."""
        return {task: splits[stage] for task, splits in self._prepared.items()}

    def train_dataloader(self) -> StreamLoader:
        """Return the stream of training steps over the adaptation splits."""
        pads = partial(collate, pad=self._pad)
        examples, share = self.examples("adaptation"), self.labelled_share
        stream = TaskStream(examples, pads, self.batch_size, self.seed, share)
        if self.trainer is not None:
            stream.rank, stream.world = self.trainer.global_rank, self.trainer.world_size
        return StreamLoader(stream, self.num_workers)

    def val_dataloader(self) -> list[Any]:
        """Return one loader per task over the selection split."""
        return self._shares("selection")

    def test_dataloader(self) -> list[Any]:
        """Return one loader per task over the test split."""
        return self._shares("test")

    def _shares(self, stage: Stage) -> list[Any]:
        loaders = self.evaluation_loaders(stage)
        if self.trainer is None or self.trainer.world_size == 1:
            return loaders
        place = self.trainer.global_rank, self.trainer.world_size
        return [ShareLoader(loader, *place) for loader in loaders]

    def evaluation_loaders(self, stage: Stage) -> list[Any]:
        """Return one loader per task over the whole split, in the order of `tasks`."""
        return [
            DataLoader(
                examples,
                batch_size=self.eval_batch_size,
                collate_fn=partial(collate, pad=self._pad),
                num_workers=self.num_workers,
            )
            for examples in self.examples(stage).values()
        ]
