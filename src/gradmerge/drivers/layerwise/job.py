"""A job of the layer-wise driver: layer after layer, then the export."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from torch import Tensor

from gradmerge._memory import release_freed_memory, trim_heap
from gradmerge._typing import Raw
from gradmerge.drivers.base import Job
from gradmerge.drivers.layerwise.block import BlockModule, MergedBlock, mean_square, require_finite
from gradmerge.drivers.layerwise.blocks import find_blocks, require_permuted
from gradmerge.drivers.layerwise.cache import Activations, Batch, Prefixes
from gradmerge.drivers.layerwise.chain import Chain
from gradmerge.drivers.layerwise.files import Starts, assembled, read_mapped, write_tensors
from gradmerge.drivers.layerwise.scores import FinishedMerge, ScoreModule, initial_coefficients
from gradmerge.engine.opening import open_plan
from gradmerge.errors import ConfigError, shorten
from gradmerge.export.folder import export_plan
from gradmerge.spec import to_plain
from gradmerge.training.callbacks import CoefficientLogger, log_artifact
from gradmerge.training.loaders import StreamLoader, TaskStream, sample_batches
from gradmerge.training.module import DTYPES
from gradmerge.training.run import describe, describe_data

# Batches a task, at most, that the BatchNorm statistics of the export are recomputed on.
_NORM_BATCHES = 16
_FILE, _BUFFER = "raw.safetensors", "buffer:"


class Layers:
    """One job of the layer-wise driver; making it finds out all that would be refused.

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
        on_data = [type(f).__name__ for f in job.recipe.finalisers if f.needs_data]
        if on_data:
            raise ConfigError(
                f"LayerWise: {', '.join(on_data)} takes passes of the whole merged network, which "
                "is never held here. Take SpectralRescale or DepthRescale, or learn end to end."
            )
        require_permuted(job.recipe.alignment)
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
        options = dict(job.options)
        dtype = DTYPES[options.get("dtype") or "float32"]
        self.plan = plan = open_plan(job.recipe, options.get("module"))
        require_permuted(job.recipe.alignment, plan)
        for warning in plan.warnings:
            lightning.pytorch.utilities.rank_zero_warn(str(warning))
        device = trainer.strategy.root_device
        self.chain = chain = Chain(plan, find_blocks(plan, blocks), dtype, device)
        job.data.attach(chain)
        job.data.setup()
        self.tasks = self._tasks()
        self.activations = Activations(job.folder / "activations", int(memory * 2**30))
        size = batch_size or job.data.batch_size
        self.prefixes = Prefixes(chain, job.data, self.tasks, size, self.activations, {})
        task, _, inputs = next(self.prefixes.inputs())
        one = {k: v[:1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        self.deviation = chain.verify(one, self.tasks[task])
        if options.get("load_sources"):
            plan.load(device)
        self._starts = Starts(plan, torch.float64 if dtype == torch.float64 else torch.float32)
        self._run: dict[str, Any] = {}

    def _make_trainer(self, folder: Path, steps: int, **options: Any) -> lightning.Trainer:
        """A trainer of the job for one block: no validation, no checkpoints but our own."""
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
        """A trainer without callbacks that need the whole merge; coefficients are logged by us."""
        ours = (Checkpoint, EarlyStopping, CoefficientLogger)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._coefficients = [c for c in callbacks if isinstance(c, CoefficientLogger)]
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, ours)]
        return trainer

    def _tasks(self) -> dict[str, str]:
        """Tasks and the expert of each.

        Raises:
            ConfigError: a task names no source.
        """
        tasks = {name: task.source or name for name, task in self.job.data.tasks.items()}
        sources = self.plan.serving
        lost = [f"{task} -> {source}" for task, source in tasks.items() if source not in sources]
        if lost:
            raise ConfigError(
                f"LayerWise: each task's data pass its own expert, and these tasks name no source: "
                f"{', '.join(lost)}; sources are {', '.join(sources)}. Set `source` of the task."
            )
        idle = [source for source in self.plan.sources if source not in tasks.values()]
        if idle:
            self.job.say(f"no task is of {shorten(idle)}: nothing asks the merge to match them")
        return tasks

    # ---- the run --------------------------------------------------------------------------------

    def run(self, epochs: int, steps: int | None) -> Path:
        """All blocks and the export."""
        folder, chain, plan, prefixes = self.job.folder, self.chain, self.plan, self.prefixes
        within = {name for block in chain.blocks for name in block.tensors}
        outside = [name for name in plan.learned if name not in within]
        self.job.say(
            f"{len(chain.blocks)} blocks, {chain.blocks[0].name} to {chain.blocks[-1].name} (one "
            f"by one {self.deviation:.1g} off the network itself); {len(outside)} tensors outside "
            f"keep their starting coefficients{': ' if outside else ''}{shorten(outside)}"
        )
        start = initial_coefficients(plan, self._starts)
        for logger in self._loggers:
            logger.log_metrics({f"init/{source}": c for source, c in start.items()}, step=0)
        self.activations.close()  # what a killed run left
        self._starts.write(folder / "outside.safetensors", outside)
        parts = read_mapped(folder / "outside.safetensors")
        prefixes.outside = dict(parts)
        prefixes.enter()
        results = []
        for number in range(len(chain.blocks)):
            result, found = self._block(number, prefixes, epochs, steps)
            results.append(result)
            gc.collect()  # a trainer and its module are in a circle
            trim_heap()  # holes grow from trainer to trainer
            parts.update({k: v for k, v in found.items() if not k.startswith(_BUFFER)})
        self.activations.close()
        prefixes.recompute(partial(self._whole_passes, prefixes, parts))
        plan.run = {**self._run, "initial_coefficients": start}
        raw = assembled(plan, parts)
        step = max((n + 1) * int(result["steps"]) for n, result in enumerate(results))
        scores = self._score(prefixes, parts, raw, step)
        extra = {
            "class_path": "LayerWise",
            "kept_at_start": outside,
            "deviation": self.deviation,
            "blocks": [
                {"name": block.name, **{k: v for k, v in result.items() if k != "run"}}
                for block, result in zip(chain.blocks, results, strict=True)
            ],
        }
        write = partial(export_plan, plan, raw)
        buffers = chain.statistics.values()
        written = self.job.export(write, extra, buffers=buffers, tasks=self.tasks, results=scores)
        if self.job.target.log_artifact:
            log_artifact(self._loggers, written)
        return written

    def _block(
        self, number: int, prefixes: Prefixes, epochs: int, steps: int | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """One block, learned now or by an earlier run; activations are then those after it."""
        block = self.chain.blocks[number]
        record = self.job.step(f"block-{number:03d}", {"block": block.name, "number": number})
        result, path = record.result, record.folder / _FILE
        last = number == len(self.chain.blocks) - 1
        if result is None or not last:
            prefixes.pass_experts(number)
        if result is None:
            result = self._learn(number, prefixes, path, epochs, steps)
            record.finish(result)
            self.job.say(
                f"block {number + 1} of {len(self.chain.blocks)}, {block.name}: loss "
                f"{result['first_loss']:.3g} in the first step, {result['loss']:.3g} over all "
                "batches in the end"
            )
            return result, read_mapped(path)
        found = read_mapped(path)
        for name, coefficient in result["fixed"].items():
            self.plan.fix([name], coefficient)
        stored = {k.removeprefix(_BUFFER): v for k, v in found.items() if k.startswith(_BUFFER)}
        self.chain.statistics.set(stored)
        self._run = self._run or result["run"]
        if not last:
            merged = MergedBlock(self.chain, number, found, prefixes.elsewhere)
            self._pass_merged(number, merged, prefixes)
        return result, found

    def _learn(
        self, number: int, prefixes: Prefixes, path: Path, epochs: int, steps: int | None
    ) -> dict[str, Any]:
        """Learn the coefficients of a block and write them to its file."""
        names = [n for n in self.chain.blocks[number].tensors if n not in self.plan.fixed]
        slots = self._starts.slots(names)
        raw = {slot: self._starts.one(shared) for slot, shared in slots.items()}
        gc.collect()
        trim_heap()  # what the experts' passes left between smaller blocks
        merged = MergedBlock(self.chain, number, raw, prefixes.elsewhere)
        result: dict[str, Any] = {"fixed": {}, "steps": 0, "run": {}}
        if names:
            result.update(self._fit(number, merged, prefixes, path.parent, epochs, steps))

        def passes() -> None:
            with merged.running():
                for batch in prefixes.batches:
                    prefixes.hidden(number, batch, "merged")

        prefixes.recompute(passes)
        buffers = {f"{_BUFFER}{k}": v for k, v in prefixes.block_buffers(number).items()}
        write_tensors(path, {**merged.raw, **buffers})
        result["loss"] = self._pass_merged(number, merged, prefixes)
        result.setdefault("first_loss", result["loss"])
        merged.release()
        return result

    @torch.no_grad()
    def _pass_merged(self, number: int, merged: MergedBlock, prefixes: Prefixes) -> float:
        """The merged activations go through the merged block; the loss over all batches."""
        losses: dict[str, list[float]] = {task: [] for task in self.tasks}
        with merged.running():
            for batch in prefixes.batches:
                out = prefixes.hidden(number, batch, "merged")
                value = mean_square(out, prefixes.target(batch), prefixes.mask(batch))
                losses[batch.task].append(float(value))
                prefixes.activations.put(batch.name("merged"), out)
        return sum(sum(values) / len(values) for values in losses.values())

    # ---- training a block -----------------------------------------------------------------------

    def _fit(
        self,
        number: int,
        merged: MergedBlock,
        prefixes: Prefixes,
        folder: Path,
        epochs: int,
        steps: int | None,
    ) -> dict[str, Any]:
        """Train one block; what is known of it afterwards."""
        batches = {(batch.task, batch.number): batch for batch in prefixes.batches}
        numbers: Any = {
            task: [number for of, number in batches if of == task] for task in self.tasks
        }
        stream = TaskStream(numbers, _first, 1, self.job.data.seed + number)
        total = steps or epochs * -(-stream.num_steps() // self._accumulated)

        def loss(task: str, index: int) -> Tensor:
            batch: Batch = batches[task, index]
            got = prefixes.hidden(number, batch, "merged")
            return mean_square(got, prefixes.target(batch), prefixes.mask(batch))

        self.job.seed()
        rate = self.job.options.get("learning_rate", 1e-2)
        module = BlockModule(merged, loss, rate, number * total, prefixes.batch_statistics)
        self.job.configure(module)
        with _quiet():
            trainer = self._make_trainer(folder, total, logger=self._loggers or False)
            trainer.fit(module, train_dataloaders=StreamLoader(stream, 0))
        whole = trainer.global_step == total or getattr(trainer, "fast_dev_run", False)
        if trainer.interrupted:
            raise KeyboardInterrupt
        if not whole:
            raise ConfigError(
                f"LayerWise: block {number} stopped after {trainer.global_step} of {total} steps. "
                "Run the same command again to go on."
            )
        name = self.chain.blocks[number].name
        require_finite(number, name, module.losses)
        value = self.plan.unused_coefficient
        if module.unused:
            warnings.warn(
                f"{len(module.unused)} tensors of {name} got no gradient and are kept at "
                f"coefficient {value:g} (recipe: unused): {shorten(module.unused)}.",
                stacklevel=2,
            )
        self._run = self._run or self._describe(trainer, module)
        merged.raw = module.release()
        for optimiser in trainer.optimizers:
            optimiser.state.clear()
        merged.renew(merged.names)
        return {
            "fixed": dict.fromkeys(module.unused, value),
            "steps": trainer.global_step,
            "first_loss": module.losses[0],
            "run": self._run,
        }

    def _describe(self, trainer: lightning.Trainer, module: BlockModule) -> dict[str, Any]:
        unused = ("module", "objective", "logit_scale")  # the loss is the driver's own
        options = {k: to_plain(v) for k, v in self.job.options.items() if k not in unused}
        data = describe_data(self.job.data)
        return {**describe(trainer, module), "model": options, "data": data}

    # ---- the end --------------------------------------------------------------------------------

    def _finished(
        self, prefixes: Prefixes, parts: Mapping[str, Tensor], source: str, name: str
    ) -> Tensor:
        """A tensor of the finished merge, as a task of this source has it."""
        if name not in self.plan.tensors:
            return self.plan.read(source, name)
        return prefixes.theta(name, parts, finished=True)

    def _whole_passes(self, prefixes: Prefixes, parts: Mapping[str, Tensor]) -> None:
        """Passes of the whole merged network; a merged tensor lives while its layer runs."""
        loaders = self.job.data.evaluation_loaders("adaptation")
        for source, loader in zip(self.tasks.values(), loaders, strict=True):
            with self.chain.weights(partial(self._finished, prefixes, parts, source)):
                for batch in sample_batches(loader, _NORM_BATCHES):
                    self.chain.skeleton(**prefixes.moved(batch))

    def _score(
        self, prefixes: Prefixes, parts: Mapping[str, Tensor], raw: Raw, step: int
    ) -> dict[str, Any]:
        """Scores of the selection split, which are logged once, with the coefficients."""
        record = self.job.step("scores", {"scores": "selection"})
        if record.result is not None:
            return record.result
        with _quiet():
            trainer = self._stripped(
                self.job.trainer(
                    self.job.root, logger=self._loggers or False, precision="32-true", max_time=None
                )
            )
            network = FinishedMerge(
                self.chain, self.tasks, partial(self._finished, prefixes, parts), self.activations
            )
            experts = bool(self.job.options.get("score_experts", True))
            module = ScoreModule(network, self.job.objective, experts, step, prefixes.moved)
            if self.chain.gives_logits:
                loaders = self.job.data.evaluation_loaders("selection")
                trainer.validate(module, dataloaders=loaders, verbose=False)
                self.activations.close()
            else:
                self.job.say("not scored: the network gives no logits")
        folder = trainer.log_dir
        for callback in self._coefficients:
            callback.write(self._loggers, folder, self.plan, raw, step)
            if folder:
                callback.draw(folder, self.plan, raw)
        for logger in self._loggers:
            logger.save()
        record.finish(module.results)
        trim_heap()
        return module.results


def _first(chosen: Sequence[Any]) -> Any:
    return chosen[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a trainer's greetings: there is one for each block."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
