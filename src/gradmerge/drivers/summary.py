"""The table at the end of a job, as a fit has one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradmerge.drivers.base import Job
from gradmerge.export.history import History
from gradmerge.training.summary import (
    aligned,
    facts_table,
    fit_scores,
    history_table,
    number,
    places,
)


def start_and_end(found: History, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the average score of a step of a fold at its start and at its end, for its record."""
    score = found.score
    start = dict(found.points(f"selection/average/{score}")).get(0)
    end = results.get("selection", {}).get("average", {}).get(score)
    return {"score": score, "start": start, "kept": end}


def fold_table(job: Job, steps: Sequence[Mapping[str, Any]], trainer: Any, module: Any) -> str:
    """Return the table of a fold: scores of each step and of the last fit, time, memory, places.

    Args:
        job: the job.
        steps: results of all steps.
        trainer: trainer of the last step.
        module: module of the last step, at what was kept.
    """
    score = next((step["score"] for step in steps if step.get("score")), "score")
    rows = [["step", "merged", f"{score} at the start", "kept"]]
    for step in steps:
        merged = " with ".join("+".join(names) for names in step["merged"])
        rows.append([step["step"], merged, number(step.get("start")), number(step.get("kept"))])
    taken = sum(int(step.get("steps", 0)) for step in steps)
    tables = [*([aligned(rows)] if len(steps) > 1 else []), *fit_scores(trainer, module)]
    return "\n\n".join([*tables, facts_table(job.seconds, taken, _places(job, trainer))])


def layers_table(
    job: Job,
    found: History,
    tasks: Iterable[str],
    blocks: Sequence[Mapping[str, Any]],
    trainer: Any,
) -> str:
    """Return the table of a job of the layer-wise driver.

    Args:
        job: the job.
        found: scores of its start and end.
        tasks: names of the tasks.
        blocks: results of all blocks.
        trainer: a trainer with the job's loggers.
    """
    taken = sum(int(block["steps"]) for block in blocks)
    facts = facts_table(job.seconds, taken, _places(job, trainer))
    return "\n\n".join([*history_table(found, tasks, None), facts])


def _places(job: Job, trainer: Any) -> list[tuple[str, Any]]:
    """Return where the job is: its model, the folder of its steps, and the logs of the last."""
    checkpoint = ("checkpoint",)  # of the last step alone, from which the job resumes
    found = [place for place in places(trainer) if place[0] not in checkpoint]
    return [("model", job.target.folder), ("steps", job.folder / "steps"), *found]
