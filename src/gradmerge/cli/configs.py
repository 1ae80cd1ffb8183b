"""Configuration files of `gradmerge fit` and of mergekit as input of `gradmerge merge`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from gradmerge.cli.arguments import configs_in
from gradmerge.cli.given import without_fit
from gradmerge.common.errors import ConfigError
from gradmerge.common.files import read_yaml
from gradmerge.common.output import paths_in
from gradmerge.engine.recipe import Recipe
from gradmerge.mergekit import Reading, is_mergekit, read_mergekit
from gradmerge.sources import Checkpoint


@dataclass(frozen=True)
class MergeInput:
    """The options of `merge` or `collect` with their configuration files."""

    given: Sequence[str]
    """As on the command line."""
    files: Mapping[int, dict[str, Any] | None]
    """Contents of the files by position among the arguments; of a mergekit file: nothing."""
    reading: Reading | None = None
    """The mergekit file, if there is one; options may replace fields of its recipe."""
    replaced: tuple[str, ...] = ()
    """Fields of the recipe that options and other files set."""
    paths: Sequence[Path] = ()
    """The configuration files."""

    @property
    def asks_for_data(self) -> bool:
        """True if an option gives data, or help on all options is asked for."""
        names = {re.split(r"[.=]", a)[0] for a in self.given if a.startswith("-")}
        return not names.isdisjoint(("--data", "--help", "-h"))

    def needs_data(self, options: Mapping[str, Any]) -> bool:
        """Return True if these options, parsed without data, need them."""
        recipe: Recipe = options["recipe"]
        given = any(file is not None and "data" in file for file in self.files.values())
        on_data = any(finaliser.needs_data for finaliser in recipe.finalisers)
        missing = recipe.needs_statistics and recipe.statistics is None
        return bool(options["search"] or options["score"] or (given and (on_data or missing)))

    def arguments(self, dropped: Sequence[str]) -> list[str]:
        """Return the arguments as the parser accepts them, without some options of the files."""
        found = list(self.given)
        for at, flag, _ in configs_in(self.given):
            file = self.files[at]
            own = None if file is None else without_fit(file, dropped)
            if own is not None and (not own or own != file):
                # the parser accepts the content of a configuration in place of its path
                found[at] = flag + yaml.safe_dump(own, sort_keys=False)
        return found

    def complete(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the parsed options with the recipe of the mergekit file, where it counts."""
        parsed, reading = options["recipe"], self.reading
        if reading is None:
            return {**options, "recipe": parsed()}
        fields = {name: parsed.keywords[name] for name in self.replaced}
        return {**options, "recipe": replace(reading.recipe, **fields)}

    @property
    def opened(self) -> Mapping[str, Checkpoint]:
        """The recipe's checkpoints, if the mergekit reader opened them."""
        if self.reading is None or {"sources", "base"} & set(self.replaced):
            return {}
        return self.reading.opened


def read_merge_input(arguments: Sequence[str], paths: Sequence[str] = ()) -> MergeInput:
    """Read the configuration files among the arguments of `merge` or `collect`.

    A file for `fit` is reduced to its recipe and data, so that one suite and one method file serve
    both commands. A mergekit YAML becomes a recipe, and its summary is printed.

    Args:
        arguments: the arguments; a file may be given by its content.
        paths: the files, if their contents are given.

    Raises:
        ConfigError: a mergekit file cannot be read, or there are several.
    """
    files = {at: _read(path) for at, _, path in configs_in(arguments)}
    theirs = {at: path for at, _, path in configs_in(arguments) if is_mergekit(files[at])}
    if len(theirs) > 1:
        raise ConfigError(
            "--config: expected at most one mergekit YAML, got " + ", ".join(theirs.values())
        )
    reading = None
    for at, path in theirs.items():
        reading, files[at] = read_mergekit(path), {}
        print(reading.summary)
    # as everywhere, later arguments win: what stands before the mergekit file is replaced by it
    start = max(theirs, default=-1) + 1
    options = re.findall(r"^--recipe\.(\w+)", "\n".join(arguments[start:]), re.MULTILINE)
    stated = [_recipe(file) for at, file in files.items() if file is not None and at >= start]
    named = [*options, *(name for own in stated if isinstance(own, dict) for name in own)]
    return MergeInput(arguments, files, reading, tuple(dict.fromkeys(named)), paths_in(paths))


def later(class_type: type, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a class as a `functools.partial` call; an instantiator for the parser."""
    return partial(class_type, *args, **kwargs)


def refuse_mergekit(arguments: Sequence[str]) -> None:
    """Reject a mergekit file in a command that learns."""
    for _, _, path in configs_in(arguments):
        if is_mergekit(_read(path)):
            raise ConfigError(
                f"expected a configuration to learn a merge, got the mergekit YAML {path}.\n"
                "To merge with its coefficients: "
                f"`gradmerge merge --config {path} --output FOLDER`.\n"
                "To start learning from them, name the sources in a recipe with "
                f"`init: {{class_path: FromMergekit, init_args: {{path: {path}}}}}`."
            )


def require_text(arguments: Sequence[str]) -> None:
    """Reject a configuration file that is not text in UTF-8, which the parser does not report.

    Raises:
        ConfigError: a file is in another encoding, or binary.
    """
    for _, _, path in configs_in(arguments):
        try:
            with open(path, encoding="utf-8") as file:
                file.read()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: expected YAML in UTF-8, got byte {error.object[error.start]:#04x} at "
                f"position {error.start}. Save the file as UTF-8."
            ) from error
        except (OSError, ValueError):  # the parser reports what cannot be opened
            continue


def _read(path: str) -> dict[str, Any] | None:
    """Return a file as plain data, or None if it is none, which the parser will report.

    Raises:
        ConfigError: it is not YAML, is ambiguous or exceeds a limit.
    """
    if "\n" in path:  # the content of a file that was rewritten
        found = yaml.safe_load(path)
    else:
        found = read_yaml(Path(path)) if os.path.isfile(path) else None
    return found if isinstance(found, dict) else None


def _recipe(found: dict[str, Any]) -> Any:
    model = found.get("model")
    return model.get("recipe") if isinstance(model, dict) else found.get("recipe")
