"""The evaluation steps of `MergeModule`: scores of the merge and of its sources on a split."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from typing_extensions import override

from gradmerge.calibration.finish import Finishing
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.outputs import Batch
from gradmerge.engine.predict import expert_rows, is_causal, predict
from gradmerge.engine.reading import reading_of
from gradmerge.engine.teacher import Teacher
from gradmerge.export.history import History
from gradmerge.objectives import Objective, Predictions
from gradmerge.training.data import MergeDataModule
from gradmerge.training.examples import Stage
from gradmerge.training.finite import FiniteModule
from gradmerge.training.fitting import require_apart
from gradmerge.training.loaders import sample_batches
from gradmerge.training.measures import Score
from gradmerge.training.monitors import scores_of
from gradmerge.training.per_example import AbstractExamples, ExampleScores
from gradmerge.training.scores import Scores, SplitScores, generated_scores, logged


class EvaluatingModule(FiniteModule):
    """A module that scores a merged model on the tasks of its data module."""

    merged: MergedModel
    objective: Objective
    teacher: Teacher
    history: History
    score_experts: bool
    _scores: SplitScores
    _finishing: Finishing
    _apart: set[str]

    @property
    def causal(self) -> bool:
        """True if the network predicts the next token."""
        return is_causal(self.merged.skeleton)

    @property
    def possible_scores(self) -> tuple[str, ...]:
        """Names of the scores that the network's predictions may have."""
        return scores_of(reading_of(self.merged.skeleton).measures)

    @property
    def score(self) -> Score:
        """Score by which the tasks of the last evaluation are judged."""
        return self._scores.score

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, in the order of the evaluation loaders."""
        return tuple(self.merged.tasks)

    def _predict(self, task: str, batch: Batch, shared: bool) -> Predictions:
        self._require_apart(task, batch)
        predictions = predict(self.merged, self.objective, task, batch, shared, self.teacher)
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, MergeDataModule) and not self.causal:
            # a network of one's own shows its number of classes only now
            data.require_classes(task, predictions.logits.shape[-1])
        return predictions

    def _require_apart(self, task: str, batch: Batch) -> None:
        if task not in self._apart and "position_ids" in batch and batch.get("use_cache") is False:
            self._apart.add(task)
            require_apart(self.merged, task, batch)

    @property
    def _split(self) -> Stage:
        return "test" if self.trainer.testing else "selection"

    @override
    def on_validation_epoch_start(self) -> None:
        self.refresh_buffers()
        self._scores.begin(self.merged.skeleton, self.device)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of one task of the selection or test split."""
        if not batch:  # padding step: another process has one more batch
            return
        task = self.tasks[dataloader_idx]
        known = self.trainer.sanity_checking or self._split in self._scores.experts
        scored = self.score_experts and not known
        self._require_apart(task, batch)
        source = self.merged.tasks[task] if scored else None
        if self._scores.add_in_parts(self.merged, task, batch, self.objective, source):
            return
        predictions = self._predict(task, batch, shared=False)
        expert = partial(expert_rows, self.merged, task, batch) if scored else None
        self._scores.add(task, batch, predictions, self.objective, expert)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the split."""
        stage = self._split
        keep = not self.trainer.sanity_checking
        found, averages = self._finish(stage, keep)
        if keep and self.trainer.state.fn == "fit":
            self._scores.record(self.history, self.trainer.global_step, found, averages)
        shown = f"{stage}/loss", f"{stage}/average/{self._scores.score.name}"
        for name, value in logged(stage, found, averages).items():
            # early stopping and checkpoints watch the averages
            is_own = name.split("/")[1] in found
            self.log(name, value, prog_bar=name in shown, rank_zero_only=is_own)

    def finish_start(self) -> dict[str, float]:
        """Return the scores of the start by name, after a pass over the selection split."""
        found, averages = self._finish("selection", keep=True)
        del self.results["selection"]  # of other coefficients than those that will be learned
        self._scores.record(self.history, 0, found, averages)
        return logged("selection", found, averages)

    def finish_test(self) -> dict[str, float]:
        """Return the scores of the test split by name, after a pass over it."""
        return logged("test", *self._finish("test", keep=True))

    def _finish(self, stage: Stage, keep: bool) -> tuple[Scores, dict[str, float]]:
        """Return the scores by task, with those of generated texts, and their averages."""
        generated = self._generated(stage) if keep else {}
        return self._scores.finish(stage, self.objective.share, keep, generated)

    def _generated(self, stage: Stage) -> dict[str, dict[str, float]]:
        """Return the scores of generated texts, of the tasks that ask for them."""
        data = getattr(self._trainer, "datamodule", None)
        if not isinstance(data, MergeDataModule):
            return {}
        place = self.trainer.global_rank, self.trainer.world_size
        return {
            task: generated_scores(self.merged, task, data, stage, place, self._scores.kept)
            for task in data.tasks
            if data.questions(task, stage)
        }

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    @property
    def results(self) -> dict[str, dict[str, dict[str, float]]]:
        """Scores of the evaluated splits: `{split: {task or "average": {metric: value}}}`."""
        return self._scores.results

    @property
    def experts(self) -> dict[str, dict[str, dict[str, float]]]:
        """Scores of the tasks' own sources: `{split: {task: {metric: value}}}`."""
        return self._scores.experts

    @property
    def examples(self) -> dict[str, dict[str, AbstractExamples]]:
        """Scores of the last evaluated split example by example: `{task: {metric: ...}}`.

        They are those that can be resampled, after `keep_examples`, of this process.
        """
        return {} if self._scores.kept is None else self._scores.kept.compute()

    def keep_examples(self) -> None:
        """Keep the scores of single examples in later evaluations."""
        self._scores.kept = ExampleScores()

    def refresh_buffers(self, data: Any = None) -> None:
        """Recompute BatchNorm statistics and finaliser corrections, as the recipe asks for.

        Args:
            data: data module with the adaptation data. Default: the trainer's.
        """
        data = data or getattr(self._trainer, "datamodule", None)
        sample = partial(self._sample, data) if hasattr(data, "evaluation_loaders") else None
        self._finishing.refresh(self.merged, data, sample)

    def _sample(self, data: Any, batches: int) -> Iterator[tuple[str, Batch]]:
        """Yield sampled batches of each task's adaptation split, on the module's device."""
        for task, loader in zip(self.tasks, data.evaluation_loaders("adaptation"), strict=True):
            for batch in sample_batches(loader, batches):
                yield task, self.transfer_batch_to_device(batch, self.device, 0)
