"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any, NoReturn

from gradmerge._version import __version__
from gradmerge.errors import GradmergeError, nearest

USAGE = f"""usage: gradmerge COMMAND [options]

Learn how to merge fine-tuned checkpoints of one architecture into one.  (version {__version__})

commands:
  fit       learn the coefficients        gradmerge fit --config merge.yaml
  validate  score on the selection split  gradmerge validate --config merge.yaml --ckpt_path X.ckpt
  test      score on the test split       gradmerge test --config merge.yaml --ckpt_path X.ckpt
  export    checkpoint -> model folder    gradmerge export X.ckpt FOLDER
  merge     merge without training        gradmerge merge --config static.yaml --output FOLDER
  collect   statistics for such merges    gradmerge collect --config merge.yaml --output FOLDER
  unpack    compact EMR -> model folders  gradmerge unpack COMPACT FOLDER
  inspect   do these sources fit?         gradmerge inspect A B --base BASE

gradmerge COMMAND --help lists a command's options; configs/ holds runnable examples.
"""

# Packages that a configuration may name and nothing else needs, and how pip calls them.
OPTIONAL = {"torchao": "gradmerge[eight-bit]", "bitsandbytes": "bitsandbytes"}
LEARNING = ("fit", "validate", "test")
COMMANDS = (*LEARNING, "export", "merge", "collect", "unpack", "inspect")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, or 2 for a mistake in the options or the input.
    """
    given = arguments
    arguments = list(sys.argv[1:] if given is None else given)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        print(__version__)
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        print(
            f"gradmerge: {command!r} is no command.{nearest(command, COMMANDS)}\n", file=sys.stderr
        )
        print(USAGE, file=sys.stderr)
        return 2
    try:
        if command in LEARNING:
            learn(given)
        else:
            _plain(command, arguments[1:])
    except ValueError as error:
        own = _own_error(error)
        if own is None:
            raise
        print(f"gradmerge {command}: {own}", file=sys.stderr)
        return 2
    return 0


def _own_error(error: BaseException) -> GradmergeError | None:
    """The error of ours that an error is, or that the parser put aside for it: a component of an
    optional option that refuses its values is one of several types that did not fit.
    """
    if isinstance(error, GradmergeError):
        return error
    put_aside: list[BaseException] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "raise_union_unexpected_value":
            put_aside += frame.f_locals.get("exceptions", ())
    return next((own for each in put_aside if (own := _own_error(each))), None)


# ---- fit, validate, test ------------------------------------------------------------------------


def learn(arguments: Sequence[str] | None, run: bool = True) -> Any:
    """`fit`, `validate` and `test`, through LightningCLI.

    Args:
        arguments: as on the command line; None takes the command line's own.
        run: run the command that the arguments begin with; otherwise they hold options alone, and
            model, data and trainer are only built.

    Returns:
        The CLI object, with `model`, `datamodule` and `trainer`; with a driver, `job` instead.
    """
    from gradmerge.cli.configs import refuse_mergekit
    from gradmerge.cli.fit import start

    refuse_mergekit(sys.argv[1:] if arguments is None else list(arguments))
    register()
    quieten()
    return start(arguments, run, stop)


def quieten() -> None:
    """Silence advice that does not apply here, so that what does apply is seen."""
    for pattern in (
        ".*in eval mode at the start of training.*",  # frozen sources: dropout must stay off
        ".*does not have many workers.*",  # batches are prepared once and kept
        ".*isinstance.treespec, LeafSpec.*",
        ".*Trying to infer the `batch_size`.*",
        ".*will be overridden by .*configure_optimizers.*",
    ):
        warnings.filterwarnings("ignore", pattern)


def register() -> None:
    """Make attribute docstrings the help texts, and every component's short name known."""
    import jsonargparse

    import gradmerge.alignment
    import gradmerge.coefficients
    import gradmerge.finalisers
    import gradmerge.mergekit
    import gradmerge.objectives
    import gradmerge.operators
    import gradmerge.optimisers
    import gradmerge.preprocess
    import gradmerge.search
    import gradmerge.sources  # noqa: F401

    copy_values_once()
    read_old_paths()
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    read_sources_once()


def read_old_paths() -> None:
    """Take class paths of earlier versions in configurations for the present ones."""
    import jsonargparse
    import yaml

    from gradmerge.spec import current_path, modernise

    load = jsonargparse.get_loader("yaml")

    def load_modernised(text: str) -> Any:
        found = modernise(load(text))
        return current_path(found) if isinstance(found, str) else found

    if load.__name__ != load_modernised.__name__:
        jsonargparse.set_loader("yaml", load_modernised, (yaml.YAMLError,))


def read_sources_once() -> None:
    """Keep the attribute docstrings of a class, which the parser asks for wherever it can stand.

    Half of the start-up went into parsing the same files again.
    """
    try:
        from docstring_parser.attrdoc import AttributeDocstrings
    except ImportError:  # another version of the parser: slower, nothing else
        return
    reader: Any = AttributeDocstrings
    if not hasattr(reader, "gradmerge_keeps"):
        original = reader.get_attr_docs
        read = functools.cache(lambda component: original(reader(), component))
        reader.get_attr_docs = lambda _, component: read(component)
        reader.gradmerge_keeps = True


def component_names(stock: bool = True) -> dict[str, str]:
    """Short names of the classes that a configuration may name, and what to write for each.

    Args:
        stock: torch's optimisers and schedules and Lightning's callbacks and loggers, too, by their
            whole paths.
    """
    from gradmerge import (
        alignment,
        coefficients,
        finalisers,
        objectives,
        operators,
        preprocess,
        search,
        sources,
    )

    concepts = (alignment, coefficients, finalisers, objectives, operators, preprocess)
    modules: tuple[Any, ...] = (*concepts, search, sources)
    own = [n for m in modules for n in m.__all__ if not n.startswith("Abstract")]
    also = ("CoefficientLogger", "ExportAtEnd", "FromMergekit")
    known = {name: name for name in (*own, *also)}
    if stock:
        from lightning.pytorch import callbacks, loggers
        from torch import optim
        from torch.optim import lr_scheduler

        from gradmerge import drivers, optimisers

        bases = {"Callback", "Logger", "LRScheduler", "Optimizer", "ProgressBar"}
        for module in (optim, optimisers, lr_scheduler, callbacks, loggers):
            for name in getattr(module, "__all__", dir(module)):
                found = isinstance(getattr(module, name), type) and name not in bases
                if found and not name.startswith(("_", "Base")):
                    known.setdefault(name, f"{module.__name__}.{name}")
        known.update({name: name for name in drivers.DRIVERS})
        # torch's own does not say which score it watches
        known["ReduceLROnPlateau"] = "lightning.pytorch.cli.ReduceLROnPlateau"
    return known


def nearest_class(path: str, known: Mapping[str, str]) -> str:
    """A suggestion for a class that there is not, or nothing."""
    module, _, name = path.rpartition(".")
    if module:
        with suppress(ImportError, ValueError):
            if hasattr(importlib.import_module(module), name):
                return ""
    elif name in known:
        return ""
    lower = {short.lower(): full for short, full in known.items()}
    match = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.7)
    return f" Did you mean {lower[match[0]]!r}?" if match else ""


def stop(message: str, parser: Any) -> NoReturn:
    """Leave with the message alone: the full usage is pages long and would bury it."""
    prog = parser.prog.replace(" [options]", "")
    print(
        f"{prog}: {explain(message, parser)}\n`{prog} --help` lists the options.", file=sys.stderr
    )
    raise SystemExit(2)


def explain(message: str, parser: Any) -> str:
    """The parser's message, with the nearest valid name for what it did not know."""
    keys = sorted(_keys(parser))
    hints = []
    for unknown in re.findall(r"--([\w.]+)", message) if "nrecognized" in message else []:
        hints.append(nearest(f"--{unknown}", [f"--{key}" for key in keys]))
    for unknown in re.findall(
        r"Key '([\w.]+)' is not expected|does not accept.*?'([\w.]+)'", message
    ):
        name = next(part for part in unknown if part)
        hints.append(nearest(name, {*keys, *(key.rsplit(".", 1)[-1] for key in keys)}))
    missing = [name for name in OPTIONAL if f"No module named '{name}" in message]
    if missing:
        name = missing[0]
        return f"{name} is not installed: pip install '{OPTIONAL[name]}'\n{message}"
    known = component_names(stock="optimizer" in keys)
    for parts in re.findall(
        r"class_path'?:? '([\w.]+)'|import path string: ([\w.]+)|path but ([\w.]+)", message
    ):
        hints.append(nearest_class(next(part for part in parts if part), known))
    return message + "".join(dict.fromkeys(hint for hint in hints if hint))


def _keys(parser: Any) -> set[str]:
    keys = set()
    for action in parser._actions:
        if action.dest and action.dest != "help":
            keys.add(action.dest)
        for inner in getattr(action, "_name_parser_map", {}).values():
            keys |= _keys(inner)
    return keys


# ---- export, merge, collect, inspect ------------------------------------------------------------


def _plain(command: str, arguments: Sequence[str]) -> None:
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, *args: Any, **kwargs: Any) -> Any:
            stop(message, self)

    register()
    with tempfile.TemporaryDirectory() as folder:
        arguments, function = _command(command, arguments, folder)
        parser = Parser(
            prog=f"gradmerge {command}",
            allow_abbrev=False,
            description=function.__doc__.split("\n")[0],
        )
        parser.add_argument(
            "--config", action="config", help="YAML file with any of these options."
        )
        positional = _POSITIONALS.get(command, [])
        for name in positional:
            several: dict[str, Any] = {"nargs": "+"} if name == "sources" else {}
            parser.add_argument(name, type=str, help=_POSITIONAL[name], **several)
        groups: set[str | int] = set(positional)
        if "data" in function.__annotations__:
            from gradmerge.training.data import MergeDataModule

            parser.add_class_arguments(MergeDataModule, "data")
            parser.set_defaults({"data.tasks": {}})  # see `learn`
            groups.add("data")
        parser.add_function_arguments(function, as_group=False, skip=groups)
        parsed = parser.instantiate_classes(parser.parse_args(underscored(arguments)))
    function(**{key: value for key, value in vars(parsed).items() if key != "config"})


def underscored(arguments: Sequence[str]) -> list[str]:
    """Return arguments with `--allow-modules` as `--allow_modules`, as the parser knows options."""
    return [
        re.sub(
            r"^--[a-z]+(-[a-z]+)+(?==|$)", lambda option: "--" + option[0][2:].replace("-", "_"), a
        )
        for a in arguments
    ]


def _command(command: str, arguments: Sequence[str], folder: str) -> tuple[list[str], Any]:
    """The arguments, as its own parser takes them, and the function of a command."""
    from gradmerge.cli import commands
    from gradmerge.cli.configs import for_merge

    arguments, with_data = list(arguments), False
    if command in ("merge", "collect"):
        arguments, with_data = for_merge(arguments, folder, command == "collect" or None)
    if not with_data:
        return arguments, getattr(commands, command)
    quieten()
    return arguments, getattr(importlib.import_module("gradmerge.cli.data_commands"), command)


_POSITIONALS = {
    "export": ["checkpoint", "output"],
    "inspect": ["sources"],
    "unpack": ["folder", "output"],
}
_POSITIONAL = {
    "checkpoint": "Checkpoint that `gradmerge fit` wrote.",
    "folder": "Folder that `gradmerge merge --outputs compact` wrote.",
    "output": "Folder to write.",
    "sources": "Paths or hub ids of the checkpoints.",
}


# Of the options that jsonargparse copies for each entry of a list: those that are the whole value.
_WHOLE = ("orig_val", "prev_val")


def copy_values_once() -> None:
    """Keep the parser from copying a whole mapping of lists for every number in it.

    A table with a coefficient for each of 291 tensors and 3 sources took it seven seconds.
    """
    try:
        from jsonargparse import _typehints
    except ImportError:  # another version of the parser: slower, nothing else
        return
    typehints: Any = _typehints
    if getattr(typehints, "deepcopy", None) is deepcopy:
        typehints.deepcopy = _copy


def _copy(value: Any) -> Any:
    if isinstance(value, dict) and "sub_add_kwargs" in value:
        return {key: part if key in _WHOLE else deepcopy(part) for key, part in value.items()}
    return deepcopy(value)
