"""Files of other commands, as `gradmerge merge` reads them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from gradmerge.mergekit_format import is_mergekit
from gradmerge.mergekit_reader import read_mergekit
from gradmerge.spec import to_plain

# What else a file for `gradmerge fit` may say; a merge without training has no use for it.
_OF_A_FIT = ("seed_everything", "data", "trainer", "optimizer", "lr_scheduler", "ckpt_path")


def for_merge(arguments: Sequence[str], folder: str) -> list[str]:
    """The arguments of `merge`, where a file of `fit` (with `model.recipe`) stands for its recipe,
    and a mergekit YAML for the recipe that it describes.

    So one pair of files, suite and method, serves both commands. What a mergekit file was
    understood as is printed. Its dtype is the result's unless the arguments name another.

    Raises:
        ConfigError: a mergekit file that cannot be read.
    """
    dtype_given = any(argument.partition("=")[0] == "--dtype" for argument in arguments)
    translated: list[str] = []
    previous = ""
    for argument in arguments:
        flag, equals, path = argument.partition("=")
        given = path if flag == "--config" and equals else argument
        if previous == "--config" or (flag == "--config" and equals):
            found = _translate(given, dtype_given)
            if found is not None:
                given = os.path.join(folder, f"{len(translated)}", os.path.basename(given))
                os.mkdir(os.path.dirname(given))
                with open(given, "w", encoding="utf-8") as file:
                    yaml.safe_dump(found, file, sort_keys=False)
        translated.append(f"{flag}={given}" if flag == "--config" and equals else given)
        previous = argument
    return translated


def _translate(path: str, dtype_given: bool) -> dict[str, Any] | None:
    """What a merge takes from a file of another command or program; None where it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # the parser says what is wrong with it
    if is_mergekit(found):
        return _recipe_of_mergekit(path, dtype_given)
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        return None
    rest = {key: value for key, value in found.items() if key not in ("model", *_OF_A_FIT)}
    recipe = found["model"].get("recipe")
    return {**rest, **({} if recipe is None else {"recipe": recipe})}


def _recipe_of_mergekit(path: str, dtype_given: bool) -> dict[str, Any]:
    reading = read_mergekit(path)
    print(reading.summary)
    for warning in reading.warnings:
        print(f"gradmerge merge: warning {path}: {warning}", file=sys.stderr)
    dtype = {} if reading.dtype is None or dtype_given else {"dtype": reading.dtype}
    return {"recipe": to_plain(reading.recipe)["init_args"], **dtype}
