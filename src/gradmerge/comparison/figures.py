"""Figures of a comparison; matplotlib is imported when the first is drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradmerge.comparison.results import Comparison, Row
from gradmerge.comparison.tables import seconds_of
from gradmerge.export.plots import COLOURS, MARKERS, new_figure, outside_legend, short_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINE = 0.27
"""Height in inches of a row."""
_MOST_BARS = 8
"""Methods in the figure of tasks."""
_GREY = "#777777"


def score_figure(found: Comparison) -> Figure | None:
    """Draw the average of each row: the mean, its deviation, and the interval of the difference."""
    rows = found.scored
    if not rows:
        return None
    figure = new_figure(7.5, 1.1 + _LINE * len(rows))
    axes = figure.subplots()
    reference = found.row(found.reference)
    centre = math.nan
    if reference is not None and reference.outcomes:
        centre = reference.mean("average", found.metric)
        axes.axvline(centre, color=_GREY, linewidth=0.8, linestyle="--")
    for at, row in enumerate(rows):
        values = [v for v in row.scores("average", found.metric) if math.isfinite(v)]
        if not values:
            continue
        colour = COLOURS[0] if row.kind == "method" else _GREY
        error = statistics.stdev(values) if len(values) > 1 else 0.0
        mean = statistics.fmean(values)
        axes.errorbar(mean, at, xerr=error or None, fmt="o", color=colour, capsize=3, markersize=5)
        if len(values) > 1:
            axes.plot(values, [at] * len(values), ".", color=colour, alpha=0.4, markersize=4)
        if row.interval is not None:
            ends = [centre + row.interval.low, centre + row.interval.high]
            axes.plot(ends, [at, at], color=colour, alpha=0.25, linewidth=6, solid_capstyle="butt")
    names = [short_label(row.name) for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_xlabel(f"{_title(found)}; dashed: {short_label(found.reference)}", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", alpha=0.25)
    return figure


def cost_figure(found: Comparison) -> Figure | None:
    """Draw the average of each method against the seconds of its final run."""
    rows = [row for row in found.scored if row.kind == "method" and seconds_of(row) > 0]
    if not rows:
        return None
    figure = new_figure(8.0, max(3.4, 0.5 + 0.2 * len(rows)))
    axes = figure.subplots()
    for number, row in enumerate(rows):
        mean = row.mean("average", found.metric)
        style: dict[str, Any] = {"color": _colour(number), "linestyle": ""}
        style["marker"] = MARKERS[number % len(MARKERS)]
        axes.plot([seconds_of(row)], [mean], label=short_label(row.name), **style)
    axes.set_xscale("log")
    for kind in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        kind("{x:g}")
    axes.tick_params(which="minor", labelsize=6)
    axes.set_xlabel("seconds of the final run (fit; or merge and statistics)", fontsize=8)
    axes.set_ylabel(_title(found), fontsize=8)
    outside_legend(axes)
    return figure


def task_figure(found: Comparison) -> Figure | None:
    """Draw the score of each task as bars, for the reference, the best methods and the bound."""
    every = [row for row in found.scored if row.kind == "method"]
    rows = _chosen(found, every)
    if not rows:
        return None
    width = 0.8 / len(rows)
    figure = new_figure(min(16.0, 2.8 + len(found.tasks) * (0.35 + 0.17 * len(rows))), 3.6)
    axes = figure.subplots()
    values = []
    for number, row in enumerate(rows):
        places = [at + (number - (len(rows) - 1) / 2) * width for at in range(len(found.tasks))]
        heights = [row.mean(task, found.metric) for task in found.tasks]
        values += [height for height in heights if math.isfinite(height)]
        colour = _GREY if row.kind != "method" else _colour(number)
        axes.bar(places, heights, width, label=short_label(row.name), color=colour)
    low, high = min(values, default=0.0), max(values, default=1.0)
    note = ""
    if high - low < 0.3 * low:  # differences would be lost in bars from 0
        axes.set_ylim(low - 0.25 * (high - low) - 0.01 * low, None)
        note = "; bars do not start at 0"
    names = [short_label(task) for task in found.tasks]
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=30 if len(names) > 5 else 0)
    axes.set_ylabel(f"{found.metric.replace('_', ' ')}{note}", fontsize=8)
    outside_legend(axes)
    return figure


def _chosen(found: Comparison, methods: Sequence[Row]) -> list[Row]:
    """Return the reference, the best methods and the bound, as many as can be told apart."""
    others = [row for row in methods if row.name != found.reference]
    reference, bound = found.row(found.reference), [r for r in found.scored if r.kind == "bound"]
    first = [reference] if reference is not None and reference.outcomes else []
    return [*first, *others[-(_MOST_BARS - len(first) - len(bound)) :], *bound]


def curve_figure(found: Comparison) -> Figure | None:
    """Draw the average against the number of adaptation examples per task."""
    if not found.curves:
        return None
    figure = new_figure(7.5, 3.6)
    axes = figure.subplots()
    for number, (name, curve) in enumerate(found.curves.items()):
        rows = dict(curve)
        whole = found.row(name)
        if whole is not None and whole.outcomes:  # with all examples that the fit has drawn
            rows.setdefault(round(whole.cost("adaptation") / len(found.tasks)), whole)
        sizes = sorted(rows)
        scores = [rows[size].scores("average", found.metric) for size in sizes]
        means = [statistics.fmean(one) for one in scores]
        errors = [statistics.stdev(one) if len(one) > 1 else 0.0 for one in scores]
        style: dict[str, Any] = {"color": _colour(number), "marker": MARKERS[number % len(MARKERS)]}
        axes.errorbar(sizes, means, yerr=errors, label=short_label(name), capsize=3, **style)
    lines = (found.reference, *(row.name for row in found.scored if row.kind == "bound"))
    for name, style_of_line in zip(lines, ("--", ":"), strict=False):
        row = found.row(name)
        if row is not None and row.outcomes:
            mean = row.mean("average", found.metric)
            label = short_label(name)
            axes.axhline(mean, color=_GREY, linewidth=0.9, linestyle=style_of_line, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("adaptation examples per task", fontsize=8)
    axes.set_ylabel(_title(found), fontsize=8)
    outside_legend(axes)
    return figure


def _title(found: Comparison) -> str:
    better = "higher" if found.higher_is_better else "lower"
    return f"{found.metric.replace('_', ' ')}, average of tasks ({better} is better)"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


FIGURES = {
    "scores": score_figure,
    "cost": cost_figure,
    "tasks": task_figure,
    "examples": curve_figure,
}
"""Figures by the name of their file."""
