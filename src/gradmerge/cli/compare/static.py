"""Merges in closed form and searches: opened once, and scored with several factors."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from gradmerge.cli.compare.methods import SCALE
from gradmerge.cli.compare.opened import (
    module_of,
    parse,
    recipe_of,
    scorer_of,
    shared_data,
    statistics_of,
)
from gradmerge.cli.compare.work import Trial, Work
from gradmerge.coefficients import AbstractInit, Constant, Scaled
from gradmerge.common.errors import ConfigError
from gradmerge.common.spec import from_plain, to_plain
from gradmerge.engine.state import FitState
from gradmerge.training.search import set_coefficients


class StaticRunner:
    """Trials of a merge whose coefficients are not learned.

    Args:
        work: the method and its seed.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._opened: Any = None
        self._by: Any = ()
        self.opening = 0.0
        """Seconds that statistics and the last opening took."""

    def prepare(self, value: Any) -> None:
        """Open the merge for a value of the axis; factors share one."""
        work = self._work
        is_scaled = work.axis is None or work.axis.option == SCALE
        key = () if is_scaled else (value,)
        if self._opened is not None and self._by == key:
            return
        self._opened = None  # before the next one takes memory
        began = time.perf_counter()
        found = parse(work.options(value))
        recipe = recipe_of(found)
        self.data = shared_data(found.datamodule, recipe)
        before = time.perf_counter() - began
        folder, cost = statistics_of(work, recipe, self.data)
        began = time.perf_counter()
        self.recipe = recipe if folder is None else replace(recipe, statistics=folder)
        self.module = module_of(found, self.recipe)
        self.scorer = scorer_of(self.module, self.data, work.method.tree(work.suite))
        self.search = found.config_init.get("search")
        self._opened, self._by = found, key
        self.opening = before + cost + time.perf_counter() - began

    def run(self, trial: Trial) -> None:
        """Score a factor, or another value, on the selection split; or run the search."""
        merged, work = self.module.merged, self._work
        if self.search is not None:
            chosen, _ = self.scorer.search(self.search)
            trial.init, trial.label = to_plain(chosen), _named(chosen)
            trial.tried = len(self.scorer.trials)
        elif work.axis is not None and work.axis.option == SCALE and trial.value is not None:
            self._scale(trial)
        else:
            set_coefficients(merged, self.recipe.init)
        trial.selection = dict(self.scorer.score()["average"])
        score = self.module.score
        trial.score, trial.higher_is_better = score.name, score.higher_is_better
        trial.opening = self.opening
        if self.recipe.needs_statistics:
            sizes = {task: len(rows) for task, rows in self.data.examples("adaptation").items()}
            trial.adaptation = sum(sizes.values())

    def _scale(self, trial: Trial) -> None:
        """Multiply the merge's coefficients, or the scale of its operator, by the trial's value."""
        merged, recipe = self.module.merged, self.recipe
        if self._scales_operator():
            operator: Any = recipe.operator
            scale = operator.scale * trial.value
            merged.state.plan = merged.plan.with_operator(replace(operator, scale=scale))
            trial.label = f"scale {scale:.3g}"
            return
        set_coefficients(merged, Scaled(recipe.init, trial.value))
        if isinstance(recipe.init, Constant) and isinstance(recipe.init.value, (int, float)):
            trial.label = f"scale {recipe.init.value * trial.value:.3g}"

    def is_scalable(self) -> bool:
        """Return whether a factor changes the merge: that of its coefficients or its operator."""
        self.prepare(None)
        return self._has_size() or self._scales_operator()

    def _scales_operator(self) -> bool:
        return hasattr(self.recipe.operator, "scale") and not self._has_size()

    def _has_size(self) -> bool:
        """Return whether more than the ratios of the coefficients counts."""
        plan = self.module.merged.plan
        first = FitState.start(plan)
        names = [name for name in first.learned if len(plan.tensors[name].shape) > 1]
        try:
            other = FitState(plan, plan.initial_raw(Scaled(plan.recipe.init, 1.5)))
        except ConfigError:  # the link cannot represent them
            return False
        for name in names or first.learned:
            if not plan.direction(name).any():
                continue  # the same in all sources: it says nothing of the others
            before, after = (state.materialise(name).float() for state in (first, other))
            return not torch.allclose(before, after, rtol=1e-5, atol=1e-7)
        return False

    def chosen(self, trial: Trial, data: Any = None) -> tuple[Any, Any]:
        """Return the module with the coefficients of a trial, and the suite's data or others."""
        self.prepare(trial.value)
        if trial.init is not None:
            set_coefficients(self.module.merged, from_plain(trial.init, self._work.allow_modules))
        elif self._work.axis is not None and self._work.axis.option == SCALE and trial.value:
            self._scale(trial)
        else:
            set_coefficients(self.module.merged, self.recipe.init)
        return self.module, self.data if data is None else data


def _named(init: AbstractInit) -> str:
    """Return chosen coefficients in words."""
    if isinstance(init, Constant) and isinstance(init.value, (list, tuple)):
        return f"coefficients {', '.join(f'{v:.2g}' for v in init.value)}"
    known = next((n for n in ("factor", "seed") if hasattr(init, n)), "")
    return f"{known or type(init).__name__} {getattr(init, known, '')}".strip()
