"""`report.html`: a merge on one page that needs no other file and no network."""

from __future__ import annotations

import base64
import dataclasses
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradmerge.common.version import __version__
from gradmerge.engine.state import FitState
from gradmerge.export.history import History
from gradmerge.export.plots import (
    CoefficientTable,
    depth_lines,
    figures_are_on,
    heat_map,
    learning_curves,
    png,
)

REPORT, COEFFICIENTS = "report.html", "coefficients.png"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; }
p.note { color: #555; }
"""


def report(
    state: FitState, results: Mapping[str, Any], history: History | None = None, name: str = ""
) -> str:
    """Return the page of a merge: its method, scores, learning curves and coefficients.

    Args:
        state: the merge.
        results: scores by split, task (or `average`) and metric.
        history: what the fit has measured, if there was one.
        name: name of the merge, for the title.
    """
    learned = history is not None or bool(state.run)
    history = history or History()
    body = [
        _method(state),
        "<h2>Scores</h2>",
        *_scores(results, history),
        *figure(png(learning_curves, history), "Learning curves", "Learning curves"),
        "<h2>Coefficients</h2>",
        # drawing takes longer than many a merge without training
        *coefficient_figures(state, draws=learned),
    ]
    if not figures_are_on():
        body.append('<p class="note">Without figures (GRADMERGE_FIGURES is off).</p>')
    return document(f"Merge {name}".strip(), body)


def coefficient_figures(state: FitState, draws: bool = True) -> Iterator[str]:
    """Yield the parts of a page that show the coefficients of a merge.

    Args:
        state: the merge.
        draws: draw the coefficients, if they are not all the same.
    """
    found = CoefficientTable.of(state)
    yield _summary(found)
    if not found.varies:
        yield f"<p>All coefficients are {float(found.mean.flatten()[0]):.6g}.</p>"
    elif draws:
        yield from figure(png(heat_map, found), "By layer and component", _HEAT_MAP)
        yield from figure(png(depth_lines, found), "By depth", _DEPTH)


def document(title: str, body: Sequence[str]) -> str:
    """Return a page of a title and parts in HTML."""
    title = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}'
        f"</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(body)
        + f'\n<p class="note">gradmerge {__version__}</p>\n</body>\n</html>\n'
    )


_HEAT_MAP = (
    "Each cell is the mean coefficient of its tensors, weighted by their sizes. Tensors outside of "
    "the layers span all columns. Grey: not learned. Hatched: no such tensor in this layer."
)
_DEPTH = "Line: mean over the layer's components. Band: their smallest and largest."


def _method(state: FitState) -> str:
    recipe = state.plan.recipe
    parts = {
        "sources": ", ".join(state.plan.source_names),
        "operator": type(recipe.operator).__name__,
        "preprocess": ", ".join(type(step).__name__ for step in recipe.preprocess) or "none",
        "coefficients": _words(recipe.coefficients),
        "start": _numbers(recipe.init),
        "tensors": f"{len(state.plan.tensors)} merged, {len(state.learned)} with own coefficients",
    }
    private = state.private
    if private is not None and private.active:
        parts["trained per task"] = private.words
    return table(["", ""], [[key, value] for key, value in parts.items()])


def _words(link: Any) -> str:
    """Return a granularity with the links around it, such as `Sigmoid(Column)`."""
    inner = getattr(link, "inner", None)
    name = type(link).__name__
    return name if inner is None else f"{name}({_words(inner)})"


def _numbers(init: Any) -> str:
    """Return a component with its numbers, such as `Constant(0.3)`; paths stay out of a page."""
    values = [getattr(init, field.name) for field in dataclasses.fields(init)]
    numbers = (f"{v:g}" for v in values if isinstance(v, (int, float)) and not isinstance(v, bool))
    return f"{type(init).__name__}({', '.join(numbers)})"


def _scores(results: Mapping[str, Any], history: History) -> Iterator[str]:
    for split, tasks in results.items():
        metrics = list(dict.fromkeys(metric for values in tasks.values() for metric in values))
        rows = [
            [task, *(_number(values.get(metric)) for metric in metrics)]
            for task, values in tasks.items()
        ]
        yield table([split, *(metric.replace("_", " ") for metric in metrics)], rows)
    if not results:
        yield "<p>None measured.</p>"
    start = {name: history.points(name)[:1] for name in history.curves}
    splits = [name.split("/") for name in start if name.startswith("selection/")]
    own = [task for _, task, *score in splits if score == [history.score]]
    rows = []
    for task in own:
        first = start[f"selection/{task}/{history.score}"]
        at_start = first[0][1] if first and first[0][0] == 0 else None
        rows.append([task, _number(at_start), _number(history.experts.get(task))])
    if any(cell for _, *cells in rows for cell in cells):
        score = str(history.score).replace("_", " ")
        yield table([f"selection {score}", "start", "the task's own source"], rows)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if math.isfinite(value) else "n/a"


def _summary(found: CoefficientTable) -> str:
    rows = [
        [source, *(f"{value:.4f}" for value in (start.mean(), mean.mean(), mean.min(), mean.max()))]
        for source, start, mean in zip(found.sources, found.start.T, found.mean.T, strict=True)
    ]
    return table(["source", "start", "mean", "smallest tensor", "largest tensor"], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in HTML."""
    lines = [("th", header)] if any(header) else []
    lines += [("td", row) for row in rows]
    cells = (
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in lines
    )
    return "<table>\n" + "\n".join(cells) + "\n</table>"


def figure(image: bytes | None, title: str, note: str) -> Iterator[str]:
    """Yield a PNG with its title and a note; nothing without one."""
    if image is None:
        return
    data = base64.b64encode(image).decode()
    yield f'<h3>{title}</h3>\n<img alt="{title}" src="data:image/png;base64,{data}">'
    if note != title:
        yield f'<p class="note">{note}</p>'


def write_report(folder: Path, *args: Any, **options: Any) -> None:
    """Write the page of a merge into a folder; arguments of `report`."""
    (folder / REPORT).write_text(report(*args, **options), encoding="utf-8")
