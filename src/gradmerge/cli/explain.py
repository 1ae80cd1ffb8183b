"""Messages for mistakes on the command line, with suggestions for unknown names."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn, get_args

from gradmerge.cli.imports import REFUSED, may_import
from gradmerge.common.errors import GradmergeError, nearest
from gradmerge.common.secrets import mask_given

# Optional packages that a configuration may need, with the argument of `pip install`.
OPTIONAL = {"torchao": "gradmerge[eight-bit]", "bitsandbytes": "bitsandbytes"}
CALLBACKS = ("CoefficientLogger", "EvaluateEvery", "ExportAtEnd")
# Modules of gradmerge whose classes a configuration names without a path.
COMPONENTS = (
    "alignment",
    "coefficients",
    "finalisers",
    "objectives",
    "operators",
    "preprocess",
    "search",
    "sources",
)


def own_message(error: ValueError) -> str:
    """Return the message of an error that gradmerge raised, or an empty string for other errors.

    If a component of an optional option rejects its values, the parser sees one of several types
    that do not fit, and lists gradmerge's message among those of the other types.
    """
    if isinstance(error, GradmergeError):
        return str(error)
    listed = str(error).partition("\nErrors:\n")[2].partition("\nGiven value type:")[0]
    found = re.split(r"(?:^|\n)  - ", listed)[1:]
    own = [text for text in found if not text.startswith(("Expected a ", "Problem with "))]
    return mask_given("\n".join(textwrap.dedent(text) for text in own))


def component_names(stock: bool) -> dict[str, str]:
    """Return the classes that a configuration may name: the text to write, by short name.

    `stock` adds the full paths of torch's optimisers and schedules and Lightning's callbacks and
    loggers.
    """
    modules = [importlib.import_module(f"gradmerge.{name}") for name in COMPONENTS]
    own = [n for m in modules for n in m.__all__ if not n.startswith("Abstract")]
    known = {name: name for name in (*own, *CALLBACKS, "FromMergekit")}
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
        # torch's own class has no option for the score to monitor
        known["ReduceLROnPlateau"] = "lightning.pytorch.cli.ReduceLROnPlateau"
    return known


def nearest_class(path: str, known: Mapping[str, str]) -> str:
    """Return a suggestion for an unknown class, or an empty string."""
    module, _, name = path.rpartition(".")
    if module:
        if not may_import(path):
            return ""
        with suppress(ImportError, ValueError):
            if hasattr(importlib.import_module(module), name):
                return ""
    elif name in known:
        return ""
    lower = {short.lower(): full for short, full in known.items()}
    match = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.7)
    return f" Did you mean {lower[match[0]]!r}?" if match else ""


class Explained:
    """Mix-in for parsers that stop with an explained message instead of the usage text."""

    _described = ""

    def add_class_arguments(
        self, theclass: Any, nested_key: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Add the options of a class, and remember its name for messages about them."""
        if nested_key is None:
            self._described = f"{theclass.__name__}: "
        return super().add_class_arguments(  # type: ignore[misc]
            theclass, nested_key, *args, **kwargs
        )

    def validate(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        """Check parsed options; errors name the class that they are of.

        Raises:
            TypeError: an option has a wrong value, or is missing, or has no such name.
        """
        self._require_values(cfg)
        try:
            super().validate(cfg, *args, **kwargs)  # type: ignore[misc]
        except (KeyError, TypeError) as error:
            text = str(error.args[0] if error.args else error)
            if not self._described or self._described in text:
                raise
            raise TypeError(f"{self._described}{text}") from error

    def _require_values(self, cfg: Any) -> None:
        """Reject null for an option that needs a value; the parser takes it for all of them."""
        for action in self._actions:  # type: ignore[attr-defined]
            kinds, option = getattr(action, "_typehint", None), action.dest
            if kinds is None or option not in cfg or cfg[option] is not None:
                continue
            # null is no seed, as false
            takes_none = action.default is None or _takes_none(kinds) or option == "seed_everything"
            if not takes_none:
                raise TypeError(
                    f"{self._described}{option}: expected {_type_name(kinds)}, got null"
                )

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Exit with the message but without the usage text, which is pages long."""
        prog = self.prog.replace(" [options]", "")  # type: ignore[attr-defined]
        hint = f"\n`{prog} --help` lists the options."
        refused = next((line for line in message.split("\n") if REFUSED in line), "")
        if refused:  # one of several types that do not fit
            message, hint = refused.strip().removeprefix("- "), ""
        print(f"{prog}: {mask_given(explain(message, self))}{hint}", file=sys.stderr)
        raise SystemExit(2)


def _takes_none(kind: Any) -> bool:
    return kind in (Any, None, type(None)) or any(map(_takes_none, get_args(kind)))


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def explain(message: str, parser: Any) -> str:
    """Return the parser's message, with suggestions for unknown names."""
    if message.strip() == "Unexpected config:":
        return "expected options in the configuration, got an empty file."
    keys = sorted(_keys(parser))
    options = re.findall(r"--[\w.]+", message) if "nrecognized" in message else []
    hints = [nearest(option, [f"--{key}" for key in keys]) for option in options]
    for found in re.finditer(r"Key '([\w.]+)' is not|does not accept.*?'([\w.]+)'", message):
        hints.append(nearest(found[1] or found[2], {*keys, *(k.rsplit(".", 1)[-1] for k in keys)}))
    for name, package in OPTIONAL.items():
        if f"No module named '{name}" in message:
            return f"{name} is not installed: pip install '{package}'\n{message}"
    known = component_names(stock="optimizer" in keys)
    named = r"(?:class_path'?:? '|import path string: |path but )([\w.]+)"
    hints += [nearest_class(path, known) for path in re.findall(named, message)]
    return message + "".join(dict.fromkeys(hint for hint in hints if hint))


def _keys(parser: Any) -> set[str]:
    keys = set()
    for action in parser._actions:
        if action.dest and action.dest != "help":
            keys.add(action.dest)
        for inner in getattr(action, "_name_parser_map", {}).values():
            keys |= _keys(inner)
    return keys
