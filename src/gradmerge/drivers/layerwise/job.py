"""A job of the layer-wise driver: block after block, then the scores and the export."""

from __future__ import annotations

import gc
import logging
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from torch import Tensor
from torch.utils.data import DataLoader

from gradmerge._memory import release_freed_memory, trim_heap
from gradmerge.alignment import AbstractAlignment
from gradmerge.alignment.views import original_of
from gradmerge.drivers.base import Job
from gradmerge.drivers.layerwise.activations import Activations
from gradmerge.drivers.layerwise.block import BlockModule, MergedBlock, MergedWeights, mean_square
from gradmerge.drivers.layerwise.chain import Chain, Passing, find_blocks
from gradmerge.drivers.layerwise.files import Starts, assembled, read_mapped, write_tensors
from gradmerge.drivers.layerwise.scores import score
from gradmerge.engine.opening import open_plan
from gradmerge.engine.plan import Plan
from gradmerge.engine.state import FitState
from gradmerge.errors import ConfigError, shorten
from gradmerge.export.folder import export_state
from gradmerge.spec import to_plain
from gradmerge.training.callbacks import CoefficientLogger
from gradmerge.training.loaders import StreamLoader, TaskStream, even_batches, sample_batches
from gradmerge.training.module import DTYPES
from gradmerge.training.run import describe, describe_data
from gradmerge.training.scores import Scores

# Batches per task, at most, that the BatchNorm statistics of the export are recomputed on.
_NORM_BATCHES = 16
_FILE, _BUFFER = "raw.safetensors", "buffer:"


class Layers:
    """One job of the layer-wise driver; making it finds everything that would be rejected.

    Args:
        job: what is merged, and with which data.
        blocks: regular expressions of the blocks' names.
        batch_size: examples per task and step.
        memory: GiB of activations in memory.

    Raises:
        ConfigError: the network is no chain of blocks, or the tasks do not fit.
    """

    def __init__(
        self, job: Job, blocks: Sequence[str] | None, batch_size: int | None, memory: float
    ) -> None:
        self.job = job
        self._size = batch_size or job.data.batch_size
        with _quiet():
            trainer = self._make_trainer(job.root, 1)
        if trainer.world_size != 1:
            raise ConfigError(
                f"LayerWise: expected one process, got {trainer.world_size}: a block is small, "
                "and its steps follow one another. Set trainer.devices: 1."
            )
        self._loggers = list(trainer.loggers)
        self._accumulated = trainer.accumulate_grad_batches
        release_freed_memory()
        dtype = DTYPES[job.options.get("dtype") or "float32"]
        self.plan = plan = open_plan(job.recipe, job.options.get("module"))
        require_permuted(job.recipe.alignment, plan)
        for warning in plan.warnings:
            lightning.pytorch.utilities.rank_zero_warn(str(warning))
        device = trainer.strategy.root_device
        self.chain = chain = Chain(plan, find_blocks(plan, blocks), dtype, device)
        self._state = chain.model.state
        job.data.attach(chain.model)
        job.data.setup()
        self.tasks = chain.model.tasks = self._tasks()
        self.activations = Activations(job.folder / "activations", int(memory * 2**30))
        task, _, batch = next(self._batches())
        one = {k: v[:1] if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.deviation = chain.verify(one, self.tasks[task])
        if job.options.get("load_sources"):
            plan.load(device)
        self._starts = Starts(plan, torch.float64 if dtype == torch.float64 else torch.float32)
        self._passing: dict[tuple[str, int], tuple[Passing, Passing]] = {}
        """By task and number of a batch: on its way through the expert and through the merge."""
        self._weights = MergedWeights(chain, {})
        self._run: dict[str, Any] = {}

    def _make_trainer(self, folder: Path, steps: int, **options: Any) -> lightning.Trainer:
        """Return a trainer of the job for one block: no validation, no checkpoints but our own."""
        return self._stripped(
            self.job.trainer(
                folder,
                max_steps=steps,
                max_epochs=-1,
                max_time=None,
                precision="32-true",  # the computation's dtype is model.dtype
                limit_train_batches=1.0,
                limit_val_batches=0,
                num_sanity_val_steps=0,
                val_check_interval=1.0,
                check_val_every_n_epoch=1,
                **options,
            )
        )

    def _stripped(self, trainer: lightning.Trainer) -> lightning.Trainer:
        """Take away callbacks that need the whole merge; the driver logs coefficients itself."""
        ours = (Checkpoint, EarlyStopping, CoefficientLogger)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._coefficients = [c for c in callbacks if isinstance(c, CoefficientLogger)]
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, ours)]
        return trainer

    def _tasks(self) -> dict[str, str]:
        """Return the expert of each task.

        Raises:
            ConfigError: a task names no source.
        """
        tasks = {name: task.source or name for name, task in self.job.data.tasks.items()}
        sources = self.plan.serving
        lost = [f"{task} -> {source}" for task, source in tasks.items() if source not in sources]
        if lost:
            raise ConfigError(
                f"LayerWise: each task's data pass its own expert, and these tasks name no source: "
                f"{', '.join(lost)} (choose from {', '.join(sources)}). Set `source` of the task."
            )
        idle = [source for source in self.plan.sources if source not in tasks.values()]
        if idle:
            self.job.say(f"no task is of {shorten(idle)}: nothing asks the merge to match them")
        return tasks

    def _batches(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Yield task, number and placed batch of the adaptation data; the same at each call.

        They are put together once, in a drawn order, as examples may lie in the order of classes.
        """
        data = self.job.data
        for task, whole in zip(self.tasks, data.evaluation_loaders("adaptation"), strict=True):
            seed = data.seed * 1_000_003 + zlib.crc32(task.encode())
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(whole.dataset), generator=generator).tolist()
            loader = DataLoader(
                whole.dataset,
                batch_sampler=even_batches(order, self._size),
                collate_fn=whole.collate_fn,
                num_workers=whole.num_workers,
            )
            for number, batch in enumerate(loader):
                yield task, number, self.chain.moved(batch)

    # ---- the run --------------------------------------------------------------------------------

    def run(self, epochs: int, steps: int | None) -> Path:
        """Learn all blocks, score the merge and export it.

        Args:
            epochs: passes over the adaptation data per block.
            steps: steps per block, instead of passes.
        """
        self._epochs, self._steps = epochs, steps
        blocks, plan = self.chain.blocks, self.plan
        within = {name for block in blocks for name in block.tensors}
        outside = [name for name in plan.learned if name not in within]
        self.job.say(
            f"{len(blocks)} blocks, {blocks[0].name} to {blocks[-1].name} (one by one "
            f"{self.deviation:.1g} off the network itself); {len(outside)} tensors outside keep "
            f"their starting coefficients{': ' if outside else ''}{shorten(outside)}"
        )
        start = self._starts.means()
        for logger in self._loggers:
            logger.log_metrics({f"init/{source}": c for source, c in start.items()}, step=0)
        self._enter(outside)
        results = self._learn_blocks()
        self._recompute(self._whole_passes)
        self._state.run = {**self._run, "initial_coefficients": start}
        state = self._state.at(assembled(plan, self._weights.raw))
        step = max((n + 1) * int(result["steps"]) for n, result in enumerate(results))
        scores = self._score(state, step)
        said = [{k: v for k, v in result.items() if k != "run"} for result in results]
        extra = {
            "class_path": "LayerWise",
            "kept_at_start": outside,
            "deviation": self.deviation,
            "blocks": [{"name": b.name, **r} for b, r in zip(blocks, said, strict=True)],
        }
        write = partial(export_state, state)
        buffers = self.chain.model.statistics.values()
        known = {"buffers": buffers, "tasks": self.tasks, "results": scores}
        return self.job.export(write, extra, self._loggers, **known)

    @torch.no_grad()
    def _enter(self, outside: Sequence[str]) -> None:
        """Compute activations before the first block, of the experts and of the merge.

        Args:
            outside: learned tensors outside of blocks, which keep their starting coefficients.
        """
        self.activations.close()  # what a killed run left
        path = self.job.folder / "outside.safetensors"
        self._starts.write(path, outside)
        self._weights.raw = read_mapped(path)
        read, _ = self._weights.kept()

        def enter(side: str, task: str, number: int, batch: dict[str, Any]) -> Passing:
            name = f"{task}/{number}/{side}"
            return self.chain.enter(batch, self.tasks[task], self.activations, name)

        def passes() -> None:
            for found in self._batches():
                enter("merged", *found)

        with self.chain.weights(read):
            self._recompute(passes)
            for found in self._batches():
                task, number, _ = found
                with self.chain.model.as_source(self.tasks[task]):
                    expert = enter("expert", *found)
                self._passing[task, number] = expert, enter("merged", *found)

    def _learn_blocks(self) -> list[dict[str, Any]]:
        """Learn block after block, take up their coefficients and return their results."""
        results, learned = [], {}
        for number in range(len(self.chain.blocks)):
            result, found = self._block(number)
            results.append(result)
            learned.update(found)
            gc.collect()  # a trainer and its module are in a circle
            trim_heap()  # holes grow from trainer to trainer
        self.activations.close()
        self._weights.raw |= learned
        return results

    def _block(self, number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the result and the coefficients of one block, learned now or by an earlier run;
        activations are then those after it.
        """
        block = self.chain.blocks[number]
        record = self.job.step(f"block-{number:03d}", {"block": block.name, "number": number})
        result, path = record.result, record.folder / _FILE
        last = number == len(self.chain.blocks) - 1
        if result is None or not last:
            self._pass_experts(number)
        if result is None:
            result = self._learn(number, path)
            record.finish(result)
            self.job.say(
                f"block {number + 1} of {len(self.chain.blocks)}, {block.name}: loss "
                f"{result['first_loss']:.3g} in the first step, {result['loss']:.3g} over all "
                "batches in the end"
            )
            return result, _without_buffers(read_mapped(path))
        stored = read_mapped(path)
        raw = _without_buffers(stored)
        for name, coefficient in result["fixed"].items():
            self._state.fix([name], coefficient)
        buffers = {name.removeprefix(_BUFFER): stored[name] for name in stored.keys() - raw.keys()}
        self.chain.model.statistics.set(buffers)
        self._run = self._run or result["run"]
        if not last:
            self._pass_merged(number, MergedBlock(number, raw, self._weights))
        return result, raw

    @torch.no_grad()
    def _pass_experts(self, number: int) -> None:
        """Run every expert's activations through its own block."""
        model = self.chain.model
        for source in dict.fromkeys(self.tasks.values()):
            read = cache(lambda source, name: self.chain.place(self.plan.read(source, name)))
            with model.as_source(source), self.chain.weights(read):
                for expert, _ in self._passing.values():
                    if expert.source == source:
                        out = self.chain.run(number, expert)
                        self.activations.put(expert.name, out)

    @torch.no_grad()
    def _pass_merged(self, number: int, merged: MergedBlock) -> float:
        """Run the merged activations through the merged block; return the loss over all batches."""
        losses: dict[str, list[float]] = {task: [] for task in self.tasks}
        with self.chain.weights(merged.read):
            for (task, _), (expert, passing) in self._passing.items():
                out = self.chain.run(number, passing)
                losses[task].append(float(self._distance(out, expert)))
                self.activations.put(passing.name, out)
        return sum(sum(values) / len(values) for values in losses.values())

    def _distance(self, hidden: Tensor, expert: Passing) -> Tensor:
        """Return the distance of a batch's hidden state from the expert's."""
        return mean_square(hidden, self.chain.hidden(expert), self.chain.mask(expert))

    # ---- learning a block -----------------------------------------------------------------------

    def _learn(self, number: int, path: Path) -> dict[str, Any]:
        """Learn the coefficients of a block and write them to its file."""
        names = [n for n in self.chain.blocks[number].tensors if n not in self._state.fixed]
        slots = self._starts.slots(names)
        raw = {slot: self._starts.one(shared) for slot, shared in slots.items()}
        gc.collect()
        trim_heap()  # what the experts' passes left between smaller blocks
        merged = MergedBlock(number, raw, self._weights)
        result: dict[str, Any] = {"fixed": {}, "steps": 0, "run": {}}
        if names:
            result.update(self._fit(number, merged, path.parent))

        def passes() -> None:
            with self.chain.weights(merged.read):
                for _, passing in self._passing.values():
                    self.chain.run(number, passing)

        self._recompute(passes)
        buffers = {f"{_BUFFER}{k}": v for k, v in self._buffers(number).items()}
        write_tensors(path, {**merged.raw, **buffers})
        result["loss"] = self._pass_merged(number, merged)
        result.setdefault("first_loss", result["loss"])
        merged.raw = {}
        return result

    def _fit(self, number: int, merged: MergedBlock, folder: Path) -> dict[str, Any]:
        """Train one block and return what is known of it afterwards."""
        name, value = self.chain.blocks[number].name, self.plan.unused_coefficient
        trainer, module = self._trained(number, merged, folder)
        _require_finite(name, module.losses)
        if merged.unused:
            warnings.warn(
                f"{len(merged.unused)} tensors of {name} got no gradient and are kept at "
                f"coefficient {value:g} (recipe: unused): {shorten(merged.unused)}.",
                stacklevel=2,
            )
        self._run = self._run or self._describe(trainer, module)
        merged.raw = module.release()
        merged.forget()
        for optimiser in trainer.optimizers:
            optimiser.state.clear()
        return {
            "fixed": dict.fromkeys(merged.unused, value),
            "steps": trainer.global_step,
            "first_loss": module.losses[0],
            "run": self._run,
        }

    def _trained(
        self, number: int, merged: MergedBlock, folder: Path
    ) -> tuple[lightning.Trainer, BlockModule]:
        numbers: Any = {task: [n for of, n in self._passing if of == task] for task in self.tasks}
        stream = TaskStream(numbers, itemgetter(0), 1, self.job.data.seed + number)
        total = self._steps or self._epochs * -(-stream.num_steps() // self._accumulated)

        def loss(task: str, index: int) -> Tensor:
            expert, passing = self._passing[task, index]
            return self._distance(self.chain.run(number, passing), expert)

        self.job.seed()
        rate = self.job.options.get("learning_rate", 1e-2)
        module = BlockModule(merged, loss, rate, number * total)
        self.job.configure(module)
        with _quiet():
            trainer = self._make_trainer(folder, total, logger=self._loggers or False)
            self.chain.model.train()
            trainer.fit(module, train_dataloaders=StreamLoader(stream, 0))
            self.chain.model.eval()
        if trainer.interrupted:
            raise KeyboardInterrupt
        if trainer.global_step != total and not getattr(trainer, "fast_dev_run", False):
            raise ConfigError(
                f"LayerWise: block {number} stopped after {trainer.global_step} of {total} steps. "
                "Run the same command again to resume."
            )
        return trainer, module

    def _describe(self, trainer: lightning.Trainer, module: BlockModule) -> dict[str, Any]:
        unused = ("module", "objective", "logit_scale")  # the loss is the driver's own
        options = {k: to_plain(v) for k, v in self.job.options.items() if k not in unused}
        data = describe_data(self.job.data)
        return {**describe(trainer, module), "model": options, "data": data}

    # ---- BatchNorm ------------------------------------------------------------------------------

    @torch.no_grad()
    def _recompute(self, passes: Callable[[], object]) -> None:
        """Recompute the BatchNorm statistics that these passes reach, if the recipe says so."""
        if self.plan.recipe.buffers == "recompute" and self.chain.model.statistics.batch_norms:
            self.chain.model.statistics.recompute([passes])

    def _whole_passes(self) -> None:
        """Run the whole finished merge; a merged tensor lives while its layer runs."""
        loaders = self.job.data.evaluation_loaders("adaptation")
        for source, loader in zip(self.tasks.values(), loaders, strict=True):
            with self.chain.model.as_weights(partial(self._weights.read, source, finished=True)):
                for batch in sample_batches(loader, _NORM_BATCHES):
                    self.chain.run_network(self.chain.moved(batch))

    def _buffers(self, number: int) -> dict[str, Tensor]:
        """Return the buffers of one block, by their names in the files."""
        binding, prefix = self.plan.binding, f"{self.chain.blocks[number].name}."
        assert binding is not None
        values = self.chain.model.statistics.values()
        return {name: v for name, v in values.items() if binding.buffers[name].startswith(prefix)}

    # ---- scores ---------------------------------------------------------------------------------

    def _score(self, state: FitState, step: int) -> dict[str, Any]:
        """Score the selection split once, and log the scores with the coefficients."""
        record = self.job.step("scores", {"scores": "selection"})
        if record.result is not None:
            return record.result
        with _quiet():
            trainer = self._stripped(
                self.job.trainer(
                    self.job.root, logger=self._loggers or False, precision="32-true", max_time=None
                )
            )
        found: Scores = {}
        if self.chain.gives_logits:
            self.job.say("scoring the merge on the selection split, block by block")
            batches = partial(self._selection, trainer.limit_val_batches)
            experts = bool(self.job.options.get("score_experts", True))
            found = score(self._weights, self.job.objective, batches, self.activations, experts)
            self.activations.close()
        else:
            self.job.say("not scored: the network gives no logits")
        self._log_scores(found, state, step, trainer.log_dir)
        results = {"selection": found} if found else {}
        record.finish(results)
        trim_heap()
        return results

    def _log_scores(self, found: Scores, state: FitState, step: int, folder: str | None) -> None:
        logged = {}
        for task, values in found.items():
            for name, value in values.items():
                whole = task == "average" and name == "loss"
                key = "selection/loss" if whole else f"selection/{task}/{name}"
                logged[key] = torch.tensor(value).item()  # in float32, as a trainer logs
        for callback in self._coefficients:
            callback.write(self._loggers, folder, state, step)
            if folder:
                callback.draw(folder, state)
        for logger in self._loggers:
            if logged:
                logger.log_metrics(logged, step=step)
            logger.save()

    def _selection(self, limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield placed batches of the selection split with their tasks.

        Args:
            limit: the trainer's `limit_val_batches`: batches per task, or a share of them.
        """
        loaders = self.job.data.evaluation_loaders("selection")
        for task, loader in zip(self.tasks, loaders, strict=True):
            share = max(int(limit * len(loader)), int(limit > 0))
            count = limit if isinstance(limit, int) else share
            for batch in islice(loader, count):
                yield task, self.chain.moved(batch)


def require_permuted(alignment: AbstractAlignment | None, plan: Plan | None = None) -> None:
    """Reject an alignment that mixes units.

    A block is matched to hidden features of an expert. A permuted expert computes them, in the
    merge's order; a mixed one computes something else, and the expert's own are in another basis.

    Args:
        alignment: the recipe's.
        plan: the opened recipe, whose maps are looked at; default: what the alignment declares.
    """
    if alignment is None:
        return
    found = "may mix units" if alignment.mixes_units else ""
    if plan is not None:
        mixed = [name for name, view in plan.serving.items() if original_of(view) is not view]
        found = f"mixes units of {shorten(mixed)}" if mixed else ""
    if found:
        raise ConfigError(
            f"LayerWise: alignment {type(alignment).__name__} {found}, expected one that permutes "
            "them: each block is matched to an expert's hidden features, and a mixed source has "
            "others. Take WeightMatching or ActivationMatching, or learn end to end: leave "
            "`driver` out."
        )


def _without_buffers(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in found.items() if not name.startswith(_BUFFER)}


def _require_finite(name: str, losses: Sequence[float]) -> None:
    """Stop at a block whose loss is not finite: all that follow would be learned from it."""
    if not all(torch.isfinite(torch.tensor(losses))):
        raise ConfigError(
            f"LayerWise: the loss of block {name} went from {losses[0]:g} to {losses[-1]:g}. Lower "
            "the learning rate (optimizer), or start nearer to the sources (recipe.init)."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence a trainer's greetings: there is one for each block."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
