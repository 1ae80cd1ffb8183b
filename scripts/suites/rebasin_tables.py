"""Tables of the benchmark of networks that share no initialisation, from its finished cells."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Result = dict[str, Any]

CLASSES = range(10)

Found = dict[tuple[str, str, str, int, str], dict[str, dict[int, Result]]]
"""By data, architecture, setting, members and condition; then by row and repeat."""


def is_learned(row: str) -> bool:
    """Whether the budget concerns it."""
    return row.startswith(("NP", "fine"))


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation in percent."""
    values = [100 * value for value in values]
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def tests(results: Mapping[int, Result]) -> list[float]:
    return [result["test"] for result in results.values()]


def render(found: Found) -> str:
    """A markdown table for each data set and architecture: rows by setting and number."""
    blocks = []
    plain = {key: rows for key, rows in found.items() if key[4] == "plain"}
    for data, name in dict.fromkeys(key[:2] for key in plain):
        cases = {key[2:4]: rows for key, rows in plain.items() if key[:2] == (data, name)}
        heads = [f"{setting}, {members}" for setting, members in cases]
        lines = [f"| {data}, {name} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        order = dict.fromkeys(row for rows in cases.values() for row in rows)
        for row in sorted(order, key=lambda row: (is_learned(row), list(order).index(row))):
            cells = [spread(tests(rows.get(row, {}))) for rows in cases.values()]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def render_study(found: Found, missing: Mapping[str, tuple[int, ...]]) -> str:
    """A markdown table: a line a condition, and what each method gives."""
    lines = []
    for key, rows in found.items():
        data, name, setting, members, mark = key
        if mark not in missing or "start" not in rows:
            continue
        if not lines:
            lines = [f"| case | condition | {' | '.join(rows)} |", "|---" * (2 + len(rows)) + "|"]
        lost = missing[mark]
        groups: dict[str, Sequence[int]] = {"": CLASSES}
        if lost:
            seen = [k for k in CLASSES if k not in lost]
            groups = {", all classes": CLASSES, ", seen classes": seen, ", unseen classes": lost}
        for label, classes in groups.items():
            cells = [
                spread([statistics.mean(r["classes"][k] for k in classes) for r in row.values()])
                for row in rows.values()
            ]
            case = f"{data}, {name}, {setting}, {members}"
            lines.append(f"| {case} | {mark}{label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(found: Found) -> list[str]:
    """The targets, each with what was measured."""
    lines = []

    def mean(rows: Mapping[str, Mapping[int, Result]], row: str) -> float:
        return 100 * statistics.mean(tests(rows[row]))

    for (data, name, setting, members, mark), rows in found.items():
        where = f"{data}, {name}, {setting}, {members}"
        if mark != "plain" or not {"endpoints", "ensemble"} <= set(rows):
            continue
        ends, upper = mean(rows, "endpoints"), mean(rows, "ensemble")
        averages = [row for row in rows if row.startswith("average, ") and "none" not in row]
        if setting == "same" and name == "mlp":
            for row in averages:
                lines.append(f"{where}: {row} is {mean(rows, row) - ends:+.2f} from the endpoints")
        tuned = rows.get("fine-tuning, aligned")
        for row in rows:
            if not (row.startswith("NP") and row.endswith("aligned")):
                continue
            own = mean(rows, row)
            if setting == "same":
                share = (own - ends) / (upper - ends) if upper != ends else float("nan")
                text = (
                    f"{own - ends:+.2f} from the endpoints, {share:.2f} of the way to the ensemble"
                )
            else:
                start = max(
                    mean(rows, r) for r in rows if r.startswith("average") and "none" not in r
                )
                text = f"{own - start:+.2f} from the best aligned average"
            if tuned:
                text += f", {own - mean(rows, 'fine-tuning, aligned'):+.2f} from fine-tuning"
            lines.append(f"{where}: {row} is {text}")
    return lines
