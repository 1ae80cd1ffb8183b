"""Merging networks that share no initialisation: alignment, NP Merge, and fine-tuning beside them.

    python scripts/bench_rebasin.py --json rebasin.json

Endpoints are trained here, on the same images from different seeds, or on disjoint classes. Then,
for pairs and quartets of them: endpoints, ensemble, plain and aligned averages, the same with
BatchNorm statistics recomputed or with REPAIR, NP Merge, and plain fine-tuning of the same aligned
average on the same adaptation images, in the same order, for as many steps, with as many learning
rates tried and the same early stopping. *Distilled*: both learn the ensemble's predictions on other
images, of which no label is read, for four times the steps, and are chosen by that loss; *longer*:
for sixteen times the steps, with the rate that the shorter run chose. Everything that is chosen is
chosen on the selection split.

`--study` asks when one coefficient a weight is the better choice: few labels, wrong labels, and
classes that the adaptation data lack.

Trained networks and finished cells are kept in the cache, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning

sys.path.insert(0, str(Path(__file__).resolve().parent / "suites"))

import common
import rebasin
import rebasin_merges as merges
import rebasin_tables
from rebasin import ARCHITECTURES, Architecture, Sizes
from rebasin_merges import (
    ALIGNMENTS,
    DISTILLATION,
    LEARNED_ON,
    LONGER,
    SETTINGS,
    Budget,
    Case,
    Condition,
    Pool,
)
from rebasin_tables import Found, Result, is_distilled, is_learned

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1  # raise when the code changes what a cell holds

# ----------------------------------------------------------------------------------------------
# Rows of the tables
# ----------------------------------------------------------------------------------------------

say = partial(common.say, "rebasin")

Row = Callable[[Case], Result]


def average_row(alignment: str | None, **factors: Any) -> Row:
    """An average: of the sources as they are, or aligned."""

    def run(case: Case) -> Result:
        return case.score(merges.averaged(case, alignment, **factors))

    return run


def np_row(merge: Callable[..., Result], aligned: bool, **options: Any) -> Row:
    """A kind of NP Merge."""

    def run(case: Case) -> Result:
        alignment = LEARNED_ON[case.architecture.name] if aligned else None
        return {**merge(case, alignment, **options), "alignment": alignment}

    return run


def tuned_row(case: Case, aligned: bool = True, **options: Any) -> Result:
    """Fine-tuning of the average that NP Merge starts from."""
    alignment = LEARNED_ON[case.architecture.name] if aligned else None
    begin = merges.averaged(case, alignment)
    return {**merges.fine_tuned(case, begin, **options), "alignment": alignment}


def longer_row(shorter: str, make: Callable[..., Row], rows: Mapping[str, Row]) -> Row:
    """Distillation for longer, with the rate that another row chose."""

    def run(case: Case) -> Result:
        found = compute(case, shorter, rows, False)
        assert found is not None
        # none was better than the start: the middle one
        rate = found["rate"] or float(list(found["tried"])[1])
        return make(distil=LONGER, rates=[rate])(case)

    return run


def rows_of(case: Case) -> dict[str, Row]:
    """All rows of a case, in the order of the table."""
    rows: dict[str, Row] = {
        "endpoints": lambda case: merges.endpoints(case),
        "ensemble": lambda case: merges.ensemble(case),
    }
    for name in ("none", *ALIGNMENTS):
        alignment = None if name == "none" else name
        rows[f"average, {name}"] = average_row(alignment, buffers="mean")
        if case.has_norms:
            rows[f"average, {name}, statistics"] = average_row(alignment)
        if alignment:
            rows[f"average, {name}, REPAIR"] = average_row(alignment, repair=True)
    if case.members == 2:
        kinds = {"NP Merge": merges.np_pair}
    else:
        kinds = {
            "NP Merge, joint": merges.np_joint,
            "NP Merge, fold": merges.np_fold,
            "NP Merge, tree": merges.np_tree,
        }
    first = next(iter(kinds))
    rows[f"{first}, none"] = np_row(kinds[first], False)
    rows |= {f"{kind}, aligned": np_row(merge, True) for kind, merge in kinds.items()}
    rows["NP Merge, unbounded, aligned"] = np_row(merges.np_unbounded, True)
    rows["fine-tuning, none"] = partial(tuned_row, aligned=False)
    rows["fine-tuning, aligned"] = tuned_row
    if case.setting == "same":  # else no ensemble knows all classes
        rows[f"{first}, aligned, distilled"] = np_row(kinds[first], True, distil=DISTILLATION)
        unbounded, tuned = "NP Merge, unbounded, aligned", "fine-tuning, aligned"
        learn = partial(np_row, merges.np_unbounded, True)
        tune = partial(partial, tuned_row)
        rows[f"{unbounded}, distilled"] = learn(distil=DISTILLATION)
        rows[f"{tuned}, distilled"] = tune(distil=DISTILLATION)
        rows[f"{unbounded}, distilled longer"] = longer_row(f"{unbounded}, distilled", learn, rows)
        rows[f"{tuned}, distilled longer"] = longer_row(f"{tuned}, distilled", tune, rows)
    return rows


def study_rows(case: Case) -> dict[str, Row]:
    """What the study compares."""
    return {
        "start": average_row(LEARNED_ON[case.architecture.name]),
        "NP Merge": np_row(merges.np_pair, True),
        "fine-tuning": tuned_row,
    }


def compute(case: Case, row: str, rows: Mapping[str, Row], finished: bool) -> Result | None:
    """One row of a case, from the cache or (unless only finished ones are wanted) computed."""
    content: list[Any] = [FORMAT, rebasin.FORMAT, case.architecture, case.pool.sizes]
    content += [SETTINGS[case.setting][case.members], case.condition, row]
    content += [case.budget if is_learned(row) else None]
    if is_distilled(row):
        content.append((LONGER if "longer" in row else DISTILLATION, "chosen by the loss"))
    if "unbounded" in row:
        content.append(merges.UNBOUNDED_RATES)
    if "REPAIR" in row:
        content.append("targets of sources whose units are not mixed")
    if is_learned(row) and "none" not in row:
        content.append(LEARNED_ON[case.architecture.name])
    file = row.replace(", ", "-").replace(" ", "-").lower()
    path = case.cache / "cells" / case.name / f"{file}-{common.fingerprint(content)}.json"
    found = common.read_json(path)
    if found is None and not finished:
        lightning.seed_everything(case.repeat, verbose=False)
        began, cpu = time.perf_counter(), time.process_time()
        found = rows[row](case)
        found |= {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        common.write_json(path, json.loads(json.dumps(found)), sort_keys=False)
        gc.collect()  # trainers and modules hold each other, with all their tensors
        say(f"{case.name} {row}: test {found['test']:.4f} ({found['seconds']:.0f} s)")
    return found


# ----------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------

CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition(50),
        Condition(200),
        Condition(1_000),
        Condition(5_000),
        Condition(1_000, noise=0.2),
        Condition(1_000, noise=0.4),
        Condition(1_000, missing=(3, 4, 8, 9)),
    )
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--archs", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--data", nargs="+", default=["fashion", "mnist"], choices=rebasin.READERS)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
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
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "rebasin")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--table", type=Path, help="file to write the tables to")
    return parser.parse_args(arguments)


def small(architecture: Architecture) -> Architecture:
    """One that trains in a second."""
    training = replace(architecture.training, epochs=4.0)
    if training.optimiser == "adam":
        training = replace(training, learning_rate=1e-2)
    return replace(architecture, width={"mlp": 32}.get(architecture.name, 4), training=training)


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    """What the options ask for, in order."""
    quick = options.quick
    sizes = Sizes(1_200, 256, 200, 300) if quick else Sizes()
    budget = Budget(steps=6, checks=2) if quick else Budget()
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
    for data in ["noise"] if quick else options.data:
        pool = Pool(data, options.cache.resolve(), sizes)
        for name in options.archs:
            architecture = small(ARCHITECTURES[name]) if quick else ARCHITECTURES[name]
            for members in [2] if options.study else options.members:
                for repeat in range(options.repeats):
                    for setting in options.settings:
                        kind = (pool, architecture, setting, members, repeat, budgets[name])
                        for condition in conditions:
                            yield Case(options.cache.resolve(), *kind, condition)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
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
            if options.json:
                write(options.json, found)
    except common.SuiteError as error:
        print(f"rebasin: error: {error}", file=sys.stderr)
        return 1
    if options.study:
        missing = {case.condition.name: case.condition.missing for case in cases_of(options)}
        table, lines = rebasin_tables.render_study(found, missing, options.repeats), []
    else:
        table, lines = rebasin_tables.render(found, options.repeats), rebasin_tables.verdicts(found)
    text = "\n".join([table, "", *(f"- {line}" for line in lines)])
    print(text)
    if options.table:
        options.table.write_text(text + "\n")
    return 0


def write(path: Path, found: Found) -> None:
    """All figures as plain data."""
    records = [
        {
            **dict(
                zip(("data", "architecture", "setting", "members", "condition"), key, strict=True)
            ),
            "row": row,
            "repeat": repeat,
            **result,
        }
        for key, rows in found.items()
        for row, results in rows.items()
        for repeat, result in results.items()
    ]
    common.write_json(path, {"records": records}, sort_keys=False)


if __name__ == "__main__":
    sys.exit(main())
