"""`MergeModule`, the LightningModule that learns the coefficients of a merge."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import lightning
import torch
from torch import Tensor, nn
from typing_extensions import override

from gradmerge.calibration.finish import Finishing
from gradmerge.coefficients import AbstractInit
from gradmerge.common.checkpoints import load_checkpoint
from gradmerge.common.errors import ConfigError, nearest, require
from gradmerge.common.memory import release_freed_memory
from gradmerge.common.names import dtype_name
from gradmerge.common.progress import show_progress
from gradmerge.common.spec import from_plain, to_plain
from gradmerge.engine.merged import Memory, MergedModel
from gradmerge.engine.opening import open_plan
from gradmerge.engine.outputs import Batch
from gradmerge.engine.placement import words_of
from gradmerge.engine.plan import Plan
from gradmerge.engine.predict import by_task, no_labels, require_ensemble
from gradmerge.engine.recipe import Recipe
from gradmerge.engine.teacher import Teacher
from gradmerge.engine.teacher_store import TeacherStore
from gradmerge.export.folder import DTYPES
from gradmerge.export.history import History
from gradmerge.objectives import AbstractTerm, CrossEntropy, Objective
from gradmerge.optimisers import AbstractPerturbed, LogisticNoise
from gradmerge.sources import AbstractSource
from gradmerge.sources.tokenizers.report import summarise, token_report
from gradmerge.training.checkpoint import (
    damage_named,
    guard_loading,
    holding,
    recipe_of,
    require_options,
    restore,
    to_save,
    unknown_sources,
)
from gradmerge.training.data import MergeDataModule
from gradmerge.training.evaluation import EvaluatingModule
from gradmerge.training.examples import Stage
from gradmerge.training.limits import require_learning, require_noise_on_coefficients
from gradmerge.training.logit_scale import LogitScale
from gradmerge.training.placing import place_sources, placement_of
from gradmerge.training.regularisation import Regularisation
from gradmerge.training.run import start_run
from gradmerge.training.saving import Saver
from gradmerge.training.scores import SplitScores
from gradmerge.training.sharing import (
    end_sharing,
    merge_together,
    require_strategy,
    share_sources,
)
from gradmerge.training.start import score_start
from gradmerge.training.summary import kept_step, to_wandb, wandb_summary


class MergeModule(EvaluatingModule):
    """Learn the coefficients of a merge with `trainer.fit`.

    The sources stay frozen. Only the raw coefficients (and `logit_scale`, if set) are parameters,
    so optimiser state and checkpoints stay small; to load a checkpoint, the sources must still be
    available.

    A training batch maps task names to batches of model inputs, as `MergeDataModule` yields them;
    `labels` are needed only for supervised terms. Training logs `train/loss` and
    `train/<task>/loss`; evaluation logs `<split>/loss`, `<split>/<task>/<metric>` and
    `<split>/average/<metric>`, where the split is `selection` or `test`.

    Args:
        recipe: the merge: sources, base, operator and the granularity of the coefficients (from
            Python also opened, a `Plan`).
        objective: the loss to minimise, or a single term of it. Default: cross-entropy.
        memory: `resident` keeps the merged tensors during a step; `streamed` rebuilds them in the
            backward pass and holds about one layer at a time.
        dtype: dtype of the merged weights during training, and of floating-point buffers and
            inputs. Tensors that transformers keeps in float32 when it loads a model stay in it.
        activation_checkpointing: recompute the activations of each block in the backward pass.
        tasks_at_once: number of tasks whose passes share a merge in streamed memory, where a step
            merges each tensor in a forward and a backward pass: 1 does so for each task, and has
            the activations of one task at a time; 4 does so once for four tasks, and has the
            activations of all four.
        learning_rate: learning rate of Adam, the optimiser unless another is configured.
        private_learning_rate: learning rate of what the recipe trains per task (`trained`,
            `adapters`), with any optimiser. Default: that of the coefficients.
        source_shards: number of processes among which the sources are divided (strategy ddp): each
            reads, merges and contracts its share of the rows, and they exchange merged rows. 1:
            each process has all sources; 0: they are divided among all processes.
        placement: where the sources' tensors are, each in its stored dtype, during training and
            evaluation. `device`: copied once to the device (on the CPU: to memory). `pinned`:
            copied once to page-locked host memory, from where those needed next are sent to the GPU
            while it computes. `mapped`: read from the files at every use, those needed next ahead.
            `auto`: on a GPU `device` for as many sources as there is room for, then `pinned` within
            half of the free host memory, then `mapped`; on a CPU `mapped`. One word, or words by
            source, with `base`, and `*` for the rest (else `auto`).
        load_sources: deprecated, the same as `placement: device`.
        score_experts: also score each task's own source, once per evaluation split, to report
            normalised scores.
        score_start: also score the selection split before the first step, if it is scored during
            the fit.
        logit_scale: initial value of a learned positive factor on the merged logits (learned
            soup). It is used in training only, not in evaluation or export. Default: no factor.
        teacher_cache: gigabytes of disk for what the tasks' own sources return on examples, if
            the objective compares with it (`KLToSource`, `HardLabels`, `HiddenStates`): each
            example then runs through its source once, in training and selection. Once full, further
            examples run through it every time. Predictions that depend on the whole batch (pairs
            of texts, spans of padded texts) are not kept. Default: no cache.
        teacher_cache_folder: local folder of the cache, which processes and later fits share.
            Entries are found by weights of the source and content of the example. Default: a
            temporary folder per process, removed at its end.
        module: the network architecture; required if no source has a config (Python only).
        allow_modules: modules outside gradmerge whose classes a checkpoint may name (your own
            granularity, operator, ...); they are imported when the checkpoint is loaded.

    Examples:
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
        source_shards: int = 1,
        score_experts: bool = True,
        score_start: bool = True,
        logit_scale: float | None = None,
        teacher_cache: float = 0.0,
        teacher_cache_folder: str | None = None,
        module: nn.Module | None = None,
        allow_modules: Sequence[str] = (),
        private_learning_rate: float | None = None,
        placement: str | dict[str, str] = "auto",
        tasks_at_once: int = 1,
    ) -> None:
        super().__init__()
        self.allow_modules = tuple(allow_modules)
        opened: Recipe | Plan = recipe
        if isinstance(recipe, Plan):
            recipe = recipe.recipe
        elif isinstance(recipe, Mapping):
            opened = recipe = from_plain(recipe, allow_modules)
        if isinstance(objective, Mapping):
            objective = from_plain(objective, allow_modules)
        if isinstance(objective, AbstractTerm):
            objective = Objective([objective])
        dtype = dtype_name(dtype)  # type: ignore[assignment]
        if dtype not in DTYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
        require_learning(learning_rate, logit_scale, private_learning_rate)
        if private_learning_rate is not None and not (recipe.trained or recipe.adapters):
            raise ConfigError(
                "private_learning_rate: expected a recipe with `trained` or `adapters`, got one "
                "that trains nothing per task; leave it out."
            )
        finite = 0 <= teacher_cache < math.inf
        require(finite, "teacher_cache", "a number of gigabytes", teacher_cache)
        self._store = TeacherStore(teacher_cache, teacher_cache_folder) if teacher_cache else None
        require(source_shards >= 0, "source_shards", "at least 0", source_shards)
        placement = placement_of({"placement": placement, "load_sources": load_sources})
        plan = opened if isinstance(opened, Plan) else open_plan(opened, module)
        words_of(placement, plan.known_owners)
        plan.checked_later = source_shards != 1
        merged = MergedModel(plan, None, memory, DTYPES[dtype], tasks_at_once=tasks_at_once)
        if activation_checkpointing:
            merged.enable_activation_checkpointing()
        options = {
            "memory": memory,
            "dtype": dtype,
            "activation_checkpointing": activation_checkpointing,
            "tasks_at_once": tasks_at_once,
            "learning_rate": learning_rate,
            "placement": placement,
            "source_shards": source_shards,
            "score_experts": score_experts,
            "score_start": score_start,
            "logit_scale": logit_scale,
            "private_learning_rate": private_learning_rate,
        }
        self._assemble(merged, objective or Objective([CrossEntropy()]), options)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = "cpu",
        strict: bool | None = None,
        *,
        weights_only: Literal[True] = True,
        allow_modules: Sequence[str] = (),
        trust_remote_code: bool = False,
        sources: Mapping[str, str | AbstractSource] | None = None,
        **options: Any,
    ) -> MergeModule:
        """Build the module of a checkpoint, whose sources are opened again.

        The checkpoint is plain data, and what it states about permissions does not count.

        Args:
            checkpoint_path: local file.
            map_location: device of its tensors.
            strict: whether the parameters must be those of the recipe. Default: yes.
            weights_only: nothing else is possible; checkpoints are never unpickled.
            allow_modules: modules outside gradmerge whose classes the checkpoint may name.
            trust_remote_code: run modelling code that ships with the sources.
            sources: places of sources that have moved, by name, or `base`. Hub ids that only the
                checkpoint names are not downloaded, but taken from the local cache.
            **options: arguments of the module that replace those in the checkpoint.

        Raises:
            ConfigError: the file is no checkpoint of gradmerge or damaged, or names classes that
                are not allowed.
            FingerprintError: the coefficients were learned on other source weights.
        """
        found = load_checkpoint(checkpoint_path, map_location)
        own = {"self", "module", "teacher_cache", "teacher_cache_folder"}  # a stranger's folder
        known = set(inspect.signature(cls.__init__).parameters) - own
        saved = {k: v for k, v in found["hyper_parameters"].items() if k in known}
        stranger = (
            nullcontext() if "recipe" in options else unknown_sources(checkpoint_path, sources)
        )
        with damage_named(checkpoint_path):
            if "recipe" not in options:
                permitted = (allow_modules, trust_remote_code, sources)
                options["recipe"] = recipe_of(saved["recipe"], *permitted)
            require_options(saved)
        with stranger:
            module = cls(**{**saved, **options, "allow_modules": allow_modules})
        module.on_load_checkpoint(found)
        module.load_state_dict(found["state_dict"], module.strict_loading and strict is not False)
        return module

    @override
    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        with damage_named("the checkpoint"):
            return super().load_state_dict(*args, **kwargs)

    @classmethod
    def around(cls, merged: MergedModel, score_experts: bool = True) -> MergeModule:
        """Wrap an existing merged model, to score it on data."""
        module = cls.__new__(cls)
        lightning.LightningModule.__init__(module)
        module.allow_modules, module._store = (), None
        options = {
            "memory": merged.memory,
            "dtype": str(merged.dtype).removeprefix("torch."),
            "activation_checkpointing": False,
            "tasks_at_once": 1,
            "learning_rate": 1e-2,
            "placement": "auto",
            "source_shards": 1,
            "score_experts": score_experts,
            "score_start": True,
            "logit_scale": None,
            "private_learning_rate": None,
        }
        module._assemble(merged, Objective([CrossEntropy()]), options)
        return module

    def _assemble(
        self, merged: MergedModel, objective: Objective, options: Mapping[str, Any]
    ) -> None:
        self.merged = merged
        self.recipe = merged.plan.recipe
        self.objective = objective
        self.learning_rate: float = options["learning_rate"]
        self.private_learning_rate: float | None = options["private_learning_rate"]
        self.placement: str | dict[str, str] = options["placement"]
        self.source_shards: int = options["source_shards"]
        self.score_experts: bool = options["score_experts"]
        self.score_start: bool = options["score_start"]
        require_ensemble(self.merged, self.objective)
        self.teacher = Teacher(merged, objective, self._store)
        self.regularisation = Regularisation(self.objective, self.merged)
        start = options["logit_scale"]
        self.logit_scale = None if start is None else LogitScale(start, self.objective.terms)
        self._checked_unused = False
        self._apart: set[str] = set()
        self._finishing = Finishing(lightning.pytorch.utilities.rank_zero_warn)
        self._scores = SplitScores()
        self.history = History()
        for warning in self.merged.plan.warnings:
            lightning.pytorch.utilities.rank_zero_warn(str(warning))
        if self.merged.plan.tokens is not None:
            summary = summarise(token_report(self.merged.plan.tokens))
            lightning.pytorch.utilities.rank_zero_info(summary)
        # plain data, so checkpoints load with `weights_only=True`
        plain = {"recipe": to_plain(self.recipe), "objective": to_plain(self.objective)}
        self._set_hparams({**plain, **options})
        self._hparams_initial = copy.deepcopy(self._hparams)
        self._log_hyperparams = True

    def start_at(self, init: AbstractInit) -> None:
        """Replace the init of the recipe and the reference point of the regularisers.

        The coefficients themselves are not changed.
        """
        self.merged.state.plan = self.merged.plan.with_init(init)
        self.recipe = self.merged.plan.recipe
        self.hparams["recipe"] = to_plain(self.recipe)
        raw = self.merged.plan.initial_raw()
        own = self.merged.raw
        self.regularisation.start_at({key: value.to(own[key]) for key, value in raw.items()})

    def configure_callbacks(self) -> list[lightning.Callback]:
        """Return a callback that saves the state of a fit which is told to end.

        The tasks are taken here, before callbacks copy what is trained per task.
        """
        trainer: Any = self.trainer
        self.take_tasks(getattr(getattr(trainer, "datamodule", None), "tasks", None))
        saves = trainer.state.fn != "fit" or any(isinstance(c, Saver) for c in trainer.callbacks)
        return [] if saves else [Saver()]

    def setup(self, stage: str) -> None:
        """Take the tasks and their sources from the trainer's data module.

        It is called before the trainer loads a checkpoint, which from here on is never unpickled.
        """
        require_strategy(self.trainer)
        guard_loading(self.trainer)
        if stage != "fit":
            self.merged.plan.require_finite()
        data = getattr(self._trainer, "datamodule", None)
        self.take_tasks(getattr(data, "tasks", None))
        self.objective.require_tasks(self.merged.tasks)
        if isinstance(data, MergeDataModule):
            self._require_labels(data, stage)

    def _require_labels(self, data: MergeDataModule, stage: str) -> None:
        """Reject tasks without labels if a term of the objective needs them."""
        splits: list[Stage] = ["adaptation"] if stage == "fit" else []
        if stage == "test":
            splits.append("test")
        elif self.trainer.enable_validation:
            splits.append("selection")
        for split in splits if self.objective.needs_labels else ():
            for task in data.tasks:
                if data.lacks_labels(task, split):
                    raise no_labels(f"{task}, {split},", self.objective)

    def take_tasks(self, described: Mapping[str, Any] | None) -> None:
        """Set the tasks and their sources from the `tasks` of a data module.

        Raises:
            ConfigError: a task names an unknown source; or has none, and the objective or private
                tensors need one.
        """
        if not described:
            return
        plan = self.merged.plan
        known = ", ".join(plan.serving)
        tasks = {name: task.source or name for name, task in described.items()}
        for name, task in described.items():
            if task.source is not None and task.source not in plan.serving:
                raise ConfigError(
                    f"task {name}: unknown source {task.source!r} (choose from {known})."
                    f"{nearest(task.source, plan.serving)} Correct `source`, or leave it out for a "
                    "task without a source of its own."
                )
        lost = [f"{task} -> {s}" for task, s in tasks.items() if s not in plan.serving]
        if lost and (self.objective.needs_teacher or plan.private):
            raise ConfigError(
                f"unknown sources of tasks: {', '.join(lost)} (choose from {known}). Set `source` "
                "of these tasks."
            )
        if lost:
            self.score_experts = False
        first = next(iter(plan.sources))
        self.merged.tasks = {n: s if s in plan.serving else first for n, s in tasks.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Merge once, run one backward pass per task, and contract the gradients once."""
        batches = by_task(self.merged, batch)
        if self.logit_scale is not None:
            self.logit_scale.begin()
        loss, values = self.merged.accumulate(self._runs(batches), self._inner_scale())
        self.require_finite_losses(dict(zip(batches, values, strict=True)))
        if self.logit_scale is not None:
            loss = loss + self.logit_scale.deferred(self._inner_scale())
            self.log("train/logit_scale", self.logit_scale.value, batch_size=1)
        if not self._checked_unused:
            self._checked_unused = True
            self._share_touched()
            self.merged.fix_unused()
        if self.objective.regularisers:
            penalty = self.regularisation.penalty()
            self.log("train/penalty", penalty.detach(), batch_size=1)
            self.require_finite_losses({"regularisers": penalty})
            loss = loss + penalty
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        self.history.add("train/loss", self.trainer.global_step, loss.detach())
        for task, value in zip(batches, values, strict=True):
            share = self.objective.share(task, tuple(batches))
            if share:
                self.log(f"train/{task}/loss", value / share, batch_size=1)
        return loss

    def _runs(self, batches: Mapping[str, Batch]) -> list[Callable[[], Tensor]]:
        tasks = tuple(batches)
        return [partial(self._task_loss, task, batch, tasks) for task, batch in batches.items()]

    def _task_loss(self, task: str, batch: Batch, tasks: Sequence[str]) -> Tensor:
        shared = self.trainer.world_size > 1
        predictions = self._predict(task, batch, shared)
        if self.logit_scale is not None:
            predictions = replace(predictions, logits=self.logit_scale.scaled(predictions.logits))
        return self.objective.share(task, tasks) * self.objective.loss(predictions)

    def _inner_scale(self) -> float:
        """Return the scale of a float16 gradient scaler; inner backward passes need it too."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0

    def _share_touched(self) -> None:
        """Share the used tensors: a tensor counts as used if any process used it."""
        if self.trainer.world_size > 1:
            found: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(found, self.merged.touched)
            self.merged.touched = set().union(*found)

    def on_fit_start(self) -> None:
        """Enter training mode, record the run, and place the sources."""
        self.train()
        self.merged.private.settled = True
        bar = self.trainer.progress_bar_callback
        show_progress(bar is not None and self.trainer.is_global_zero)
        start_run(self.trainer, self)
        if self.merged.memory == "streamed":
            release_freed_memory()
        share_sources(self.trainer, self.merged, self.source_shards)
        place_sources(self)

    def on_train_start(self) -> None:
        """Check the optimisers against the trainer, and measure what is known before a step.

        Raises:
            ConfigError: the optimiser does not suit the trainer or the parameters, or no
                coefficient has a gradient to measure its importance by.
        """
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, AbstractPerturbed):
                scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
                optimizer.require(self.trainer.accumulate_grad_batches, scaled)
            if isinstance(optimizer, LogisticNoise):
                require_noise_on_coefficients(optimizer.noisy, self.merged.raw.values())
        if self.score_start:
            score_start(self.trainer, self)
        if not self.regularisation.wants_batches:
            return
        data = getattr(self._trainer, "datamodule", None)
        # a new loader starts at the same batch as training and does not advance its loader
        loader: Any = self.trainer.train_dataloader if data is None else data.train_dataloader()
        moved = (self.transfer_batch_to_device(batch, self.device, 0) for batch in loader)
        with self.trainer.precision_plugin.train_step_context():
            steps = (self._runs(by_task(self.merged, batch)) for batch in moved)
            self.regularisation.measure(steps, self._inner_scale())

    def teardown(self, stage: str) -> None:
        """Unload the sources, but for a validation: searches score by many, and a fit follows."""
        if stage != "validate":
            self.merged.plan.unload()

    def on_train_end(self) -> None:
        """Record the final logit scale in the record of the run, and unload the sources."""
        self._note_logit_scale()
        self.merged.plan.unload()

    def _note_logit_scale(self) -> None:
        if self.logit_scale is not None and self.merged.state.run:
            self.merged.state.run["logit_scale"] = self.logit_scale.value

    def on_validation_start(self) -> None:
        """Place the sources; merge together with the processes that share them, if any do."""
        place_sources(self)
        merge_together(self.merged)

    def on_test_start(self) -> None:
        """Place the sources."""
        place_sources(self)

    def on_validation_model_train(self) -> None:
        """Return to training mode within a fit.

        The trainer restores the mode of submodules only, and the network is not a submodule.
        """
        self.train(self.trainer.state.fn == "fit")

    def on_fit_end(self) -> None:
        """Switch to evaluation mode, and sum up the fit in its W&B run."""
        self.eval()
        end_sharing(self.merged)
        step = self.history.step if self.history.step is not None else kept_step(self.trainer)
        to_wandb(self.trainer.loggers, wandb_summary(self, step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with `learning_rate`; `optimizer` on the command line replaces it."""
        return torch.optim.Adam(self.parameter_groups(), lr=self.learning_rate)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters for an optimiser; private ones apart if they have their own rate.

        An optimiser of your own that takes them gives each group its learning rate.
        """
        if self.private_learning_rate is None:
            return [{"params": list(self.parameters())}]
        private = list(self.merged.private.parameters())
        own = [p for p in self.parameters() if not any(p is other for other in private)]
        return [{"params": own}, {"params": private, "lr": self.private_learning_rate}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add fingerprints, fixed tensors, buffers, corrections and scores to the checkpoint.

        They belong to the coefficients in the checkpoint, which differ from the current ones if a
        callback saves averaged weights.
        """
        own = dict(self.named_parameters())
        self.merged.plan.require_unchanged()
        with holding(own, checkpoint.get("state_dict", {})):
            self.merged.state.require_finite()
            self.refresh_buffers()
            self._note_logit_scale()
            known = (self._checked_unused, self.results, self._scores.experts)
            checkpoint["gradmerge"] = to_save(self.merged, *known)
        checkpoint["gradmerge"]["history"] = self.history.to_save()
        checkpoint["gradmerge"]["regularisation"] = self.regularisation.to_save()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits these sources, and restore all but the parameters.

        Raises:
            FingerprintError: the checkpoint was trained on other source weights.
            ConfigError: the checkpoint was not written by gradmerge.
        """
        saved = checkpoint.get("gradmerge")
        with damage_named("the checkpoint"):
            restored = restore(self.merged, checkpoint)
            self.regularisation.restore((saved or {}).get("regularisation", {}))
            self.history = History.restore((saved or {}).get("history", {}))
        self._checked_unused, self._scores.results, self._scores.experts = restored
