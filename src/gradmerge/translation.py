"""Files of other commands, as `gradmerge merge` reads them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import yaml

# What else a file for `gradmerge fit` may say; a merge without training has no use for it.
_OF_A_FIT = ("seed_everything", "data", "trainer", "optimizer", "lr_scheduler", "ckpt_path")


def for_merge(arguments: Sequence[str], folder: str) -> list[str]:
    """The arguments of `merge`, where a file of `fit` (with `model.recipe`) stands for its recipe.

    So one pair of files, suite and method, serves both commands.
    """
    translated: list[str] = []
    previous = ""
    for argument in arguments:
        flag, equals, path = argument.partition("=")
        given = path if flag == "--config" and equals else argument
        if previous == "--config" or (flag == "--config" and equals):
            found = _recipe_of_a_fit(given)
            if found is not None:
                given = os.path.join(folder, f"{len(translated)}", os.path.basename(given))
                os.mkdir(os.path.dirname(given))
                with open(given, "w", encoding="utf-8") as file:
                    yaml.safe_dump(found, file, sort_keys=False)
        translated.append(f"{flag}={given}" if flag == "--config" and equals else given)
        previous = argument
    return translated


def _recipe_of_a_fit(path: str) -> dict[str, Any] | None:
    """What a merge takes from a file of `fit`; None where it is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # the parser says what is wrong with it
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        return None
    rest = {key: value for key, value in found.items() if key not in ("model", *_OF_A_FIT)}
    recipe = found["model"].get("recipe")
    return {**rest, **({} if recipe is None else {"recipe": recipe})}
