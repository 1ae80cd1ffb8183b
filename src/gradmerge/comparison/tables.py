"""A comparison as Markdown, as CSV, and as plain data."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

from gradmerge.common.progress import duration
from gradmerge.comparison.results import Comparison, Row


def head_and_rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the main table as text."""
    head = ["method", *found.tasks, "average", "difference [95%]", "gap closed", "choice"]
    head += ["trials", "trainable", "examples", "seconds", "tuning", "memory"]
    rows = [[_name(found, row), *_scores(found, row), *_cost(row)] for row in found.scored]
    return head, rows


def markdown(found: Comparison) -> str:
    """Return the table with what was compared, learning curves, and failures."""
    better = "higher" if found.higher_is_better else "lower"
    seeds = sorted({seed for row in found.rows for seed in row.outcomes})
    title = (
        f"Test split, {_words(found.metric)} ({better} is better), "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}."
    )
    parts = [title, _table(*head_and_rows(found))]
    if found.curves:
        parts += ["By adaptation examples per task:", _table(*curve_rows(found))]
    parts += [*notes(found), *found.about]
    for name, other in found.others.items():
        parts += [f"On {name}, {_words(other.metric)}:", _table(*head_and_rows(other))]
        parts += notes(other)
    return "\n\n".join(parts) + "\n"


def curve_rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the learning curves."""
    sizes = sorted({size for curve in found.curves.values() for size in curve})
    rows = []
    for name, curve in found.curves.items():
        whole = found.row(name)
        cells = [
            spread(curve[size].scores("average", found.metric)) if size in curve else ""
            for size in sizes
        ]
        rows.append([name, *cells, spread(whole.scores("average", found.metric)) if whole else ""])
    return ["method", *map(str, sizes), "all"], rows


def notes(found: Comparison) -> list[str]:
    """Return what is to be said about edges of grids and failures."""
    lines = []
    edge = [row.name for row in found.scored if any(row.values("edge"))]
    if edge:
        lines.append(
            f"At the edge of the grid even after it was widened: {', '.join(edge)}. Another value "
            "may be better (`--tune`)."
        )
    wider = [f"{row.name} ({max(row.values('wider'))})" for row in found.scored if _wider(row)]
    if wider:
        lines.append(
            "Trials beyond the budget, because the best value was at the edge of the grid: "
            f"{', '.join(wider)}."
        )
    reference = found.row(found.reference)
    has_reference = reference is not None and bool(reference.outcomes)
    if has_reference and len(found.scored) > 1 and not any(row.interval for row in found.rows):
        lines.append(f"No intervals: {_words(found.metric)} is not known for single examples.")
    for row in found.failed:
        for seed, reason in row.errors.items():
            first = reason.partition("\n")[0]
            lines.append(f"**{row.name}, seed {seed}, has failed**: {first}")
    return lines


def _wider(row: Row) -> int:
    return max((int(value) for value in row.values("wider")), default=0)


def _name(found: Comparison, row: Row) -> str:
    return f"{row.name} (reference)" if row.name == found.reference else row.name


def _scores(found: Comparison, row: Row) -> list[str]:
    metric = found.metric
    cells = [_number(row.mean(task, metric)) for task in found.tasks]
    cells.append(spread(row.scores("average", metric)))
    interval = row.interval
    if interval is None:
        cells.append("")
    else:
        low, high = f"{interval.low:+.3f}", f"{interval.high:+.3f}"
        cells.append(f"{interval.difference:+.3f} [{low}, {high}]")
    gap = found.gap_closed(row)
    compared = row.kind != "bound" and row.name != found.reference
    cells.append(f"{gap:.0%}" if math.isfinite(gap) and compared else "")
    return cells


def _cost(row: Row) -> list[str]:
    labels = dict.fromkeys(str(label) for label in row.values("label") if label)
    cells = [", ".join(labels)]
    cells.append(f"{row.cost('trials'):.0f}" if row.cost("trials") else "")
    cells.append(f"{row.cost('trainable'):,.0f}" if row.cost("trainable") else "")
    words = ", labels" if any(row.values("labels")) else ""
    cells.append(f"{row.cost('adaptation'):,.0f}{words}" if row.cost("adaptation") else "")
    cells.append(f"{seconds_of(row):.1f}" if seconds_of(row) else "")
    cells.append(f"{row.cost('tuning'):.1f}" if row.cost("tuning") else "")
    memory = max((float(value) for value in row.values("memory")), default=0.0)
    cells.append(f"{memory / 1e9:.2f} GB" if memory and row.kind == "method" else "")
    return cells


def seconds_of(row: Row) -> float:
    """Return the seconds of a final run: of the fit, or of merging with statistics of data."""
    learns = any(row.values("learns"))
    return row.cost("opening") + (row.cost("seconds") if learns else 0.0)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean and, of several values, the standard deviation.

    Examples:
        >>> spread([0.5, 0.7]), spread([0.25])
        ('0.600 ± 0.141', '0.250')
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{deviation}"


def as_csv(found: Comparison) -> str:
    """Return one line per row, seed and task, with the average among the tasks."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["data", "method", "kind", "seed", "examples", "task", "metric", "value"])
    for data, one in {"test": found, **found.others}.items():
        curves = [(size, row) for curve in one.curves.values() for size, row in curve.items()]
        for size, row in [("", row) for row in one.scored] + curves:
            for seed, outcome in row.outcomes.items():
                for task, scores in outcome.test.items():
                    for name, value in scores.items():
                        about = [data, row.name, row.kind, seed, size, task]
                        writer.writerow([*about, name, value])
    return text.getvalue()


def as_plain(found: Comparison) -> dict[str, Any]:
    """Return everything as plain data."""

    def plain(row: Row) -> dict[str, Any]:
        return {
            "name": row.name,
            "kind": row.kind,
            "seeds": {str(seed): dict(one.record) for seed, one in row.outcomes.items()},
            "errors": {str(seed): reason for seed, reason in row.errors.items()},
            "interval": None if row.interval is None else vars(row.interval),
            "gap_closed": found.gap_closed(row) if row.outcomes else None,
        }

    lost = [row for row in found.failed if not row.outcomes]
    return {
        "metric": found.metric,
        "higher_is_better": found.higher_is_better,
        "reference": found.reference,
        "tasks": list(found.tasks),
        "rows": [plain(row) for row in [*found.scored, *lost]],
        "curves": {
            name: {str(size): plain(row) for size, row in curve.items()}
            for name, curve in found.curves.items()
        },
        "about": list(found.about),
        "others": {name: as_plain(other) for name, other in found.others.items()},
    }


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else ""


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table without columns that are empty."""
    used = [at for at in range(len(head)) if not at or any(row[at] for row in rows)]
    widths = [max(len(line[at]) for line in (head, *rows)) for at in used]
    lines = [
        [line[at].ljust(width) for at, width in zip(used, widths, strict=True)]
        for line in (head, *rows)
    ]
    lines.insert(1, ["-" * max(3, width) for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(found: Comparison, seconds: float) -> str:
    """Return the end of the command's output."""
    return f"{markdown(found)}\ntook {duration(seconds)}"
