"""Figures of a comparison as files, and `report.html`, which shows everything on one page."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradmerge.common.atomic import whole_file
from gradmerge.common.errors import GradmergeError
from gradmerge.comparison.figures import FIGURES
from gradmerge.comparison.results import Comparison, Outcome, Row
from gradmerge.comparison.tables import curve_rows, head_and_rows, notes
from gradmerge.engine.state import FitState
from gradmerge.export.plots import DPI, figures_are_on
from gradmerge.export.report import REPORT, coefficient_figures, document, figure, table
from gradmerge.training.module import MergeModule

_TITLES = {
    "scores": "Average score",
    "cost": "Score and cost",
    "tasks": "Score of each task",
    "examples": "Learning curves",
}
_ABOUT = {
    "scores": "Mean over seeds, with the standard deviation and a dot for each seed. Broad bars: "
    "the 95% interval of the difference to the reference, from the dashed line.",
    "cost": "Seconds of the final run alone; the table has those of tuning.",
    "tasks": "The reference, the best methods, and each task's own expert.",
    "examples": "Mean over seeds, with the standard deviation. The last point has all examples.",
}


def draw(found: Comparison) -> dict[str, bytes]:
    """Return the figures as PNG, by name; nothing if figures are off."""
    images = {}
    for name, drawing in FIGURES.items() if figures_are_on() else ():
        drawn = drawing(found)
        if drawn is not None:
            buffer = io.BytesIO()
            drawn.savefig(buffer, format="png", dpi=DPI)
            images[name] = buffer.getvalue()
    return images


def write_page(folder: Path, found: Comparison, **options: Any) -> None:
    """Write the figures and the page into a folder; options as of `page`."""
    images = draw(found)
    for name, image in images.items():
        with whole_file(folder / f"{name}.png") as path:
            path.write_bytes(image)
    with whole_file(folder / REPORT) as path:
        path.write_text(page(found, images, **options), encoding="utf-8")


def page(found: Comparison, images: Mapping[str, bytes], **options: Any) -> str:
    """Return the page: table, figures, and the coefficients of the best learned merge.

    Args:
        found: the comparison.
        images: its figures as PNG, by name.
        **options: options of `MergeModule.load_from_checkpoint`, such as `allow_modules`.
    """
    body = [table(*head_and_rows(found))]
    if found.curves:
        body += ["<h2>By adaptation examples per task</h2>", table(*curve_rows(found))]
    body += [f"<p>{html.escape(note.replace('**', ''))}</p>" for note in notes(found)]
    body += [f'<p class="note">{html.escape(line)}</p>' for line in found.about]
    for name, other in found.others.items():
        body += [f"<h2>On {html.escape(name)}</h2>", table(*head_and_rows(other))]
    for name, image in images.items():
        body += figure(image, _TITLES[name], _ABOUT[name])
    if images:
        body += _learned(found, options)
    return document("Comparison of merges", body)


def best_learned(found: Comparison) -> tuple[Row, Outcome] | None:
    """Return the best row whose coefficients are in a checkpoint, and its first outcome."""
    for row in reversed([row for row in found.scored if row.kind == "method"]):
        for outcome in row.outcomes.values():
            place = checkpoint_of(outcome)
            if place is not None and place.is_file():
                return row, outcome
    return None


def checkpoint_of(outcome: Outcome) -> Path | None:
    """Return the file or folder of what was learned, if anything was."""
    name = outcome.record.get("checkpoint")
    return outcome.place.parent / str(name) if name and outcome.place is not None else None


def _learned(found: Comparison, options: Mapping[str, Any]) -> Iterator[str]:
    best = best_learned(found)
    if best is None:
        return
    row, outcome = best
    path = checkpoint_of(outcome)
    assert path is not None
    yield f"<h2>What {html.escape(row.name)} has learned (seed {outcome.seed})</h2>"
    try:
        state: FitState = MergeModule.load_from_checkpoint(path, **options).merged.state
    except GradmergeError as error:
        yield f'<p class="note">The checkpoint cannot be opened: {html.escape(str(error))}</p>'
        return
    yield from coefficient_figures(state)
