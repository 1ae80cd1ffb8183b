"""The order of a comparison's work, its progress, and its results on disk."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from gradmerge.cli.compare.baselines import BASELINES, rows_of
from gradmerge.cli.compare.methods import BOUND, SUITE, Suite
from gradmerge.cli.compare.opened import forget_data, parse, recipe_of, shared_data
from gradmerge.cli.compare.plan import Plan, say
from gradmerge.cli.compare.work import Other, Work
from gradmerge.cli.compare.workers import Ended, attempt, known, run_in_processes
from gradmerge.common.atomic import whole_file
from gradmerge.common.errors import ConfigError, GradmergeError, nearest
from gradmerge.common.progress import duration
from gradmerge.comparison.page import write_page
from gradmerge.comparison.results import Comparison, Outcome, Row
from gradmerge.comparison.tables import as_csv, as_plain, markdown
from gradmerge.drivers.state import describe_contents, write_json
from gradmerge.engine.merged import MergedModel
from gradmerge.engine.recipe import Recipe
from gradmerge.sources import as_source
from gradmerge.sources.base import fingerprints_of

FAILED = 3
"""Exit status of a comparison with a method that has failed."""


class Run:
    """One run of a comparison; what earlier runs have finished is kept.

    Args:
        plan: what is compared.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.given = plan, plan.given
        self.ended: list[Ended] = []
        self._began = time.monotonic()
        self._suites: dict[tuple[int, str | None], Any] = {}
        self._contents = {seed: self._describe(seed) for seed in plan.seeds}
        self._contents_of_others = {
            (seed, name): describe_contents(self._parsed(seed, name).datamodule)
            for seed in plan.seeds
            for name in plan.others
        }

    # ---- work ------------------------------------------------------------------------------------

    def _describe(self, seed: int) -> dict[str, Any]:
        """Return fingerprints of the sources and of the splits of a seed."""
        found = self._parsed(seed)
        recipe, data = recipe_of(found), found.datamodule
        base = None if recipe.base is None else as_source(recipe.base)
        specs = {} if base is None else {"base": base}
        served = {**recipe.sources, **recipe.heads}
        specs |= {name: as_source(spec, base) for name, spec in served.items()}
        opened = {name: spec.open() for name, spec in specs.items()}
        return {"sources": fingerprints_of(opened), "data": describe_contents(data)}

    def _parsed(self, seed: int, other: str | None = None) -> Any:
        if (seed, other) not in self._suites:
            allowed = [w for name in self.given.allow_modules for w in ("--allow_modules+", name)]
            file = str(self.plan.suite_file(seed, other))
            self._suites[seed, other] = parse([*SUITE.arguments(file), *allowed])
        return self._suites[seed, other]

    def _works(self, seed: int) -> Iterator[Work]:
        for given in [BASELINES, *self.plan.methods]:
            method, contents = self.plan.suite.at_seed(given, seed), self._contents[seed]
            if method.folder:
                model = {method.name: as_source(method.folder).open()}
                contents = {**contents, "model": fingerprints_of(model)}
            others = []
            for name in self.plan.others:
                found = self._contents_of_others[seed, name]
                others.append(Other(name, str(self.plan.suite_file(seed, name)), found))
            yield Work(
                seed,
                method,
                str(self.plan.suite_file(seed)),
                contents,
                str(self.plan.folder),
                self.given.trials,
                self.given.select,
                sizes=tuple(sorted(set(self.given.examples))),
                tune_examples=self.given.tune_examples,
                ensemble=self.given.ensemble,
                others=tuple(others),
                allow_modules=tuple(self.given.allow_modules),
            )

    def all(self) -> int:
        """Run what is missing, write the results, and return the exit status."""
        first, *others = self.plan.seeds
        later = [work for seed in others for work in self._works(seed)]
        if self.given.tune_seeds == "first":
            self._run([*self._works(first), *(w for w in later if w.method.name == BASELINES.name)])
            chosen = {work.method.name: self._choice(work, names) for work, names, _ in self.ended}
            tuned = [work for work in later if work.method.name != BASELINES.name]
            self._run([replace(w, fixed=chosen[w.method.name]) for w in tuned])
        else:
            self._run([*self._works(first), *later])
        found = self.results()
        self.write(found)
        print(f"\n{markdown(found)}")
        print(f"table.md, table.csv, results.json, report.html and figures: {self.plan.folder}")
        print(f"took {duration(time.monotonic() - self._began)}")
        return FAILED if found.failed else 0

    def _choice(self, work: Work, names: list[str] | None) -> dict[str, Any] | None:
        """Return what the first seed has chosen; None to tune again where it has failed."""
        if not names or work.method.name == BASELINES.name:
            return None
        record = json.loads((work.place / names[0]).read_text(encoding="utf-8"))
        return {"value": record.get("value")}

    def _run(self, works: Sequence[Work]) -> None:
        missing = []
        for work in works:
            names = known(work)
            if names is None:
                missing.append(work)
            else:
                self.ended.append((work, names, ""))
        if len(missing) < len(works):
            say(f"{len(works) - len(missing)} of {len(works)} methods and seeds are on record")
        if not missing:
            return
        self._require_data(missing)
        progress = _Progress(missing, max(1, self.given.workers))
        if self.given.workers:
            self._suites.clear()
            forget_data()
            for ended in run_in_processes(missing, self.given.workers, progress.trial):
                self._end(ended, progress)
            return
        for work in missing:
            names, reason = attempt(work, lambda *told, w=work: progress.trial(w, *told))
            self._end((work, names, reason), progress)

    def _end(self, ended: Ended, progress: _Progress) -> None:
        self.ended.append(ended)
        progress.end(*ended)

    def _require_data(self, works: Iterable[Work]) -> None:
        """Prepare the data of all seeds once, so that their mistakes are found before any work.

        Raises:
            GradmergeError: splits overlap, a row cannot be read, or sources and data do not fit.
        """
        seeds = dict.fromkeys(work.seed for work in works)
        for seed, other in itertools.product(seeds, [None, *self.plan.others]):
            found = self._parsed(seed, other)
            recipe = recipe_of(found)
            data = shared_data(found.datamodule, recipe)
            try:
                private, heads = recipe.private, recipe.heads
                plain = Recipe(recipe.sources, recipe.base, private=private, heads=heads)
                data.attach(MergedModel(plain))
                data.setup()
            except GradmergeError as error:
                place = f"seed {seed}" if other is None else f"--also {other}, seed {seed}"
                raise type(error)(f"{place}: {error}") from error

    # ---- results ---------------------------------------------------------------------------------

    def results(self) -> Comparison:
        """Return the comparison of everything that has ended."""
        found = self._gathered(None)
        found.about = self._about()
        found.others = {name: self._gathered(name, found.metric) for name in self.plan.others}
        return found

    def _data_of(self, seed: int, other: str | None) -> dict[str, dict[str, str]]:
        if other is not None:
            return self._contents_of_others[seed, other]
        found: dict[str, dict[str, str]] = self._contents[seed]["data"]
        return found

    def _gathered(self, other: str | None, metric: str = "") -> Comparison:
        """Return the comparison on the suite's test data, or on others."""
        rows: dict[str, Row] = {}
        curves: dict[str, dict[int, Row]] = {}
        for work, names, reason in self.ended:
            at = next((one for one in work.others if one.name == other), None)
            if names is None and other is None:
                row = rows.setdefault(work.method.name, Row(work.method.name, "method"))
                row.errors[work.seed] = reason
            for name in names or ():
                place = work.place / name
                if at is not None:
                    place = at.record(place)
                    if not place.is_file():
                        continue  # of a learning curve
                record = json.loads(place.read_text(encoding="utf-8"))
                outcome = Outcome(work.seed, record, place)
                own, kind, size = record["row"], record["kind"], record.get("examples")
                if record.get("error") and at is not None:
                    rows.setdefault(own, Row(own, kind)).errors[work.seed] = record["error"]
                elif size is None:
                    rows.setdefault(own, Row(own, kind)).outcomes[work.seed] = outcome
                else:
                    curve = curves.setdefault(own, {})
                    curve.setdefault(size, Row(own, kind)).outcomes[work.seed] = outcome
        suite = self.plan.suite if other is None else self.plan.others[other]
        bound = self._bound(rows, suite)
        if bound.outcomes:
            rows[BOUND] = bound
        outcomes = [outcome for row in rows.values() for outcome in row.outcomes.values()]
        judged = next((str(one.record.get("score")) for one in outcomes), "")
        splits = {
            seed: {task: one["test"] for task, one in self._data_of(seed, other).items()}
            for seed in self.plan.seeds
        }
        metric = self.given.metric or metric or judged
        measured = list(dict.fromkeys(name for o in outcomes for name in o.test["average"]))
        if metric not in measured and measured and other is None:
            raise ConfigError(
                f"--metric: no row has {metric!r} (choose from {', '.join(measured)})."
                f"{nearest(metric, measured)} Everything is on record; run the command again."
            )
        every_row, reference = list(rows.values()), self.plan.reference
        found = Comparison(every_row, suite.tasks, metric, reference, splits, curves)
        found.compare(self.given.resamples)
        return found

    def _bound(self, rows: dict[str, Row], suite: Suite) -> Row:
        """Return the row of each expert on its own task, made of those of the experts."""
        bound = Row(BOUND, "bound")
        described = (suite.tree.get("data") or {}).get("tasks") or {}
        for seed in self.plan.seeds:
            only = {}
            for task, data in described.items():
                source = (data or {}).get("source") or task
                row = rows.get(f"expert {source}")
                if row is not None and seed in row.outcomes:
                    only[task] = row.outcomes[seed]
            if len(only) < len(described):
                continue
            test = {task: dict(one.test[task]) for task, one in only.items()}
            names = [n for n in next(iter(test.values())) if all(n in t for t in test.values())]
            mean = {n: sum(scores[n] for scores in test.values()) / len(test) for n in names}
            record = {"test": {**test, "average": mean}}
            record["score"] = next(iter(only.values())).record.get("score", "")
            bound.outcomes[seed] = Outcome(seed, record, None, only)
        return bound

    def _about(self) -> list[str]:
        given = self.given
        seeds = "on every seed" if given.tune_seeds == "all" else f"on seed {self.plan.seeds[0]}"
        lines = [
            f"Trials of each method on the selection split, {seeds}: {given.trials} (learning "
            "rates or scales around the file's), or the values of `--tune`. Of a fit the best step "
            f"is kept, by the {'loss' if given.select == 'loss' else 'score'}. The test split is "
            "read once for each choice.",
            f"Differences are to {self.plan.reference}, with 95% intervals of a paired bootstrap "
            f"({given.resamples:,} resamples of the test examples within each task, pooled over "
            "seeds); they tell how much a difference owes to the test examples, not to the seed.",
        ]
        if given.examples:
            rate = "are tuned for each number of examples"
            kept = "use the value that was chosen with all adaptation examples"
            lines.append(
                f"Learning curves {rate if given.tune_examples else kept}, and choose the step "
                "anew; step 0 is the start."
            )
        return lines

    def write(self, found: Comparison) -> None:
        """Write tables, figures and the page."""
        folder = self.plan.folder
        texts = {"table.md": markdown(found), "table.csv": as_csv(found)}
        for name, text in texts.items():
            with whole_file(folder / name) as path:
                path.write_text(text, encoding="utf-8")
        write_json(folder / "results.json", as_plain(found))
        given = (self.plan.suite.tree.get("model") or {}).get("recipe") or {}
        trusted = bool(given.get("trust_remote_code"))
        allowed = tuple(self.given.allow_modules)
        write_page(folder, found, allow_modules=allowed, trust_remote_code=trusted)


class _Progress:
    """Lines about finished trials, with the time that is left."""

    def __init__(self, works: Sequence[Work], workers: int) -> None:
        self._left = {
            self._name(work): (
                len(rows_of(work)) if work.method.name == BASELINES.name else work.planned
            )
            for work in works
        }
        self._learns = {self._name(work): work.method.learns for work in works}
        self._total, self._done, self._workers = sum(self._left.values()), 0, workers
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._began = time.monotonic()

    @staticmethod
    def _name(work: Work) -> tuple[int, str]:
        return work.seed, work.method.name

    def trial(self, work: Work, text: str, seconds: float) -> None:
        """Report a finished trial."""
        name = self._name(work)
        self._done += 1
        self._left[name] = max(0, self._left[name] - 1)
        self._seconds[work.method.learns].append(seconds)
        self._total = self._done + sum(self._left.values())
        where = f"[{self._done}/{self._total}] seed {work.seed}, {work.method.name}"
        say(f"{where}, {text} ({duration(seconds)}; {self._remaining()})")

    def end(self, work: Work, names: list[str] | None, reason: str) -> None:
        """Forget what is left of a method, and say it if it has failed."""
        self._left[self._name(work)] = 0
        if names is None:
            say(f"seed {work.seed}, {work.method.name} has failed: {reason}")

    def _remaining(self) -> str:
        seconds = 0.0
        every = [s for own in self._seconds.values() for s in own]
        for name, count in self._left.items():
            own = self._seconds[self._learns[name]] or every
            seconds += count * sum(own) / len(own)
        return f"about {duration(seconds / self._workers)} left"
