"""The LightningModule: merged model, objective, tasks and metrics meet here."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn

from gradmerge.errors import ConfigError
from gradmerge.finishing import Finishing
from gradmerge.memory import release_freed_memory
from gradmerge.merged import Memory, MergedModel
from gradmerge.metrics import TaskScores, mean_scores, normalised
from gradmerge.objectives import (
    AbstractTerm,
    CrossEntropy,
    Objective,
    Predictions,
    next_token_rows,
)
from gradmerge.provenance import start_run
from gradmerge.recipe import Recipe
from gradmerge.saved import restore, to_save
from gradmerge.sources.token_report import summarise, token_report
from gradmerge.spec import from_plain, to_plain

Batch = Mapping[str, Any]
_NOT_INPUTS = frozenset({"labels", "bytes_per_token"})
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


class MergeModule(lightning.LightningModule):
    """Learns the coefficients of a merge with `trainer.fit`.

    A training batch maps task names to batches of that task (`MergeDataModule` makes them); a batch
    is a mapping of model inputs, with `labels` where there are any. Only the raw coefficients are
    parameters: they are all that the optimiser and the checkpoint hold.

    Args:
        recipe: what is merged and how.
        objective: what is minimised; a single term will do.
        memory: `resident` keeps merged tensors for the step; `streamed` rebuilds them in backward
        and     holds about one layer.
        dtype: dtype of the merged weights in training.
        activation_checkpointing: recompute each block's activations in backward.
        learning_rate: of Adam, where no other optimiser is configured.
        load_sources: copy the sources to the training device once, instead of reading their mapped
            files at every step (a GPU wants it, if they fit).
        score_experts: also run each task's source once an evaluation split, for normalised scores.
        module: the architecture, where no source carries a config (Python only).

    Example:
        >>> from gradmerge import MergeModule, Recipe
        >>> import torch
        >>> base, a, b = (torch.nn.Linear(4, 2) for _ in range(3))
        >>> module = MergeModule(Recipe(sources={"a": a, "b": b}, base=base))
        >>> [tuple(parameter.shape) for parameter in module.parameters()]
        [(2, 2)]
    """

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective | None = None,
        memory: Memory = "resident",
        dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32",
        activation_checkpointing: bool = False,
        learning_rate: float = 1e-2,
        load_sources: bool = False,
        score_experts: bool = True,
        module: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if isinstance(recipe, Mapping):
            recipe = from_plain(recipe)
        if isinstance(objective, Mapping):
            objective = from_plain(objective)
        if isinstance(objective, AbstractTerm):
            objective = Objective([objective])
        self.recipe = recipe
        self.objective = objective or Objective([CrossEntropy()])
        self.learning_rate = learning_rate
        self.load_sources = load_sources
        self.score_experts = score_experts
        if dtype not in DTYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, came {dtype!r}.")
        self.merged = MergedModel(recipe, module, memory, DTYPES[dtype])
        if activation_checkpointing:
            self.merged.enable_activation_checkpointing()
        self._start = {k: c.detach().clone() for k, c in self._small_coefficients().items()}
        self._remember(memory, dtype, activation_checkpointing)
        self._checked_unused = False
        self._finishing = Finishing()
        self._scores: dict[str, TaskScores] = {}
        self._experts: dict[str, dict[str, dict[str, float]]] = {}
        self.results: dict[str, dict[str, dict[str, float]]] = {}
        for warning in self.merged.plan.warnings:
            lightning.pytorch.utilities.rank_zero_warn(str(warning))
        if self.merged.plan.alignment is not None:
            summary = summarise(token_report(self.merged.plan.alignment))
            lightning.pytorch.utilities.rank_zero_info(summary)

    def _remember(self, memory: str, dtype: str, activation_checkpointing: bool) -> None:
        """Hyper-parameters as plain data: the checkpoint then loads with `weights_only=True`."""
        plain = {
            "recipe": to_plain(self.recipe),
            "objective": to_plain(self.objective),
            "memory": memory,
            "dtype": dtype,
            "activation_checkpointing": activation_checkpointing,
            "learning_rate": self.learning_rate,
            "load_sources": self.load_sources,
            "score_experts": self.score_experts,
        }
        self._set_hparams(plain)
        self._hparams_initial = copy.deepcopy(self._hparams)
        self._log_hyperparams = True

    def _small_coefficients(self) -> dict[str, Tensor]:
        """Coefficients, where the objective has regularisers that look at them."""
        return self.merged.coefficients() if self.objective.regularisers else {}

    @property
    def causal(self) -> bool:
        """Whether the network predicts the next token."""
        name = type(self.merged.skeleton).__name__
        return name.endswith(("ForCausalLM", "LMHeadModel"))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, in the order of the evaluation loaders."""
        return tuple(self.merged.tasks)

    def setup(self, stage: str) -> None:
        """Take the tasks, and whose source each uses, from the data module."""
        data = getattr(self._trainer, "datamodule", None)
        self.take_tasks(getattr(data, "tasks", None))
        self.objective.require_tasks(self.merged.tasks)

    def take_tasks(self, described: Mapping[str, Any] | None) -> None:
        """Take the tasks, and whose source each uses, from a data module's."""
        if described:
            tasks = {name: task.source or name for name, task in described.items()}
            lost = [f"{t} -> {s}" for t, s in tasks.items() if s not in self.merged.plan.sources]
            if lost and len(self.merged.plan.sources) and self._tasks_need_source():
                raise ConfigError(
                    f"these tasks name no source: {', '.join(lost)}; sources are "
                    f"{', '.join(self.merged.plan.sources)}. Set `source` of the task."
                )
            first = next(iter(self.merged.plan.sources))
            self.merged.tasks = {
                name: source if source in self.merged.plan.sources else first
                for name, source in tasks.items()
            }
            if lost:
                self.score_experts = False

    def _tasks_need_source(self) -> bool:
        return self.objective.needs_teacher or bool(self.merged.plan.private)

    def _by_task(self, batch: Batch) -> dict[str, Batch]:
        if all(isinstance(value, Mapping) for value in batch.values()):
            unknown = [name for name in batch if name not in self.merged.tasks]
            if unknown:
                raise ConfigError(
                    f"the batch has tasks {unknown}; expected some of {', '.join(self.tasks)}."
                )
            return dict(batch)
        if len(self.merged.tasks) != 1:
            raise ConfigError(
                "a training batch must map task names to batches, came the keys "
                f"{', '.join(map(str, batch))}; tasks are {', '.join(self.tasks)}."
            )
        return {self.tasks[0]: batch}

    def rows(self, task: str, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits of a task's batch as rows, labels, and the rows kept (see `next_token_rows`)."""
        inputs = {key: value for key, value in batch.items() if key not in _NOT_INPUTS}
        output = self.merged(task=task, **inputs)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"{type(self.merged.skeleton).__name__} returned {type(output).__name__}; expected "
                "a tensor of logits or an output with `logits`."
            )
        config = getattr(self.merged.skeleton, "config", None)
        decodes = getattr(config, "is_encoder_decoder", False)
        mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
        return next_token_rows(logits.float(), batch.get("labels"), mask, self.causal)

    def _expert_rows(self, task: str, batch: Batch) -> Tensor:
        with self.merged.as_source(self.merged.tasks[task]):
            return self.rows(task, batch)[0].detach()

    def _predict(self, task: str, batch: Batch, shared: bool = False) -> Predictions:
        teacher = self._expert_rows(task, batch) if self.objective.needs_teacher else None
        logits, labels, _ = self.rows(task, batch)
        if labels is None and self.objective.needs_labels:
            terms = [type(term).__name__ for term in self.objective.terms if term.needs_labels]
            raise ConfigError(
                f"task {task} has no labels, which {', '.join(terms)} needs; name its "
                "label column, or use Entropy or KLToSource."
            )
        return Predictions(logits, labels, teacher, shared)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One merge, one backward a task, one contraction."""
        batches = self._by_task(batch)
        runs = [partial(self._task_loss, task, b, tuple(batches)) for task, b in batches.items()]
        loss, values = self.merged.accumulate(runs, self._inner_scale())
        if not self._checked_unused:
            self._checked_unused = True
            self._share_touched()
            self.merged.fix_unused()
        if self.objective.regularisers:
            penalty = self.objective.penalty(self._small_coefficients(), self._start)
            self.log("train/penalty", penalty.detach(), batch_size=1)
            loss = loss + penalty
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        for task, value in zip(batches, values, strict=True):
            share = self.objective.share(task, tuple(batches))
            if share:
                self.log(f"train/{task}/loss", value / share, batch_size=1)
        return loss

    def _task_loss(self, task: str, batch: Batch, tasks: Sequence[str]) -> Tensor:
        predictions = self._predict(task, batch, self.trainer.world_size > 1)
        return self.objective.share(task, tasks) * self.objective.loss(predictions)

    def _inner_scale(self) -> float:
        """The scale of a float16 gradient scaler: the backward inside must not underflow either."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0

    def _share_touched(self) -> None:
        """A tensor is used if any process used it."""
        if self.trainer.world_size > 1:
            found: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(found, self.merged.touched)
            self.merged.touched = set().union(*found)

    def on_fit_start(self) -> None:
        """Training mode, for trainers leave modes as they find them; sources to the device."""
        self.train()
        start_run(self.trainer, self)
        if self.merged.memory == "streamed":
            release_freed_memory()
        if self.load_sources:
            self.merged.plan.load(self.device)

    def on_validation_model_train(self) -> None:
        """Go back to training; a trainer would restore flags of submodules, which the network is
        not.
        """
        self.train(self.trainer.state.fn == "fit")

    def on_fit_end(self) -> None:
        """Ready for use."""
        self.eval()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam; the command line's `optimizer` and `lr_scheduler` take its place."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def on_validation_epoch_start(self) -> None:
        """Start the scores of the selection split."""
        self._begin()

    def on_test_epoch_start(self) -> None:
        """Start the scores of the test split."""
        self._begin()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one task's batch of the selection split."""
        self._evaluate(batch, dataloader_idx, "selection")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one task's batch of the test split."""
        self._evaluate(batch, dataloader_idx, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the selection split."""
        self._finish("selection")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test split."""
        self._finish("test")

    def _begin(self) -> None:
        self.refresh_buffers()
        self._scores = {k: TaskScores(self.causal, self.device) for k in ("merged", "expert")}

    def _evaluate(self, batch: Batch, index: int, stage: str) -> None:
        if not batch:  # another process has one more
            return
        task = self.tasks[index]
        predictions = self._predict(task, batch)
        bytes_per_token = float(batch.get("bytes_per_token", 1.0))
        rows = self.objective.rows(predictions)
        if rows:
            self._scores["merged"].update_loss(task, self.objective.loss(predictions), rows)
        if predictions.labels is None:
            return
        merged = self._scores["merged"]
        merged.update(task, predictions.logits, predictions.labels, bytes_per_token)
        if self.score_experts and stage not in self._experts and not self.trainer.sanity_checking:
            teacher = predictions.teacher
            expert = teacher if teacher is not None else self._expert_rows(task, batch)
            self._scores["expert"].update(task, expert, predictions.labels, bytes_per_token)

    def _finish(self, stage: str) -> None:
        merged = self._scores["merged"]
        found = merged.compute()
        if not self.trainer.sanity_checking and stage not in self._experts:
            self._experts[stage] = self._scores["expert"].compute()
        for task, values in found.items():
            expert = self._experts.get(stage, {}).get(task, {}).get(merged.score.name)
            own = values.get(merged.score.name)
            if expert is not None and own is not None:
                values["normalised"] = normalised(merged.score, own, expert)
            for name, value in values.items():
                self.log(f"{stage}/{task}/{name}", value, rank_zero_only=True)
        averages = mean_scores(found)
        if "loss" in averages:
            # Weighted as in training; early stopping and checkpoints watch it.
            shares = {t: self.objective.share(t, tuple(found)) for t in found}
            averages["loss"] = sum(shares[t] * v.get("loss", 0.0) for t, v in found.items())
        for name, value in averages.items():
            key = f"{stage}/loss" if name == "loss" else f"{stage}/average/{name}"
            self.log(key, value, prog_bar=name in ("loss", merged.score.name))
        if not self.trainer.sanity_checking:
            self.results[stage] = {**found, "average": averages}

    def refresh_buffers(self, data: Any = None) -> None:
        """Recompute on adaptation data (by default the trainer's) what the recipe says is to be:
        BatchNorm statistics, and the corrections of finalisers.
        """
        self._finishing.refresh(self, data)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the coefficients belong to."""
        self.refresh_buffers()
        own = (self._checked_unused, self.results, self._experts)
        checkpoint["gradmerge"] = to_save(self.merged, *own)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse coefficients of other weights, and restore what is not a parameter.

        Raises:
            FingerprintError: the sources' weights are not those of the checkpoint.
            ConfigError: the checkpoint is not one of gradmerge.
        """
        restored = restore(self.merged, checkpoint.get("gradmerge"))
        self._checked_unused, self.results, self._experts = restored
