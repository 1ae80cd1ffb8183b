"""Checks of a comparison before any work: numbers, names, places, and every method on the suite."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from gradmerge.cli.compare.methods import (
    BOUND,
    REFERENCE,
    SUITE,
    TASK_ARITHMETIC,
    Axis,
    Method,
    Suite,
    problems_of,
    read_methods,
    read_others,
    with_axes,
)
from gradmerge.common.atomic import lock, whole_file, writing
from gradmerge.common.errors import ConfigError, GradmergeError, nearest
from gradmerge.common.output import paths_in, require_apart, require_writable

_MARK = "comparison.yaml"
"""File by which a folder is known as that of a comparison."""


class Plan:
    """A comparison, after all checks that need no data.

    Args:
        given: the parsed options.

    Raises:
        ConfigError: something cannot be used; all problems at once.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.folder = Path(given.output).expanduser()
        problems = [*self._numbers()]
        methods, wrong = read_methods(given.methods)
        problems += wrong
        names = [method.name for method in methods]
        if REFERENCE not in names:
            methods.insert(0, TASK_ARITHMETIC)
        methods, wrong = with_axes(methods, given.tune)
        problems += wrong
        try:
            self.suite = Suite.read(given.suite)
        except GradmergeError as error:
            raise ConfigError("\n".join([*problems, str(error)])) from error
        self.others, wrong = read_others(given.also, self.suite)
        """Suites with other test data, by name."""
        problems += wrong
        recipe = (self.suite.tree.get("model") or {}).get("recipe") or {}
        if recipe.get("base") is None and REFERENCE not in names:
            methods = [m for m in methods if m is not TASK_ARITHMETIC]
        self.methods: list[Method] = methods
        self.reference: str = given.reference or self._default_reference()
        self.seeds: list[int] = list(dict.fromkeys(given.seeds or [self.suite.seed]))
        problems += self._names(recipe)
        if problems:
            raise ConfigError("\n".join(problems))
        problems += self._place(recipe)
        problems += self._parsed()
        if problems:
            raise ConfigError("\n".join(dict.fromkeys(problems)))

    def _default_reference(self) -> str:
        known = any(method.name == REFERENCE for method in self.methods)
        return REFERENCE if known else "uniform average"

    def _numbers(self) -> Iterator[str]:
        least = {"trials": 1, "workers": 0, "resamples": 100}
        for name, low in least.items():
            value = getattr(self.given, name)
            if value < low:
                yield f"--{name}: expected at least {low}, got {value}."
        if any(size < 1 for size in self.given.examples):
            yield f"--examples: expected numbers of at least 1, got {self.given.examples}."
        if any(not 0 <= seed < 2**32 for seed in self.given.seeds or ()):
            yield f"--seeds: expected numbers of at least 0, got {self.given.seeds}."

    def _names(self, recipe: Any) -> Iterator[str]:
        sources = list(recipe.get("sources") or {}) if isinstance(recipe, dict) else []
        known = [method.name for method in self.methods]
        known += ["base", "uniform average", *(f"expert {source}" for source in sources)]
        known += ["ensemble"] if self.given.ensemble else []
        if self.reference not in known:
            hint = nearest(self.reference, known)
            choice = ", ".join(known)
            yield f"--reference: unknown row {self.reference!r} (choose from {choice}).{hint}"
        if not self.suite.tasks:
            yield f"{self.given.suite}: expected data.tasks, got none."
        built_in = ["baselines", "base", "uniform average", "ensemble", BOUND]
        for name in [m.name for m in self.methods if m.name in built_in]:
            yield f"{name}: is the name of a built-in row; name the method: NAME=FILE."
        wrong = [m.name for m in self.methods if "/" in m.name or m.name.startswith(".")]
        if wrong:
            yield f"METHOD: expected names without '/' or a leading '.', got {', '.join(wrong)}."

    def _place(self, recipe: Any) -> Iterator[str]:
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise ConfigError(f"--output {self.folder}: expected a folder, got a file.")
            is_other = self.folder.is_dir() and not (self.folder / _MARK).is_file()
            if is_other and any(self.folder.iterdir()):
                raise ConfigError(
                    f"--output {self.folder}: expected a new folder or that of an earlier "
                    "comparison, which is resumed, got another that is not empty."
                )
            require_writable(self.folder)
            require_apart(self.folder, paths_in(recipe, self.suite.tree.get("data"), patterns=True))
        except GradmergeError as error:
            yield str(error)

    def _parsed(self) -> Iterator[str]:
        """Yield what is wrong with the suite on any seed, and with the methods on it."""
        allowed = [word for name in self.given.allow_modules for word in ("--allow_modules+", name)]
        for seed in self.seeds:
            text = self.suite_text(seed)
            if wrong := problems_of(SUITE, text, None, allowed):
                yield f"{self.given.suite}, seed {seed}: {wrong}"
                return
            for name in self.others:
                if wrong := problems_of(SUITE, self.suite_text(seed, name), None, allowed):
                    yield f"--also {name}, seed {seed}: {wrong}"
        text = self.suite_text(self.seeds[0])
        for method in self.methods:
            places = [self.suite.at_seed(method, seed).folder for seed in self.seeds]
            lost = [place for place in places if place and not Path(place).expanduser().is_dir()]
            yield from (f"{method.name}: expected a model folder, got none at {p}" for p in lost)
            axis: Axis | None = None
            wrong = problems_of(method, text, None, allowed)
            if not wrong:
                axis = method.tuned_by(text, self.given.trials)
                wrong = problems_of(method, text, axis, allowed)
            if wrong:
                yield f"{method.name}: {wrong}"

    def suite_text(self, seed: int, other: str | None = None) -> str:
        """Return the suite's configuration for a seed as YAML, if asked for with other data."""
        suite = self.suite if other is None else self.others[other]
        text = yaml.safe_dump(suite.seeded(seed), sort_keys=False, allow_unicode=True)
        return f"# Written by `gradmerge compare`: the suite for seed {seed}.\n{text}"

    def suite_file(self, seed: int, other: str | None = None) -> Path:
        """Return the file of the suite for a seed, if asked for with other data."""
        part = "" if other is None else f"-{other}"
        return self.folder / "suites" / f"seed{seed}{part}.yaml"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Make the folder, and keep other processes out of it.

        Raises:
            ConfigError: another process compares there.
        """
        with writing(self.folder, "Give another folder (--output)."):
            self.folder.mkdir(parents=True, exist_ok=True)
            with lock(self.folder) as held:
                if held is False:
                    raise ConfigError(
                        f"--output {self.folder}: another process compares there. Wait for it, or "
                        "give another folder."
                    )
                self._write()
                yield

    @property
    def _data(self) -> list[str | None]:
        """Names of all test data; None stands for the suite's own."""
        return [None, *self.others]

    def _write(self) -> None:
        given = {name: value for name, value in vars(self.given).items() if name != "output"}
        head = "# Written by `gradmerge compare`; the same command resumes it.\n"
        texts = {self.folder / _MARK: head + yaml.safe_dump(given, sort_keys=False)}
        for seed in self.seeds:
            texts |= {self.suite_file(seed, o): self.suite_text(seed, o) for o in self._data}
        for path, text in texts.items():
            path.parent.mkdir(exist_ok=True)
            with whole_file(path) as aside:
                aside.write_text(text, encoding="utf-8")


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"gradmerge compare: {text}", file=sys.stderr, flush=True)
