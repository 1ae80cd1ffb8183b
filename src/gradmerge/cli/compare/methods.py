"""Suites and methods of a comparison, from their files, and the options that are tuned."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from gradmerge.cli.given import read_parts, tree_of
from gradmerge.cli.precheck import prechecked
from gradmerge.common.errors import ConfigError, GradmergeError, nearest
from gradmerge.common.files import near, read_yaml

SCALE = "scale"
"""Axis of factors on the coefficients of a static merge."""
RATE = "optimizer.init_args.lr"
BOUND = "each expert on its own task"
"""Name of the row that is an upper bound."""
REFERENCE = "task_arithmetic"
"""Name of the method that others are compared with by default."""
_LOWEST_RATE = "lr_scheduler.init_args.eta_min"
_RATES = (RATE, "model.learning_rate")
# What a file states that makes its method a learned one.
_LEARNS = ("optimizer", "objective", "driver", "learning_rate")


def split_files(text: str) -> tuple[str, ...]:
    """Return the files that a text names, joined by `+`."""
    return (text,) if Path(text).expanduser().exists() else tuple(text.split("+"))


@dataclass(frozen=True)
class Axis:
    """An option with the values that are tried."""

    option: str
    values: tuple[Any, ...]
    centre: float | None = None
    """The file's own value, preferred among equally good ones."""

    @classmethod
    def around(cls, option: str, centre: float, count: int) -> Axis:
        """Return a geometric ladder of values around one, which is among them.

        Five rates are x 0.1, 0.32, 1, 3.2 and 10; five scales are x 1/8, 1/4, 1/2, 1 and 2, because
        sums of more task vectors want smaller ones. More values are denser, fewer span less.
        """
        steps = max(4, count - 1)
        if option in _RATES:
            step, above = 10 ** (2 / steps), (count - 1) // 2
        else:
            step, above = 2 ** (4 / steps), round(steps / 4) if count > 2 else 0
        values = (_rounded(centre * step**k) for k in range(above - count + 1, above + 1))
        return cls(option, tuple(values), centre)

    def beyond(self, value: Any) -> Any:
        """Return the next value outside of the grid if the given one is at its edge, else None."""
        numbers = [v for v in self.values if isinstance(v, (int, float)) and v > 0]
        if len(numbers) < max(2, len(self.values)) or isinstance(value, bool):
            return None
        ordered = sorted(numbers)
        if value == ordered[-1]:
            new: float = _rounded(ordered[-1] * ordered[-1] / ordered[-2])
        elif value == ordered[0]:
            new = _rounded(ordered[0] * ordered[0] / ordered[1])
        else:
            return None
        if all(isinstance(v, int) for v in numbers):
            new = round(new)
        return None if new in numbers or new <= 0 else new

    def distance(self, value: Any) -> float:
        """Return how far a value is from the file's own, 0 if that is not known."""
        return 0.0 if self.centre is None else abs(math.log(value / self.centre))

    def is_edge(self, value: Any) -> bool:
        """Return whether a value is the first or the last of several, by size."""
        return self.beyond(value) is not None

    def with_value(self, value: Any) -> Axis:
        """Return the axis with one more value."""
        return replace(self, values=(*self.values, value))

    def shown(self, value: Any) -> str:
        """Return a value in words."""
        name = {RATE: "rate", SCALE: "scale x"}.get(self.option, self.option.rpartition(".")[2])
        number = f"{value:g}" if isinstance(value, float) else str(value)
        return f"{name}{'' if name.endswith('x') else ' '}{number}"


def _rounded(value: float) -> float:
    """Return a value with two significant digits, so that its label is the value itself."""
    return float(f"{value:.2g}")


@dataclass(frozen=True)
class Method:
    """A way to merge: its files, which complete the suite's."""

    name: str
    files: tuple[str, ...]
    axis: Axis | None = None
    """The option that the user wants to be tuned. Default: rate or scale."""
    inline: str = ""
    """YAML in place of files."""
    folder: str = ""
    """A finished model, whatever made it, in place of a method."""
    stated: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The content of the files."""

    @classmethod
    def read(cls, text: str) -> Method:
        """Return the method of `[NAME=]FILE[+FILE...]`, or of a model folder.

        Raises:
            ConfigError: a file does not exist, or holds no options.
        """
        name, equals, rest = text.partition("=")
        if not equals or "/" in name or "." in name:
            name, rest = "", text
        if Path(rest).expanduser().is_dir():
            return cls(name or Path(rest).name, (), folder=rest)
        files = split_files(rest)
        for file in files:
            if not Path(file).expanduser().is_file():
                raise ConfigError(f"{file}: expected a YAML file, but none exists.{near(file)}")
        contents = [read_yaml(Path(file).expanduser()) for file in files]
        stated: dict[str, Any] = {}
        for file, found in zip(files, contents, strict=True):
            if not isinstance(found, dict):
                raise ConfigError(f"{file}: expected the options of a method, got none.")
            stated |= {**found, **(found.get("model") or {})}
        return cls(name or "+".join(Path(file).stem for file in files), files, stated=stated)

    @property
    def learns(self) -> bool:
        """True if coefficients are learned, false for merges in closed form and searches."""
        return any(self.stated.get(key) is not None for key in _LEARNS)

    def arguments(self, suite: str) -> list[str]:
        """Return the arguments of `gradmerge fit` with the method on a suite."""
        given = [suite, *self.files, *([self.inline] if self.inline else [])]
        found = [word for file in given for word in ("--config", file)]
        # statistics of data belong to one seed, so that they are collected here
        owned = "statistics" in (self.stated.get("recipe") or {})
        dropped = ["--model.recipe.statistics=null"] if owned else []
        # of the methods that learn: a schedule is refused where there is no optimiser
        unused = [] if self.learns else ["--optimizer=null", "--lr_scheduler=null"]
        return [*found, *dropped, *unused]

    def tree(self, suite: str) -> dict[str, Any]:
        """Return suite and method as one tree of plain data."""
        return tree_of("fit", read_parts("fit", self.arguments(suite)))

    def tuned_by(self, suite: str, trials: int) -> Axis | None:
        """Return what is tuned; None for a search, which tunes by itself."""
        if self.axis is not None or self.folder:
            return self.axis
        tree = self.tree(suite)
        if not self.learns:
            return None if tree.get("search") else Axis.around(SCALE, 1.0, trials)
        optimizer = tree.get("optimizer")
        if isinstance(optimizer, Mapping):
            rate = (optimizer.get("init_args") or {}).get("lr", 1e-3)
            return Axis.around(RATE, float(rate), trials)
        rate = tree.get("model", {}).get("learning_rate", 1e-2)
        return Axis.around("model.learning_rate", float(rate), trials)

    def options(self, suite: str, axis: Axis | None, value: Any) -> list[str]:
        """Return the arguments that set a value of the axis."""
        if axis is None or value is None or axis.option == SCALE:
            return []
        shown = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
        found = [f"--{axis.option}={shown.removesuffix(chr(10)).removesuffix('...').strip()}"]
        tree = self.tree(suite)
        schedule = (tree.get("lr_scheduler") or {}).get("init_args") or {}
        lowest = schedule.get("eta_min")
        if axis.option == RATE and isinstance(lowest, (int, float)):
            own = (tree["optimizer"].get("init_args") or {}).get("lr", 1e-3)
            found.append(f"--{_LOWEST_RATE}={float(lowest) * value / float(own):g}")
        return found


SUITE = Method("suite", ())
"""The suite alone."""
TASK_ARITHMETIC = Method(
    REFERENCE,
    (),
    inline=yaml.safe_dump(
        {
            "model": {
                "recipe": {
                    "coefficients": {"class_path": "Model"},
                    "init": {"class_path": "Constant", "init_args": {"value": 0.3}},
                }
            }
        }
    ),
)


@dataclass(frozen=True)
class Suite:
    """Sources, data and trainer that all methods share, for any seed."""

    files: tuple[str, ...]
    tree: Mapping[str, Any]

    @classmethod
    def read(cls, text: str) -> Suite:
        """Return the suite of `FILE[+FILE...]`.

        Raises:
            ConfigError: a file cannot be read.
        """
        files = split_files(text)
        given = [word for file in files for word in ("--config", str(Path(file).expanduser()))]
        return cls(files, tree_of("fit", read_parts("fit", given)))

    @property
    def seed(self) -> int:
        """The suite's own seed."""
        given = self.tree.get("seed_everything")
        return int(given) if isinstance(given, int) and not isinstance(given, bool) else 0

    def seeded(self, seed: int) -> dict[str, Any]:
        """Return the suite with another seed, of the fit, of the data and in all paths.

        Texts that contain `seedN`, where N is the suite's own seed, get the other number.
        """
        own = self._own
        tree = copy.deepcopy(dict(self.tree))

        def replaced(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: replaced(item) for key, item in value.items()}
            if isinstance(value, list):
                return [replaced(item) for item in value]
            return own.sub(f"seed{seed}", value) if isinstance(value, str) else value

        found: dict[str, Any] = replaced(tree)
        found["seed_everything"] = seed
        found["data"] = {**(found.get("data") or {}), "seed": seed}
        return found

    def at_seed(self, method: Method, seed: int) -> Method:
        """Return a method with the model folder of a seed."""
        return replace(method, folder=self._own.sub(f"seed{seed}", method.folder))

    def on(self, other: Suite) -> Suite:
        """Return the suite with the tasks of another file, which complete its own."""
        own = self.tree.get("data") or {}
        before, after = own.get("tasks") or {}, (other.tree.get("data") or {}).get("tasks") or {}
        tasks = {name: _completed(before.get(name), task) for name, task in after.items()}
        return replace(self, tree={**self.tree, "data": {**own, "tasks": tasks}})

    @property
    def _own(self) -> re.Pattern[str]:
        return re.compile(rf"seed{self.seed}(?!\d)")

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list((self.tree.get("data") or {}).get("tasks") or {})


def _completed(before: Any, after: Any) -> Any:
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return after
    return {**before, **{k: _completed(before.get(k), value) for k, value in after.items()}}


def read_others(texts: Sequence[str], suite: Suite) -> tuple[dict[str, Suite], list[str]]:
    """Return suites with other test data by name, and what is wrong with the files of `--also`."""
    found: dict[str, Suite] = {}
    problems = []
    for text in texts:
        name, equals, rest = text.partition("=")
        if not equals or "/" in name or "." in name:
            name, rest = Path(text).stem, text
        try:
            other = Suite.read(rest)
        except GradmergeError as error:
            problems.append(f"--also {text}: {error}")
            continue
        data = other.tree.get("data") or {}
        beside = [*(k for k in other.tree if k != "data"), *(f"data.{k}" for k in data)]
        if not other.tasks or beside != ["data.tasks"]:
            problems.append(
                f"--also {text}: expected data.tasks and nothing else, got "
                f"{', '.join(beside) or 'nothing'}. Its tasks complete those of the suite."
            )
        elif name in (*found, "test"):
            problems.append(f"--also: expected different names, got {name} twice or `test`.")
        else:
            found[name] = suite.on(other)
    return found, problems


def read_methods(texts: Sequence[str]) -> tuple[list[Method], list[str]]:
    """Return the methods that can be read, and what is wrong with the others."""
    methods, problems = [], []
    for text in texts:
        try:
            methods.append(Method.read(text))
        except GradmergeError as error:
            problems.append(str(error))
    names = [method.name for method in methods]
    for name in dict.fromkeys(n for n in names if names.count(n) > 1):
        problems.append(
            f"{name}: expected methods of different names, got {names.count(name)} of this one; "
            "name one of them: NAME=FILE."
        )
    return methods, problems


def with_axes(methods: Sequence[Method], texts: Sequence[str]) -> tuple[list[Method], list[str]]:
    """Return methods with the axes of `--tune`, and what is wrong with those.

    Args:
        methods: the methods.
        texts: `METHOD:option=[values]`, or YAML files of `{METHOD: {option: [values]}}`.
    """
    problems: list[str] = []
    axes: dict[str, Axis] = {}
    for text in texts:
        try:
            axes |= dict(_axis(*found) for found in _tuned(text))
        except (ConfigError, yaml.YAMLError) as error:
            problems.append(f"--tune {text}: {error}")
    names = [method.name for method in methods]
    for name in axes:
        if name not in names:
            hint, choice = nearest(name, names), f"choose from {', '.join(names)}"
            problems.append(f"--tune: unknown method {name!r} ({choice}).{hint}")
    for method in methods:
        if method.folder and method.name in axes:
            problems.append(f"--tune: {method.name} is a finished model, which has no options.")
    return [replace(m, axis=axes.get(m.name, m.axis)) for m in methods], problems


def _tuned(text: str) -> list[tuple[str, str, Any]]:
    if text.endswith((".yaml", ".yml")):
        found = read_yaml(Path(text).expanduser())
        wrong = ConfigError("expected a mapping {METHOD: {option: [values]}}.")
        if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
            raise wrong
        return [(name, o, values) for name, own in found.items() for o, values in own.items()]
    head, equals, values = text.partition("=")
    name, colon, option = head.rpartition(":")
    if not (equals and colon and name and option):
        raise ConfigError("expected METHOD:option=[value, value, ...].")
    return [(name, option, yaml.safe_load(values))]


def _axis(name: str, option: str, values: Any) -> tuple[str, Axis]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"expected a list of values of {option}, got {values!r}.")
    full = f"model.{option}" if option.partition(".")[0] in ("recipe", "objective") else option
    return name, Axis(full, tuple(values))


def problems_of(method: Method, suite: str, axis: Axis | None, more: Sequence[str]) -> str:
    """Return what is wrong with a method on a suite; empty if nothing is."""
    try:
        arguments = [*method.arguments(suite), *more]
        for value in (None,) if axis is None else axis.values:
            prechecked("fit", [*arguments, *method.options(suite, axis, value)])
    except GradmergeError as error:
        return str(error)
    return ""
