"""Configuration files of `gradmerge fit` and of mergekit as input of `gradmerge merge`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import yaml

from gradmerge.engine.recipe import Recipe
from gradmerge.errors import ConfigError
from gradmerge.mergekit import Reading, is_mergekit, read_mergekit
from gradmerge.sources import Checkpoint

# Options of `gradmerge fit` that a merge without training ignores.
_OF_A_FIT = ("seed_everything", "trainer", "optimizer", "lr_scheduler", "ckpt_path", "driver")
# Options that need data for any recipe.
_ASKING = ("search", "score")


@dataclass(frozen=True)
class MergeInput:
    """Arguments of `merge` or `collect` in the form that the command's parser accepts."""

    arguments: list[str]
    with_data: bool = False
    """The command needs the tasks' data."""
    recipe: Recipe | None = None
    """The recipe of a mergekit file, whose fields options may replace."""
    opened: Mapping[str, Checkpoint] = field(default_factory=dict)
    """The recipe's checkpoints, which the mergekit reader opened."""
    replaced: tuple[str, ...] = ()
    """Fields of the recipe that options and other files set."""
    dtype: str | None = None
    """The dtype that a mergekit file sets."""

    def complete(self, parsed: partial[Recipe]) -> Recipe:
        """Return the recipe of the options, or the mergekit file's with the fields they set."""
        if self.recipe is None:
            return parsed()
        return replace(self.recipe, **{name: parsed.keywords[name] for name in self.replaced})


def read_merge_input(arguments: Sequence[str], with_data: bool | None = None) -> MergeInput:
    """Read the configuration files among the arguments of `merge` or `collect`.

    A file for `fit` is reduced to its recipe and data, so that one suite and one method file serve
    both commands. A mergekit YAML becomes a recipe, and its summary is printed. `data` is kept only
    if it is needed, because parsing it imports Lightning.

    Args:
        arguments: arguments as on the command line.
        with_data: data is needed, as always for `collect`. Default: if the arguments hold a search
            or scores, a finaliser on data, or an alignment or step that needs statistics and no
            statistics.

    Raises:
        ConfigError: a mergekit file cannot be read, or there are several.
    """
    files = {at: _read(path) for at, _, path in _configs(arguments)}
    theirs = {at for at, found in files.items() if is_mergekit(found)}
    if len(theirs) > 1:
        raise ConfigError(
            "--config: expected at most one mergekit YAML, got "
            + ", ".join(path for at, _, path in _configs(arguments) if at in theirs)
        )
    # `collect` accepts the files of `merge` and ignores a search in them
    dropped = _ASKING if with_data else ()
    if with_data is None:
        own = [file for at, file in files.items() if file is not None and at not in theirs]
        with_data = _needs_data(arguments, own)
    if not with_data:
        dropped = (*dropped, "data")
    translated: list[str] = list(arguments)
    recipe = dtype = None
    opened: Mapping[str, Checkpoint] = {}
    for at, flag, path in _configs(arguments):
        found = files[at]
        if at in theirs:
            reading = _read_mergekit(path)
            recipe, dtype, opened = reading.recipe, reading.dtype, reading.opened
            found = {}
        if found is not None and (at in theirs or {"model", *dropped} & found.keys()):
            # the parser accepts the content of a configuration in place of its path
            content = yaml.safe_dump(_translated(found, dropped), sort_keys=False)
            translated[at] = f"{flag}{content}"
    # as everywhere, later arguments win: what stands before the mergekit file is replaced by it
    start = max(theirs, default=-1) + 1
    options = re.findall(r"^--recipe\.(\w+)", "\n".join(arguments[start:]), re.MULTILINE)
    stated = [_recipe(file) for at, file in files.items() if file is not None and at >= start]
    named = [*options, *(name for own in stated if isinstance(own, dict) for name in own)]
    replaced = tuple(dict.fromkeys(named))
    if {"sources", "base"} & set(replaced):
        opened = {}
    return MergeInput(translated, with_data, recipe, opened, replaced, dtype)


def later(class_type: type, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a class as a `functools.partial` call; an instantiator for the parser."""
    return partial(class_type, *args, **kwargs)


def refuse_mergekit(arguments: Sequence[str]) -> None:
    """Reject a mergekit file in a command that learns.

    Raises:
        ConfigError: the arguments name one.
    """
    for _, _, path in _configs(["--config" if a == "-c" else a for a in arguments]):
        if is_mergekit(_read(path)):
            raise ConfigError(
                f"expected a configuration to learn a merge, got the mergekit YAML {path}.\n"
                "To merge with its coefficients: "
                f"`gradmerge merge --config {path} --output FOLDER`.\n"
                "To start learning from them, name the sources in a recipe with "
                f"`init: {{class_path: FromMergekit, init_args: {{path: {path}}}}}`."
            )


def _configs(arguments: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yield position, flag and path of every configuration file among the arguments."""
    for at, argument in enumerate(arguments):
        if argument.startswith("--config="):
            yield at, "--config=", argument.removeprefix("--config=")
        elif at and arguments[at - 1] == "--config":
            yield at, "", argument


def _read(path: str) -> dict[str, Any] | None:
    """Return a file as plain data, or None if it is invalid, which the parser will report."""
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def _recipe(found: dict[str, Any]) -> Any:
    model = found.get("model")
    return model.get("recipe") if isinstance(model, dict) else found.get("recipe")


def _translated(found: dict[str, Any], dropped: Sequence[str]) -> dict[str, Any]:
    if not isinstance(found.get("model"), dict):
        return {key: value for key, value in found.items() if key not in dropped}
    dropped = ("model", *_OF_A_FIT, *dropped)
    rest = {key: value for key, value in found.items() if key not in dropped}
    recipe = _recipe(found)
    return {**rest, **({} if recipe is None else {"recipe": recipe})}


def _needs_data(arguments: Sequence[str], files: Sequence[dict[str, Any]]) -> bool:
    options = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
    names = [option.removeprefix("--").split(".")[0] for option in options]
    if "help" in names or "-h" in arguments or "data" in names:
        return True  # help shows all options, and options of data imply that it is needed
    for asking in _ASKING:
        if asking in names or any(file.get(asking) for file in files):
            return True
    recipes = [recipe for recipe in map(_recipe, files) if isinstance(recipe, dict)]
    given = any("data" in file for file in files)
    options_say = [word for argument in arguments for word in re.split(r"\W+", argument)]
    final = [word for recipe in recipes for word in _words(recipe.get("finalisers"))]
    if given and not _finalisers_on_data().isdisjoint([*options_say, *final]):
        return True
    if "--recipe.statistics" in options or any(recipe.get("statistics") for recipe in recipes):
        return False
    factors = ("alignment", "preprocess")
    steps = [word for recipe in recipes for f in factors for word in _words(recipe.get(f))]
    return given and not _needing_statistics().isdisjoint([*options_say, *steps])


def _words(value: Any) -> Iterator[str]:
    """Yield the last part of every string in nested data, class names among them."""
    if isinstance(value, str):
        yield value.rpartition(".")[2]
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _words(inner)


def _needing_statistics() -> set[str]:
    """Return the names of alignments and preprocess steps that need statistics."""
    from gradmerge import alignment, preprocess

    found: set[str] = set()
    bases: list[tuple[Any, Any]] = [
        (alignment, alignment.AbstractAlignment),
        (preprocess, preprocess.AbstractPreprocess),
    ]
    for module, base in bases:
        kinds: dict[str, Any] = {name: getattr(module, name) for name in module.__all__}
        known = [n for n, k in kinds.items() if isinstance(k, type) and issubclass(k, base)]
        found |= {name for name in known if kinds[name].needs is not base.needs}
    return found


def _finalisers_on_data() -> set[str]:
    """Return the names of finalisers that need data."""
    from gradmerge import finalisers

    kinds = {name: getattr(finalisers, name) for name in finalisers.__all__}
    return {name for name, kind in kinds.items() if getattr(kind, "needs_data", False)}


def _read_mergekit(path: str) -> Reading:
    reading = read_mergekit(path)
    print(reading.summary)
    for warning in reading.warnings:
        print(f"gradmerge merge: warning {path}: {warning}", file=sys.stderr)
    return reading
