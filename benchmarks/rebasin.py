"""Merging networks that share no initialisation: alignment, NP Merge, and fine-tuning beside them.

    python benchmarks/rebasin.py --json rebasin.json

Endpoints are trained here, on the same images from different seeds, or on disjoint classes. Then,
for pairs and quartets of them: endpoints, ensemble, plain and aligned averages, the same with
BatchNorm statistics recomputed or with REPAIR, NP Merge, and plain fine-tuning of the same aligned
average on the same adaptation images, in the same order, for as many steps, with as many learning
rates tried and the same early stopping. *Distilled*: both learn the ensemble's predictions on other
images, of which no label is read, for four times the steps, and are chosen by that loss; *longer*:
for sixteen times the steps, with the rate that the shorter run chose. Every choice is made on the
selection split.

`--study` asks when one coefficient per weight is the better choice: few labels, wrong labels, and
classes that the adaptation data lack.

Trained networks and finished cells are kept in the cache, so a stopped run resumes where it
stopped.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning

import harness
import rebasin_merges as merges
from rebasin_merges import Case, Condition, Result
from suites import common
from suites import rebasin as suite
from suites.rebasin import ARCHITECTURES, Architecture, Pool, Sizes

FORMAT = 1  # raise when the code changes what a cell holds
LEARNERS = ("NP Merge", "fine-tuning")

Row = Callable[[Case], Result]
Found = dict[tuple[str, str, str, int, str], dict[str, dict[int, Result]]]
"""By data, architecture, setting, members and condition; then by row and repeat."""


def is_learned(row: str) -> bool:
    """Check whether the budget concerns a row."""
    return row.startswith(LEARNERS)


# ---- rows of the tables -------------------------------------------------------------------------


def average_row(alignment: str | None, **factors: Any) -> Row:
    """Return the row of an average: of the sources as they are, or aligned."""
    return lambda case: case.score(merges.averaged(case, alignment, **factors))


def learned_row(learn: Callable[..., Result], aligned: bool = True, **options: Any) -> Row:
    """Return the row of NP Merge or of fine-tuning."""

    def run(case: Case) -> Result:
        alignment = merges.LEARNED_ON[case.architecture.name] if aligned else None
        return {**learn(case, alignment, **options), "alignment": alignment}

    return run


def tuned(case: Case, alignment: str | None, **options: Any) -> Result:
    """Fine-tune the average that NP Merge starts from."""
    return merges.fine_tuned(case, merges.averaged(case, alignment), **options)


def longer_row(shorter: str, learn: Callable[..., Result], rows: Mapping[str, Row]) -> Row:
    """Return the row that distils for longer, with the rate that another row chose."""

    def run(case: Case) -> Result:
        found = compute(case, shorter, rows, False)
        assert found is not None
        # none was better than the start: the middle one
        rate = found["rate"] or float(list(found["tried"])[1])
        return learned_row(learn, distil=merges.LONGER, rates=[rate])(case)

    return run


def rows_of(case: Case) -> dict[str, Row]:
    """Return all rows of a case, in the order of the table."""
    rows: dict[str, Row] = {"endpoints": merges.endpoints, "ensemble": merges.ensemble}
    for name in ("none", *merges.ALIGNMENTS):
        alignment = None if name == "none" else name
        rows[f"average, {name}"] = average_row(alignment, buffers="mean")
        if case.has_norms:
            rows[f"average, {name}, statistics"] = average_row(alignment)
        if alignment:
            rows[f"average, {name}, REPAIR"] = average_row(alignment, repair=True)
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
    rows[f"{first}, none"] = learned_row(kinds[first], aligned=False)
    rows |= {f"{kind}, aligned": learned_row(merge) for kind, merge in kinds.items()}
    rows["NP Merge, unbounded, aligned"] = learned_row(unbounded)
    rows["fine-tuning, none"] = learned_row(tuned, aligned=False)
    rows["fine-tuning, aligned"] = learned_row(tuned)
    if case.setting == "same":  # else no ensemble knows all classes
        rows[f"{first}, aligned, distilled"] = learned_row(kinds[first], distil=merges.DISTILLATION)
        last = {"NP Merge, unbounded, aligned": unbounded, "fine-tuning, aligned": tuned}
        for name, learn in last.items():
            rows[f"{name}, distilled"] = learned_row(learn, distil=merges.DISTILLATION)
        for name, learn in last.items():
            shorter = f"{name}, distilled"
            rows[f"{shorter} longer"] = longer_row(shorter, learn, rows)
    return rows


def study_rows(case: Case) -> dict[str, Row]:
    """Return the rows that the study compares."""
    return {
        "start": average_row(merges.LEARNED_ON[case.architecture.name]),
        "NP Merge": learned_row(merges.np_merge, kind="pair"),
        "fine-tuning": learned_row(tuned),
    }


def cell_of(case: Case, row: str) -> Path:
    """Return the file of a row of a case; its name holds the hash of all that decides it."""
    content: list[Any] = [FORMAT, suite.FORMAT, case.architecture, case.pool.sizes]
    content += [merges.SETTINGS[case.setting][case.members], case.condition, row]
    content += [case.budget if is_learned(row) else None]
    if ", distilled" in row:
        distil = merges.LONGER if "longer" in row else merges.DISTILLATION
        content.append((distil, "chosen by the loss"))
    if "unbounded" in row:
        content.append(merges.UNBOUNDED_RATES)
    if "REPAIR" in row:
        content.append("targets of sources whose units are not mixed")
    if is_learned(row) and "none" not in row:
        content.append(merges.LEARNED_ON[case.architecture.name])
    file = row.replace(", ", "-").replace(" ", "-").lower()
    name = f"{file}-{common.fingerprint(content)}.json"
    return case.pool.cache / "cells" / case.name / name


def compute(case: Case, row: str, rows: Mapping[str, Row], finished: bool) -> Result | None:
    """Return one row of a case, from the cache or (unless only finished ones are wanted) new."""
    path = cell_of(case, row)
    found = common.read_json(path)
    if found is None and not finished:
        lightning.seed_everything(case.repeat, verbose=False)
        began, cpu = time.perf_counter(), time.process_time()
        found = rows[row](case)
        found |= {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        common.write_json(path, json.loads(json.dumps(found)), sort_keys=False)
        gc.collect()  # trainers and modules hold each other, with all their tensors
        seconds = f"({found['seconds']:.0f} s)"
        common.say("rebasin", f"{case.name} {row}: test {found['test']:.4f} {seconds}")
    return found


# ---- tables -------------------------------------------------------------------------------------


def percent(values: Sequence[float], expected: int = 0) -> str:
    """Return mean and deviation in percent; the number of values, where fewer than expected."""
    if not values:
        return ""
    count = f" ({len(values)} of {expected})" if len(values) < expected else ""
    return f"{harness.spread([100 * value for value in values], 1)}{count}"


def tests(results: Mapping[int, Result]) -> list[float]:
    return [result["test"] for result in results.values()]


def render(found: Found, repeats: int) -> str:
    """Return a markdown table per data set and architecture: rows by setting and number."""
    blocks = []
    plain = {key: rows for key, rows in found.items() if key[4] == "plain"}
    for data, name in dict.fromkeys(key[:2] for key in plain):
        cases = {key[2:4]: rows for key, rows in plain.items() if key[:2] == (data, name)}
        heads = [f"{setting}, {members}" for setting, members in cases]
        order = list(dict.fromkeys(row for rows in cases.values() for row in rows))
        lines = [
            [row, *(percent(tests(rows.get(row, {})), repeats) for rows in cases.values())]
            for row in sorted(order, key=lambda row: (is_learned(row), order.index(row)))
        ]
        blocks.append(harness.table([f"{data}, {name}", *heads], lines))
    return "\n\n".join(blocks)


def render_study(found: Found, missing: Mapping[str, tuple[int, ...]], repeats: int) -> str:
    """Return a markdown table: a line per condition, a column per method.

    The last columns are of the largest learning rate and the last step: the result without a
    selection split to choose on.
    """
    heads = ["start", *LEARNERS, *(f"{name}, untuned" for name in LEARNERS)]
    lines = []
    for key, rows in found.items():
        if not any(row in rows for row in LEARNERS):
            continue
        data, name, setting, members, mark = key
        columns = {row: list(results.values()) for row, results in rows.items()}
        for row in LEARNERS:
            tried = [list(result["tried"].values())[-1] for result in columns.get(row, [])]
            columns[f"{row}, untuned"] = [result["last"] for result in tried]
        lost, every = missing[mark], range(suite.CLASSES)
        groups: dict[str, Sequence[int]] = {"": every}
        if lost:
            seen = [k for k in every if k not in lost]
            groups = {", all": every, ", classes it has": seen, ", classes it lacks": lost}
        for label, classes in groups.items():
            cells = []
            for head in heads:
                results = columns.get(head, [])
                scores = [statistics.mean(r["classes"][k] for k in classes) for r in results]
                cells.append(percent(scores, repeats))
            lines.append([f"{data}, {name}, {setting}, {members}", f"{mark}{label}", *cells])
    return harness.table(["case", "condition", *heads], lines)


def verdicts(found: Found) -> list[str]:
    """Return the measured targets: means over repeats, in points of accuracy."""
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


# ---- the command line ---------------------------------------------------------------------------

CONDITIONS = {
    condition.name: condition
    for condition in (
        *map(Condition, (50, 200, 1_000, 5_000)),
        *(Condition(1_000, noise=noise) for noise in (0.2, 0.4)),
        Condition(1_000, missing=(3, 4, 8, 9)),
    )
}


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
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=CONDITIONS)
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
    """Yield the cases that the options ask for, in order."""
    quick = options.quick
    sizes = Sizes(1_200, 256, 200, 300) if quick else Sizes()
    budget = merges.Budget(steps=6, checks=2) if quick else merges.Budget()
    if options.study:
        budget = replace(budget, steps=budget.steps // 2)
    budgets = {
        name: replace(budget, batch_size=256) if name == "mlp" else budget for name in options.archs
    }
    conditions = (
        [CONDITIONS[name] for name in options.conditions] if options.study else [Condition()]
    )
    if quick and options.study:
        conditions = [replace(condition, adaptation=100) for condition in conditions]
    members = [2] if options.study else options.members
    for data in ["noise"] if quick else options.data:
        pool = Pool(data, options.cache.resolve(), sizes)
        kinds = itertools.product(
            options.archs, members, range(options.repeats), options.settings, conditions
        )
        for name, number, repeat, setting, condition in kinds:
            architecture = small(ARCHITECTURES[name]) if quick else ARCHITECTURES[name]
            yield Case(pool, architecture, setting, number, repeat, budgets[name], condition)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    harness.quieten()
    found: Found = {}
    try:
        for case in cases_of(options):
            key = (case.pool.data, case.architecture.name, case.setting, case.members)
            rows = study_rows(case) if options.study else rows_of(case)
            for row in rows:
                if any(map(row.startswith, options.rows)) and not any(
                    word in row for word in options.skip
                ):
                    result = compute(case, row, rows, options.finished)
                    if result is None:
                        continue
                    cells = found.setdefault((*key, case.condition.name), {})
                    cells.setdefault(row, {})[case.repeat] = result
            harness.write_json(options.json, {"records": records_of(found)})
    except common.SuiteError as error:
        print(f"rebasin: error: {error}", file=sys.stderr)
        return 1
    if options.study:
        missing = {case.condition.name: case.condition.missing for case in cases_of(options)}
        shown, lines = render_study(found, missing, options.repeats), []
    else:
        shown, lines = render(found, options.repeats), verdicts(found)
    text = "\n".join([shown, "", *(f"- {line}" for line in lines)])
    print(text)
    if options.table:
        options.table.write_text(text + "\n")
    return 0


def records_of(found: Found) -> list[dict[str, Any]]:
    """Return all figures as plain data."""
    names = ("data", "architecture", "setting", "members", "condition")
    return [
        {**dict(zip(names, key, strict=True)), "row": row, "repeat": repeat, **result}
        for key, rows in found.items()
        for row, results in rows.items()
        for repeat, result in results.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
