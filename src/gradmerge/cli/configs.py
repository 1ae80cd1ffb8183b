"""Files of other commands, and of mergekit, as `gradmerge merge` and `collect` read them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from gradmerge.errors import ConfigError
from gradmerge.mergekit import is_mergekit
from gradmerge.mergekit.reader import read_mergekit
from gradmerge.spec import to_plain

# What else a file for `gradmerge fit` may say; a merge without training has no use for it.
_OF_A_FIT = ("seed_everything", "trainer", "optimizer", "lr_scheduler", "ckpt_path", "driver")
# Options that ask for data, whatever is merged.
_ASKING = ("search", "score")


def for_merge(
    arguments: Sequence[str], folder: str, with_data: bool | None = None
) -> tuple[list[str], bool]:
    """The arguments of `merge`, where a file of `fit` (with `model.recipe`) stands for its recipe,
    and a mergekit YAML for the recipe that it describes.

    So one pair of files, suite and method, serves both commands. The files' `data` is kept only
    where it is needed: reading it takes Lightning, which a plain merge need not wait for. What a
    mergekit file was understood as is printed; its dtype is the result's unless the arguments name
    another.

    Args:
        arguments: as on the command line.
        folder: where translated files are written.
        with_data: whether data is needed (for `collect` it always is); default: as the arguments
            say (an alignment or step that needs statistics and none given, a finaliser that needs
            data, a search, scores).

    Returns:
        The arguments, and whether data is needed.

    Raises:
        ConfigError: a mergekit file that cannot be read.
    """
    dtype_given = any(argument.partition("=")[0] == "--dtype" for argument in arguments)
    files = {at: _read(path) for at, _, path in _configs(arguments)}
    theirs = {at for at, found in files.items() if is_mergekit(found)}
    for at, _, path in _configs(arguments):
        if at in theirs:
            files[at] = _recipe_of_mergekit(path, dtype_given)
    # a file of a merge serves `collect` as well, which has no use for a search
    dropped = _ASKING if with_data else ()
    if with_data is None:
        with_data = _needs_data(arguments, [file for file in files.values() if file is not None])
    data = () if with_data else ("data",)
    translated = list(arguments)
    for at, flag, path in _configs(arguments):
        found = files[at]
        if found is None:
            continue
        if at not in theirs and not {"model", "data", *dropped} & found.keys():
            continue
        given = os.path.join(folder, f"{at}", os.path.basename(path))
        os.mkdir(os.path.dirname(given))
        with open(given, "w", encoding="utf-8") as file:
            yaml.safe_dump(_translated(found, (*dropped, *data)), file, sort_keys=False)
        translated[at] = f"{flag}{given}"
    return translated, with_data


def refuse_mergekit(arguments: Sequence[str]) -> None:
    """Stop where a command that learns is given a file for mergekit.

    Raises:
        ConfigError: says what to do with it.
    """
    for _, _, path in _configs(["--config" if a == "-c" else a for a in arguments]):
        if is_mergekit(_read(path)):
            raise ConfigError(
                f"{path} is a mergekit YAML, which states coefficients. Merge with them: "
                f"`gradmerge merge --config {path} --output FOLDER`; or learn from there: name the "
                "sources in the recipe, with `init: {class_path: FromMergekit, init_args: {path: "
                f"{path}}}}}`."
            )


def _configs(arguments: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Where a file is named, what stands before its path there, and the path."""
    for at, argument in enumerate(arguments):
        if argument.startswith("--config="):
            yield at, "--config=", argument.removeprefix("--config=")
        elif at and arguments[at - 1] == "--config":
            yield at, "", argument


def _read(path: str) -> dict[str, Any] | None:
    """A file as plain data; None where it is none (the parser says what is wrong with it)."""
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
        return True  # the whole help; or data was given for something
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
    """The last parts of all strings in nested data: class names among them."""
    if isinstance(value, str):
        yield value.rpartition(".")[2]
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _words(inner)


def _needing_statistics() -> set[str]:
    """Names of the alignments and steps that need statistics."""
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
    """Names of the finalisers that are computed on data."""
    from gradmerge import finalisers

    kinds = {name: getattr(finalisers, name) for name in finalisers.__all__}
    return {name for name, kind in kinds.items() if getattr(kind, "needs_data", False)}


def _recipe_of_mergekit(path: str, dtype_given: bool) -> dict[str, Any]:
    reading = read_mergekit(path)
    print(reading.summary)
    for warning in reading.warnings:
        print(f"gradmerge merge: warning {path}: {warning}", file=sys.stderr)
    dtype = {} if reading.dtype is None or dtype_given else {"dtype": reading.dtype}
    return {"recipe": to_plain(reading.recipe)["init_args"], **dtype}
