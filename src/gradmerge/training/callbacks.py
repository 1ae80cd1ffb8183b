"""Callbacks: logging of coefficients, progress, and export at the end of a fit."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import WandbLogger

from gradmerge.common.atomic import writing
from gradmerge.common.checkpoints import load_checkpoint
from gradmerge.common.names import Dtype
from gradmerge.common.output import paths_in
from gradmerge.common.ranges import require_ranges
from gradmerge.engine.state import FitState
from gradmerge.export.atomic import inputs_of, refuse_existing, require_room
from gradmerge.export.folder import export_merged, require_options
from gradmerge.export.history import History
from gradmerge.export.license import license_note
from gradmerge.export.plots import CoefficientTable, figures_are_on, heat_map, png
from gradmerge.export.report import COEFFICIENTS, REPORT, report
from gradmerge.training.module import MergeModule
from gradmerge.training.run import read_by
from gradmerge.training.start import score_test

_KEPT = "The checkpoints of the fit are kept."


class CoefficientLogger(lightning.Callback):
    """Log the mean coefficient of each tensor and source after every validation of a fit.

    Writes to the run's folder, without any logging service: `coefficients.csv`, with one row per
    validation and tensor and one column per source; at the end `coefficients.png`, a heat map by
    layer and component, and `report.html`, a page with scores, learning curves and coefficients.
    With a `WandbLogger` it also logs the heat map, a histogram of learned coefficients per source
    and the report to W&B. The command line adds this callback, unless the configuration has one or
    turns logging off.

    Args:
        every_n_validations: log after every n-th validation.
    """

    def __init__(self, every_n_validations: int = 1) -> None:
        require_ranges(CoefficientLogger, {"every_n_validations": every_n_validations})
        self.every_n_validations = every_n_validations
        self._count = 0

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Log the coefficients, except in the sanity check and outside of a fit."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._count += 1
        if not hasattr(pl_module, "merged"):
            return  # a driver's module, which learns only a part of the merge
        folder = trainer.log_dir  # a collective call: every process must make it
        if trainer.is_global_zero and (self._count - 1) % self.every_n_validations == 0:
            self.write(trainer.loggers, folder, pl_module.merged.state, trainer.global_step)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Save the heat map and the report of the final coefficients."""
        folder = trainer.log_dir
        if trainer.is_global_zero and hasattr(pl_module, "merged"):
            known = (pl_module.merged.state, pl_module.results, pl_module.history)
            self.finish(trainer.loggers, folder, trainer.global_step, *known)

    def finish(
        self,
        loggers: Iterable[Any],
        folder: str | None,
        step: int,
        state: FitState,
        results: Mapping[str, Any],
        history: History | None = None,
    ) -> None:
        """Save the heat map and the report of a finished fit, and log the report to W&B."""
        runs = [logger for logger in loggers if isinstance(logger, WandbLogger)]
        if not folder and not runs:
            return
        page = report(state, results, history, Path(folder).name if folder else "")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            image = Path(folder) / COEFFICIENTS
            with writing(image, _KEPT):
                if drawn := png(heat_map, CoefficientTable.of(state)):
                    image.write_bytes(drawn)
                image.with_name(REPORT).write_text(page, encoding="utf-8")
        for logger in runs:
            import wandb

            logger.log_metrics({"report": wandb.Html(page, inject=False)}, step)

    def write(self, loggers: Iterable[Any], folder: str | None, state: FitState, step: int) -> None:
        """Log the given coefficients to `coefficients.csv` and to W&B."""
        table = CoefficientTable.of(state)
        if folder:
            path = Path(folder) / "coefficients.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            with writing(path, _KEPT), path.open("a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", "tensor", *table.sources])
                for name, row in zip(table.names, table.mean.tolist(), strict=True):
                    writer.writerow([step, name, *(f"{value:.6g}" for value in row)])
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                self._to_wandb(logger, table, step)

    def _to_wandb(self, logger: Any, table: CoefficientTable, step: int) -> None:
        import wandb

        logged: dict[str, Any] = {}
        if figures_are_on():
            logged["coefficients/heat_map"] = wandb.Image(heat_map(table))
        if table.learned.any():
            for source, values in zip(table.sources, table.mean[table.learned].T, strict=True):
                logged[f"coefficients/{source}"] = wandb.Histogram(values.numpy())
        if logged:
            logger.log_metrics(logged, step)


class StepProgress(TQDMProgressBar):
    """Progress bar over all training steps, with the loss, the step rate and the time left.

    It counts steps because epochs mean little when tasks differ in size. If the output is not a
    terminal, it prints a line every ten seconds.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 100)

    def init_train_tqdm(self) -> Any:
        """Return the bar over the whole fit."""
        bar = super().init_train_tqdm()
        bar.mininterval = 0.2 if sys.stderr.isatty() else 10.0
        return bar

    def init_validation_tqdm(self) -> Any:
        """Return a disabled bar within a fit, where scores appear on the training bar."""
        if self.trainer.state.fn != "fit":
            return super().init_validation_tqdm()
        return Tqdm(disable=True)

    def init_sanity_tqdm(self) -> Any:
        """Return a disabled bar."""
        return Tqdm(disable=True)

    def on_train_start(self, *_: Any) -> None:
        """Open the bar."""
        trainer = self.trainer
        self.train_progress_bar = bar = self.init_train_tqdm()
        steps = trainer.estimated_stepping_batches
        bar.total = None if steps == float("inf") else int(steps)
        bar.initial = bar.n = bar.last_print_n = trainer.global_step
        bar.set_description("learning", refresh=False)

    def on_train_epoch_start(self, *_: Any) -> None:
        """Keep the bar: it spans all epochs."""

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        """Advance the bar to the optimiser's step."""
        bar = self.train_progress_bar
        moved = trainer.global_step - bar.n
        if moved:
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(moved)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Keep the bar: it spans all epochs."""

    def on_train_end(self, *_: Any) -> None:
        """Show the final state and close the bar."""
        self.train_progress_bar.refresh()
        self.train_progress_bar.close()

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """Return the metrics on the bar, without the version number."""
        metrics = super().get_metrics(trainer, pl_module)
        return {key: value for key, value in metrics.items() if key != "v_num"}


class ExportAtEnd(lightning.Callback):
    """Export the merged model as a Hugging Face folder at the end of a fit.

    Exports the best checkpoint if the trainer's checkpoint callback monitors a metric, else the
    final coefficients. Nothing is exported after an interrupted fit or with `fast_dev_run`.

    Args:
        output: folder to write. Without `overwrite` it must not exist; this is checked before
            training starts.
        dtype: dtype of the exported tensors: float32, bfloat16 or float16. Default: the dtype of
            each tensor in the reference checkpoint.
        overwrite: replace an existing folder.
        head: task whose head is stored in the folder's own model.
        log_artifact: also log the folder to W&B as an artifact.
        provenance_paths: keep the local paths of sources and data in the folder's records. Default:
            names and hub ids only.
        score_test: also score the test split with the exported coefficients; its scores go to the
            model card, the provenance and the logs. Leave it off while options are still chosen.
    """

    def __init__(
        self,
        output: str,
        dtype: Dtype | None = None,
        overwrite: bool = False,
        head: str | None = None,
        log_artifact: bool = False,
        provenance_paths: bool = False,
        score_test: bool = False,
    ) -> None:
        self.output = output
        self.dtype = dtype
        self.overwrite = overwrite
        self.head = head
        self.log_artifact = log_artifact
        self.provenance_paths = provenance_paths
        self.score_test = score_test

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Reject an existing output folder before training."""
        if stage == "fit":
            self.require_free(self._inputs(trainer, pl_module))
            kind = require_options(self.dtype, None, ())
            require_room(self.folder, pl_module.merged.plan, kind)

    @staticmethod
    def _inputs(trainer: lightning.Trainer, module: Any) -> list[Path]:
        data = getattr(trainer, "datamodule", None)
        return [*inputs_of(module.merged.plan), *read_by(data), *paths_in(trainer.ckpt_path)]

    @property
    def folder(self) -> Path:
        """The folder to write."""
        return Path(self.output).expanduser()

    def require_free(self, inputs: Iterable[Path] = ()) -> None:
        """Reject an output folder that cannot be written, overlaps with an input, or exists.

        With `overwrite` it may exist if gradmerge wrote it.
        """
        remedy = "ExportAtEnd with overwrite: true"
        refuse_existing(self.folder, self.overwrite, inputs, remedy)

    def require_tasks(self, tasks: Iterable[str]) -> None:
        """Reject an unknown dtype, or a `head` that does not fit the tasks."""
        require_options(self.dtype, self.head, tasks)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Reject options that do not fit the tasks."""
        self.require_tasks(pl_module.merged.tasks)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Restore the best coefficients and export the merged model."""
        if getattr(trainer, "fast_dev_run", False) or trainer.interrupted:
            return
        facts = finish_fit(trainer, pl_module)
        if self.score_test:
            score_test(trainer, pl_module)
        if trainer.is_global_zero:
            export = partial(export_merged, pl_module.merged)
            known = {"results": pl_module.results, "history": pl_module.history, "extra": facts}
            self.write(export, trainer.loggers, **known, inputs=self._inputs(trainer, pl_module))

    def write(self, export: Callable[..., Path], loggers: Iterable[Any], **options: Any) -> Path:
        """Write the folder, and log it if that is asked for.

        Args:
            export: `export_merged` or `export_state` with its first argument bound.
            loggers: loggers of the fit.
            **options: more arguments of `export`, or others than this callback's.
        """
        names = ("dtype", "overwrite", "head", "provenance_paths")
        own = {name: getattr(self, name) for name in names}
        folder = export(self.output, **{**own, **options})
        lightning.pytorch.utilities.rank_zero_info(f"merged model written to {folder}")
        if note := license_note(folder):
            lightning.pytorch.utilities.rank_zero_info(note)
        for logger in loggers if self.log_artifact else ():
            if isinstance(logger, WandbLogger):
                import wandb

                artifact = wandb.Artifact("merged-model", type="model")
                artifact.add_dir(str(folder))
                attempt = getattr(logger, "attempt", lambda action: action())
                attempt(partial(logger.experiment.log_artifact, artifact))
        return folder


def finish_fit(trainer: lightning.Trainer, module: MergeModule) -> dict[str, Any]:
    """Restore the best coefficients, and return facts about the fit for the provenance.

    Without a monitored metric, the final coefficients are kept.

    Raises:
        ConfigError: the checkpoint holds no gradmerge coefficients.
    """
    callback: Any = trainer.checkpoint_callback
    best = getattr(callback, "best_model_path", "") if getattr(callback, "monitor", None) else ""
    if best:
        checkpoint, history = load_checkpoint(best), module.history
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        module.history = history  # with what followed
        history.step = int(checkpoint["global_step"])
    else:
        module.refresh_buffers()
    return {"checkpoint": Path(best).name if best else "last state", "steps": trainer.global_step}
