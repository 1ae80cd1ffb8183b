"""The command line; heavy imports wait until a command needs them."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradmerge.cli.arguments import (
    configs_in,
    underscored,
    with_sources,
)
from gradmerge.cli.ending import ended_by_signal, named_loss
from gradmerge.cli.explain import Explained, own_message
from gradmerge.cli.help import explain_component, screen
from gradmerge.cli.learning import learn, quieten, register
from gradmerge.cli.options import LEARNING, POSITIONAL
from gradmerge.cli.precheck import prechecked
from gradmerge.common.errors import nearest
from gradmerge.common.failures import expected
from gradmerge.common.faults import explain_bus_errors
from gradmerge.common.spec import CONCEPTS
from gradmerge.common.version import __version__

if TYPE_CHECKING:
    from gradmerge.cli.configs import MergeInput

USAGE = f"""usage: gradmerge COMMAND [options]

Merge fine-tuned checkpoints of one architecture, with learned or fixed coefficients.
Version {__version__}.

commands:
  learn     learn a merge without a YAML  gradmerge learn A B --base BASE --data A=a.jsonl
  fit       learn a merge                 gradmerge fit --config merge.yaml
  plan      predict memory and time       gradmerge plan --config merge.yaml
  validate  score on the selection split  gradmerge validate --config merge.yaml --ckpt_path X.ckpt
  test      score on the test split       gradmerge test --config merge.yaml --ckpt_path X.ckpt
            score a model folder          gradmerge test --config data.yaml --model FOLDER
  export    write a fit as a model        gradmerge export X.ckpt FOLDER
  merge     merge without training        gradmerge merge --config static.yaml --output FOLDER
  collect   collect statistics on data    gradmerge collect --config merge.yaml --output FOLDER
  unpack    expand a compact EMR merge    gradmerge unpack COMPACT FOLDER
  inspect   check and compare sources     gradmerge inspect A B --base BASE
  compare   tune and compare methods      gradmerge compare SUITE METHOD... --output FOLDER
  evaluate  run benchmarks (lm-eval)      gradmerge evaluate FOLDER_OR_CKPT --tasks arc_easy,piqa
  push      upload a folder to the hub    gradmerge push FOLDER owner/name --dry-run true
  help      explain a component           gradmerge help Column; gradmerge help operators

`gradmerge COMMAND --help` lists the options of a command on a screen, `--help-all` all of them.
configs/ holds runnable examples.
"""

COMMANDS = (
    "learn",
    "plan",
    *LEARNING,
    "export",
    "merge",
    "collect",
    "unpack",
    "inspect",
    "compare",
    "evaluate",
    "push",
)

OWN_PARSERS = {
    "learn": "gradmerge.cli.quick",
    "plan": "gradmerge.cli.plan",
    "compare": "gradmerge.cli.compare.command",
}
"""Commands whose options are no fields of components, with the modules of their parsers."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0; 2 for an error in the options or the input, or of the machine; 1 for a
        fault of gradmerge, after its traceback; 130 after an interrupt.
    """
    _open_streams()
    command, *options = list(sys.argv[1:] if arguments is None else arguments) or ["help"]
    if command in ("-V", "--version", "version"):
        print(__version__)
        return 0
    helps = command in ("-h", "--help", "help")
    if not helps and command not in COMMANDS:
        print(
            f"gradmerge: unknown command {command!r} (choose from {', '.join(COMMANDS)})."
            f"{nearest(command, COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    explain_bus_errors()
    status = 0
    try:
        with ended_by_signal(command):
            asks = {"-h", "--help", *(["--help-all"] if command in OWN_PARSERS else [])}
            if helps or asks & set(options):
                status = _help(options if helps else [command])
            elif command == "learn":
                _quick(options, arguments)
            elif command == "compare":
                from gradmerge.cli.compare.command import compare_command

                status = compare_command(underscored(options))
            elif command == "plan":
                from gradmerge.cli.plan import plan_command

                plan_command(underscored(options), arguments is None)
            elif command in LEARNING:
                with named_loss():
                    learn(arguments)
            else:
                _plain(command, options)
        sys.stdout.flush()  # a full disk or a closed pipe is found here, not at the exit
    except KeyboardInterrupt:
        return _interrupted(command)
    except SystemExit as stopped:
        # the trainer ends the process after an interrupt, with a status of its own
        if isinstance(stopped.__context__, KeyboardInterrupt):
            return _interrupted(command)
        raise
    except Exception as error:
        return _failed(command, error)
    return status


def _quick(options: Sequence[str], arguments: Sequence[str] | None) -> None:
    """Run `learn`: write its YAML, and fit that unless the run is dry."""
    from gradmerge.cli.quick import learn_command

    chosen = learn_command(underscored(options))
    if arguments is None:
        sys.argv[1:] = chosen  # read by LightningCLI and by the processes of DDP
    if chosen:
        with named_loss():
            learn(None if arguments is None else chosen)


def _help(names: Sequence[str]) -> int:
    """Print the commands, or what components are, and return the exit status."""
    if not names:
        print(USAGE)
    for name in names:
        try:
            if name in OWN_PARSERS:
                text = importlib.import_module(OWN_PARSERS[name]).parser().format_help()
            else:
                text = screen(name) if name in COMMANDS else explain_component(name)
            print(text, end="")
        except KeyError as error:
            groups = ", ".join(name for name in CONCEPTS if name not in ("mergekit", "training"))
            print(
                f"gradmerge help: unknown component {name!r}.{error.args[0]}\n"
                f"Choose from the commands ({', '.join(COMMANDS)}), or list a group: {groups}.",
                file=sys.stderr,
            )
            return 2
    return 0


def _open_streams() -> None:
    """Open standard streams that are closed, or the next file would get what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _interrupted(command: str) -> int:
    print(f"gradmerge {command}: interrupted", file=sys.stderr)
    return 130


def _failed(command: str, error: Exception) -> int:
    """Report what stopped a command, and return its exit status."""
    if isinstance(error, BrokenPipeError) and _is_hung_up():
        return 141  # that of a process which SIGPIPE ends
    text = expected(error) or (own_message(error) if isinstance(error, ValueError) else "")
    if text:
        print(f"gradmerge {command}: {text}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    print(
        f"gradmerge {command}: an unexpected error, which is a fault of gradmerge {__version__} "
        "unless the lines above end in code of your own. Please report it with these lines, the "
        "command and its configuration.",
        file=sys.stderr,
    )
    return 1


def _is_hung_up() -> bool:
    """Return True if nobody reads the output any more, and drop what is still to be written."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return True
    return False


# ---- export, merge, collect, inspect ------------------------------------------------------------


def _plain(command: str, arguments: Sequence[str]) -> None:
    arguments = underscored(arguments)
    files = [path for _, _, path in configs_in(arguments)]
    if command in ("export", "evaluate"):
        arguments = with_sources(arguments)
    arguments = prechecked(command, arguments)

    from gradmerge.cli import commands
    from gradmerge.cli.configs import read_merge_input
    from gradmerge.cli.imports import allowed_modules, only_components, require_allowed
    from gradmerge.common.progress import show_progress

    show_progress(True)
    register(arguments)
    allowed = allowed_modules(arguments)
    with only_components(allowed):
        if command in ("merge", "collect"):
            options = merge_options(command, read_merge_input(arguments, files))
        else:
            options = _parsed(_parser(command), arguments)
    require_allowed("allow_modules", options.pop("allow_modules"), allowed)
    if command in ("export", "evaluate"):
        options["allow_modules"] = allowed
    getattr(commands, command)(**options)


def merge_options(command: str, given: MergeInput, data: bool = False) -> dict[str, Any]:
    """Return the options of `merge` or `collect`.

    Parsing data imports Lightning, so without `data` they are parsed only if they are needed.
    """
    data = data or command == "collect" or given.asks_for_data
    # `collect` accepts the files of `merge` and ignores a search in them
    dropped = ("search", "score") if command == "collect" else ()
    parser = _parser(command, data)
    if given.reading is not None:
        parser.set_defaults({"recipe.sources": {}})
    options = given.complete(_parsed(parser, given.arguments(dropped if data else ("data",))))
    if not data and given.needs_data(options):
        return merge_options(command, given, data=True)
    if command == "merge":
        options["opened"] = given.opened
        options["configs"] = given.paths
        if given.reading is not None:
            options["dtype"] = options.get("dtype") or given.reading.dtype
    return options


def _parsed(parser: Any, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the options of a command, with a recipe as a `functools.partial` call."""
    from gradmerge.cli.configs import later
    from gradmerge.common.finite import require_finite_options
    from gradmerge.engine.recipe import Recipe

    parser.add_instantiator(later, Recipe, subclasses=False)
    config = parser.parse_args(list(arguments))
    require_finite_options(config.as_dict())
    parsed = parser.instantiate_classes(config)
    return {key: value for key, value in vars(parsed).items() if key != "config"}


def _parser(command: str, data: bool = False) -> Any:
    """Return the parser of a command, with options of data if asked for."""
    import jsonargparse

    from gradmerge.cli import commands
    from gradmerge.cli.imports import ALLOW_MODULES

    function = getattr(commands, command)

    class Parser(Explained, jsonargparse.ArgumentParser):
        pass

    parser = Parser(
        prog=f"gradmerge {command}",
        allow_abbrev=False,
        description=function.__doc__.split("\n")[0],
    )
    if command != "evaluate":  # its task files can run code, so a stranger's YAML names none
        about = "YAML file with any of these options."
        parser.add_argument("--config", action="config", help=about)
    parser.add_argument("--allow_modules", **ALLOW_MODULES)
    if command == "inspect":
        about = "Checkpoints to inspect, as paths or hub ids."
        parser.add_argument("sources", type=str, nargs="+", help=about)
    if command == "evaluate":
        about = "Model folder, hub id, or checkpoint of `gradmerge fit` (*.ckpt)."
        parser.add_argument("path", type=str, help=about)
    if data:
        from gradmerge.training.data import MergeDataModule

        quieten()
        parser.add_class_arguments(MergeDataModule, "data")
        parser.set_defaults({"data.tasks": {}})  # as in `MergeCLI.add_arguments_to_parser`
    parser.add_function_arguments(
        function,
        as_group=False,
        as_positional=command in POSITIONAL and command not in ("inspect", "evaluate"),
        skip={
            "allow_modules",
            "configs",
            "data",
            "opened",
            *{"inspect": ["sources"], "evaluate": ["path"]}.get(command, []),
        },
    )
    return parser
