"""Imports by configurations: components, never arbitrary code.

The parser imports what a YAML names (`class_path`, callables, `--X.help CLASS`) and calls it. Here
it gets components only: classes of gradmerge, and optimisers, schedules, callbacks, loggers and
other parts of a trainer from torch, Lightning and a few packages. `--allow_modules` on the command
line adds modules; a YAML cannot, because configurations are passed on.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from gradmerge.cli.options import ABOUT
from gradmerge.common.errors import ConfigError

PACKAGES = (
    "gradmerge",
    "torch",
    "lightning",
    "pytorch_lightning",
    "transformers",
    "torchao",
    "bitsandbytes",
)
# Modules whose functions are arguments of callbacks.
_FUNCTIONS = ("torch.optim.swa_utils",)
_OPTION = "--allow_modules"
ALLOW_MODULES: dict[str, Any] = {
    "type": list[str] | str | None,
    "default": None,
    "help": ABOUT["allow_modules"],
}
"""Arguments of the parser for the option."""
REFUSED = "expected a component of gradmerge or a part of a trainer"
"""Words of the error."""
_allowed: tuple[str, ...] = ()


def allowed_modules(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that `--allow_modules` names on the command line."""
    import yaml

    found: list[str] = []
    for at, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag.rstrip("+") != _OPTION:
            continue
        given = value if equals else next(iter(arguments[at + 1 : at + 2]), "")
        names = yaml.safe_load(given) if given.startswith("[") else given.split(",")
        found += [name.strip() for name in names if isinstance(name, str) and name.strip()]
    return tuple(found)


def require_allowed(option: str, given: Any, allowed: Collection[str]) -> None:
    """Reject modules that a configuration allows, and not the command line."""
    names = given.split(",") if isinstance(given, str) else given or []
    lost = [name for name in names if name not in allowed]
    if lost:
        raise ConfigError(
            f"{option}: expected modules on the command line only, got {', '.join(lost)} in a "
            f"configuration, which may be a stranger's. If you trust them, add {_OPTION} "
            f"{','.join(lost)}."
        )


def may_import(path: str) -> bool:
    """Return True if a configuration may import the module or object of a path."""
    return path.partition(".")[0] in PACKAGES or _is_allowed(path)


@contextmanager
def only_components(allowed: Sequence[str]) -> Iterator[None]:
    """Give parsers within the context components only.

    Args:
        allowed: further modules; a package allows all of its modules.
    """
    from jsonargparse import _actions, _typehints

    global _allowed
    parsing, helping = vars(_typehints), vars(_actions)
    before = _allowed, parsing["adapt_classes_any"]
    load = parsing["import_object"]
    _allowed = (*_allowed, *allowed)
    parsing["import_object"] = helping["import_object"] = lambda path: _component(path, load)
    # options of any type are plain data
    parsing["adapt_classes_any"] = lambda value, *_: value
    try:
        yield
    finally:
        _allowed, parsing["adapt_classes_any"] = before
        parsing["import_object"] = helping["import_object"] = load


def _component(path: Any, load: Callable[[str], Any]) -> Any:
    """Return what the parser asks for, if it is a component."""
    if not isinstance(path, str) or "." not in path:
        return load(path)
    module = path.rpartition(".")[0]
    if not (may_import(path) or module in sys.modules):
        raise _refused(path, module)
    found = load(path)
    if not _is_component(found):
        raise _refused(path, _home(found))
    return found


def _is_component(found: Any) -> bool:
    home = _home(found)
    if _is_allowed(home):
        return True
    if inspect.isclass(found):
        return home.partition(".")[0] == "gradmerge" or issubclass(found, _kinds())
    if callable(found):
        return home in _FUNCTIONS
    return home.partition(".")[0] in PACKAGES


def _home(found: Any) -> str:
    """Return the module that defines a class, a function or the type of an instance."""
    return str(getattr(found, "__module__", None) or type(found).__module__)


def _is_allowed(path: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in _allowed)


@cache
def _kinds() -> tuple[type, ...]:
    """Return the base classes of the parts of a merge and of a trainer."""
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
    from lightning.pytorch import Callback
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.plugins import LayerSync, Precision
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from gradmerge.common.spec import abstract_classes
    from gradmerge.drivers import AbstractDriver
    from gradmerge.search import AbstractSearch

    trainer = (Callback, Logger, Profiler, Strategy, Accelerator, Precision, LayerSync)
    return (
        *abstract_classes(),
        AbstractDriver,
        AbstractSearch,
        Optimizer,
        LRScheduler,
        CheckpointIO,
        ClusterEnvironment,
        *trainer,
    )


def _refused(path: str, module: str) -> ConfigError:
    trust = f" If you trust it, add {_OPTION} {module}."
    return ConfigError(
        f"{path}: {REFUSED} (optimiser, schedule, "
        f"callback, logger and so on), got an object of {module}, which is not imported, because "
        f"that runs code.{'' if module.partition('.')[0] in sys.stdlib_module_names else trust}"
    )
