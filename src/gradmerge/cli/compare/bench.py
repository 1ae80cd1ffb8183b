"""Trials of one method on one seed, tuned and scored, with records of what is done."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from gradmerge.cli.compare.folder import FolderRunner
from gradmerge.cli.compare.learned import LearnedRunner
from gradmerge.cli.compare.methods import SCALE, Axis
from gradmerge.cli.compare.opened import other_data, scorer_of
from gradmerge.cli.compare.static import StaticRunner
from gradmerge.cli.compare.work import (
    MissingError,
    Other,
    Say,
    Trial,
    Work,
    read_final,
    read_record,
    score_others,
    write_final,
    write_record,
)
from gradmerge.common.errors import ConfigError, GradmergeError, NonFiniteError
from gradmerge.common.memory import peak_memory, reset_peak_memory

Chosen = tuple[Trial, dict[str, Any]]
"""The best trial, and what all of them took."""
_MOST_WIDER = 3
"""Trials beyond the budget, for a method whose best value is at the edge of its grid."""


class Bench:
    """Runs trials of a method on its seed; what finished is read from the records.

    Args:
        work: the method and its seed.
        say: called after each trial.
        known_only: only read records; what they lack raises `MissingError`.
    """

    def __init__(self, work: Work, say: Say, known_only: bool = False) -> None:
        self.work, self._say, self._known_only = work, say, known_only
        self._runner: Any = None

    @property
    def runner(self) -> Any:
        """The runner of trials, made when the first is needed."""
        if self._runner is None:
            method = self.work.method
            own = LearnedRunner if method.learns else StaticRunner
            self._runner = (FolderRunner if method.folder else own)(self.work)
        return self._runner

    def run(self) -> list[str]:
        """Tune, score the choice on the test split, and then the learning curve.

        Returns:
            The names of the final records.

        Raises:
            ConfigError: no trial has a score.
        """
        reset_peak_memory()
        work, axis = self.work, self.work.axis
        if axis is not None and axis.option == SCALE and not self._is_scalable():
            axis = None
        tunes = axis is not None and work.fixed is None
        value = None if work.fixed is None else work.fixed["value"]
        best, told = self._tuned(axis, None) if tunes else self._alone(axis, value, None)
        if best.rank(work.select) == -math.inf:
            reason = best.error or "no score on the selection split; do the tasks have labels?"
            raise ConfigError(f"none of {told['trials']} trials has a score. The last: {reason}")
        names = [self._final(best, told)]
        for size in work.sizes if work.method.learns else ():
            if tunes and work.tune_examples:
                short, told = self._tuned(axis, size)
            else:
                short, told = self._alone(axis, best.value, size)
            if short.rank(work.select) > -math.inf:
                names.append(self._final(short, told))
        return names

    def _alone(self, axis: Axis | None, value: Any, size: int | None) -> Chosen:
        """Return the trial of a value that was chosen before, or of a method without an axis."""
        trial = self._trial(axis, value, size)
        told = {"trials": trial.tried, "wider": 0, "edge": False, "tuning": 0.0}
        return trial, told if axis is not None else {**told, "tuning": trial.seconds}

    def _tuned(self, axis: Axis | None, size: int | None) -> Chosen:
        """Return the best trial, and the cost of all."""
        assert axis is not None
        grid = axis

        def best() -> Trial:
            # of equally good values the one nearest to the file's, else the first
            return max(tried, key=lambda t: (t.rank(self.work.select), -grid.distance(t.value)))

        tried = [self._trial(grid, value, size) for value in grid.values]
        extra = 0
        while extra < _MOST_WIDER and best().rank(self.work.select) > -math.inf:
            new = grid.beyond(best().value)
            if new is None:
                break
            extra += 1
            grid = grid.with_value(new)
            tried.append(self._trial(grid, new, size))
        chosen = best()
        return chosen, {
            "trials": sum(trial.tried for trial in tried),
            "wider": extra,
            "edge": grid.is_edge(chosen.value),
            "tuning": sum(trial.seconds for trial in tried),
        }

    def _is_scalable(self) -> bool:
        """Return whether a factor on the coefficients changes the merge; kept on disk."""
        path = self.work.place / f"scalable-{self.work.key(None, None)}.json"
        kept = read_record(path)
        if kept is None:
            self._require_allowed_to_run()
            kept = {"scalable": bool(self.runner.is_scalable())}
            write_record(path, kept)
        return bool(kept["scalable"])

    def _trial(self, axis: Axis | None, value: Any, examples: int | None = None) -> Trial:
        key = self.work.key(value, examples)
        path = self.work.place / f"trial-{key}.json"
        if (found := read_record(path)) is not None:
            return Trial(**found)
        self._require_allowed_to_run()
        label = axis.shown(value) if axis is not None and value is not None else ""
        trial = Trial(value, label, key, examples)
        began = time.perf_counter()
        try:
            self.runner.prepare(value)
            began = time.perf_counter()
            self.runner.run(trial)
        except GradmergeError as error:  # other values may do
            trial.error = str(error)
            is_result = isinstance(error, NonFiniteError)  # the learning rate is too high
        else:
            is_result = True
        trial.seconds, trial.memory = time.perf_counter() - began, peak_memory()
        if is_result:
            write_record(path, vars(trial))
        part = f" with {examples} examples per task" if examples is not None else ""
        self._say(f"{trial.label}{part}: {trial.found}".lstrip(": "), trial.seconds)
        return trial

    def _final(self, trial: Trial, told: Mapping[str, Any]) -> str:
        """Score a trial on the test split, unless that was done; return the record's name."""
        work = self.work
        path = work.place / f"final-{trial.key}.json"
        about = {"row": work.method.name, "kind": "method", "score": trial.score}
        known = read_final(path)
        if known is None:
            test, examples = self._scored(trial, None)
            found = {**vars(trial), **about, **told, "learns": work.method.learns, "test": test}
            write_final(path, found, examples)
        elif {key: known.get(key) for key in told} != dict(told):
            write_record(path, {**known, **told})
        if trial.examples is None:
            score_others(work, path, about, lambda other: self._scored(trial, other))
        return path.name

    def _scored(self, trial: Trial, other: Other | None) -> tuple[dict[str, Any], Any]:
        """Return the scores of a trial on test data, and those of each example."""
        self._require_allowed_to_run()
        work = self.work
        data = None if other is None else other_data(work, other)
        module, own = self.runner.chosen(trial, data)
        module.keep_examples()
        return scorer_of(module, own, work.method.tree(work.suite)).test(), module.examples

    def _require_allowed_to_run(self) -> None:
        if self._known_only:
            raise MissingError
