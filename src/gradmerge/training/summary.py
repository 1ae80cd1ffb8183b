"""The table at the end of a fit, and those of its scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import WandbLogger

from gradmerge.common import memory
from gradmerge.common.checkpoints import load_checkpoint
from gradmerge.common.progress import duration
from gradmerge.export.evaluated import STAGE
from gradmerge.export.history import History
from gradmerge.export.report import COEFFICIENTS, REPORT
from gradmerge.training.measures import SCORES

_MOST_TASKS = 8
_JUDGED = {score.name for score in SCORES.values()}


def score_table(split: str, results: Mapping[str, Any], experts: Mapping[str, Any]) -> str:
    """Return the scores of a split: one row per task, and those of each task's own source.

    Args:
        split: the split, or another measurement.
        results: scores of the merge by task, or `average`, and metric.
        experts: the scores of the tasks' own sources in the same form.
    """
    metrics = list(dict.fromkeys(m for values in results.values() for m in values))
    theirs = [m for m in metrics if any(m in values for values in experts.values())]
    theirs = [m for m in theirs if m in _JUDGED] or theirs[:1]
    title = split if split.startswith(STAGE) else f"{split} split"
    header = [title, *metrics, *(f"{metric} of its source" for metric in theirs)]
    rows = [
        [
            task,
            *(number(values.get(metric)) for metric in metrics),
            *(number(experts.get(task, {}).get(metric)) for metric in theirs),
        ]
        for task, values in results.items()
    ]
    return aligned([header, *rows])


def fit_table(trainer: Any, module: Any, seconds: float) -> str:
    """Return what a fit has reached, taken and written, as a table and a few lines."""
    private = module.merged.private
    learned = sum(value.numel() for value in module.merged.raw.values())
    counted = [("learned", f"{learned:,} coefficients")]
    counted += [("trained per task", private.words)] if private.active else []
    counted += [("unchanged", module.merged.plan.unchanged_note)]
    facts = facts_table(seconds, trainer.global_step, [*counted, *places(trainer)])
    return "\n\n".join([*fit_scores(trainer, module), facts])


def fit_scores(trainer: Any, module: Any) -> list[str]:
    """Return tables of the scores of a fit: those of the selection split, then all others."""
    tables = history_table(module.history, module.tasks, kept_step(trainer))
    for split in module.results.keys() - {"selection"}:
        tables.append(score_table(split, module.results[split], module.experts.get(split, {})))
    return tables


def history_table(found: History, tasks: Iterable[str], step: int | None) -> list[str]:
    """Return a table of the selection scores of a fit's start, of its end, and of the sources.

    Args:
        found: the scores by step.
        tasks: names of the tasks.
        step: the step that was kept; None for the last.

    Returns:
        The table, or nothing if there are no scores.
    """
    known = [name for name in tasks if found.points(f"selection/{name}/{found.score}")]
    shown = [*(known if len(known) <= _MOST_TASKS else ()), "average"]
    names = [f"selection/{name}/{found.score}" for name in shown] + ["selection/loss"]
    curves = [dict(found.points(name)) for name in names]
    if not any(curves):
        return []
    steps = sorted({at for curve in curves for at in curve})
    best = step if step in steps else steps[-1]
    label = f"kept, step {best}" if step in steps else f"last, step {best}"
    rows = [["start", *(number(curve.get(0)) for curve in curves)]] if 0 in steps else []
    rows.append([label, *(number(curve.get(best)) for curve in curves)])
    if found.experts:
        theirs = (number(found.experts.get(name)) for name in shown)
        rows.append(["each task's source", *theirs, ""])
    better = "higher" if found.higher_is_better else "lower"
    title = f"selection: {found.score} ({better} is better)" if found.score else "selection"
    return [aligned([[title, *shown, "loss"], *rows])]


def facts_table(seconds: float, steps: int, more: Iterable[tuple[str, Any]]) -> str:
    """Return time, steps, memory and more facts, as places, as a table."""
    facts = [["time", f"{duration(seconds)}, {steps} steps"], ["peak memory", peak_memory()]]
    return aligned([*facts, *([what, str(place)] for what, place in more if place)])


def kept_step(trainer: Any) -> int | None:
    """Return the step of the best checkpoint, if the trainer watches a score."""
    callback = trainer.checkpoint_callback
    best = getattr(callback, "best_model_path", "") if getattr(callback, "monitor", None) else ""
    if not best or not Path(best).is_file():
        return None
    return int(load_checkpoint(best, mmap=True)["global_step"])


def places(trainer: Any) -> list[tuple[str, Any]]:
    """Return what a fit has written, and where."""
    callback = trainer.checkpoint_callback
    checkpoint = getattr(callback, "best_model_path", "") or getattr(
        callback, "last_model_path", ""
    )
    exports = [c.folder for c in trainer.callbacks if hasattr(c, "require_free")]
    found = [("checkpoint", checkpoint)]
    found += [("model", folder) for folder in exports if folder.is_dir()]
    folder = _log_dir(trainer)
    found.append(("logs", folder))
    for what, name in (("report", REPORT), ("figure", COEFFICIENTS)):
        if folder and (path := Path(folder) / name).is_file():
            found.append((what, path))
    for logger in trainer.loggers:
        run = getattr(logger, "_experiment", None) if isinstance(logger, WandbLogger) else None
        if run is not None:
            # what failed to open has neither; W&B warns who asks an offline run for its URL
            url = None if getattr(run, "offline", True) else run.url
            place = url or getattr(run, "dir", None)
            found.append(("W&B", place.removesuffix("/files") if place else None))
    return found


def _log_dir(trainer: Any) -> str | None:
    """Return the trainer's `log_dir`, a call that would wait for all other processes."""
    for logger in trainer.loggers[:1]:
        return getattr(logger, "log_dir", None) or logger.save_dir
    return str(trainer.default_root_dir)


def peak_memory() -> str:
    """Return the most memory that this process has taken, in words."""
    size = memory.peak_memory()
    parts = [f"{size / 1e9:.2f} GB"] if size else []
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        parts.append(f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU")
    return ", ".join(parts) or "unknown"


def wandb_summary(module: Any, step: int | None) -> dict[str, float]:
    """Return the numbers of a fit that W&B shows per run: start, kept step, sources and test."""
    found: History = module.history
    shown = {}
    for name in found.curves:
        points = dict(found.points(name))
        if name.startswith("selection/") and 0 in points:
            shown[f"start/{name}"] = points[0]
        if step is not None and step in points and name.startswith("selection/"):
            shown[f"kept/{name}"] = points[step]
    shown |= {f"sources/{task}/{found.score}": value for task, value in found.experts.items()}
    if step is not None:
        shown["kept/step"] = step
    for task, values in module.results.get("test", {}).items():
        shown |= {f"test/{task}/{name}": value for name, value in values.items()}
    return shown


def to_wandb(loggers: Sequence[Any], values: Mapping[str, float]) -> None:
    """Put numbers into the summaries of W&B runs."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):

            def update(logger: Any = logger) -> None:
                logger.experiment.summary.update(dict(values))

            getattr(logger, "attempt", lambda action: action())(update)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text with aligned columns; the first is on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        pad = [
            cell.ljust(w) if len(widths) == 2 else cell.rjust(w)
            for cell, w in zip(rest, widths[1:], strict=True)
        ]
        lines.append("  ".join([first.ljust(widths[0]), *pad]).rstrip())
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Return a score as text; nothing for one that was not measured."""
    if value is None:
        return ""
    return f"{value:.4f}" if math.isfinite(value) else "n/a"
