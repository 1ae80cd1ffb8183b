"""Callbacks: what is logged about coefficients, and the export at the end of a fit."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from gradmerge.engine.plan import Plan
from gradmerge.errors import ConfigError
from gradmerge.export.atomic import refuse_existing
from gradmerge.export.folder import export_merged, require_options
from gradmerge.training.module import MergeModule


def heat_map(
    table: Tensor, names: Sequence[str], sources: Sequence[str], path: Path | None, title: str = ""
) -> Any:
    """Mean coefficient of each tensor (rows) and source (columns), diverging around zero.

    Args:
        table: `[tensors, sources]`.
        names: tensors, in order of depth.
        sources: names of the sources.
        path: PNG to write; None returns the figure only.
        title: text above the map.
    """
    from matplotlib.figure import Figure

    height = min(24.0, max(3.0, 0.17 * len(names) + 1.4))
    figure = Figure(figsize=(3.6 + 0.7 * len(sources), height), layout="constrained")
    axes = figure.subplots()
    limit = max(float(table.abs().max()), 1e-6)
    image = axes.imshow(
        table.numpy(),
        aspect="auto",
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
    )
    axes.set_xticks(range(len(sources)), list(sources), rotation=30, ha="right")
    if len(names) <= 120:
        axes.set_yticks(range(len(names)), list(names), fontsize=6)
    else:
        axes.set_ylabel(f"{len(names)} tensors, first to last")
    axes.set_title(title or "mean coefficient of each tensor and source", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.6)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    return figure


def coefficient_table(plan: Plan, raw: Any) -> tuple[list[str], Tensor]:
    """Names of the merged tensors and their mean coefficients, `[tensors, sources]`."""
    rows = []
    for name in plan.tensors:
        coefficient = plan.coefficient(name, raw).detach().float().cpu()
        rows.append(coefficient.reshape(len(plan.sources), -1).mean(dim=1))
    return list(plan.tensors), torch.stack(rows)


class CoefficientLogger(lightning.Callback):
    """Coefficients at each validation: a histogram and a tensor x source heat map to W&B.

    Always, without any logger service: `coefficients.csv` (one line a validation, tensor and
    source) and, at the end, `coefficients.png`, in the run's folder. The command line adds one
    unless the configuration has its own, or logs nothing.

    Args:
        every_n_validations: log at every n-th validation.
    """

    def __init__(self, every_n_validations: int = 1) -> None:
        self.every_n_validations = every_n_validations
        self._count = 0

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Log, unless this is the sanity check or a plain `validate`."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._count += 1
        if not hasattr(pl_module, "merged"):
            return  # a driver's, of which a part is learned
        folder = trainer.log_dir  # agreed on by all processes, so all must ask
        if trainer.is_global_zero and (self._count - 1) % self.every_n_validations == 0:
            merged = pl_module.merged
            self.write(trainer.loggers, folder, merged.plan, merged.raw, trainer.global_step)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Save the heat map."""
        folder = trainer.log_dir
        if trainer.is_global_zero and folder and hasattr(pl_module, "merged"):
            self.draw(folder, pl_module.merged.plan, pl_module.merged.raw)

    def draw(self, folder: str, plan: Plan, raw: Any) -> None:
        """Save the heat map of coefficients as they stand."""
        names, table = coefficient_table(plan, raw)
        heat_map(table, names, plan.source_names, Path(folder) / "coefficients.png")

    def write(
        self, loggers: Iterable[Any], folder: str | None, plan: Plan, raw: Any, step: int
    ) -> None:
        """Log coefficients as they stand, to the folder's table and to W&B."""
        names, table = coefficient_table(plan, raw)
        if folder:
            path = Path(folder) / "coefficients.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", "tensor", *plan.source_names])
                for name, row in zip(names, table.tolist(), strict=True):
                    writer.writerow([step, name, *(f"{value:.6g}" for value in row)])
        for logger in loggers:
            if isinstance(logger, lightning.pytorch.loggers.WandbLogger):
                self._to_wandb(logger, plan, table, names, step)

    def _to_wandb(
        self, logger: Any, plan: Plan, table: Tensor, names: list[str], step: int
    ) -> None:
        import wandb

        figure = heat_map(table, names, plan.source_names, None)
        logged: dict[str, Any] = {"coefficients/heat_map": wandb.Image(figure)}
        for source, values in zip(plan.source_names, table.T, strict=True):
            logged[f"coefficients/{source}"] = wandb.Histogram(values.numpy())
        logger.experiment.log({**logged, "trainer/global_step": step})


class StepProgress(TQDMProgressBar):
    """One bar over all training steps: the loss, the step rate and the time left.

    Epochs say little here: tasks differ in size, and a fit is a number of steps. Where the output
    is no terminal, a line every ten seconds.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 100)

    def init_train_tqdm(self) -> Any:
        """The bar over the whole fit."""
        bar = super().init_train_tqdm()
        bar.mininterval = 0.2 if sys.stderr.isatty() else 10.0
        return bar

    def init_validation_tqdm(self) -> Any:
        """No bar of its own within a fit: its scores appear on the training bar."""
        if self.trainer.state.fn != "fit":
            return super().init_validation_tqdm()
        return Tqdm(disable=True)

    def init_sanity_tqdm(self) -> Any:
        """None."""
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
        """The bar goes on."""

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        """Move the bar to the optimiser's step."""
        bar = self.train_progress_bar
        moved = trainer.global_step - bar.n
        if moved:
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(moved)

    def on_train_epoch_end(self, *_: Any) -> None:
        """The bar goes on."""

    def on_train_end(self, *_: Any) -> None:
        """Show the last state and leave the line."""
        self.train_progress_bar.refresh()
        self.train_progress_bar.close()

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """The loss and the score that is watched, without the version number."""
        metrics = super().get_metrics(trainer, pl_module)
        return {key: value for key, value in metrics.items() if key != "v_num"}


OVERWRITE = "ExportAtEnd with overwrite: true"
"""How a fit is told to replace a folder."""


class ExportAtEnd(lightning.Callback):
    """Write the merged model as a Hugging Face folder when the fit ends.

    With a checkpoint callback that watches a metric the best checkpoint is exported, else the last
    state.

    Args:
        output: folder to write; an existing one is refused before training starts.
        dtype: float32, bfloat16, float16; default: as the reference stores each tensor.
        overwrite: replace an existing folder.
        head: task whose head the folder itself carries.
        log_artifact: also log the folder to W&B as an artifact.
    """

    def __init__(
        self,
        output: str,
        dtype: str | None = None,
        overwrite: bool = False,
        head: str | None = None,
        log_artifact: bool = False,
    ) -> None:
        self.output = output
        self.dtype = dtype
        self.overwrite = overwrite
        self.head = head
        self.log_artifact = log_artifact

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse before training what would be refused after it."""
        if stage == "fit":
            self.require_free()

    def require_free(self) -> None:
        """Refuse an existing folder, unless it is to be replaced."""
        refuse_existing(Path(self.output).expanduser(), self.overwrite, OVERWRITE)

    def require_tasks(self, tasks: Iterable[str]) -> None:
        """Refuse options that these tasks do not have, and a dtype that is none."""
        require_options(self.dtype, self.head, tasks)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """The same for options that depend on the tasks."""
        self.require_tasks(pl_module.merged.tasks)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Restore the best coefficients and export."""
        if getattr(trainer, "fast_dev_run", False) or trainer.interrupted:
            return
        best = restore_best(trainer, pl_module)
        if not best:
            pl_module.refresh_buffers()
        if not trainer.is_global_zero:
            return
        folder = export_merged(
            pl_module.merged,
            self.output,
            dtype=self.dtype,
            overwrite=self.overwrite,
            head=self.head,
            results=pl_module.results,
            extra={
                "checkpoint": Path(best).name if best else "last state",
                "steps": trainer.global_step,
            },
        )
        lightning.pytorch.utilities.rank_zero_info(f"merged model written to {folder}")
        if self.log_artifact:
            log_artifact(trainer.loggers, folder)


def log_artifact(loggers: Iterable[Any], folder: Path) -> None:
    """Log a model folder to W&B, where one of a trainer's loggers logs there."""
    for logger in loggers:
        if isinstance(logger, lightning.pytorch.loggers.WandbLogger):
            import wandb

            artifact = wandb.Artifact("merged-model", type="model")
            artifact.add_dir(str(folder))
            logger.experiment.log_artifact(artifact)


def restore_best(trainer: lightning.Trainer, module: MergeModule) -> str:
    """Load the coefficients of the best checkpoint, if one was kept by a watched metric.

    Raises:
        ConfigError: the checkpoint has no coefficients of this merge.
    """
    callback: Any = trainer.checkpoint_callback
    best = getattr(callback, "best_model_path", "") if getattr(callback, "monitor", None) else ""
    if best:
        checkpoint = torch.load(best, map_location="cpu", weights_only=True)
        if "gradmerge" not in checkpoint:
            raise ConfigError(f"{best} holds no gradmerge coefficients.")
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
    return best
