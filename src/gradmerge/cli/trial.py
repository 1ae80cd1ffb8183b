"""The last check before a command starts: values, places and components, without Lightning.

Components check their own values when they are made. Making them takes torch, but neither
Lightning nor transformers, and opens no file.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gradmerge.cli.catalogue import (
    Class,
    Either,
    Instance,
    Listing,
    Options,
    Scalar,
    Table,
    Type,
)
from gradmerge.cli.check import Mistake, class_of, fitting
from gradmerge.cli.early import require_monitors, require_numbers, require_optimiser, require_seed
from gradmerge.cli.options import LEARNING, TASK, fields_of, options_of
from gradmerge.cli.places import unreadable
from gradmerge.common.errors import GradmergeError

# Modules whose classes are made with Lightning.
_HEAVY = ("gradmerge.drivers", "gradmerge.training", "gradmerge.cli", "lightning", "torch")
_TASKS = TASK.rpartition(".")[0]


class _NotMadeError(Exception):
    """A component that is not made here, or whose parts are wrong."""


def trial(command: str, tree: Mapping[str, Any]) -> list[Mistake]:
    """Return what is wrong in the values of a configuration of the right form.

    Args:
        command: name of the command.
        tree: its options as plain data.
    """
    found = list(_numbers(command, tree)) if command in LEARNING else []
    if found:
        return found
    _part(tree, Instance(options_of(command)), "", found)
    if tree.get("driver"):  # the recipe is that of each of its steps, not of all sources at once
        found = [mistake for mistake in found if mistake.at != "model.recipe"]
    if not found:
        found += unreadable(command, tree)
    if not found and command in LEARNING:
        found += _learning(command, tree)
    return found


def infinite(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield one mistake for all numbers that are NaN or infinite."""
    if not all(map(math.isfinite, _numbers_in(tree))):
        from gradmerge.common.finite import require_finite_options

        try:
            require_finite_options(_with_infinite(tree))
        except GradmergeError as error:
            yield Mistake("", str(error))


def _with_infinite(value: Any) -> Any:
    """Return plain data with texts such as 1e400, which a parser takes for numbers, as numbers."""
    if isinstance(value, Mapping):
        return {key: _with_infinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_infinite(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE]\+?\d+", value):
        return float(value) if math.isinf(float(value)) else value
    return value


def _numbers_in(value: Any) -> Iterator[float]:
    given = _with_infinite(value)
    if isinstance(given, float):
        yield given
    elif isinstance(given, (Mapping, list)):
        for item in given.values() if isinstance(given, Mapping) else given:
            yield from _numbers_in(item)


# ---- components ----------------------------------------------------------------------------------


def _made(value: Any, kind: Type, at: str, found: list[Mistake]) -> Any:
    """Return an object of plain data; what it rejects is added to `found`."""
    match kind:
        case Scalar(kind=scalar) if scalar is float and isinstance(value, str):
            return float(value)
        case Either():
            fits = fitting(value, kind)
            return value if fits is None else _made(value, fits, at, found)
        case Listing(inner=inner) if isinstance(value, list):
            parts = [_part(v, inner, f"{at}[{i}]", found) for i, v in enumerate(value)]
            return _whole(parts)
        case Table(inner=inner) if isinstance(value, dict):
            made = {k: _part(v, inner, f"{at}.{k}", found) for k, v in value.items()}
            _whole(made.values())
            return made
        case Instance(of=of):
            return _component(value, of, at, found)
    return value


def _part(value: Any, kind: Type, at: str, found: list[Mistake]) -> Any:
    """Return an object, or the exception that says that it is not made."""
    try:
        return _made(value, kind, at, found)
    except _NotMadeError as error:
        return error


def _whole(parts: Iterable[Any]) -> list[Any]:
    listed = list(parts)
    if any(isinstance(part, _NotMadeError) for part in listed):
        raise _NotMadeError
    return listed


def _component(value: Any, of: Class | Options, at: str, found: list[Mistake]) -> Any:
    if isinstance(of, Class):
        if isinstance(value, str):
            value = {"class_path": value}
        if isinstance(value, Mapping) and "class_path" in value:
            kind = class_of(str(value["class_path"]), of)
            if not isinstance(kind, Class):
                raise _NotMadeError
            of, value = kind, value.get("init_args") or {}
    if not isinstance(value, Mapping) or (isinstance(of, Class) and of.is_abstract):
        raise _NotMadeError
    known, lost = fields_of(of), False
    arguments = {}
    for key, item in value.items():
        if key in known:
            part = _part(item, known[key].kind, f"{at}.{key}" if at else key, found)
            lost = lost or isinstance(part, _NotMadeError)
            arguments[key] = part
    heavy = not isinstance(of, Class) or of.home.name.startswith(_HEAVY)
    if lost or (heavy and not (isinstance(of, Class) and of.home.name == _TASKS)):
        raise _NotMadeError
    assert isinstance(of, Class)
    try:
        kind = getattr(importlib.import_module(of.home.name), of.name)
        hints = inspect.get_annotations(kind)
        for key, item in arguments.items():
            if isinstance(item, list) and str(hints.get(key, "")).startswith("tuple"):
                arguments[key] = tuple(item)
        return kind(**arguments)
    except GradmergeError as error:
        found.append(Mistake(at, str(error)))
    except Exception:
        pass
    raise _NotMadeError


# ---- numbers, scores and the optimiser ---------------------------------------------------------


def _get(tree: Mapping[str, Any], name: str) -> Any:
    """Return an option by its dotted name, with classes by their paths and numbers as numbers."""
    kind: Any = Instance(options_of("fit"))
    found: Any = tree
    for key in name.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
        field = fields_of(kind.of).get(key) if isinstance(kind, Instance) else None
        kind = None if field is None else field.kind
    return _resolved(found, kind)


def _resolved(value: Any, kind: Any) -> Any:
    if isinstance(value, list):
        return [_resolved(item, kind) for item in value]
    options = kind.options if isinstance(kind, Either) else (kind,)
    inner = [o.inner if isinstance(o, Listing) else o for o in options]
    bases = [o.of for o in inner if isinstance(o, Instance) and isinstance(o.of, Class)]
    if (bases and bases[0].is_abstract) or (bases and not isinstance(value, Mapping)):
        given = {"class_path": value} if isinstance(value, str) else value
        if isinstance(given, Mapping) and isinstance(given.get("class_path"), str):
            found = class_of(given["class_path"], bases[0])
            path = found.path if isinstance(found, Class) else given["class_path"]
            return {**given, "class_path": path}
    return value


def _numbers(command: str, tree: Mapping[str, Any]) -> Iterator[Mistake]:
    def get(name: str) -> Any:
        return _get(tree, name)

    seed = get("seed_everything")
    for check in (
        lambda: require_seed(seed) if isinstance(seed, int) else None,
        lambda: require_numbers(get, command == "fit"),
        lambda: require_monitors(get) if command == "fit" else None,
    ):
        try:
            check()
        except GradmergeError as error:
            yield Mistake("", str(error))
        except Exception:
            continue


def _learning(command: str, tree: Mapping[str, Any]) -> Iterator[Mistake]:
    from gradmerge.training.limits import require_batches, require_learning

    for option, check in (("data", require_batches), ("model", require_learning)):
        given = tree.get(option) or {}
        names = inspect.signature(check).parameters
        try:
            check(**{name: given[name] for name in names if given.get(name) is not None})
        except GradmergeError as error:
            text = str(error)
            yield Mistake("", text if text.startswith(option) else f"{option}.{text}")
        except Exception:
            continue
    kinds = [_get(tree, name) for name in ("optimizer", "lr_scheduler")]
    given = [kind for kind in kinds if isinstance(kind, Mapping)]
    paths = [str(kind.get("class_path")) for kind in given]
    # arguments that are objects themselves are made by the parser
    plain = not any(
        isinstance(value, (dict, list)) and "class_path" in str(value)
        for kind in given
        for value in (kind.get("init_args") or {}).values()
    )
    known = all(path.startswith(("torch.", "gradmerge.")) for path in paths)
    if command == "fit" and plain and known:
        try:
            require_optimiser(lambda name: _get(tree, name))
        except GradmergeError as error:
            yield Mistake("", str(error))
        except Exception:
            pass
