"""A job of the layer-wise driver: block after block, then the scores and the export."""

from __future__ import annotations

import gc
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from gradmerge.alignment import AbstractAlignment
from gradmerge.alignment.views import original_of
from gradmerge.calibration.finish import NORM_BATCHES
from gradmerge.common.errors import ConfigError, shorten
from gradmerge.common.memory import release_freed_memory, trim_heap
from gradmerge.common.names import dtype_name
from gradmerge.common.spec import to_plain
from gradmerge.drivers.base import Job
from gradmerge.drivers.layerwise.activations import ActivationStore
from gradmerge.drivers.layerwise.block import BlockModule, mean_square
from gradmerge.drivers.layerwise.chain import BlockChain, Passing
from gradmerge.drivers.layerwise.files import Starts, read_mapped, write_whole
from gradmerge.drivers.layerwise.scores import score
from gradmerge.drivers.state import STEP, read_json
from gradmerge.drivers.summary import layers_table
from gradmerge.engine.opening import open_plan
from gradmerge.engine.plan import Plan
from gradmerge.engine.state import FitState
from gradmerge.export.folder import DTYPES, export_state
from gradmerge.export.history import History
from gradmerge.export.provenance import mean_coefficients
from gradmerge.export.writer import Entry
from gradmerge.training.callbacks import CoefficientLogger
from gradmerge.training.loaders import StreamLoader, TaskStream, even_batches, sample_batches
from gradmerge.training.placing import place, placement_of
from gradmerge.training.run import describe, describe_data, quiet
from gradmerge.training.scores import Scores

_FILE, _BUFFER = "raw.safetensors", "buffer:"
_OWN = ("run", "history")  # parts of a block's result that are of the whole job


class Layers:
    """One job of the layer-wise driver; making it finds everything that would be rejected.

    Args:
        job: what is merged, and with which data.
        blocks: regular expressions of the blocks' names.
        batch_size: examples per task and step.
        memory: GiB of activations in memory.
        resumed_at: steps of the blocks that an earlier run has finished; None if there was none.
    """

    def __init__(
        self,
        job: Job,
        blocks: Sequence[str] | None,
        batch_size: int | None,
        memory: float,
        resumed_at: int | None,
    ) -> None:
        self.job = job
        self._size = batch_size or job.data.batch_size
        with quiet():
            # not fitted; the dtype of the computation is model.dtype
            whole = {"precision": "32-true", "max_epochs": 1, "max_time": None}
            trainer = job.trainer(job.folder, (), resumed_at, **whole)
        if trainer.world_size != 1:
            raise ConfigError(
                f"LayerWise: expected one process, got {trainer.world_size}: a block is small, "
                "and its steps follow one another. Set trainer.devices: 1."
            )
        self._trainer = trainer
        release_freed_memory()
        dtype = DTYPES[dtype_name(job.options.get("dtype") or "float32")]
        plan = open_plan(job.recipe, job.options.get("module"))
        require_permuted(job.recipe.alignment, plan)
        for warning in plan.warnings:
            lightning.pytorch.utilities.rank_zero_warn(str(warning))
        device = trainer.strategy.root_device
        self.chain = chain = BlockChain(plan, blocks, dtype, device)
        self.plan = chain.plan
        self._state = chain.model.state
        job.data.attach(chain.model)
        job.data.setup()
        self.tasks = chain.model.tasks = self._tasks()
        task, _, batch = next(self._batches())
        one = {k: v[:1] if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.deviation = chain.verify(one, self.tasks[task])
        chain.store = ActivationStore(job.folder, int(memory * 2**30))
        place(self.plan, placement_of(job.options), device)
        self._starts = Starts(plan, torch.float64 if dtype == torch.float64 else torch.float32)
        self._resumed_at = resumed_at
        self._history = History()
        """Scores of the start and of the end."""
        self._passing: list[tuple[str, Passing, Passing]] = []
        """Task of each batch, and the batch on its way through the expert and through the merge."""
        self._inputs: list[dict[str, Any]] = []
        """The batches themselves, if something is learned after the last block."""

    def _tasks(self) -> dict[str, str]:
        """Return the expert of each task."""
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
        """Learn all blocks for so many passes, or steps each, score the merge and export it."""
        self._epochs, self._steps = epochs, steps
        blocks, parts, loggers = self.chain.blocks, self.chain.steps, self._trainer.loggers
        within = {name for part in parts for name in part.tensors}
        outside = [name for name in self.plan.learned if name not in within]
        after = self.chain.end.tensors
        last = f"a last step learns {len(after)} after them: {shorten(after)}; " if after else ""
        self.job.say(
            f"{len(blocks)} blocks, {blocks[0].name} to {blocks[-1].name} (one by one "
            f"{self.deviation:.1g} off the network itself); {last}{len(outside)} tensors outside "
            f"keep their starting coefficients{': ' if outside else ''}{shorten(outside)}"
        )
        if tied := self.chain.tied:
            self.job.say(
                f"{shorten(tied)}: not learned after the last block, because what precedes the "
                "blocks has the same tensor or coefficient; learn end to end to learn them"
            )
        start = mean_coefficients(FitState(self.plan, self._starts))
        for logger in () if self._resumed_at else loggers:
            logger.log_metrics({f"init/{source}": c for source, c in start.items()}, step=0)
        self._score_start()
        results = self._learn(outside)
        run: dict[str, Any] = next((result["run"] for result in results if result["run"]), {})
        self._state.run = {**run, "initial_coefficients": start}
        scores = self._score(max((n + 1) * int(r["steps"]) for n, r in enumerate(results)))
        extra = {
            "class_path": "LayerWise",
            "kept_at_start": outside,
            "deviation": self.deviation,
            "blocks": [
                {"name": block.name, **{k: v for k, v in result.items() if k not in _OWN}}
                for block, result in zip(parts, results, strict=True)
            ],
        }
        write = partial(export_state, self._state)
        buffers = self.chain.model.network_buffers.values()
        known: dict[str, Any] = {"buffers": buffers, "tasks": self.tasks, "results": scores}
        self.plan.unload()
        folder = self.job.export(write, extra, loggers, history=self._history, **known)
        self.job.table = layers_table(self.job, self._history, self.tasks, results, self._trainer)
        return folder

    def _learn(self, outside: Sequence[str]) -> list[dict[str, Any]]:
        """Learn block after block, take up all coefficients and return the blocks' results."""
        path = self.job.folder / "outside.safetensors"
        write_whole(path, [self._starts.entry(key) for key in self._keys(outside)])
        kept = read_mapped(path)
        self._state.raw = kept
        self._enter()
        results, learned = [], dict(kept)
        for number in range(len(self.chain.steps)):
            result, raw = self._block(number)
            results.append(result)
            learned |= raw
            self._state.raw = kept  # a tensor of a block is known within the block alone
        self._passing.clear()
        self._inputs.clear()
        self.chain.store.clear()
        self._state.raw = learned
        self._recompute(self._whole_passes)
        return results

    def _keys(self, names: Iterable[str]) -> list[str]:
        """Return the keys of the raw coefficients of tensors."""
        return list(dict.fromkeys(self.plan.layout.slots[name].key for name in names))

    @torch.no_grad()
    def _enter(self) -> None:
        """Compute activations before the first block, of the experts and of the merge."""

        def enter(side: str, task: str, number: int, batch: dict[str, Any]) -> Passing:
            return self.chain.enter(batch, self.tasks[task], f"{task}/{number}/{side}")

        def passes() -> None:
            for found in self._batches():
                enter("merged", *found)

        with self.chain.weights(cache(self.chain.theta)):
            self._recompute(passes)
            for found in self._batches():
                with self.chain.model.as_source(self.tasks[found[0]]):
                    expert = enter("expert", *found)
                self._passing.append((found[0], expert, enter("merged", *found)))
                if self.chain.end.tensors:
                    self._inputs.append(self.chain.kept(found[2]))

    def _block(self, number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the result and the coefficients of one block, or of what follows the last one,
        learned now or by an earlier run; activations are then those after it.
        """
        name, num = self.chain.steps[number].name, len(self.chain.steps)
        record = self.job.step(f"block-{number:03d}", {"block": name, "number": number})
        result, path = record.result, record.folder / _FILE
        passes = result is None or number < num - 1
        if passes and not self._is_end(number):
            self._pass_experts(number)
        found = result or self._fit_block(number, path)
        stored = read_mapped(path)
        raw = {key: z for key, z in stored.items() if not key.startswith(_BUFFER)}
        self._state.raw = {**self._state.raw, **raw}
        for tensor, coefficient in found["fixed"].items():
            self._state.fix([tensor], coefficient)
        buffers = {key.removeprefix(_BUFFER): stored[key] for key in stored.keys() - raw.keys()}
        self.chain.model.network_buffers.set(buffers)
        loss = self._pass_merged(number) if passes else math.nan
        if result is None:
            found = {"first_loss": loss, **found, "loss": loss}
            if number == 0:
                found["history"] = self._history.to_save()
            record.finish(found)
            self.job.say(
                f"step {number + 1} of {num}, {name}: loss {found['first_loss']:.3g} in the first "
                f"step, {loss:.3g} over all batches in the end"
            )
        return found, raw

    def _is_end(self, number: int) -> bool:
        return number == len(self.chain.blocks)

    @torch.no_grad()
    def _pass_experts(self, number: int) -> None:
        """Run every expert's activations through its own block."""
        for source in dict.fromkeys(self.tasks.values()):
            with self.chain.expert(source):
                for _, expert, _ in self._passing:
                    if expert.source == source:
                        self.chain.store.put(expert.name, self.chain.run(number, expert))

    @torch.no_grad()
    def _pass_merged(self, number: int) -> float:
        """Run the merged activations through the merged block, if it is one, and return the loss
        over all batches.
        """
        losses: dict[str, list[float]] = {task: [] for task in self.tasks}
        with self.chain.weights(cache(self.chain.theta)):
            for index, (task, expert, passing) in enumerate(self._passing):
                if self._is_end(number):
                    losses[task].append(float(self._distance_in_the_end(index)))
                    continue
                out = self.chain.run(number, passing)
                losses[task].append(float(self._distance(out, expert)))
                self.chain.store.put(passing.name, out)
        return sum(sum(values) / len(values) for values in losses.values())

    def _distance(self, hidden: Tensor, expert: Passing) -> Tensor:
        """Return the distance of a batch's hidden state from the expert's."""
        return mean_square(hidden, self.chain.hidden(expert), expert.mask)

    def _distance_in_the_end(self, index: int) -> Tensor:
        """Return the distance of what the network gives out from what the expert's gives out."""
        (_, expert, passing), batch = self._passing[index], self._inputs[index]
        model, mode = self.chain.model, self.chain.model.training
        model.eval()
        with self.chain.expert(expert.source):
            wanted = self.chain.outputs(expert, batch)
        model.train(mode)
        given = self.chain.outputs(passing, batch)
        pairs = zip(given, wanted, strict=True)
        return torch.stack([mean_square(a, b, expert.mask) for a, b in pairs]).sum()

    # ---- learning a block -----------------------------------------------------------------------

    def _fit_block(self, number: int, path: Path) -> dict[str, Any]:
        """Learn a block, or what follows, and write its file; return what is known, but losses."""
        block = self.chain.steps[number]
        raw = {key: self._starts[key] for key in self._keys(block.tensors)}
        trim_heap()  # what the experts' passes left between smaller blocks
        result: dict[str, Any] = {"fixed": {}, "steps": 0, "run": {}}
        if raw:
            result.update(self._fit(number, raw, path.parent))
        self._state.raw = {**self._state.raw, **raw}
        gc.collect()  # a trainer and its module are in a circle
        trim_heap()  # holes grow from trainer to trainer

        def passes() -> None:
            with self.chain.weights(cache(self.chain.theta)):
                for *_, passing in self._passing:
                    self.chain.run(number, passing)

        if not self._is_end(number):
            self._recompute(passes)
        binding, statistics = self.plan.binding, self.chain.model.network_buffers.values()
        assert binding is not None
        for name, value in statistics.items():
            if binding.buffers[name].startswith(f"{block.name}."):
                raw[f"{_BUFFER}{name}"] = value
        write_whole(path, [Entry(k, tuple(z.shape), z.dtype, z.cpu) for k, z in raw.items()])
        return result

    def _fit(self, number: int, raw: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        """Train the raw coefficients of one block, in place, and return what is known of it."""
        numbers: Any = {task: [] for task in self.tasks}
        for index, (task, *_) in enumerate(self._passing):
            numbers[task].append(index)
        stream = TaskStream(numbers, itemgetter(0), 1, self.job.data.seed + number)
        per_step = self._trainer.accumulate_grad_batches
        total = self._steps or self._epochs * -(-stream.num_steps() // per_step)

        def loss(index: int) -> Tensor:
            if self._is_end(number):
                return self._distance_in_the_end(index)
            _, expert, passing = self._passing[index]
            return self._distance(self.chain.run(number, passing), expert)

        self.job.seed()
        rate = self.job.options.get("learning_rate", 1e-2)
        module = BlockModule(self.chain, number, raw, loss, rate, number * total)
        self.job.configure(module)
        with quiet():
            trainer = self._block_trainer(folder, total)
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
        raw.update((key, parameter.detach()) for key, parameter in module.raw.items())
        return self._described(trainer, module)

    def _block_trainer(self, folder: Path, steps: int) -> lightning.Trainer:
        """Return a trainer of the job for one block: no validation, no checkpoints but our own."""
        trainer = self.job.trainer(
            folder,
            max_steps=steps,
            max_epochs=-1,
            max_time=None,
            precision="32-true",
            limit_train_batches=1.0,
            limit_val_batches=0,
            val_check_interval=1.0,
            check_val_every_n_epoch=1,
            logger=self._trainer.loggers or False,
        )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [c for c in callbacks if not isinstance(c, (Checkpoint, EarlyStopping))]
        return trainer

    def _described(self, trainer: lightning.Trainer, module: BlockModule) -> dict[str, Any]:
        """Return the record of a block's fit, whose losses are finite."""
        name, value = self.chain.steps[module.number].name, self.plan.unused_coefficient
        first, last, unused = module.losses[0], module.losses[-1], module.unused or []
        if not (math.isfinite(first) and math.isfinite(last)):
            raise ConfigError(  # all blocks that follow would be learned from it
                f"LayerWise: the loss of block {name} went from {first:g} to {last:g}. Lower "
                "the learning rate (optimizer), or start nearer to the sources (recipe.init)."
            )
        if unused:
            warnings.warn(
                f"{len(unused)} tensors of {name} got no gradient and are kept at "
                f"coefficient {value:g} (recipe: unused): {shorten(unused)}.",
                stacklevel=2,
            )
        own = ("module", "objective", "logit_scale")  # the loss is the driver's own
        options = {k: to_plain(v) for k, v in self.job.options.items() if k not in own}
        data = describe_data(self.job.data)
        return {
            "fixed": dict.fromkeys(unused, value),
            "steps": trainer.global_step,
            "first_loss": first,
            "run": {**describe(trainer, module), "model": options, "data": data},
        }

    # ---- BatchNorm ------------------------------------------------------------------------------

    @torch.no_grad()
    def _recompute(self, passes: Callable[[], object]) -> None:
        """Recompute the BatchNorm statistics that these passes reach, if the recipe says so."""
        if self.plan.recipe.buffers == "recompute" and self.chain.model.network_buffers.batch_norms:
            self.chain.model.network_buffers.recompute([passes])

    def _whole_passes(self) -> None:
        """Run the whole finished merge; a merged tensor lives while its layer runs."""
        loaders = self.job.data.evaluation_loaders("adaptation")
        with self.chain.weights(partial(self.chain.theta, finished=True)):
            for source, loader in zip(self.tasks.values(), loaders, strict=True):
                self.chain.source = source
                for batch in sample_batches(loader, NORM_BATCHES):
                    self.chain.run_network(self.chain.moved(batch))

    # ---- scores ---------------------------------------------------------------------------------

    def _score(self, step: int) -> dict[str, Any]:
        """Score the selection split once, and log the scores with the coefficients."""
        record = self.job.step("scores", {"scores": "selection"})
        kept = record.result
        if kept is not None:
            self._history = History.restore(kept.get("history", {}))
            return dict(kept.get("results", kept))  # earlier versions kept the results alone
        found: Scores = {}
        if self.chain.gives_logits:
            self.job.say("scoring the merge on the selection split, block by block")
            found = self._scored(bool(self.job.options.get("score_experts", True)), step)
        else:
            self.job.say("not scored: the network gives no logits")
        self._log_scores(found, step)
        results = {"selection": found} if found else {}
        record.finish({"results": results, "history": self._history.to_save()})
        trim_heap()
        return results

    def _scored(self, experts: bool, step: int) -> Scores:
        given = (self.chain, self.job.objective, self._selection, experts, self._history, step)
        found = score(*given)
        self.chain.store.clear()
        return found

    def _score_start(self) -> None:
        """Score the merge before the first block is learned, unless an earlier run has done that.

        Networks with BatchNorm, whose statistics are recomputed block by block, have no such score.
        """
        first = self.job.step("block-000", {"block": self.chain.blocks[0].name, "number": 0})
        if first.result is not None:
            self._history = History.restore(first.result.get("history", {}))
            return
        norms = self.chain.model.network_buffers.batch_norms
        recomputes = self.plan.recipe.buffers == "recompute" and bool(norms)
        wanted = self.job.options.get("score_start", True) and self.chain.gives_logits
        if not wanted or recomputes or not self._trainer.limit_val_batches:
            return
        self.job.say("scoring the start on the selection split, block by block")
        self._state.raw = self._starts
        self._log(self._scored(False, 0), 0)
        trim_heap()

    def _log(self, found: Scores, step: int) -> None:
        """Log scores under the names that a fit logs them by."""
        logged = {}
        for task, values in found.items():
            for name, value in values.items():
                key = f"{task}/{name}" if (task, name) != ("average", "loss") else "loss"
                logged[f"selection/{key}"] = torch.tensor(value).item()  # float32, as trainers log
        for logger in self._trainer.loggers if logged else ():
            logger.log_metrics(logged, step=step)

    def _log_scores(self, found: Scores, step: int) -> None:
        trainer, folder = self._trainer, self._trainer.log_dir
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, CoefficientLogger):
                callback.write(trainer.loggers, folder, self._state, step)
                results = {"selection": found} if found else {}
                callback.finish(trainer.loggers, folder, step, self._state, results, self._history)
        self._log(found, step)
        for logger in trainer.loggers:
            logger.save()

    def _selection(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield placed batches of the selection split with their tasks, as many per task as the
        trainer's `limit_val_batches` allows.
        """
        limit = self._trainer.limit_val_batches
        loaders = self.job.data.evaluation_loaders("selection")
        for task, loader in zip(self.tasks, loaders, strict=True):
            share = max(int(limit * len(loader)), int(limit > 0))
            for batch in islice(loader, limit if isinstance(limit, int) else share):
                yield task, self.chain.moved(batch)


def steps_of(folder: Path) -> int | None:
    """Return the steps whose logs of an earlier run of a job are kept; None if there was no run.

    Args:
        folder: the job's folder.
    """
    if not (folder / "logs").is_dir():
        return None
    records = [read_json(path, result=dict) for path in folder.glob(f"steps/block-*/{STEP}")]
    steps = [int(record["result"].get("steps", 0)) for record in records if record]
    is_scored = (folder / "steps" / "scores" / STEP).is_file()  # after the last step
    return len(steps) * max(steps, default=0) + is_scored


def require_permuted(alignment: AbstractAlignment | None, plan: Plan | None = None) -> None:
    """Reject an alignment that mixes units, in the maps of an opened plan or as it declares.

    A block is matched to hidden features of an expert. A permuted expert computes them, in the
    merge's order; a mixed one computes something else, and the expert's own are in another basis.
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
