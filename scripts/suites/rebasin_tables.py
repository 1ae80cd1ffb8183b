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


def is_distilled(row: str) -> bool:
    """Whether it learns from the ensemble."""
    return ", distilled" in row


def spread(values: Sequence[float], wanted: int = 0) -> str:
    """Mean and deviation in percent; how many values, where there are fewer than wanted."""
    values = [100 * value for value in values]
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    count = f" ({len(values)} of {wanted})" if len(values) < wanted else ""
    return f"{statistics.mean(values):.1f}{deviation}{count}"


def tests(results: Mapping[int, Result]) -> list[float]:
    return [result["test"] for result in results.values()]


def render(found: Found, repeats: int) -> str:
    """A markdown table for each data set and architecture: rows by setting and number."""
    blocks = []
    plain = {key: rows for key, rows in found.items() if key[4] == "plain"}
    for data, name in dict.fromkeys(key[:2] for key in plain):
        cases = {key[2:4]: rows for key, rows in plain.items() if key[:2] == (data, name)}
        heads = [f"{setting}, {members}" for setting, members in cases]
        lines = [f"| {data}, {name} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        order = dict.fromkeys(row for rows in cases.values() for row in rows)
        for row in sorted(order, key=lambda row: (is_learned(row), list(order).index(row))):
            cells = [spread(tests(rows.get(row, {})), repeats) for rows in cases.values()]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def render_study(found: Found, missing: Mapping[str, tuple[int, ...]], repeats: int) -> str:
    """A markdown table: a line a condition, and what each method gives.

    The last columns are of the largest learning rate and the last step: what comes without a
    selection split to choose on.
    """
    learners = ("NP Merge", "fine-tuning")
    heads = ["start", *learners, *(f"{name}, untuned" for name in learners)]
    lines = [f"| case | condition | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for key, rows in found.items():
        if not any(row in rows for row in learners):
            continue
        data, name, setting, members, mark = key
        columns = {row: list(results.values()) for row, results in rows.items()}
        for row in learners:
            tried = [list(result["tried"].values())[-1] for result in columns.get(row, [])]
            columns[f"{row}, untuned"] = [result["last"] for result in tried]
        lost = missing[mark]
        groups: dict[str, Sequence[int]] = {"": CLASSES}
        if lost:
            seen = [k for k in CLASSES if k not in lost]
            groups = {", all": CLASSES, ", classes it has": seen, ", classes it lacks": lost}
        for label, classes in groups.items():
            cells = []
            for head in heads:
                results = columns.get(head, [])
                scores = [statistics.mean(r["classes"][k] for k in classes) for r in results]
                cells.append(spread(scores, repeats))
            case = f"{data}, {name}, {setting}, {members}"
            lines.append(f"| {case} | {mark}{label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(found: Found) -> list[str]:
    """What the targets speak of, as measured: means over repeats, in points of accuracy."""
    lines = []
    for (data, name, setting, members, mark), rows in found.items():
        where = f"{data}, {name}, {setting}, {members}"
        mean = {row: 100 * statistics.mean(tests(results)) for row, results in rows.items()}
        if mark != "plain" or not {"endpoints", "ensemble"} <= set(mean):
            continue
        ends, upper = mean["endpoints"], mean["ensemble"]
        aligned = [row for row in mean if row.startswith("average, ") and "none" not in row]
        if not aligned:
            continue
        best = max(aligned, key=lambda row: mean[row])
        lines.append(
            f"{where}: the best aligned average ({best}) is {mean[best] - ends:+.2f} from "
            "the endpoints"
        )
        for row in (row for row in mean if row.startswith("NP")):
            texts = [f"{mean[row] - mean[best]:+.2f} from the best aligned average"]
            if setting == "same":
                texts.append(
                    f"{mean[row] - ends:+.2f} from the endpoints (half-way to the "
                    f"ensemble: {(upper - ends) / 2:+.2f})"
                )
            start = "none" if "none" in row else "aligned"
            rival = f"fine-tuning, {start}" + "".join(row.partition(", distilled")[1:])
            if rival in mean:
                texts.append(f"{mean[row] - mean[rival]:+.2f} from fine-tuning")
            lines.append(f"{where}: {row} is {', '.join(texts)}")
    return lines
