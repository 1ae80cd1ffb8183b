"""A command line and its configuration files as one tree of plain data.

The same content may be spelled in several ways; parsers get it in one.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from gradmerge.cli.arguments import configs_in
from gradmerge.cli.catalogue import (
    ANY,
    Class,
    Either,
    Instance,
    Listing,
    Scalar,
    Table,
    Type,
    Unknown,
    options_within,
)
from gradmerge.cli.check import class_of
from gradmerge.cli.options import LEARNING, MERGING, POSITIONAL, fields_of, options_of
from gradmerge.common.errors import ConfigError
from gradmerge.common.files import near, read_yaml, require_bounded
from gradmerge.common.spec import modernise

# Options that the parser itself answers.
_ASKED = ("help", "print_config", "allow_modules")


@dataclass(frozen=True)
class Part:
    """An option or a configuration file among the arguments."""

    at: int
    """Position of its first argument."""
    count: int
    """Number of its arguments."""
    flag: str
    """As given, e.g. `--data.batch_size`; empty for what is given without a name."""
    path: tuple[str, ...]
    """Where its value belongs."""
    value: Any
    original: Any
    """The value as the parser gets it if nothing changes it."""
    file: str = ""
    adds: bool = False
    """True for `--option+`, which adds an element to a list."""

    @property
    def arguments(self) -> list[str]:
        """As the parser accepts it."""
        if not self.flag:
            return [str(self.value)]
        if self.file:
            return [self.flag, yaml.safe_dump(self.value, sort_keys=False)]
        text = self.value if isinstance(self.value, str) else json.dumps(self.value)
        return [f"{self.flag}={text}"]


def spelled(command: str, arguments: Sequence[str]) -> list[str]:
    """Return arguments with the options of a recipe spelled as the command's parser knows them.

    `fit`, `validate` and `test` have `--model.recipe.X`, and `merge` and `collect` `--recipe.X`.
    """
    pairs = {True: ("recipe", "model.recipe"), False: ("model.recipe", "recipe")}
    old, new = pairs[command in LEARNING]
    option = re.compile(rf"^--{re.escape(old)}(?=[.=+]|$)")
    return [option.sub(f"--{new}", argument) for argument in arguments]


def read_parts(command: str, arguments: Sequence[str]) -> list[Part]:
    """Return the options and files among arguments, in order.

    Raises:
        ConfigError: a file does not exist, is not YAML, or holds something else than options.
    """
    parts = list(parts_of(command, arguments))
    dropped: list[str] = ["search", "score"] if command == "collect" else []
    if command == "merge" and not any(map(_asks_for_data, parts)):
        dropped.append("data")
    return [_translated(command, part, dropped) for part in parts]


def _asks_for_data(part: Part) -> bool:
    """Return whether an option needs the data that a file for `fit` may have."""
    if part.path:
        return part.path[0] in ("data", "search", "score")
    return bool(part.value.get("search") or part.value.get("score"))


def parts_of(command: str, arguments: Sequence[str]) -> Iterator[Part]:
    """Yield the options and files among arguments, in order, as they are given."""
    at, files = 0, {at: (flag, path) for at, flag, path in configs_in(arguments)}
    if "config" not in options_of(command).fields:
        files = {}
    unnamed = POSITIONAL.get(command, ())
    most = 1 if unnamed else len(arguments)  # values of an option
    bare: list[int] = []
    while at < len(arguments):
        argument, start = arguments[at], at
        at += 1
        name, equals, text = argument.partition("=")
        if argument in ("--config", "-c") and at in files:
            yield _file(start, 2, "--config", files[at][1])
            at += 1
        elif start in files:
            yield _file(start, 1, "--config", files[start][1])
        elif re.match(r"--\w", argument):
            values = [text] if equals else []
            while not equals and at < len(arguments) and not arguments[at].startswith("--"):
                if len(values) == most:
                    break
                values.append(arguments[at])
                at += 1
            path = tuple(name[2:].rstrip("+").split("."))
            asked = path[-1] == "help" or path[0] in _ASKED or not values
            if not asked:
                found = [_plain(value) for value in values]
                value = found[0] if len(found) == 1 else found
                yield Part(start, at - start, name, path, value, value, adds=name.endswith("+"))
        elif unnamed:
            bare.append(start)
    yield from _unnamed(command, [(at, arguments[at]) for at in bare])


def _unnamed(command: str, given: Sequence[tuple[int, str]]) -> Iterator[Part]:
    """Yield what is given without a name.

    Raises:
        ConfigError: there is more than the command takes.
    """
    names = POSITIONAL.get(command, ())
    if command == "inspect":
        for at, text in given:
            yield Part(at, 1, "", names, text, text, adds=True)
        return
    if len(given) > len(names):
        more = ", ".join(repr(text) for _, text in given[len(names) :])
        raise ConfigError(
            f"expected {' and '.join(map(str.upper, names))}, got also {more}. Options are given "
            "by name (--dtype bfloat16)."
        )
    for name, (at, text) in zip(names, given, strict=False):
        yield Part(at, 1, "", (name,), text, text)


def _file(at: int, count: int, flag: str, path: str) -> Part:
    if "\n" in path or path.lstrip().startswith("{"):
        found = _load(path, "--config")
        return Part(at, count, flag, (), found, found, flag)
    if not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "no such file"
        raise ConfigError(f"--config {path}: expected a YAML file, got {what}.{near(path)}")
    found = read_yaml(Path(path))
    if found is None:
        raise ConfigError(f"{path}: expected options in the configuration, got an empty file.")
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ConfigError(f"{path}: expected options as a mapping, got a {kind} at its top.")
    found = modernise(found)
    return Part(at, count, flag, (), found, found, path)


def _load(text: str, where: str) -> Any:
    try:
        require_bounded(text)
        return modernise(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: expected YAML, got: {error}") from error


def _plain(text: str) -> Any:
    if text.endswith((".yaml", ".yml")) and os.path.isfile(text):
        found = read_yaml(Path(text))  # the parser takes a file for a group of options
        return modernise(found) if isinstance(found, dict) else text
    try:
        require_bounded(text)
        found = modernise(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError):
        return text
    # as the parser, which takes everything else as text
    return found if isinstance(found, (bool, int, float, list, dict, type(None))) else text


# ---- files of other commands ---------------------------------------------------------------------


def _translated(command: str, part: Part, dropped: Sequence[str]) -> Part:
    """Return a file of another command as one of this command."""
    found = part.value
    if not part.file or is_foreign(part):
        return part
    if command in MERGING:  # its own reader of configurations does the same
        value = without_fit(found, dropped)
        return replace(part, value=value, original=value)
    if command in LEARNING and "recipe" in found:
        model = found.get("model") or {}
        inner = {**model, "recipe": found["recipe"]} if isinstance(model, dict) else model
        ours, theirs = fields_of(options_of(command)), fields_of(options_of("merge"))
        left = [key for key in found if key in theirs and key not in ours and key != "recipe"]
        if left:
            note = f"{', '.join(left)}: only for `gradmerge merge`, not used here"
            print(f"gradmerge {command}: {part.file}: {note}", file=sys.stderr)
        kept = {key: value for key, value in found.items() if key not in ("recipe", *left)}
        return replace(part, value={**kept, "model": inner})
    return part


# Options of `gradmerge fit` that a merge without training ignores.
_OF_A_FIT = ("seed_everything", "trainer", "optimizer", "lr_scheduler", "ckpt_path", "driver")


def without_fit(found: Mapping[str, Any], dropped: Sequence[str] = ()) -> dict[str, Any]:
    """Return a file of `fit` with the options of `merge`, its recipe first of all."""
    model = found.get("model")
    left = (*_OF_A_FIT, *dropped)
    if isinstance(model, dict):
        left = ("model", *left)
        if model.get("recipe") is not None:
            found = {**found, "recipe": model["recipe"]}
    return {key: value for key, value in found.items() if key not in left}


def is_foreign(part: Part) -> bool:
    """Return whether a file is of mergekit, whose reader checks it."""
    keys = {"merge_method", "slices", "experts", "gate_mode"}
    return bool(part.file) and not keys.isdisjoint(map(str, part.value))


# ---- one tree ------------------------------------------------------------------------------------


def tree_of(command: str, parts: Sequence[Part]) -> dict[str, Any]:
    """Return what all parts say together; as in the parser, later ones win."""
    root: Type = Instance(options_of(command))
    tree: dict[str, Any] = {}
    for part in parts:
        if not is_foreign(part):
            tree = _placed(tree, part.path, part.value, root, part.adds)
    return tree


def _placed(old: Any, path: Sequence[str], value: Any, kind: Type, adds: bool) -> Any:
    if not path:
        if adds:
            listed = list(old) if isinstance(old, list) else []
            return [*listed, *(value if isinstance(value, list) else [value])]
        return _merged(old, value, kind)
    if isinstance(old, list) and old:
        return [*old[:-1], _placed(old[-1], path, value, ANY, adds)]
    key, *rest = path
    if isinstance(old, str):
        old = {"class_path": old}
    old = dict(old) if isinstance(old, Mapping) else {}
    if "class_path" in old and key not in ("class_path", "init_args"):
        path, key, rest = path, "init_args", list(path)
    inner = step(kind, key, old)
    old[key] = _placed(old.get(key), rest, value, ANY if inner is None else inner, adds)
    return old


def _merged(old: Any, new: Any, kind: Type) -> Any:
    """Return a value in place of an earlier one; groups of options are merged."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if isinstance(kind, Either):
        kind = next((o for o in kind.options if isinstance(o, Instance)), ANY)
    if not isinstance(kind, Instance):
        return new
    if "class_path" in old and new.get("class_path", old["class_path"]) == old["class_path"]:
        given = new.get("init_args", {} if "class_path" in new else new) or {}
        return {**old, "init_args": {**(old.get("init_args") or {}), **given}}
    if "class_path" in old or "class_path" in new:
        return new
    merged = dict(old)
    for key, value in new.items():
        inner = step(kind, str(key), merged)
        merged[key] = _merged(merged.get(key), value, ANY if inner is None else inner)
    return merged


def step(kind: Type, key: str, value: Any) -> Type | None:
    """Return the type of an option within a value of a type, or None if there is no such option."""
    match kind:
        case Either(options=options):
            inner = [step(option, key, value) for option in options if option != _NULL]
            return next((found for found in inner if found not in (None, ANY)), ANY)
        case Table():
            return kind.inner
        case Instance(of=of):
            if isinstance(of, Class) and of.is_abstract:
                found = given_class(of, value)
                if key in ("class_path", "init_args") or found is None:
                    return ANY
                of = found
            known = fields_of(of)
            if key in known:
                return known[key].kind
            return ANY if of.is_open or key in ("class_path", "init_args") else None
    return ANY


def given_class(base: Class, value: Any) -> Class | None:
    """Return the class that a value names for a base class, if it is known."""
    path = value.get("class_path") if isinstance(value, Mapping) else value
    found = class_of(path, base) if isinstance(path, str) else None
    return found if isinstance(found, Class) else None


_NULL = Scalar(type(None))


def type_at(command: str, path: Sequence[str], tree: Any) -> tuple[Type | None, str, Type]:
    """Return the type of an option, the path that it was found to, and the type of its group.

    The type is None if there is no such option.
    """
    kind: Type = Instance(options_of(command))
    for i, key in enumerate(path):
        while isinstance(tree, list) and tree:
            tree = tree[-1]
        if isinstance(kind, (Unknown, Listing)):
            return ANY, "", kind
        inner = step(kind, key, tree)
        if inner is None:
            return None, ".".join(path[: i + 1]), _group(kind, tree)
        kind = inner
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return kind, ".".join(path), kind


def _group(kind: Type, value: Any) -> Type:
    """Return the type whose options a value may have, of several alternatives."""
    for option in options_within(kind):
        if isinstance(option, Instance):
            of = option.of
            found = given_class(of, value) if isinstance(of, Class) and of.is_abstract else None
            return option if found is None else Instance(found)
    return kind
