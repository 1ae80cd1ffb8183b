"""Lists of arguments, rewritten before any parser reads them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

from typing_extensions import override

from gradmerge.common.errors import ConfigError, nearest

SCORING = ("validate", "test")
MODEL = "model"
"""Source name of a scored folder in its recipe."""


class PlainParser(argparse.ArgumentParser):
    """A parser of options that are no fields of components; its errors are `ConfigError`s."""

    @override
    def error(self, message: str) -> NoReturn:
        wrong = message.removeprefix("unrecognized arguments: ").partition(" ")[0]
        near = nearest(wrong, self._option_string_actions) if wrong.startswith("--") else ""
        raise ConfigError(f"{message}.{near}\n`{self.prog} --help` lists the options.")


def flag(text: str) -> bool:
    """Return whether a text is true.

    Raises:
        ArgumentTypeError: it is neither true nor false.
    """
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def underscored(arguments: Sequence[str]) -> list[str]:
    """Return arguments as the parser expects them: with `_` in names, and its `--help`.

    `--help` itself is one screen, which `gradmerge.cli.help` makes; `--help-all` is the parser's.
    """
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    option = re.compile(r"(?<=^--)[a-z-]+(?==|$)")
    return [option.sub(lambda name: name[0].replace("-", "_"), a) for a in arguments]


def configs_in(arguments: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yield position, flag and path of every configuration file among the arguments."""
    for at, argument in enumerate(arguments):
        if argument.startswith("--config="):
            yield at, "--config=", argument.removeprefix("--config=")
        elif at and arguments[at - 1] in ("--config", "-c"):
            yield at, "", argument


def with_model_folder(arguments: Sequence[str]) -> list[str]:
    """Return arguments with `--model FOLDER` rewritten to `--model_folder` and a recipe.

    LightningCLI's own `--model` takes a configuration of the model, which stays possible.
    """
    found = list(arguments)
    if not found or found[0] not in SCORING:
        return found
    for at, argument in enumerate(found):
        flag, equals, value = argument.partition("=")
        if flag != "--model":
            continue
        if not equals:
            value = next(iter(found[at + 1 :]), "")
        is_config = value.startswith("{") or value.endswith((".yaml", ".yml", ".json"))
        if value and not is_config and not value.startswith("-") and "\n" not in value:
            sources = f"--model.recipe.sources={json.dumps({MODEL: value})}"
            found[at : at + (1 if equals else 2)] = [f"--model_folder={value}", sources]
            break
    return found


def with_sources(arguments: Sequence[str]) -> list[str]:
    """Return arguments with all `--sources NAME=PLACE` as one option, a mapping.

    The option may be repeated, and may have several values.

    Raises:
        ConfigError: a value is not of this form.
    """
    found: dict[str, str] = {}
    kept: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        flag, equals, value = argument.partition("=")
        if flag != "--sources":
            kept.append(argument)
            continue
        values = [value] if equals else waiting[:1]
        waiting = waiting if equals else waiting[1:]
        while waiting and re.match(r"[^-=/][^=/]*=", waiting[0]):
            values.append(waiting.pop(0))
        if values and values[0].lstrip().startswith("{"):
            return list(arguments)  # a mapping already, which the parser checks
        for given in values:
            name, equals, place = given.partition("=")
            if not (name and equals and place):
                raise ConfigError(f"sources: expected NAME=PLACE, e.g. a=models/a, got {given!r}.")
            found[name] = place
    return [*kept, f"--sources={json.dumps(found)}"] if found else kept
