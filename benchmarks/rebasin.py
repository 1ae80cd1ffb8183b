"""Merging networks that share no initialisation: alignment, NP Merge, and fine-tuning beside them.

    python benchmarks/rebasin.py --json rebasin.json

Endpoints are trained here, on the same images from different seeds, or on disjoint classes. For
pairs and quartets of them: endpoints, ensemble, averages, NP Merge, and plain fine-tuning of the
same average with the same budget. Every choice is made on the selection split. `--study` asks when
one coefficient per weight is the better choice: few labels, wrong labels, and classes that the
adaptation data lack. docs/benchmarks/rebasin.md says what the rows are.

Trained networks and finished cells are kept in the cache, so a stopped run resumes where it
stopped.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning

import harness
import rebasin_merges as merges
from gradmerge.finalisers import REPAIR
from rebasin_merges import CONDITIONS, Case, Result
from suites import rebasin as suite
from suites.rebasin import ARCHITECTURES, Architecture, Pool, Sizes

FORMAT = 2  # raise when the code changes what a cell holds
LEARNERS = ("NP Merge", "fine-tuning")

Row = Callable[[Case], Result]
Found = dict[tuple[str, str, str, int, str], dict[str, list[Result]]]
"""By data, architecture, setting, members and condition; then by row: a result per repeat."""


# ---- rows of the tables -------------------------------------------------------------------------


def rows_of(case: Case) -> dict[str, Row]:
    """Return all rows of a case, in the order of the table."""
    rows: dict[str, Row] = {"endpoints": merges.endpoints, "ensemble": merges.ensemble}
    for name in ("none", *merges.ALIGNMENTS):
        average = partial(merges.average, alignment=None if name == "none" else name)
        rows[f"average, {name}"] = partial(average, buffers="mean")
        if case.architecture.name != "mlp":  # the others have BatchNorm
            rows[f"average, {name}, statistics"] = average
        if name != "none":
            rows[f"average, {name}, REPAIR"] = partial(average, finalisers=[REPAIR()])
    if case.members == 2:
        kinds = {"NP Merge": partial(merges.np_merge, kind="pair")}
    else:
        kinds = {
            "NP Merge, joint": partial(merges.np_merge, kind="joint"),
            "NP Merge, fold": merges.np_fold,
            "NP Merge, tree": merges.np_tree,
        }
    first = next(iter(kinds))
    unbounded = partial(merges.np_merge, kind="unbounded")
    aligned = {"alignment": merges.LEARNED_ON[case.architecture.name]}
    rows[f"{first}, none"] = partial(kinds[first], alignment=None)
    rows |= {f"{kind}, aligned": partial(merge, **aligned) for kind, merge in kinds.items()}
    rows["NP Merge, unbounded, aligned"] = partial(unbounded, **aligned)
    rows["fine-tuning, none"] = partial(merges.fine_tuned, alignment=None)
    rows["fine-tuning, aligned"] = partial(merges.fine_tuned, **aligned)
    if case.setting == "same":  # else no ensemble knows all classes
        last = {"NP Merge, unbounded": unbounded, "fine-tuning": merges.fine_tuned}
        for name, learn in {first: kinds[first], **last}.items():
            distilled = partial(learn, **aligned, distil=merges.DISTILLATION)
            rows[f"{name}, aligned, distilled"] = distilled
        for name, learn in last.items():
            shorter = f"{name}, aligned, distilled"
            longer = partial(learn, **aligned, distil=merges.LONGER)
            rows[f"{shorter} longer"] = partial(at_the_rate_of, rows, shorter, longer)
    return rows


def at_the_rate_of(
    rows: Mapping[str, Row], shorter: str, longer: Callable[..., Result], case: Case
) -> Result:
    """Learn for longer, with the rate that another row chose."""
    found = compute(case, shorter, rows)
    # none was better than the start: the middle one
    return longer(case, rates=[found["rate"] or float(list(found["tried"])[1])])


def study_rows(case: Case) -> dict[str, Row]:
    aligned = {"alignment": merges.LEARNED_ON[case.architecture.name]}
    return {
        "start": partial(merges.average, **aligned),
        "NP Merge": partial(merges.np_merge, **aligned, kind="pair"),
        "fine-tuning": partial(merges.fine_tuned, **aligned),
    }


def cell_of(case: Case, row: str) -> Path:
    """Return the file of a row of a case; its name holds the hash of all that decides it."""
    condition = CONDITIONS[case.condition]
    content: list[Any] = [FORMAT, suite.FORMAT, case.architecture, case.pool.sizes, condition]
    content += [merges.SETTINGS[case.setting][case.members], row, case.budget]
    content += [merges.DISTILLATION, merges.LONGER, merges.RATES, merges.LEARNED_ON]
    file = row.replace(", ", "-").replace(" ", "-").lower()
    name = f"{file}-{harness.fingerprint(content)}.json"
    return case.pool.cache / "cells" / case.name / name


def compute(case: Case, row: str, rows: Mapping[str, Row]) -> Result:
    """Return one row of a case, from the cache or new."""

    def run() -> Result:
        lightning.seed_everything(case.repeat, verbose=False)
        began, cpu = time.perf_counter(), time.process_time()
        found = rows[row](case)
        seconds = time.perf_counter() - began
        gc.collect()  # trainers and modules hold each other, with all their tensors
        print(f"{case.name} {row}: test {found['test']:.4f} ({seconds:.0f} s)", flush=True)
        return {**found, "seconds": seconds, "cpu": time.process_time() - cpu}

    return harness.cached(cell_of(case, row), run)


# ---- tables -------------------------------------------------------------------------------------


def percent(results: Sequence[Result], repeats: int, classes: Sequence[int] = ()) -> str:
    """Return accuracies in percent, of some classes alone; the number of repeats, if too few."""
    if not results:
        return ""
    scores = [statistics.mean(r["classes"][k] for k in classes) for r in results if classes]
    count = f" ({len(results)} of {repeats})" if len(results) < repeats else ""
    return harness.spread([100 * s for s in scores or map(tested, results)], 1) + count


def tested(result: Result) -> float:
    return result["test"]


def render(found: Found, repeats: int) -> str:
    """Return a markdown table per data set and architecture: rows by setting and number."""
    blocks = []
    for data, name in dict.fromkeys(key[:2] for key in found):
        cases = {key[2:4]: rows for key, rows in found.items() if key[:2] == (data, name)}
        heads = [f"{setting}, {members}" for setting, members in cases]
        order = dict.fromkeys(row for rows in cases.values() for row in rows)
        lines = [
            [row, *(percent(rows.get(row, []), repeats) for rows in cases.values())]
            for row in sorted(order, key=lambda row: row.startswith(LEARNERS))
        ]
        blocks.append(harness.table([f"{data}, {name}", *heads], lines))
    return "\n\n".join([*blocks, render_differences(found)])


def render_differences(found: Found) -> str:
    """Return a markdown table of the means of learned merges, in points less those of others."""
    lines = []
    for key, rows in found.items():
        mean = {row: 100 * statistics.mean(map(tested, results)) for row, results in rows.items()}
        aligned = [row for row in mean if row.startswith("average") and "none" not in row]
        best = max(aligned, key=lambda row: mean[row], default="")
        for row in (best, *(row for row in mean if row.startswith("NP Merge"))):
            if row in mean:
                learned = row.partition(", distilled")[0]
                start = learned.rpartition(", ")[2]
                rival = "fine-tuning, " + start + row[len(learned) :]
                others = ["endpoints", "ensemble", best, rival]
                cells = [f"{mean[row] - mean[o]:+.2f}" if o in mean else "" for o in others]
                lines.append([", ".join(map(str, key[:4])), row, *cells])
    others = ["endpoints", "ensemble", "best aligned average", "fine-tuning"]
    return harness.table(["case", "points more than", *others], lines)


def render_study(found: Found, repeats: int) -> str:
    """Return a markdown table: a line per condition, a column per method.

    The last columns are of the largest learning rate and the last step: the result without a
    selection split to choose on.
    """
    heads = ["start", *LEARNERS, *(f"{name}, untuned" for name in LEARNERS)]
    lines = []
    for (data, name, setting, members, mark), rows in found.items():
        untuned = {
            f"{row}, untuned": [list(r["tried"].values())[-1]["last"] for r in rows.get(row, [])]
            for row in LEARNERS
        }
        lost, every = CONDITIONS[mark].missing, range(suite.CLASSES)
        groups: dict[str, Sequence[int]] = {"": every}
        if lost:
            seen = [k for k in every if k not in lost]
            groups = {", all": every, ", classes it has": seen, ", classes it lacks": lost}
        for label, classes in groups.items():
            cells = [percent({**rows, **untuned}.get(h, []), repeats, classes) for h in heads]
            lines.append([f"{data}, {name}, {setting}, {members}", f"{mark}{label}", *cells])
    return harness.table(["case", "condition", *heads], lines)


# ---- the command line ---------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, "rebasin")
    parser.add_argument("--archs", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--data", nargs="+", default=["fashion", "mnist"], choices=suite.READERS)
    parser.add_argument(
        "--settings", nargs="+", default=list(merges.SETTINGS), choices=merges.SETTINGS
    )
    parser.add_argument("--members", nargs="+", type=int, default=[2, 4], choices=[2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows that begin so")
    parser.add_argument("--skip", nargs="+", default=[], help="no rows with these words in them")
    parser.add_argument("--study", action="store_true", help="few labels, wrong ones, lost classes")
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS)[1:], choices=CONDITIONS)
    parser.add_argument("--quick", action="store_true", help="tiny networks and drawn images")
    parser.add_argument(
        "--finished", action="store_true", help="compute nothing: tables of what is in the cache"
    )
    parser.add_argument("--table", type=Path, help="file to write the tables to")
    return parser.parse_args(arguments)


def small(architecture: Architecture) -> Architecture:
    """Return the architecture so small that it trains in a second."""
    training = replace(architecture.training, epochs=4.0)
    if training.optimiser == "adam":
        training = replace(training, learning_rate=1e-2)
    return replace(architecture, width={"mlp": 32}.get(architecture.name, 4), training=training)


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    quick = options.quick
    sizes = Sizes(1_200, 256, 200, 300) if quick else Sizes()
    steps, checks = (6, 2) if quick else (120, 3)
    conditions, members = ["plain"], options.members
    if options.study:
        steps, members = steps // 2, [2]
        conditions = options.conditions
    for data in ["noise"] if quick else options.data:
        pool = Pool(data, options.cache.resolve(), sizes)
        kinds = itertools.product(
            options.archs, members, range(options.repeats), options.settings, conditions
        )
        for name, number, repeat, setting, condition in kinds:
            architecture = small(ARCHITECTURES[name]) if quick else ARCHITECTURES[name]
            budget = merges.Budget(steps, checks, 256 if name == "mlp" else 64)
            yield Case(pool, architecture, setting, number, repeat, budget, condition)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    harness.quieten()
    found: Found = {}
    records = []
    for case in cases_of(options):
        names = {"data": case.pool.data, "architecture": case.architecture.name}
        names |= {"setting": case.setting, "members": case.members}
        names |= {"condition": case.condition}
        rows = study_rows(case) if options.study else rows_of(case)
        for row in rows:
            wanted = row.startswith(tuple(options.rows))
            if any(word in row for word in options.skip) or not wanted:
                continue
            if not options.finished or cell_of(case, row).is_file():
                result = compute(case, row, rows)
                found.setdefault(tuple(names.values()), {}).setdefault(row, []).append(result)
                records.append({**names, "row": row, "repeat": case.repeat, **result})
        harness.write_json(options.json, {"records": records})
    text = (render_study if options.study else render)(found, options.repeats)
    print(text)
    if options.table:
        options.table.write_text(text + "\n")


if __name__ == "__main__":
    main()
